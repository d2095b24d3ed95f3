"""One module per program: its docstring is its help, its first line stands in the list of programs, and
`main(argv)` returns the exit status."""
