"""`lckv-megatron NAME [OPTION ...]`: finds the program and hands it the options.

A program is a module in `lckv_megatron.commands`, and only the chosen one is imported.
"""

import ast
import difflib
import importlib
import importlib.metadata
import importlib.resources
import sys
from collections.abc import Sequence
from pkgutil import iter_modules

from lckv_megatron import commands
from megatron_ext.signals import Interrupted, interruptible

_USAGE = """usage: lckv-megatron NAME [OPTION ...]

{programs}

lckv-megatron NAME --help says what a program does and takes. Training: pretrain_lckv.py --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` (default: the process's own arguments) names; its exit status, 2 where
    there is none of that name, or 128 and the number of the signal that stopped it."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        sys.stderr.write(_listing())
        return 2
    name, rest = words[0], words[1:]
    if name in ("-h", "--help"):
        sys.stdout.write(_listing())
        return 0
    if name == "--version":
        sys.stdout.write(f"lckv-megatron {importlib.metadata.version('lckv-megatron')}\n")
        return 0
    if name not in program_names():
        sys.stderr.write(f"error: {_unknown(name)}\n")
        return 2
    try:
        with interruptible():
            module = importlib.import_module(f"{commands.__name__}.{_module_name(name)}")
            status: int = module.main(rest)
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_status
    return status


def program_names() -> list[str]:
    """All programs, in the order of the alphabet."""
    return sorted(module.name.replace("_", "-") for module in iter_modules(commands.__path__))


def summary(name: str) -> str:
    """The first line of a program's docstring, without importing the program."""
    source = importlib.resources.files(commands).joinpath(f"{_module_name(name)}.py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert text is not None, f"lckv_megatron.commands.{_module_name(name)} has no docstring"
    return text.partition("\n")[0]


def _module_name(name: str) -> str:
    return name.replace("-", "_")


def _listing() -> str:
    names = program_names()
    width = max(map(len, names))
    return _USAGE.format(programs="\n".join(f"  {name:<{width}}  {summary(name)}" for name in names))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), program_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name!r} is no program.{hint} lckv-megatron --help lists them."


if __name__ == "__main__":
    sys.exit(main())
