"""The files around the code: dependencies, constraints, examples, and nothing of the machine on which they
were written."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(
    path
    for ending in ("yaml", "yml")
    for path in (ROOT / "examples").rglob(f"*.{ending}")
    # tests/examples/test_launchers.py and test_study.py read the others
    if path.name != "kubernetes.yaml" and not path.match("study/study*.yaml")
)

ENGINES = {"3.11": "0.16.1", "3.12": "0.19.2", "3.13": "0.19.2"}
"""The version of megatron-core that each version of Python gets (docs/engines.md)."""
PYTHONS = tuple(ENGINES)

MACHINE_TRACES = {
    "absolute path": re.compile(r"(?<![\w.$}*~:/-])/(?:root|home|Users|work|opt|tmp/\w*venv|mnt)/[\w.]"),
    "package host": re.compile(
        r"--(?:extra-)?index-url|--find-links|--trusted-host|pypi\.org|pythonhosted\.org|download\.pytorch\.org|/simple/",
        re.I,
    ),
}


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _declared() -> dict[str, list[Requirement]]:
    """What is always needed, under "install", and each extra by its name."""
    project = _project()
    lists = {"install": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(entry) for entry in entries] for name, entries in lists.items()}


def _applies(entry: Requirement, python: str) -> bool:
    """Whether an entry is for a version of Python, on Linux."""
    environment = {"python_version": python, "platform_system": "Linux"}
    return entry.marker is None or entry.marker.evaluate(environment)


def _constraints(python: str) -> dict[str, Requirement]:
    """What constraints-cpu.txt says of each package for a version of Python."""
    lines = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    entries = [Requirement(line) for line in lines if line and not line.startswith("#")]
    entries = [entry for entry in entries if _applies(entry, python)]
    constraints = {canonicalize_name(entry.name): entry for entry in entries}
    assert len(constraints) == len(entries), "a package has two versions"
    return constraints


@pytest.mark.parametrize("python", PYTHONS)
def test_the_version_of_torch_is_exact(python: str) -> None:
    assert str(_constraints(python)["torch"].specifier) == "==2.13.0"


@pytest.mark.parametrize(("python", "version"), ENGINES.items())
def test_each_python_has_its_engine(python: str, version: str) -> None:
    assert str(_constraints(python)["megatron-core"].specifier) == f"=={version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_an_exact_tested_version_in_its_range(python: str) -> None:
    lists, constraints = _declared(), _constraints(python)
    for requirement in lists["install"] + lists["dev"]:
        if _applies(requirement, python):
            (version,) = constraints[canonicalize_name(requirement.name)].specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), requirement.name


def test_versions_come_without_addresses() -> None:
    lists = _declared()
    assert all(entry.url is None for entries in lists.values() for entry in entries)
    assert all(entry.url is None for python in PYTHONS for entry in _constraints(python).values())


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [row for row in text.partition("## Dependencies")[2].splitlines() if row.startswith("|")]
    required = {row.split("|")[1].strip() for row in rows}
    words = set(re.findall(r"[\w-]+", " ".join(rows)))
    lists = _declared()
    assert {entry.name for entry in lists["install"]} <= required
    assert {entry.name for entries in lists.values() for entry in entries} <= words


def test_one_place_says_what_the_package_is() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in tree.body[1:]] == ["from setuptools import setup", "setup()"]


def test_the_change_log_has_the_version() -> None:
    version = _project()["version"].removesuffix(".dev0")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\]", text, re.M)
    assert re.search(
        rf"^version: {re.escape(version)}", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M
    )


def _texts() -> dict[str, str]:
    """The text files that are tracked or about to be, by name."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in listing.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and name != Path(__file__).relative_to(ROOT).as_posix():
            content = path.read_bytes()
            if b"\0" not in content:
                texts[name] = content.decode("utf-8")
    return texts


@pytest.mark.parametrize("kind", MACHINE_TRACES)
def test_no_file_names_this_machine(kind: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in _texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_TRACES[kind].search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("absolute path", 'cache = "/root/.cache"'),
        ("absolute path", "cd /work/main && make"),
        ("absolute path", "/tmp/venv/bin/python -m pytest"),
        ("package host", "pip install --index-url https://packages.example.org/simple torch"),
        ("package host", "https://files.pythonhosted.org/packages/a/b"),
    ],
)
def test_traces_of_a_machine_are_seen(kind: str, line: str) -> None:
    assert MACHINE_TRACES[kind].search(line)


@pytest.mark.parametrize(
    "line", ["/dev/shm", "/usr/bin/env bash", "examples/work/main", "https://github.com/work/x", "~/work/x"]
)
def test_other_lines_are_not_taken_for_traces(line: str) -> None:
    assert not any(pattern.search(line) for pattern in MACHINE_TRACES.values())


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_configuration_of_an_example_is_read(path: Path) -> None:
    from megatron_ext.command_line import parse_run_config

    parse_run_config(["--config", str(path)])
