"""Every command of the pages is run, in bash and in the order of the page, with a tiny model on this machine.

`PAGES` says for each page what a user has before it (`bring`), and which words of it are others here
(`replaced`): what a cluster has -> what the test has. Everything else is run as it stands there.
"""

import re
import shlex
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from _pytest.mark.structures import ParameterSet

from tests.pages.blocks import blocks_of, commands_outside_bash, substituted, without
from tests.pages.bring import (
    TINY,
    bring_cluster_data,
    bring_dmc,
    bring_published_dmc,
    bring_readme,
    bring_shared_map,
)  # fmt: skip
from tests.pages.stand_ins import CLUSTER, REPLACED, ROOT, stand_ins

BLOCK_SECONDS = 400
ANY_PORT, SERVED = "--port 0", "localhost:$SERVED_PORT"
"""A server takes any port that is free, and says which; commands after it get that from the shell."""
Environments = dict[bool, dict[str, str]]
"""Of warm (False) and of cold (True) programs."""


@dataclass(frozen=True)
class Page:
    """How a page is run."""

    path: str
    bring: Callable[[Path, Path], None]
    """Makes what the page takes for granted: gets the folder in which it runs, and that of the Hub."""

    replaced: dict[str, str]
    not_run: dict[str, str] = field(default_factory=dict)
    """Beginnings of commands that are left out, and why."""

    cold: bool = False
    """Start each program anew, as a user does; slower."""


AT_NIGHT = ("examples/published_dmc", "examples/shared_map", "examples/cluster_data")
"""Folders of examples whose pages are run then; by day those of README.md and of another retrofit show that
programs and options are there."""


def at_night(page: Page) -> ParameterSet:
    """The page, marked where it is run at night only."""
    marks = [pytest.mark.nightly] if page.path.startswith(AT_NIGHT) else []
    return pytest.param(page, id=page.path, marks=marks)


TINY_MODEL = "--config tiny.yaml"
"""Behind the recipe's own configuration; `TINY` is its content."""
TINY_RUN = "--config tiny_run.yaml"
"""The same without sizes, for a run whose model is that of a checkpoint."""

