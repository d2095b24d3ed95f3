"""Compiles a grammar in a process of its own, which may be killed: a small grammar can ask for hours, for all
memory, or for more stack than there is.

A program for `grammars.py`: it reads a Lark grammar from standard input and prints what is wrong with it. Its
arguments are the folder that holds the package llguidance, and how many tokens the grammar may name by their
numbers. It runs without `site`, so that it starts fast.
"""

import contextlib
import resource
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

MEMORY_BYTES = 2 * 2**30
"""Of address space."""

CPU_SECONDS = 60
"""In case nobody is there any more to end it."""

STACK_BYTES = 2**20
"""Less than any thread of the engine has: what compiles here compiles there."""


_MARK = b"\xff"
"""The library puts it before the names of special tokens. No UTF-8 has it."""

_NAME = b"[%d]"


def limits(library: Any) -> Any:
    """Of the work that a grammar may cause, in one compilation and in each step."""
    return library.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # about 20 ms
        step_lexer_fuel=200_000,  # about 15 ms
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,  # 1 to 2 KB each
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def vocabulary(library: Any, contents: Sequence[bytes | None], ends: list[int]) -> Any:
    """The library's tokenizer: what each token adds to a text (None: it is special), those that end it."""
    special = [token for token, content in enumerate(contents) if content is None]
    tokens = [_NAME % token if content is None else content for token, content in enumerate(contents)]
    tokens = [b"" if _MARK in content else content for content in tokens]
    given = SimpleNamespace(
        tokens=tokens, special_token_ids=special, eos_token_id=ends[0], bos_token_id=None,
        is_tokenizer_wrapper=True,
    )  # fmt: skip
    return library.LLTokenizer(_Callable(given), n_vocab=len(tokens), eos_token=ends)


class _Callable:
    """The library looks for a function that makes tokens of a text; grammars without forced tokens, as ours,
    do not use it."""

    def __init__(self, given: SimpleNamespace) -> None:
        vars(self).update(vars(given))

    def __call__(self, text: Any) -> list[int]:
        raise NotImplementedError(f"no grammar forces tokens: {text!r}")


def _try() -> None:
    import llguidance

    contents: list[bytes | None] = [bytes([byte]) for byte in range(256)]
    contents += [b""] * (int(sys.argv[2]) - len(contents))
    tokenizer = vocabulary(llguidance, [*contents, None], [len(contents)])
    matcher = llguidance.LLMatcher(tokenizer, sys.stdin.read(), log_level=0, limits=limits(llguidance))
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())
    sys.stdout.flush()


def main() -> None:
    """The program."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # where the system has no such limit, or a lower one
            resource.setrlimit(kind, (most, most))
    sys.path.append(sys.argv[1])
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_try)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
