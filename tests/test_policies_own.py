"""Nothing outside the folder of a KV policy names it, except the policy of a plain transformer, which is the
default."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ROOT / "lckv" / "policies"
PRODUCT = ("lckv", "megatron_ext", "checkpoints_conversion", "lckv_megatron", "tools", "pretrain_lckv.py")
DEFAULT = "dense"
NAMES = sorted(path.parent.name for path in POLICIES.glob("*/config.py") if path.parent.name != DEFAULT)


def lines_that_name(name: str, roots: tuple[str, ...], root: Path = ROOT) -> Iterator[str]:
    """Lines of Python files outside the policy's folder in which its name stands as a word, or as a part of
    one that begins with it (DMCConfig)."""
    word = re.compile(rf"(?<![a-z]){name}(?![a-z])", re.IGNORECASE)
    inside = re.compile(rf"\b{name.upper()}[A-Z]")  # a class of the policy
    for top in roots:
        for path in sorted((root / top).rglob("*.py")) if (root / top).is_dir() else [root / top]:
            if not path.is_file() or path.is_relative_to(root / "lckv" / "policies" / name):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if word.search(line) or inside.search(line):
                    yield f"{path.relative_to(root)}:{number}: {line.strip()}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_its_folder_names_a_policy(name: str) -> None:
    assert list(lines_that_name(name, PRODUCT)) == []


def test_names_are_seen_in_any_dress(tmp_path: Path) -> None:
    folder = tmp_path / "lckv" / "policies" / "odd"
    folder.mkdir(parents=True)
    (folder / "policy.py").write_text("odd = 1\n")
    (tmp_path / "lckv" / "other.py").write_text('"odd"\nODDPolicy\nodd_loss\nthe oddest\nmodd\n# of ODD\n')
    assert [line.split(": ")[1] for line in lines_that_name("odd", ("lckv", "missing"), tmp_path)] == [
        '"odd"', "ODDPolicy", "odd_loss", "# of ODD",
    ]  # fmt: skip


def test_there_are_policies_to_look_for() -> None:
    assert NAMES and all((ROOT / name).exists() for name in PRODUCT)