MOCK = (
    "--data.mock true --data.data_path [] --data.tokenizer_type none --data.tokenizer_model null "
    "--data.reset_attention_mask false --data.reset_position_ids false"
)
"""Random tokens instead of a dataset."""
TINY_MOCK = f"{TINY_MODEL} --compression.layer_types 0_2_2_3 {MOCK}"
PAGES = [
    Page(
        "README.md",
        bring_readme,
        {
            "--nproc-per-node 8": "--nproc-per-node 1",
            "--checkpoint.save runs/1b": f"{TINY_MODEL} --compression.layer_types 0_2_2_3 {MOCK}",
            "--max-bytes 2000000": "--max-bytes 200000",
            "--vocab-size 1024": "--vocab-size 400",
            "--workers 2": "--workers 1",
            "--train.eval_interval 10": "--train.eval_interval 2 --data.split 50,50,0",
            "--train.eval_iters 1": "--train.eval_iters 1 --train.global_batch_size 2",
            "--optimizer.lr_warmup_iters 5": "--optimizer.lr_warmup_iters 0 --train.micro_batch_size 1",
            "--logging.log_interval 5": "--logging.log_interval 1",
            "--train.train_iters 20": "--train.train_iters 2",
            "--train.train_iters 30": "--train.train_iters 3",
            "--text README.md": "--text held_out.txt",
            "-new-tokens 40": "-new-tokens 4",
            "meta-llama/Llama-2-13b-hf": "models/llama",
            "ckpt/llama2-13b": "ckpt/run",
            "0_1_2_..._39": "0_0_2_2",
            "DMC_FOLDER": "models/dmc --vocab-size 61",
            "wiki.txt": "held_out.txt",
            "--port 8000": ANY_PORT,
        },
        not_run={
            "lckv-megatron evaluate": "downloads benchmarks; its own test runs it with a local one",
            "python -m tools.benchmarks.inference": "takes minutes; its own test runs it",
        },
    ),
    Page(
        "examples/README.md",
        bring_cluster_data,
        {
            "CORPUS.jsonl.zst": "corpus/000.jsonl.zst",
            "--workers 32": "--workers 1",
            "RECIPE": "llama_1b_lckv",
            "--train.train_iters 20": f"{TINY_MODEL} --compression.layer_types 0_2_2_3 --train.train_iters 3",
        },
        not_run={"srun --nodes=1": "makes an environment inside of a container, from the network"},
    ),
    Page("examples/policy_from_zero/README.md", lambda folder, hub: None, {}),
    Page(
        "docs/dry_run.md",
        lambda folder, hub: None,
        {
            "llama2_13b_lckv/pretrain.yaml": f"llama2_13b_lckv/pretrain.yaml {TINY_MOCK} --world-size 2",
            "yoco_3b/pretrain.yaml": f"yoco_3b/pretrain.yaml {TINY_MOCK} --model.num_query_groups 4",
            "--world-size 1024 --train.global_batch_size 4096": (
                "--compression.sliding_window null --world-size 8 --train.global_batch_size 8"
            ),
            "--rank 513": "--rank 5",
        },
    ),
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
            "--port 8000": ANY_PORT,
            "localhost:8000": SERVED,
        },
    ),
    Page(
        "examples/published_dmc/README.md",
        bring_published_dmc,
        {
            "meta-llama/Llama-2-13b-hf": "nvidia/tokenizer",
            "--legacy-path models/dmc4x": "--legacy-path models/dmc4x --vocab-size 61",
            "--hf-path models/dmc4x": "--hf-path models/dmc4x --vocab-size 61",
            "--memory 40GiB --context 4096": "--memory 1MiB --context 32",
            '"max_tokens": 64': '"max_tokens": 8',
            "The key-value cache of a language model": "THE CACHE",
            "--port 8000": ANY_PORT,
            "localhost:8000": SERVED,
        },
    ),
    Page(
        "examples/shared_map/README.md",
        bring_shared_map,
        {
            "map=0_0_2_2_4_4_6_6_8_8_10_10_12_12_14_14_16_16_18_18_20_20": "map=0_0_2_2",
            "--workers 32": "--workers 1",
            "uptrain.yaml": f"uptrain.yaml {TINY_RUN}",
            "--world-size 8": "--world-size 1",
            "--nproc-per-node 8": "--nproc-per-node 1",
            "from_pretrained(\"me/tinyllama-cla2\"": "from_pretrained(\"out/tinyllama-cla2\"",
        },
    ),
    Page(
        "examples/cluster_data/README.md",
        bring_cluster_data,
        {
            "--array=0-15": "--array=0-1",
            "preprocess.sh 16": "preprocess.sh 2",
            "parts/corpus --part 3/16 --workers 32": "other --part 3/16 --workers 2",
            "pretrain.yaml": f"pretrain.yaml {TINY_MODEL} --compression.layer_types 0_2_2_3",
            "--world-size 16": "--world-size 1",
        },
        cold=True,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environments]:
    folder = tmp_path_factory.mktemp("programs")
    hub = folder / "hub"
    with (
        stand_ins(folder / "warm", hub=hub) as warm,
        stand_ins(folder / "cold", hub=hub, cold=True) as cold,
    ):
        yield {False: warm | {"HUB": str(hub)}, True: cold | {"HUB": str(hub)}}


