"""lckv-megatron: one list of programs, one line each, and only the chosen one is imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lckv_megatron.__main__ import main, program_names, summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
OTHER_NAMES = {"preprocess_data": "preprocess", "plot_run": "plot"}


def test_help_lists_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in program_names():
        assert f"  {name} " in text
    assert {"generate", "kv-memory", "convert", "preprocess", "plot"} <= set(program_names())


def test_without_a_name_the_list_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "kv-memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", program_names())
def test_each_program_has_a_line_and_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = summary(name)
    assert len(line) <= 80
    assert line.endswith(".")
    assert line[: line.index(" ")].endswith("s"), "what it does: Writes ..., Says ..."
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: lckv-megatron {name} " in text
    assert re.search(rf"lckv[-_]megatron {name} ", text.partition("\n\n")[2]), "an example"
    assert "tools/" not in text
    assert "tools." not in text


@pytest.mark.parametrize(
    ("name", "near"), [("generat", "generate"), ("kv_memory", "kv-memory"), ("convertt", "convert")]
)
def test_an_unknown_name_is_answered_with_the_nearest(
    name: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 2
    assert f"{name!r} is no program. Did you mean {near}?" in capsys.readouterr().err


def test_a_name_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "error: 'xyzzy' is no program. lckv-megatron --help lists them." in capsys.readouterr().err


def test_the_list_is_made_without_importing_programs() -> None:
    code = """
import sys
from lckv_megatron.__main__ import main
assert main(["--help"]) == 0
heavy = {"torch", "numpy", "matplotlib", "transformers", "megatron.core", "lckv_megatron.commands.plan"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_a_checkout_run_its_own_packages(name: str, tmp_path: Path) -> None:
    """Even where another copy is installed: the script's checkout is first on the path, its folder is not."""
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / f"{name}.py"
    script.write_text((ROOT / "tools" / f"{name}.py").read_text())
    (tmp_path / "tools" / "json.py").write_text(
        "raise AssertionError('a module of this folder hides another')"
    )
    (tmp_path / "lckv_megatron").mkdir()
    (tmp_path / "lckv_megatron" / "__init__.py").touch()
    (tmp_path / "lckv_megatron" / "__main__.py").write_text(
        "import json\n\n\ndef main(words):\n    print(json.dumps(words))\n    return 7\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "--a", "b"],
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 7, result.stderr
    program = OTHER_NAMES.get(name, name).replace("_", "-")
    assert result.stdout == f'["{program}", "--a", "b"]\n'
    assert program in program_names()


@pytest.mark.parametrize(
    "command", [["tools/kv_memory.py"], ["-m", "tools.kv_memory"], ["-m", "lckv_megatron", "kv-memory"]]
)
def test_every_way_to_call_a_program(command: list[str]) -> None:
    options = ["--memory", "1GiB", "--model.num_layers", "4"]
    result = subprocess.run(
        [sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert "KV bytes per token" in result.stdout


def _texts(ending: str) -> list[str]:
    """The files of this kind in which a user reads commands."""
    folders = [ROOT / name for name in ("docs", "examples", "lckv", "megatron_ext", "checkpoints_conversion")]
    paths = [*ROOT.glob(f"*.{ending}"), *(path for folder in folders for path in folder.rglob(f"*.{ending}"))]
    return [path.read_text(encoding="utf-8") for path in paths]


def test_commands_of_pages_and_scripts_exist() -> None:
    command = re.compile(r"(?:lckv-megatron|-m lckv_megatron) ([a-z][a-z-]+)")
    named = {name for ending in ("md", "sh") for text in _texts(ending) for name in command.findall(text)}
    assert {"generate", "plan", "dump-logits"} <= named
    assert named <= set(program_names())


@pytest.mark.parametrize("ending", ["md", "sh", "py"])
def test_nobody_is_sent_to_the_scripts(ending: str) -> None:
    script = re.compile(r"tools/[a-z_]+\.py|-m tools\.(?!benchmarks)")
    assert [found for text in _texts(ending) for found in script.findall(text)] == []
