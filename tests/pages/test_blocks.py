"""Blocks are taken from pages as they stand there, and no command escapes."""

from pathlib import Path

import pytest

from tests.pages.blocks import Block, blocks_of, commands_outside_bash, substituted, without
from tests.pages.hub import check_options

PAGE = """text
```bash
one \\
    two
```
   ```
   $ lckv-megatron plan
   cost  3
   ```
```yaml
a: 1
```
"""


def test_blocks_are_found_with_language_and_place(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    assert blocks_of(tmp_path / "page.md") == [
        Block("bash", "one \\\n    two\n", 2),
        Block("", "   $ lckv-megatron plan\n   cost  3\n", 6),
        Block("yaml", "a: 1\n", 10),
    ]


@pytest.mark.parametrize(
    ("language", "text", "commands"),
    [
        ("bash", "lckv-megatron plan\n", []),
        ("", "$ lckv-megatron plan\ncost  3\n", []),
        ("", "result\n  torchrun x.py\n", ["torchrun x.py"]),
        ("sh", "hf download x\n", ["hf download x"]),
        ("", "A=1 B=2 sbatch x\n", ["A=1 B=2 sbatch x"]),
    ],
)
def test_a_command_that_no_test_runs_is_seen(language: str, text: str, commands: list[str]) -> None:
    assert commands_outside_bash(Block(language, text, 1)) == commands


def test_the_longest_replacement_goes_first_and_use_is_told() -> None:
    replaced = {"a": "1", "ab": "2", "c": "3"}
    assert substituted("ab a", replaced) == ("2 1", {"a", "ab"})


def test_a_command_is_left_out_as_a_whole() -> None:
    text = "srun a \\\n  b \\\n  c\nsrunning\nd\n"
    assert without(text, ["srun a", "e"]) == ("srunning\nd\n", {"srun a"})


def test_options_of_hf_are_those_of_the_real_command() -> None:
    check_options("upload", ["me/model", "out/model", "--private"])
    with pytest.raises(AssertionError, match=r"hf upload has no option --privat$"):
        check_options("upload", ["me/model", "out/model", "--privat"])
