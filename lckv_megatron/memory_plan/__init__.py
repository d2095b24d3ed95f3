"""Where the storages of a training step lie if somebody plans it, beside what PyTorch's allocator does.

- `requests`: storages as requests in time; `trace`: those of a program, and when its layers ran
- `placement`: addresses for them with the least peak, by an integer program or by first fit
- `blocks`: the two levels, layers first and then the step
- `caching_allocator`: PyTorch's allocator on the same requests
- `rank`: all of it for a rank; `report`, `picture`: what is said of it

The two levels are those of MEMO (Zhao et al. 2024). Nothing here runs a model: the dry run gives the trace.
"""
