"""Every command of the pages is run, in bash and in the order of the page, with a tiny model on this machine.

`PAGES` says for each page what a user has before it (`bring`), and which words of it are others here
(`replaced`): what a cluster has -> what the test has. Everything else is run as it stands there.
"""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.pages.blocks import blocks_of, substituted
from tests.pages.bring import FREE_PORT, TINY, bring_dmc
from tests.pages.stand_ins import CLUSTER, REPLACED, ROOT, stand_ins

BLOCK_SECONDS = 120


@dataclass(frozen=True)
class Page:
    """How a page is run."""

    path: str
    bring: Callable[[Path, Path], None]
    """Makes what the page takes for granted: gets the folder in which it runs, and that of the Hub."""

    replaced: dict[str, str]
    cold: bool = False
    """Start each program anew, as a user does; slower."""


TINY_MODEL = "--config tiny.yaml"
"""Behind the recipe's own configuration; `TINY` is its content."""

PAGES = [
    Page(
        "examples/llama2_13b_dmc/README.md",
        bring_dmc,
        {
            "--workers 32": "--workers 1",
            "$stage.yaml --world-size 64": f"$stage.yaml {TINY_MODEL} --world-size 1",
            "launch.sh zero_out": f"launch.sh zero_out {TINY_MODEL}",
            "launch.sh retrofit": f"launch.sh retrofit {TINY_MODEL}",
            "launch.sh finetune": f"launch.sh finetune {TINY_MODEL}",
            "--nproc-per-node 8": "--nproc-per-node 1",
            "retrofit.yaml\n": f"retrofit.yaml {TINY_MODEL}\n",
            "--memory 40GiB --context 4096": "--memory 1MiB --context 64",
            "8000": str(FREE_PORT),
        },
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("warm")
    with stand_ins(folder, hub=folder / "hub") as environment:
        yield environment | {"HUB": str(folder / "hub")}


class Shell:
    """Runs the blocks of a page. One that serves goes on in the background until the page ends."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._started = {"cwd": folder, "env": environment, "text": True}
        self._server: subprocess.Popen[str] | None = None

    def run(self, text: str) -> None:
        if text.startswith("lckv-megatron serve "):
            self._server = subprocess.Popen(["bash", "-c", f"exec {text}"], **self._started)
            wait_for(f"http://localhost:{FREE_PORT}/health", self._server)
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BLOCK_SECONDS,
            **self._started,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"

    def end(self) -> None:
        """Stop the server, which must end well."""
        if self._server is not None:
            self._server.terminate()
            assert self._server.wait(BLOCK_SECONDS) == 0


def wait_for(url: str, server: subprocess.Popen[str]) -> None:
    """Until the server answers."""
    for _ in range(10 * BLOCK_SECONDS):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url).close()
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"no answer from {url}")


def test_what_is_not_run_itself_is_named_with_its_reason() -> None:
    assert set(REPLACED) == {"hf", *(path.name for path in CLUSTER.iterdir())}


def test_a_command_that_fails_fails_the_page(warm: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unrecognized arguments: --append-eos"):
        Shell(tmp_path, warm).run("lckv-megatron preprocess --input x --output-prefix y --append-eos\ntrue\n")
    with pytest.raises(AssertionError, match="sbatch: unknown option --gpus=8"):
        Shell(tmp_path, warm).run("sbatch --gpus=8 job.sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_every_command_of_a_page(page: Page, warm: dict[str, str], tmp_path: Path) -> None:
    hub = Path(warm["HUB"])
    for name in ("examples", "pretrain_lckv.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    page.bring(tmp_path, hub)
    blocks = [block for block in blocks_of(ROOT / page.path) if block.language == "bash"]
    assert blocks
    used: set[str] = set()
    shell = Shell(tmp_path, warm)
    try:
        for block in blocks:
            text, here = substituted(block.text, page.replaced)
            used |= here
            shell.run(text)
    finally:
        shell.end()
    assert used == set(page.replaced), "replacements that the page has no use for"
