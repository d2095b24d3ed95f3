"""The dry run as options of the plan: what it prints and draws, and what it refuses."""

import re
from pathlib import Path

import matplotlib.image
import pytest
import torch.distributed as dist

from lckv_megatron.commands.plan import main

TINY = [
    "--model.num_layers=2", "--model.hidden_size=32", "--model.num_attention_heads=2",
    "--model.vocab_size=50", "--train.seq_length=64", "--train.global_batch_size=16", "--data.mock=true",
]  # fmt: skip
PIPELINE = ["--parallel.pipeline_model_parallel_size", "2", "--world-size", "8"]


def dry_run(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Lines that the dry run adds to the plan."""
    assert main([*TINY, "--dry-run", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.startswith("dry run: memory")) :]


def rows(lines: list[str], title: str) -> list[dict[str, str]]:
    """The table below a title, by its head."""
    start = next(number for number, line in enumerate(lines) if line.startswith(title)) + 1
    head, *others = (re.split(r"  +", line) for line in lines[start:] if line)
    return [dict(zip(head, row, strict=False)) for row in others if len(row) > 1]


def test_a_pipeline_from_top_to_bottom(capsys, tmp_path: Path) -> None:
    lines = dry_run(capsys, *PIPELINE, "--picture", str(tmp_path / "memory.png"), "--network", "IB-200G")
    memory = rows(lines, "dry run: memory")[:2]
    assert [(row["rank"], row["stage"], row["verdict"]) for row in memory] == [
        ("0", "0", "fits"),
        ("4", "1", "fits"),
    ]
    kinds = ("parameters", "gradients", "optimizer", "activations", "temporary")
    for row in memory:
        peak = float(row["peak"].split()[0])
        assert sum(float(row[kind].split()[0]) for kind in kinds) == pytest.approx(peak, rel=0.1)
    collectives = rows(lines, "dry run: collectives of a step, over IB-200G")
    # 16 rows, 4 replicas: 4 micro-batches, each with a message there and one back
    sent = {
        (row["rank"], row["collective"]): row["count"] for row in collectives if row["group"] == "pipeline"
    }
    assert sent["0", "send"] == sent["4", "receive"] == sent["0", "receive"] == sent["4", "send"] == "4"
    times = rows(lines, "dry run: seconds")[:2]
    assert all(float(row["bubble"]) > 0 and float(row["FLOPs"]) > 0 for row in times)
    seconds = {row["rank"]: float(row["step"]) for row in times}
    slowest = max(seconds, key=lambda rank: seconds[rank])
    (said,) = [line for line in lines if line.startswith("A step takes ")]
    assert said.startswith(f"A step takes {seconds[slowest]:.3g} s, by rank {slowest}.")
    picture = matplotlib.image.imread(tmp_path / "memory.png")
    assert picture.shape[1] == 1200
    assert len({tuple(colour) for colour in picture.reshape(-1, picture.shape[2])}) > 20
    assert not dist.is_initialized()


def test_a_memory_plan_and_its_picture(capsys, tmp_path: Path) -> None:
    picture_file = str(tmp_path / "plan.png")
    lines = dry_run(capsys, *PIPELINE, "--rank", "4", "--memory-plan", "--picture", picture_file)
    row = rows(lines, "dry run: memory planned, beside PyTorch's caching allocator (simulated)")[0]
    assert row["rank"] == "4"
    live, told, reserved = (float(row[name].split()[0]) for name in ("live", "planned", "reserved"))
    assert 0 < live <= told <= 1.2 * live
    assert reserved == pytest.approx(0.002, rel=0.1)  # one small segment
    assert any(re.fullmatch(r"Planning saves .* of what expandable segments reserve, .*", li) for li in lines)
    blocks = rows(lines, "dry run: blocks of rank 4")
    assert {row["how"].split(",")[0] for row in blocks} <= {"live peak reached", "first fit"}
    picture = matplotlib.image.imread(tmp_path / "plan.png")
    assert picture.shape[1] == 1200
    assert len({tuple(colour) for colour in picture.reshape(-1, picture.shape[2])}) > 20


def test_one_rank_of_many(capsys) -> None:
    lines = dry_run(capsys, "--world-size", "1024", "--rank", "513", "--train.global_batch_size", "2048")
    (memory,) = rows(lines, "dry run: memory")[:1]
    assert memory["rank"] == "513"
    ranks = {row["group"]: row["ranks"] for row in rows(lines, "dry run: collectives") if "group" in row}
    assert ranks["data"] == "1024"


def test_activations_on_the_host(capsys) -> None:
    lines = dry_run(capsys, "--train.activation_offload", "token_wise", "--world-size", "1")
    (row,) = rows(lines, "dry run: activations on the host, in a step")[:1]
    assert row["share"] == "0 %"
    assert row["to the host"] == row["back"] != "0.00 GiB"
    assert (row["its memory"], row["of a node"]) == ("1.00 GiB", "8.00 GiB")
    (times,) = rows(lines, "dry run: seconds")[:1]
    # layers of 64 tokens are computed at once
    assert 0 < float(times["copies"]) < float(times["step"])
    assert row["waited for"] == f"{times['copies']} s"
    (mfu,) = [line for line in lines if line.startswith("MFU ")]
    share = float(times["share of peak"].split()[0])
    assert float(mfu.split()[1]) <= share


def test_what_does_not_fit_is_said_with_the_reason(capsys) -> None:
    large = "--model.ffn_hidden_size 200000 --model.hidden_size 1024 --gpu L4 --train.seq_length 2048"
    lines = dry_run(capsys, *large.split(), "--world-size", "1")
    (row,) = rows(lines, "dry run: memory")[:1]
    too_much, kind, most = re.fullmatch(
        r"does not fit: (\S+) GiB too much; largest are (\w+), (\S+ GiB)", row["verdict"]
    ).groups()
    assert row[kind] == most
    # 22.0 GiB less 5 % and 2 GiB
    assert float(row["peak"].split()[0]) - float(too_much) == pytest.approx(18.9, abs=0.02)


def test_layouts_are_searched(capsys) -> None:
    lines = dry_run(capsys, "--world-size", "2", "--train.global_batch_size", "2", "--search")
    found = rows(lines, "dry run: layouts of 2 GPUs, the shortest step first")
    assert {row["layout"].removeprefix("* ") for row in found} == {
        "TP 1, PP 1, DP 2",
        "TP 2, PP 1, DP 1",
        "TP 1, PP 2, DP 1",
    }
    seconds = [float(row["seconds of a step"]) for row in found]
    assert seconds == sorted(seconds)
    assert [row["layout"] for row in found if row["layout"].startswith("*")] == ["* TP 1, PP 1, DP 2"]
    for row in found:
        tokens = 2 * 64 / 2 / float(row["seconds of a step"])
        assert float(row["tokens/s per GPU"].replace(",", "")) == pytest.approx(tokens, rel=0.01)


def test_a_search_says_what_does_not_fit_before_it_is_run(capsys) -> None:
    large = "--model.ffn_hidden_size 400000 --model.hidden_size 1024 --gpu L4 --train.global_batch_size 1"
    lines = dry_run(capsys, *large.split(), "--world-size", "1", "--search")
    found = rows(lines, "dry run: layouts of 1 GPUs")
    # the run's own kind, and the one that needs least
    assert {row["recompute"] for row in found} == {"full", "none"}
    for row in found:
        assert re.fullmatch(r"does not fit: \S+ GiB too much by the formulas", row["verdict"])
        assert row["seconds of a step"] == row["tokens/s per GPU"] == "-"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rank 1", "--rank is given without --dry-run; add --dry-run, or leave --rank out."),
        ("--search", "--search is given without --dry-run; add --dry-run, or leave --search out."),
        ("--network IB-200G", "--network is given without --dry-run; add --dry-run, or leave --network out."),
        (
            "--memory-plan",
            "--memory-plan is given without --dry-run; add --dry-run, or leave --memory-plan out.",
        ),
        ("--picture a.png", "--picture is given without --dry-run; add --dry-run, or leave --picture out."),
        (
            "--dry-run --rank 8 --world-size 8",
            "--rank is 8; it must be from 0 to 7, as 8 processes are pretended (--world-size).",
        ),
        ("--dry-run --rank -1 --world-size 8", "--rank is -1; it must be from 0 to 7"),
        (
            "--dry-run --gpu 48GiB",
            "--gpu is '48GiB'; --dry-run estimates times and needs one of H100, H200, B200, A100",
        ),
        ("--dry-run --network FE", "argument --network: invalid choice: 'FE'"),
        (
            "--dry-run --picture nowhere/a.png",
            "--picture is nowhere/a.png; the folder nowhere is not here: make it, or give another file.",
        ),
    ],
)
def test_what_is_refused(capsys, options: str, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([*TINY, *options.split()])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
