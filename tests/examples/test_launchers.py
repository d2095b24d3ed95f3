"""Launchers without a batch system, on pretended nodes: torchrun by hand, and a Job of Kubernetes."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_ext.command_line import parse_run_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "examples/launch_with_torchrun.sh"
RECIPE = "examples/llama_1b_lckv"


def run(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """With a Python that says what it was given."""
    python = folder / "python"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nenv | grep -E "^(NCCL|GLOO|TORCH|PYTORCH)_" | sort\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def started(said: str) -> tuple[dict[str, str], list[str]]:
    """What torchrun was told, and the program's own options."""
    lines = said.splitlines()
    ours = lines.index("pretrain_lckv.py")
    assert lines[:2] == ["-m", "torch.distributed.run"]
    options = [
        line for line in lines[ours + 1 :] if not line.startswith(("NCCL_", "GLOO_", "TORCH_", "PYTORCH_"))
    ]
    return dict(zip(lines[2:ours:2], lines[3:ours:2], strict=True)), options


def test_one_node_needs_no_variables(tmp_path: Path) -> None:
    done = run(tmp_path, ["bash", LAUNCHER, RECIPE, "--train.seed", "7"])
    told, options = started(done.stdout)
    assert (told["--nnodes"], told["--node-rank"], told["--max-restarts"]) == ("1", "0", "3")
    settings = parse_run_config(options)
    assert settings.train.seed == 7
    assert settings.checkpoint.save == "runs/llama_1b_lckv/checkpoints"
    assert settings.checkpoint.resume == "auto"


def test_several_nodes_meet_at_the_first(tmp_path: Path) -> None:
    variables = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "INTERFACE": "ib0"}
    done = run(tmp_path, ["bash", LAUNCHER, RECIPE], **variables)
    told, _ = started(done.stdout)
    assert (told["--nnodes"], told["--node-rank"], told["--master-addr"]) == ("2", "1", "first")
    assert "NCCL_SOCKET_IFNAME=ib0\n" in done.stdout
    assert "GLOO_SOCKET_IFNAME=ib0\n" in done.stdout
    assert "\nTORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0\n" in done.stdout
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n" in done.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NODES": "2"}, "MASTER_ADDR: is missing: a name or address of node 0"),
        (
            {"NODES": "4", "MASTER_ADDR": "first"},
            "NODE_RANK: is missing: 0 on the first node, up to 3 on the last",
        ),
    ],
)
def test_what_is_missing_is_named(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = run(tmp_path, ["bash", LAUNCHER, RECIPE], **variables)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_job_of_kubernetes_starts_the_recipe(tmp_path: Path) -> None:
    """What a pod runs, with the variables that it gets."""
    text = (ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    command = [*container["command"], *container["args"]]
    done = run(tmp_path, command, JOB_COMPLETION_INDEX="1", **variables)
    told, options = started(done.stdout)
    settings = parse_run_config(options)
    assert int(told["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert told["--node-rank"] == "1"
    assert told["--master-addr"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(told["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert settings.checkpoint.save.startswith("/shared/")
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
