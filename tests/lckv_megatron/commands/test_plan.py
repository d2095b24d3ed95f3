"""The plan of a run: its numbers are those of the model that would be built, and everything that cannot work
is named at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lckv.config import CompressionConfig
from lckv_megatron.commands.plan import main
from lckv_megatron.planning import inputs
from lckv_megatron.planning.inputs import find_vocab_size
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import gib
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.data import checks
from megatron_ext.model.build import build_stage
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.summary.sizes import cost_of
from megatron_ext.training.loop import _count_parameters
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    "--model.num_layers",
    "4",
    "--model.hidden_size",
    "32",
    "--model.vocab_size",
    "50",
    "--data.mock",
    "true",
]
TINY += [
    "--model.num_query_groups",
    "2",
    "--train.precision",
    "fp32",
    "--train.seq_length",
    "64",
    "--train.train_iters",
    "10",
]
PIPELINE = ["--parallel.pipeline_model_parallel_size", "2", "--parallel.tensor_model_parallel_size", "2"]
RING = ["--parallel.context_parallel_communication", "ring"]
PIPELINE += ["--parallel.sequence_parallel", "true"]


def planned(capsys, *argv: str) -> list[str]:
    assert main([*TINY, *argv]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def line(lines: list[str], start: str) -> str:
    (found,) = [text for text in lines if text.startswith(start)]
    return found


def built(argv: list[str]) -> tuple[int, tuple[int, ...], int]:
    """Run on every rank: parameters in all, the shape that it sends to the next stage, and parameters
    held."""
    run = parse_run_config(argv)
    initialize(run.parallel, seed=1)
    stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=50)
    sent = stage.decoder.payload_out(stage.decoder.visit).shape(
        run.train.seq_length, run.train.micro_batch_size
    )
    return (
        _count_parameters(stage.parameters()),
        sent,
        sum(parameter.numel() for parameter in stage.parameters()),
    )


@pytest.mark.parametrize(
    ("layer_types", "layout", "ranks"),
    [("0_1_2_3", [], 1), ("0_2_2_3", [], 1), ("0_0_2_2", PIPELINE, 4), ("0_0_0_0", PIPELINE, 4)],
)
def test_numbers_are_those_of_the_model(capsys, layer_types: str, layout: list[str], ranks: int) -> None:
    argv = [*layout, "--compression.layer_types", layer_types]
    lines = planned(capsys, *argv)
    found = run_on_ranks(ranks, built, [*TINY, *argv])
    assert line(lines, "parameters").split()[1].rstrip(",") == f"{found[0][0]:,}"
    stages = [text.split() for text in lines if re.match(r"\d+  +\d+-\d+ ", text)]
    held = [held for _, _, held in found[:: max(1, ranks // len(stages))]]
    assert [stage[2] for stage in stages] == [f"{number:,}" for number in held]
    if layout:
        numbers = 1
        for length in found[0][1]:
            numbers *= length
        assert f"{gib(4 * numbers)}: hidden states" in " ".join(stages[0])
        assert ("KV of 0" in " ".join(stages[0])) == (layer_types == "0_0_0_0")


def test_a_plan_from_top_to_bottom(capsys) -> None:
    lines = planned(
        capsys, "--compression.layer_types", "0s_2_2_3", "--compression.sliding_window", "16",
        "--world-size", "4",
        "--logging.peak_tflops", "0.001", "--train.recompute_granularity", "full",
    )  # fmt: skip
    assert [text[:16] for text in lines[:4]] == [
        "layer 3  KV  <- ",
        "layer 2  KV  <- ",
        "layer 1      <- ",
        "layer 0  KV  <- ",
    ]
    assert "┐ iterated" in lines[1]
    assert "window 16" in lines[3]
    assert line(lines, "KV cache").endswith(
        "192 bytes per token in 16 bits, 1.33x less than a plain model's 256"
    )
    assert line(lines, "  full context").endswith(
        f"{gib(9 * 1024)} for 64 tokens, 1.78x less than {gib(16 * 1024)}"
    )
    assert line(lines, "predicted cost").endswith(
        "(7 passes without and 2 with gradient over each cyclic group)"
    )
    assert re.fullmatch(
        r"predicted prompt      \d\.\d\dx a plain model's of 64 tokens, with all passes",
        line(lines, "predicted prompt"),
    )
    assert line(lines, "length").startswith("length                10 steps, 5,120 tokens, ")
    assert line(lines, "time").endswith(
        "hours if every device does 40 % of 0.001 TFLOP/s (assumed, not measured)"
    )
    assert line(lines, "layout").endswith("4 processes: TP 1, PP 1, DP 4")
    assert line(lines, "global batch").endswith(
        "8 sequences = 4 replicas x 2 micro-batches x 1; 512 tokens per step"
    )
    assert not any(re.search(r"[KM]iB", text) for text in lines)
    assert not any(text.startswith("pipeline") for text in lines)


def test_a_scaled_rope_is_shown(capsys) -> None:
    scaled = ("--model.rope_scaling.factor", "2", "--model.rope_scaling.type")
    assert not any(said.startswith("RoPE") for said in planned(capsys))
    words = "RoPE                  scaled by 2, linear"
    assert line(planned(capsys, *scaled, "linear"), "RoPE") == words
    length = ("--train.seq_length", "96", "--model.max_position_embeddings", "64")
    words = "dynamic: its base grows beyond 64 positions, for rows of 96 tokens"
    assert line(planned(capsys, *scaled, "dynamic", *length), "RoPE").endswith(words)


def test_a_pipeline_says_how_long_it_is_idle(capsys) -> None:
    lines = planned(capsys, *PIPELINE)
    assert line(lines, "layout").endswith("4 processes: TP 2 + SP, PP 2, DP 1")
    assert line(lines, "pipeline idle time").endswith("11.1 % of a step: (PP - 1) / (micro-batches + PP - 1)")


def test_context_parallel_ranks_keep_their_tokens_and_all_keys_and_values(capsys) -> None:
    def activations(*argv: str) -> str:
        shared_map = ["--compression.layer_types", "0_0_0_0", "--train.recompute_granularity", "full"]
        lines = planned(capsys, *shared_map, "--world-size", "2", *argv)
        return re.split(r"  +", line(lines, "0  "))[6]

    shared = 64 * 2 * 16 * 4  # keys and values of layer 0
    of_tokens = 4 * 64 * 32 * 4 + 64 * (3 * 32 * 4 + 4)  # layer inputs, final norm, gradient of the states
    assert activations() == gib(shared + of_tokens)
    assert activations("--parallel.context_parallel_size", "2") == gib(shared + of_tokens // 2)
    lines = planned(capsys, "--parallel.context_parallel_size", "2", "--train.global_batch_size", "1")
    assert line(lines, "layout").endswith("2 processes: TP 1, PP 1, CP 2, DP 1")


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (["--compression.layer_types", "0_0_2_2"], 2 * 2),
        (["--train.recompute_granularity", "full"], 4 * 3),
        (["--compression.layer_types", "0_2_2_3"], 2 * 2 + 7 + 2 * 2),  # layer 2: 7 passes without gradient
        (RING, 4 * 3),
        (
            [*RING, "--train.recompute_granularity", "selective", "--train.recompute_modules", "[core_attn]"],
            4 * 4,
        ),
    ],
)
def test_what_context_parallel_ranks_send(capsys, options: list[str], times: int) -> None:
    lines = planned(
        capsys, "--parallel.context_parallel_size", "4", "--train.global_batch_size", "1", *options
    )
    part = 16 * 2 * 16 * 4
    how = "ring" if "ring" in options else "gather"
    said = line(lines, "context parallelism").split(maxsplit=2)[2]
    assert said.startswith(f"{how}: each rank sends {gib(times * 3 * part)} per micro-batch")
    assert ("CP 4 (ring)" in line(lines, "layout")) == (how == "ring")


def test_a_ring_says_how_long_it_is_idle_and_what_it_sends(capsys) -> None:
    ring = [*PIPELINE, "--compression.layer_types", "0_2_2_3", "--parallel.pipeline_in_flight", "3"]
    lines = planned(capsys, *ring)
    idle = line(lines, "pipeline idle time")
    share = float(idle.split()[3])
    assert 0 < share < 40
    assert idle.endswith("at most 3 micro-batches are in flight")
    stages = [text for text in lines if re.match(r"\d+  +\d+-\d+ ", text)]
    # below: 7 passes to prepare, 2 to train; above: 7 back around, and one between those that train
    assert [stage.split()[-3:] for stage in stages] == [["in", "9", "parts"], ["in", "8", "parts"]]


def test_interleaved_stages_are_shown(capsys) -> None:
    lines = planned(capsys, *PIPELINE, "--parallel.virtual_pipeline_model_parallel_size", "2")
    assert re.match(r"0 +0-0 2-2 ", line(lines, "0  "))
    assert re.match(r"1 +1-1 3-3 ", line(lines, "1  "))


def test_the_first_stage_keeps_activations_of_all_micro_batches_in_flight(capsys) -> None:
    def activations(*argv: str) -> list[str]:
        lines = planned(capsys, *PIPELINE, "--train.recompute_granularity", "full", *argv)
        return [re.split(r"  +", line(lines, start))[6] for start in ("0  ", "1  ")]

    layer_inputs = 2 * 64 * 32 * 4 // 2  # of the 2 layers of a stage, shared out over 2 ranks
    of_loss = 64 * (2 * 32 * 4 // 2 + 2) + 64 * 32 * 4  # the final norm, and its output's gradient
    last = gib(layer_inputs + of_loss)
    assert activations() == [gib(2 * layer_inputs), last]
    assert activations("--train.global_batch_size", "1") == [gib(layer_inputs), last]


def verdicts(capsys, *argv: str) -> dict[str, list[str]]:
    """The cells of the table of kinds of recompute, by the kind."""
    lines = planned(capsys, *argv)
    start = lines.index(line(lines, "recompute"))
    return {row[0]: row[1:] for row in (re.split(r"  +", text) for text in lines[start + 1 : start + 6])}


LARGE = ["--model.num_layers", "20", "--model.hidden_size", "4096", "--model.num_attention_heads", "32"]
LARGE += ["--train.seq_length", "4096", "--train.precision", "bf16", "--train.micro_batch_size", "4"]


def test_each_kind_of_recompute_has_a_verdict(capsys) -> None:
    kinds = verdicts(capsys, *LARGE, "--world-size", "2")
    assert list(kinds)[:4] == ["* none", "selective mlp", "selective core_attn mlp", "full"]
    needed = [float(row[3].split()[0].replace(",", "")) for row in list(kinds.values())[:4]]
    assert needed == sorted(needed, reverse=True)
    for row in list(kinds.values())[:4]:
        state, activations, working, whole = (float(cell.split()[0].replace(",", "")) for cell in row[:4])
        assert whole == pytest.approx(state + activations + working, abs=0.02)
        assert row[4] == ("fits" if whole <= 73.14 else "does not fit")
    assert {row[4] for row in list(kinds.values())[:4]} == {"fits", "does not fit"}
    larger = verdicts(capsys, *LARGE, "--world-size", "2", "--gpu", "500GiB")
    assert [row[4] for row in list(larger.values())[:4]] == ["fits"] * 4


def test_the_run_s_own_kind_of_recompute_is_marked(capsys) -> None:
    def marked(*argv: str) -> list[str]:
        return [name for name in verdicts(capsys, *argv) if name.startswith("*")]

    assert marked("--train.recompute_granularity", "full") == ["* full"]
    some = ["--train.recompute_granularity", "full", "--train.recompute_num_layers", "2"]
    assert marked(*some) == ["* full 2"]
    selective = ["--train.recompute_granularity", "selective"]
    assert marked(*selective) == ["* selective mlp"]
    assert marked(*selective, "--train.recompute_modules", "core_attn") == ["* selective core_attn"]


def test_selective_recompute_saves_by_default_and_core_attn_alone_does_not(capsys) -> None:
    """Fused attention keeps its inputs and output anyway; of the scores there is the logsumexp only."""
    only = ["--train.recompute_granularity", "selective", "--train.recompute_modules", "core_attn"]
    kinds = verdicts(capsys, *LARGE, *only)
    none, mlp, core = (
        float(kinds[name][1].split()[0]) for name in ("none", "selective mlp", "* selective core_attn")
    )
    assert core > 0.99 * none and mlp < 0.6 * none


def test_checkpoints_on_the_disk(capsys, tmp_path: Path) -> None:
    argv = ["--checkpoint.save", str(tmp_path / "run"), "--checkpoint.save_interval", "3"]
    parameters = int(line(planned(capsys), "parameters").split()[1].rstrip(",").replace(",", ""))
    each = parameters * 12  # float32: weights and two moments
    assert line(planned(capsys), "checkpoints").endswith("none, checkpoint.save is not set")
    assert line(planned(capsys, *argv), "checkpoints").endswith(
        f"{gib(each)} each, 4 of them; 4 are kept: at most {gib(4 * each)} on the disk"
    )
    assert line(planned(capsys, *argv, "--checkpoint.keep_last", "2"), "checkpoints").endswith(
        f"{gib(each)} each, 4 of them; 2 are kept: at most {gib(3 * each)} on the disk"
    )


def test_what_is_not_here_is_told_behind_the_plan(capsys, tmp_path: Path) -> None:
    prefix, tokenizer, load = (str(tmp_path / name) for name in ("corpus", "tokenizer", "before"))
    argv = [*TINY, "--data.mock", "false", "--data.data_path", prefix, "--data.tokenizer_type"]
    argv += ["huggingface", "--data.tokenizer_model", tokenizer, "--checkpoint.load", load]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "fits" in captured.out and "epochs are not known: no description of" in captured.out
    assert f"problem 1: the dataset {prefix} is not here ({prefix}.bin and {prefix}.idx)" in captured.err
    assert f"problem 2: data.tokenizer_model is {tokenizer}, which is not here" in captured.err
    assert f"problem 3: checkpoint.load is {load}, which is not here" in captured.err


def test_epochs_of_the_data(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        for end in ("bin", "idx"):
            (tmp_path / f"{name}.{end}").touch()
    monkeypatch.setattr(inputs, "_tokens", lambda prefix: {"a": 1000, "b": 5120}[Path(prefix).name])
    argv = ["--data.mock", "false", "--data.data_path", "3", f"{tmp_path}/a", "1", f"{tmp_path}/b"]
    lines = planned(capsys, *argv, "--data.split", "1,1,0")
    assert [text for text in lines if text.startswith("data ")] == [
        f"data                  7.68 epochs of {tmp_path}/a, 3,840 tokens",
        f"data                  0.50 epochs of {tmp_path}/b, 1,280 tokens",
    ]


def test_a_recipe_s_own_processes(capsys, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {global_batch_size: 48}\n")
    assert line(planned(capsys, "--config", str(config)), "layout").startswith("layout                1 proc")
    (tmp_path / "launch.sh").write_text("#!/bin/bash\n#SBATCH --nodes=3\n#SBATCH --gpus-per-node=8\n")
    for words in (["--config", str(config)], [f"--config={config}"]):
        assert line(planned(capsys, *words), "layout").startswith("layout                24 processes")
    given = planned(capsys, "--config", str(config), "--world-size", "2")
    assert line(given, "layout").startswith("layout                2 processes")


def test_time_at_an_mfu(capsys) -> None:
    """Recomputation does not count as work, so it changes nothing."""
    argv = ["--mfu", "0.5", "--logging.peak_tflops", "1e-9"]
    one = line(planned(capsys, *argv), "time")
    assert "if the MFU is 50 % of 1e-09 TFLOP/s" in one
    assert one == line(planned(capsys, *argv, "--train.recompute_granularity", "full"), "time")
    hours = float(one.split()[1].replace(",", "")) * (24 if " days" in one else 1)
    four = line(planned(capsys, *argv, "--world-size", "4"), "time")
    assert float(re.search(r"([\d,]+) GPU-hours", four)[1].replace(",", "")) == pytest.approx(hours, rel=0.01)


def test_replicas_share_the_state_of_a_distributed_optimizer(capsys) -> None:
    def optimizer(*argv: str) -> float:
        return float(re.split(r"  +", line(planned(capsys, "--world-size", "4", *argv), "0  "))[5].split()[0])

    assert optimizer("--parallel.use_distributed_optimizer", "false") == pytest.approx(
        4 * optimizer(), rel=1e-3
    )


def test_time_follows_operations_devices_and_utilisation(capsys) -> None:
    def hours(*argv: str) -> float:
        return float(
            line(planned(capsys, "--logging.peak_tflops", "1e-6", *argv), "time").split()[1].replace(",", "")
        )

    base = hours()
    assert hours("--utilisation", "0.2") == pytest.approx(2 * base, rel=0.05)
    assert hours("--world-size", "2") == pytest.approx(base / 2, rel=0.05)
    assert hours("--train.recompute_granularity", "full") > 1.2 * base


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--train.recompute_granularity", "full"],
        ["--train.recompute_granularity", "full", "--train.recompute_num_layers", "1", *PIPELINE],
        ["--compression.layer_types", "0_2_2_3", "--train.recompute_granularity", "full"],
    ],
)
def test_costs_are_those_that_the_run_itself_reports(capsys, argv: list[str]) -> None:
    run = parse_run_config([*TINY, *argv])
    plan = Plan(run, 4, 50, 0.4)
    assert f"{cost_of(run, plan.shape).hardware_flops:.3e} with recomputation" in line(
        planned(capsys, *argv), "FLOPs"
    )


def test_named_layouts_are_compared(capsys) -> None:
    lines = planned(capsys, "--compare")
    names = ["plain", "CLA", "YOCO", "LCKV (w=2)", "sandwich-middle"]
    assert [text for text in lines[1:6] for name in names if text.startswith(name)] == lines[1:6]
    assert "64 tokens" in lines[0]
    assert lines[6].startswith("Sliding layers see 1,024 tokens, cyclic groups run 7 + 2 passes.")
    assert [text.split()[-1] for text in lines[7:]] == [
        "0_1_2_3",
        "0_0_2_2",
        "0s_1s_2_2",
        "0_2_2_3",
        "0_1_1_3",
    ]


def test_maps_are_compared_with_the_run_s_own_settings(capsys) -> None:
    argv = ["--compression.sliding_window", "16", "--compression.layer_types", "0s_1_2_3"]
    lines = planned(capsys, *argv, "--compare", "yoco", "0_0_0_0", "--compression.forward_passes", "3")
    assert lines[1].split()[:3] == ["YOCO", "3", "192"]
    assert f" {gib(64 * (16 + 16 + 64))} " in lines[1]  # 64 bytes per token
    assert lines[2].split()[:4] == ["map", "2", "1", "64"] and f" {gib(64 * 64)} " in lines[2]
    assert lines[3].startswith("Sliding layers see 16 tokens, cyclic groups run 3 + 2 passes.")


def test_what_is_neither_a_map_nor_a_name(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, "--compare", "circle"])
    assert exit_.value.code == 2
    assert "error: --compare: layer_types is 'circle'; entry 0" in capsys.readouterr().err


def test_all_problems_are_named_and_the_plan_is_shown_where_sizes_fit(capsys) -> None:
    assert main([*TINY, "--checkpoint.save_interval", "5", "--optimizer.lr", "-1"]) == 2
    captured = capsys.readouterr()
    assert "problem 1: optimizer.lr is -1.0" in captured.err
    assert "problem 2: checkpoint.save_interval is 5 and checkpoint.save is not set" in captured.err
    assert "parameters" in captured.out


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--world-size", "3", *PIPELINE], "3 processes were started"),
        (["--train.global_batch_size", "7", "--world-size", "2"], "train.global_batch_size is 7"),
        (["--compression.layer_types", "0_0"], "compression.layer_types is '0_0'; it has 2 entries"),
        (
            ["--parallel.pipeline_model_parallel_layout", "Et|tL", *PIPELINE],
            "parallel.pipeline_model_parallel_layout is 'Et|tL', which is 1 E, 2 t and 1 L; it needs",
        ),
        (
            ["--train.recompute_num_layers", "9", "--train.recompute_granularity", "full"],
            "train.recompute_num_layers is 9",
        ),
        (["--train.micro_batch_size", "0"], "train.micro_batch_size is 0"),
        (["--model.num_attention_heads", "0"], "model.num_attention_heads is 0"),
    ],
)
def test_sizes_that_do_not_fit_have_no_plan(capsys, argv: list[str], problem: str) -> None:
    assert main([*TINY, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err


def test_every_problem_of_a_step_is_one_of_the_run() -> None:
    from megatron_ext.validation.run import problems, step_problems

    run = parse_run_config(
        [*TINY, "--train.seq_length", "0", "--model.num_layers", "0", "--train.micro_batch_size", "0"]
    )
    assert set(step_problems(run, 3)) <= set(problems(run, 3))


def test_a_vocabulary_that_nothing_tells(capsys) -> None:
    error = refused(capsys, "--data.data_path", "absent")
    assert (
        "the vocabulary is unknown; set model.vocab_size, or data.tokenizer_type and data.tokenizer_model."
        in error
    )


def test_a_tokenizer_that_is_not_there(capsys) -> None:
    options = ["--data.tokenizer_type", "sentencepiece", "--data.tokenizer_model", "absent.model"]
    assert "absent.model" in refused(capsys, "--data.mock", "true", *options)


def test_the_tokenizer_s_vocabulary(monkeypatch) -> None:
    monkeypatch.setattr(checks, "find_vocabulary", lambda data: checks.Vocabulary(123, 0, "", "", "here"))
    assert find_vocab_size(RunConfig()) == 123


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world-size", "0"], "argument --world-size: '0' is not a whole number of at least 1"),
        (["--utilisation", "1.5"], "argument --utilisation: 1.5 is not in (0, 1]"),
        (["--mfu", "0.3", "--utilisation", "0.3"], "argument --utilisation: not allowed with argument --mfu"),
        (["--gpu", "H10"], "argument --gpu: --gpu is 'H10'; it must be one of H100"),
    ],
)
def test_options_out_of_range(capsys, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err


def test_an_unknown_setting_is_refused_as_in_training(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--model.layers", "3"])
    assert exit_.value.code == 2
    assert "model.layers is unknown" in capsys.readouterr().err


def test_windows_of_one_kind_of_reader_only_bound_the_cache() -> None:
    from lckv_megatron.layouts import cache_bytes

    plan = Plan(parse_run_config(TINY), 1, 50, 0.4)
    types = CompressionConfig(layer_types="0s_0_2s_2s").map(4)  # layer 1 reads all of layer 0's
    assert cache_bytes(plan.shape, types, window=16, tokens=64) == 64 * (64 + 16)
    assert cache_bytes(plan.shape, types, window=16, tokens=8) == 64 * (8 + 8)


def test_a_plan_needs_neither_torch_nor_megatron() -> None:
    script = (
        "import sys; from lckv_megatron.commands.plan import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *TINY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_activations_on_the_host(capsys):
    argv = ("--train.activation_offload", "token_wise", "--train.offload_fraction", "0.5")
    lines = planned(capsys, *PIPELINE, *argv)
    assert line(lines, "* token_wise")
    assert line(lines, "host memory").endswith("of 50% of the tokens")
