"""Every recipe's configuration can work on the processes that its page names, its page says what the plan
says, and it is launched."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lckv_megatron.commands.plan import main as plan
from megatron_ext.command_line import parse_run_config
from megatron_ext.validation.run import problems

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(
    path.parent for path in EXAMPLES.glob("*/launch.sh") if (path.parent / "pretrain.yaml").exists()
)
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
MOCK = "--data.mock true --data.data_path [] --data.tokenizer_type none --data.tokenizer_model null"

recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def page(recipe: Path) -> str:
    return (recipe / "README.md").read_text(encoding="utf-8")


def planned(recipe: Path) -> tuple[list[str], list[str]]:
    """Arguments of the plan that the page shows, and the lines that it shows of it."""
    blocks = re.findall(r"```\n\$ lckv-megatron plan (.*?)```", page(recipe), re.DOTALL)
    ((command, *lines),) = (block.splitlines() for block in blocks if "--world-size" in block)
    return shlex.split(command), lines


def world_size(recipe: Path) -> int:
    arguments, _ = planned(recipe)
    return int(arguments[arguments.index("--world-size") + 1])


def test_there_are_recipes() -> None:
    assert {recipe.name for recipe in RECIPES} >= {
        "llama_1b_lckv",
        "llama2_13b_lckv",
        "yoco_3b",
        "long_context_7b",
    }


@recipes
@pytest.mark.parametrize("options", ["", MOCK], ids=["as it is", "on random tokens"])
def test_nothing_is_wrong_with_its_settings(recipe: Path, options: str) -> None:
    run = parse_run_config(["--config", str(recipe / "pretrain.yaml"), *options.split()])
    assert problems(run, world_size(recipe)) == []


@recipes
def test_its_page_shows_what_the_plan_says(recipe: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, lines = planned(recipe)
    assert plan(arguments) == 2  # the data are not here
    captured = capsys.readouterr()
    assert re.findall(r"problem \d: (\S+ \S+ \S+)", captured.err) == [
        "the dataset data/corpus",
        "data.tokenizer_model is data/tokenizer,",
    ]
    said = captured.out.splitlines()
    assert len(lines) > 8
    assert [shown for shown in lines if shown not in said] == []


@recipes
def test_its_page_names_the_processes_that_are_launched(recipe: Path) -> None:
    script = (recipe / "launch.sh").read_text(encoding="utf-8")
    nodes, gpus = (
        int(re.search(rf"#SBATCH --{name}=(\d+)", script)[1]) for name in ("nodes", "gpus-per-node")
    )
    assert nodes * gpus == world_size(recipe)
    word = "node" if nodes == 1 else "nodes"
    assert f"{nodes} {word} of {gpus} H100 80 GB ({world_size(recipe)} processes" in page(recipe)


@recipes
def test_its_page_promises_no_more_than_is_known(recipe: Path) -> None:
    assert "**Not run.**" in page(recipe)
    assert "| Loss | unknown |" in page(recipe)


def test_every_folder_has_a_line_in_the_overview() -> None:
    overview = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    folders = {
        path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))
    }
    assert {name for name in folders if f"[{name}]({name})" not in overview} == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_scripts_are_well_formed(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def launch(recipe: Path, folder: Path, *options: str, **variables: str) -> tuple[list[str], list[str]]:
    """Run launch.sh on a pretended cluster: what srun was given, and what torchrun was."""
    commands = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "srun": 'while [[ $1 == --* ]]; do echo "srun $1"; shift; done; '
        'echo "srun allocator $PYTORCH_CUDA_ALLOC_CONF"; SLURM_NODEID=1 exec "$@"',
        "python": 'printf "python %s\\n" "$@"',
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in commands.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "VENV": str(folder),
    }
    environment |= {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "two",
    } | variables
    command = ["bash", str(recipe / "launch.sh"), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    said = [line.partition(" ") for line in result.stdout.splitlines()]
    return [rest for word, _, rest in said if word == "srun"], [
        rest for word, _, rest in said if word == "python"
    ]


@recipes
def test_every_node_starts_its_processes(recipe: Path, tmp_path: Path) -> None:
    given, started = launch(
        recipe,
        tmp_path,
        "--train.seed",
        "7",
        CHECKPOINTS=str(tmp_path / "run"),
        CONTAINER_MOUNTS="/data:/data",
    )
    assert {
        "--ntasks-per-node=1",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        "allocator expandable_segments:True",
    } <= set(given)
    ours = started.index("pretrain_lckv.py")
    pairs = dict(zip(started[2:ours:2], started[3:ours:2], strict=True))
    assert started[:2] == ["-m", "torch.distributed.run"]
    assert (pairs["--nnodes"], pairs["--node-rank"], pairs["--nproc-per-node"]) == ("2", "1", "8")
    assert (pairs["--master-addr"], pairs["--master-port"]) == ("first", "24567")
    run = parse_run_config(started[ours + 1 :])
    assert (run.train.seed, run.train.exit_duration_minutes) == (7, 1410)
    assert (run.checkpoint.save, run.checkpoint.load) == (str(tmp_path / "run"), None)
    assert problems(run, world_size(recipe)) == []


def test_a_job_that_starts_again_has_the_same_settings(tmp_path: Path) -> None:
    """checkpoint.resume finds out whether there is something to go on from."""
    (tmp_path / "latest").touch()
    variables = {
        "CHECKPOINTS": str(tmp_path),
        "MINUTES": "90",
        "CONFIG": str(EXAMPLES / "demo" / "pretrain.yaml"),
    }
    _, started = launch(RECIPES[0], tmp_path, **variables)
    run = parse_run_config(started[started.index("pretrain_lckv.py") + 1 :])
    assert (run.checkpoint.save, run.checkpoint.load, run.checkpoint.resume) == (str(tmp_path), None, "auto")
    assert run.train.exit_duration_minutes == 90
    assert run.model.num_layers == 8


@recipes
def test_the_trial_of_the_overview_works(recipe: Path) -> None:
    overview = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    trial = re.search(
        r"sbatch examples/RECIPE/launch\.sh (--train\.train_iters 20.*?)```", overview, re.DOTALL
    )[1]
    options = shlex.split(trial.replace("\\\n", " "))
    run = parse_run_config(["--config", str(recipe / "pretrain.yaml"), *options])
    assert problems(run, world_size(recipe)) == []
    assert run.data.mock


def test_the_node_is_used_whole_and_the_interface_is_named(tmp_path: Path) -> None:
    given, _ = launch(RECIPES[0], tmp_path, SLURM_CPUS_ON_NODE="96", INTERFACE="ib0")
    assert "--cpus-per-task=96" in given
    script = (EXAMPLES / "launch_on_slurm.sh").read_text(encoding="utf-8")
    assert "export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE" in script
    without, _ = launch(RECIPES[0], tmp_path, CONTAINER_IMAGE="none")
    assert not [option for option in without if option.startswith("--container")]


@recipes
def test_a_job_whose_node_fails_is_started_again_with_the_same_log(recipe: Path) -> None:
    script = (recipe / "launch.sh").read_text(encoding="utf-8")
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --open-mode=append\n" in script


def test_the_launcher_outside_of_a_job_says_so(tmp_path: Path) -> None:
    command = ["bash", str(EXAMPLES / "launch_on_slurm.sh"), "examples/yoco_3b"]
    result = subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "this runs inside of a Slurm job: sbatch examples/yoco_3b/launch.sh" in result.stderr