class Shell:
    """Runs the blocks of a page. One that serves goes on in the background until the page ends."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, dict(environment)
        self._server: subprocess.Popen[str] | None = None

    def run(self, text: str) -> None:
        if serve := re.search(r"^lckv-megatron serve .*\n", text, re.MULTILINE):
            self._serve(serve[0])
            text = text.replace(serve[0], "")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BLOCK_SECONDS,
            cwd=self._folder,
            env=self._environment,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"

    def _serve(self, command: str) -> None:
        assert self._server is None
        said = self._folder / "serve.log"
        with said.open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                stderr=log,
                cwd=self._folder,
                env=self._environment,
                text=True,
            )
        self._environment["SERVED_PORT"] = port_of(self._server, said)

    def end(self) -> None:
        """Stop the server, which must end well."""
        if self._server is not None:
            self._server.terminate()
            assert self._server.wait(BLOCK_SECONDS) == 0


def port_of(server: "subprocess.Popen[str]", said: Path) -> str:
    """Where the server listens, as soon as it says so."""
    deadline = time.monotonic() + BLOCK_SECONDS
    while time.monotonic() < deadline:
        if line := re.search(r"serving .* at http://\S+:(\d+)/v1", said.read_text(encoding="utf-8")):
            return line[1]
        assert server.poll() is None, f"the server has ended\n{said.read_text(encoding='utf-8')}"
        time.sleep(0.1)
    pytest.fail(f"the server does not serve\n{said.read_text(encoding='utf-8')}")


def test_what_is_not_run_itself_is_named_with_its_reason() -> None:
    assert set(REPLACED) == {"hf", *(path.name for path in CLUSTER.iterdir())}


ELSEWHERE = {
    "CONTRIBUTING.md": "make: continuous integration runs it",
    "docs/engines.md": "make: continuous integration runs it",
    "docs/fine_tuning.md": "tests/pages/test_fine_tuning.py runs them, and the code",
    "docs/faults.md": "takes an hour; the test of the command runs its short form",
}
"""Pages whose commands are not run here, and why."""


def test_no_page_has_commands_that_are_not_run() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    outside = {
        page.relative_to(ROOT).as_posix()
        for page in pages
        if any(commands_outside_bash(block) for block in blocks_of(page))
    }
    assert outside == set(ELSEWHERE)
    inside = {
        page.relative_to(ROOT).as_posix()
        for page in pages
        if any(block.language == "bash" for block in blocks_of(page))
    }
    assert inside == {page.path for page in PAGES}


def test_a_command_that_fails_fails_the_page(environments: Environments, tmp_path: Path) -> None:
    warm = environments[False]
    with pytest.raises(AssertionError, match="unrecognized arguments: --append-eos"):
        Shell(tmp_path, warm).run("lckv-megatron preprocess --input x --output-prefix y --append-eos\ntrue\n")
    with pytest.raises(AssertionError, match="sbatch: unknown option --gpus=8"):
        Shell(tmp_path, warm).run("sbatch --gpus=8 job.sh")


@pytest.mark.timeout(900)  # a page is many processes; twenty seconds where nothing else runs
@pytest.mark.parametrize("page", [*map(at_night, PAGES)])
def test_every_command_of_a_page(page: Page, environments: Environments, tmp_path: Path) -> None:
    environment = environments[page.cold]
    hub = Path(environment["HUB"])
    for name in ("examples", "pretrain_lckv.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    of_run = {name: section for name, section in TINY.items() if name != "model"}
    (tmp_path / "tiny_run.yaml").write_text(yaml.safe_dump(of_run), encoding="utf-8")
    page.bring(tmp_path, hub)
    blocks = [block for block in blocks_of(ROOT / page.path) if block.language in ("bash", "python")]
    assert blocks
    used: set[str] = set()
    shell = Shell(tmp_path, environment)
    try:
        for block in blocks:
            text, here = without(textwrap.dedent(block.text), page.not_run)
            used |= here
            text, here = substituted(text, page.replaced)
            used |= here
            shell.run(text if block.language == "bash" else f"python -c {shlex.quote(text)}")
    finally:
        shell.end()
    assert used == {*page.replaced, *page.not_run}, "what the page has no use for"
