"""Any rank of any world, on one CPU and without its memory: the unmodified model, optimizer and schedule run
on tensors that have shapes and no numbers, among processes that do not exist.

- `world`: the pretended processes, and what has to be replaced for them (`replacements`)
- `stand_ins`: what the kernels of a GPU keep and move, in place of those of the CPU
- `recorder`: sees every operation: storages, collectives, work; `shapes` makes it fast
- `memory`, `collectives`, `hardware`: what the record says
- `rank`: the steps of one rank; `stages`: of several; `report`, `picture`: what is said of them
- `search`: other layouts of the same run
- `options`: all of it as options of `lckv-megatron plan`
"""
