"""Command-line options, YAML files and dictionaries to a RunConfig and back."""

import json
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.command_line import (
    config_from_dict,
    config_to_dict,
    exit_with,
    parse_run_config,
    save_config,
)
from megatron_ext.config import RunConfig
from megatron_ext.data.blends import Blend, parse_blend
from megatron_ext.errors import ConfigError
from megatron_ext.foreign_names import SETTING_OF
from megatron_ext.settings import settings_of, variants_of

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
"""Forty lines of YAML that stand for 2 ** 40 texts."""


def refusal(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_run_config(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err and captured.err.startswith("error: ")
    return captured.err


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_are_the_defaults():
    assert parse_run_config([]) == RunConfig()


def test_later_files_win_and_options_win_over_files_wherever_they_stand(tmp_path):
    first = write(
        tmp_path / "a.yaml", "train: {train_iters: 5, seed: 1, seq_length: 32}\noptimizer:\n  lr: 3e-4\n"
    )
    second = write(tmp_path / "b.yaml", "train: {seed: 2, seq_length: 64}\n")
    run = parse_run_config(
        ["--train.seq_length=128", "--config", first, "--config", second, "--data.mock", "true"]
    )
    assert (run.train.train_iters, run.train.seed, run.train.seq_length) == (5, 2, 128)
    assert run.optimizer.lr == 3e-4 and run.data.mock is True


def test_an_alias_stands_for_another_value(tmp_path):
    file = write(
        tmp_path / "run.yaml", "model: {num_layers: &n 6, num_attention_heads: *n}\ntrain: {seed: *n}\n"
    )
    run = parse_run_config(["--config", file])
    assert (run.model.num_layers, run.model.num_attention_heads, run.train.seed) == (6, 6, 6)


def test_texts_stay_texts(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "compression: {layer_types: 0_0_2_2}\n"
        "logging: {wandb_name: 0x10, wandb_project: yes}\n"
        "checkpoint: {save: 'null'}\n",
    )
    run = parse_run_config(["--config", file])
    assert run.compression.layer_types == "0_0_2_2"
    assert (run.logging.wandb_name, run.logging.wandb_project, run.checkpoint.save) == ("0x10", "yes", "null")
    assert parse_run_config(["--compression.layer_types", "0_0_2_2"]).compression.layer_types == "0_0_2_2"


def test_null_unsets_on_the_command_line_and_in_files(tmp_path):
    file = write(tmp_path / "run.yaml", "checkpoint: {save: somewhere, load: elsewhere}\ntrain:\n")
    cleared = write(tmp_path / "cleared.yaml", "checkpoint:\n  load:\n")
    run = parse_run_config(["--config", file, "--config", cleared, "--checkpoint.save", "null"])
    assert run.checkpoint.save is None and run.checkpoint.load is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("corpus", ("corpus",)),
        ("[0.3,a,0.70,b]", ("0.3", "a", "0.70", "b")),
        ("['a b', \"c,d\"]", ("a b", "c,d")),
        ("[]", ()),
    ],
)
def test_lists_of_texts(text, expected, tmp_path):
    assert parse_run_config(["--data.data_path", text]).data.data_path == expected
    assert parse_run_config([f"--data.data_path={text}"]).data.data_path == expected
    file = write(tmp_path / "run.yaml", f"data:\n  data_path: {text}\n")
    assert parse_run_config(["--config", file]).data.data_path == expected


def test_the_kv_policy_is_chosen_by_its_name(tmp_path):
    assert parse_run_config([]).compression.policy == DenseConfig()
    options = (
        "--compression.policy.name dmc --compression.policy.stage retrofit --compression.policy.window null"
    )
    expected = DMCConfig(stage="retrofit", window=None, target_compression_ratio=4.0)
    argv = [*options.split(), "--compression.policy.target_compression_ratio=4"]
    assert parse_run_config(argv).compression.policy == expected
    file = write(tmp_path / "run.yaml", "compression:\n  policy: {name: dmc, stage: retrofit}\n")
    assert parse_run_config(["--config", file]).compression.policy == DMCConfig(stage="retrofit")
    assert parse_run_config(["--config", file, *argv]).compression.policy == expected


def test_a_stage_may_be_given_before_the_policy_that_has_it(tmp_path):
    stage = write(tmp_path / "stage.yaml", "compression: {policy: {stage: finetune}}\n")
    policy = write(tmp_path / "policy.yaml", "compression: {policy: {name: dmc, window: 8}}\n")
    for argv in (["--config", stage, "--config", policy], ["--config", policy, "--config", stage]):
        assert parse_run_config(argv).compression.policy == DMCConfig(stage="finetune", window=8)
    argv = ["--compression.policy.window=8", "--config", stage, "--compression.policy.name=dmc"]
    assert parse_run_config(argv).compression.policy == DMCConfig(stage="finetune", window=8)


BELONGS = (
    "compression.policy.stage belongs to policy dmc or dms; compression.policy.name is dense: remove the "
    "former, or set the latter to dmc or dms."
)


def test_settings_of_another_policy_in_a_file(tmp_path, capsys):
    file = write(tmp_path / "run.yaml", "compression: {policy: {name: dmc, stage: finetune}}\n")
    said = refusal(["--config", file, "--compression.policy.name", "dense"], capsys)
    assert said == f"error: {file}: {BELONGS}\n"


def test_nested_sections(tmp_path):
    file = write(tmp_path / "run.yaml", "model:\n  rope_scaling: {type: llama3, factor: 4}\n")
    scaling = parse_run_config(["--config", file, "--model.rope_scaling.factor", "2"]).model.rope_scaling
    assert (scaling.type, scaling.factor) == ("llama3", 2.0)


@pytest.mark.parametrize(
    "argv",
    [
        ["--data.data_path", "0.5", "a", "0.5", "b"],
        ["--data.data_path", "0.5 a 0.5 b"],
        ["--data.data_path=0.5 a  0.5 b"],
        ["--data.data_path", "[0.5, a, 0.5, b]"],
        ["--data.data_path", "[0.5,", "a,", "0.5,", "b]"],
        ["--data.data_path", "0.5 a", "0.5 b"],
        ["--config", "run.yaml"],
    ],
)
@pytest.mark.parametrize("name", ["data_path", "train_data_path", "valid_data_path"])
@pytest.mark.parametrize("text", ["0.5 a 0.5 b", "[0.5, a, 0.5, b]", '["0.5 a", 0.5 b]', '0.5 "a" .5 b'])
def test_blends_however_they_are_given(argv, name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run.yaml", f"data: {{{name}: {json.dumps(text) if text[0] != '[' else text}}}")
    run = parse_run_config([word.replace("data_path", name) for word in argv] + ["--train.seed", "3"])
    assert parse_blend(name, getattr(run.data, name)) == Blend(("a", "b"), (0.5, 0.5))
    assert run.train.seed == 3


def test_other_lists_of_texts_are_given_in_words_too():
    run = parse_run_config(["--train.recompute_modules", "core_attn", "mlp", "--train.seed", "3"])
    assert run.train.recompute_modules == ("core_attn", "mlp")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.learning_rate", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("optimizer.LR", "optimizer.lr"),
        ("train.lerning_rate", "optimizer.lr"),
        ("train.weight_decy", "optimizer.weight_decay"),
        ("micro-batch-size", "train.micro_batch_size"),
        ("parallel.micro-batch-size", "train.micro_batch_size"),
        ("global-batch-sise", "train.global_batch_size"),
        ("tensor-model-parallel-size", "parallel.tensor_model_parallel_size"),
        ("max_steps", "train.train_iters"),
        ("model.num_hidden_layrs", "model.num_layers"),
        ("num_key_value_heads", "model.num_query_groups"),
        ("data-path", "data.data_path"),
        ("valid-data-path", "data.valid_data_path"),
        ("data-args-path", "data.data_path"),
        ("checkpoint.laod", "checkpoint.load"),
        ("optimiser.min_lr", "optimizer.min_lr"),
        ("train.save_interval", "checkpoint.save_interval"),
        ("train.save_intervall", "checkpoint.save_interval"),
    ],
)
def test_what_is_meant_by_names_of_elsewhere_and_misspelt_ones(name, meant, tmp_path, capsys):
    assert f"{name} is unknown; did you mean {meant}?" in refusal([f"--{name}", "1"], capsys)
    section, _, key = name.rpartition(".")
    file = write(tmp_path / "run.yaml", f"{section}: {{{key}: 1}}" if section else f"{key}: 1")
    text = refusal(["--config", file], capsys)
    assert f"is unknown; did you mean {meant}?" in text or section not in {f.name for f in fields(RunConfig)}


def test_foreign_names_mean_settings_that_exist():
    settings = settings_of(RunConfig)
    assert set(SETTING_OF.values()) <= set(settings)
    assert not set(SETTING_OF) & {key.rpartition(".")[2] for key in settings}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.train_iter", "5"], "train.train_iter is unknown; did you mean train.train_iters?"),
        (["--train.train_it", "5"], "train.train_it is unknown; did you mean train.train_iters?"),
        (["--conf", "run.yaml"], "conf is unknown; --help shows every setting."),
        (["--train.lr=1"], "train.lr is unknown; did you mean optimizer.lr?"),
        (["--zzz", "5"], "zzz is unknown; --help shows every setting."),
        (["--train.train_iters", "abc"], "train.train_iters is 'abc'; it must be an integer."),
        (["--train.train_iters=2.5"], "train.train_iters is '2.5'; it must be an integer."),
        (["--train.train_iters", "true"], "train.train_iters is 'true'; it must be an integer."),
        (["--train.seed", "null"], "train.seed is 'null'; it must be an integer."),
        (["--optimizer.lr", "fast"], "optimizer.lr is 'fast'; it must be a number."),
        (["--data.mock", "1"], "data.mock is '1'; it must be true or false."),
        (["--model.kv_channels", "x"], "model.kv_channels is 'x'; it must be an integer or null."),
        (["--train.precision", "fp8"], "train.precision is 'fp8'; it must be one of fp32, bf16."),
        (
            ["--data.data_path", "[a, [b]]"],
            "data.data_path is '[a, [b]]'; it must be a list of texts, such as [a, b].",
        ),
        (["--data.data_path", "[a"], "data.data_path is '[a'; it must be a list of texts, such as [a, b]."),
        (
            ["--train", "5"],
            "train is a section; its settings are train.train_iters, train.micro_batch_size, ",
        ),
        (
            ["--model.rope_scaling", "x"],
            "model.rope_scaling is a section; its settings are model.rope_scaling.type, ",
        ),
        (["--compression.policy.stage", "retrofit"], f"error: {BELONGS}\n"),
        (
            ["--compression.policy.name", "dmcc", "--compression.policy.stage", "retrofit"],
            (
                "error: compression.policy.name is 'dmcc'; it must be one of dense, dmc, dms, forgetful; did "
                "you mean dmc?\n"
            ),
        ),
        (
            ["--compression.policy.stge", "x"],
            "policy.stge is unknown; did you mean compression.policy.stage?",
        ),
        (
            ["--compression.policy.name=dmc", "--compression.policy.stage", "retro"],
            (
                "compression.policy.stage is 'retro'; it must be one of zero_out, retrofit, finetune; did "
                "you mean retrofit?"
            ),
        ),
        (
            ["--data.split", "9,1", "3"],
            "unrecognized arguments: 3; settings are given as --section.key VALUE.",
        ),
        (["--data.mock"], "--data.mock: expected one argument"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_wrong_options(argv, message, capsys):
    assert message in refusal(argv, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {train_iter: 5}", "run.yaml: train.train_iter is unknown; did you mean train.train_iters?"),
        ("trian: {seed: 5}", "run.yaml: trian is unknown; did you mean train?"),
        (
            "model: {rope_scaling: {fctor: 5}}",
            "model.rope_scaling.fctor is unknown; did you mean model.rope_scaling.factor?",
        ),
        ("train: 5", "run.yaml: train is '5'; it must be a mapping of names to values."),
        (BOMB, "is not valid YAML: it stands for more than 100,000 values by its aliases (*)."),
        ("a: &a [*a]", "line 1, column 4 is not valid YAML: an alias (*) refers to what it is in."),
        ("a: &a {b: {c: *a}}", "is not valid YAML: an alias (*) refers to what it is in."),
        ("a: " + "[" * 5000, "is not valid YAML: lists or mappings in one another, too deep to be read."),
        ("a: " + "{b: " * 5000, "is not valid YAML: lists or mappings in one another, too deep to be read."),
        ("[a, b]: c", "is not valid YAML: a list or mapping is no name of a setting"),
        ("{a: b}: c", "is not valid YAML: a list or mapping is no name of a setting"),
        ("<<: {a: 1}", "run.yaml: << is unknown"),
        (
            "compression: {policy: dmc}",
            "run.yaml: compression.policy is 'dmc'; it must be a mapping of names to values.",
        ),
        ("compression: {policy: {stage: finetune}}", f"run.yaml: {BELONGS}"),
        (
            "compression: {policy: {name: null}}",
            "compression.policy.name is None; it must be one of dense, dmc, dms, forgetful.",
        ),
        (
            "compression: {policy: {name: dmc, stge: x}}",
            "policy.stge is unknown; did you mean compression.policy.stage?",
        ),
        ("- train", "the configuration is ['train']; it must be a mapping of names to values."),
        ("train: {seed: [1]}", "run.yaml: train.seed is ['1']; it must be an integer."),
        ("train: {seed: null}", "run.yaml: train.seed is None; it must be an integer."),
        ("data: {split: }", "run.yaml: data.split is None; it must be a text."),
        ("data: {data_path: [a, null]}", "data.data_path is ['a', None]; it must be a list of texts"),
        ("data: {split: {a: b}}", "run.yaml: data.split is {'a': 'b'}; it must be a text."),
        ("train: {seed: 1, seed: 2}", "run.yaml, line 1, column 18 is not valid YAML: seed is given twice."),
        ("train: {seed: 1", "is not valid YAML"),
    ],
)
def test_wrong_files(text, message, tmp_path, capsys):
    assert message in refusal(["--config", write(tmp_path / "run.yaml", text)], capsys)


def test_all_problems_of_files_and_options_are_said_at_once(tmp_path, capsys):
    file = write(tmp_path / "run.yaml", "train: {seed: x, train_iter: 1}\ndata: {mock: 3}\n")
    said = refusal(["--config", file, "--optimizer.lr", "fast", "--compression.policy.eps", "1"], capsys)
    assert all(
        key in said for key in ("train.seed", "train.train_iter ", "data.mock", "optimizer.lr", "policy.eps")
    )


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert "cannot be read: No such file or directory." in refusal(
        ["--config", str(tmp_path / "none.yaml")], capsys
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is not a text in UTF-8" in refusal(["--config", str(tmp_path / "binary")], capsys)


def test_files_cannot_build_objects(tmp_path, capsys):
    file = write(tmp_path / "run.yaml", "data: {split: !!python/object/apply:os.getcwd []}\n")
    assert "data.split is []" in refusal(["--config", file], capsys)


def test_only_one_process_of_a_group_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("megatron_ext.console._PATIENCE_SECONDS", 0)
    with pytest.raises(SystemExit) as stop:
        exit_with("wrong")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def leaves(section, prefix=""):
    for entry in fields(section):
        hint = typing.get_type_hints(section)[entry.name]
        key = prefix + entry.name
        parts = [hint] if is_dataclass(hint) else variants_of(entry).values()
        for part in parts:
            yield from leaves(part, f"{key}.")
        if not parts:
            yield key, hint, entry.default


def test_help_explains_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, _, _ in leaves(RunConfig):
        assert f"--{key} " in shown
    assert "Tokens per sequence. (type: int, default: 1024)" in shown
    assert (
        "Save and exit cleanly after this long (for batch systems with time limits). (type: float | null"
        in shown
    )
    assert "train: Length, batch and numerics of the run:" in shown
    assert (
        "compression.policy: What is kept along the sequence: --compression.policy.name "
        "{dense,dmc,dms,forgetful} dense: "
        "Keep" in shown
    )
    assert "compression.policy dmc: --compression.policy.stage {zero_out,retrofit,finetune}" in shown
    assert "compression.policy forgetful: --compression.policy.age AGE Tokens after which" in shown


def test_help_needs_no_torch():
    program = (
        "import sys; from megatron_ext.command_line import parse_run_config; assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("option", ["--print-config", "--print_config"])
def test_print_config_can_be_run_again(option, tmp_path, capsys):
    argv = [
        "--compression.layer_types",
        "0_0_2_2",
        "--data.data_path",
        "[1,a]",
        "--optimizer.adam_eps",
        "1e-9",
    ]
    argv += ["--compression.policy.name", "dmc", "--compression.policy.temperature", "0.2"]
    with pytest.raises(SystemExit) as stop:
        parse_run_config([*argv, option])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert parse_run_config(["--config", write(tmp_path / "run.yaml", shown)]) == parse_run_config(argv)


# PyYAML does not write U+0085 so that it reads back; save_config notices it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85")) | st.sampled_from(
    ["null", "~", "0_1", "true", "1e3", "[a", "{"]
)
VALUES = {
    int: st.integers(-(2**60), 2**60),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: TEXTS,
    NoneType: st.none(),
    tuple[str, ...]: st.lists(TEXTS).map(tuple),
    tuple[float, ...]: st.lists(st.floats(allow_nan=False)).map(tuple),
}


def values_of(hint) -> st.SearchStrategy:
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    return VALUES[hint] if hint in VALUES else st.one_of(*map(values_of, typing.get_args(hint)))


def build(section, draw):
    values = {}
    hints = typing.get_type_hints(section)
    for entry in fields(section):
        hint = hints[entry.name]
        if variants := variants_of(entry):
            hint = variants[draw(st.sampled_from(sorted(variants)))]
        values[entry.name] = build(hint, draw) if is_dataclass(hint) else draw(values_of(hint))
    return section(**values)


@st.composite
def runs(draw):
    return build(RunConfig, draw)


@settings(max_examples=25, deadline=None)
@given(runs())
def test_dictionary_round_trip(run):
    sections = config_to_dict(run)
    assert isinstance(sections["data"]["data_path"], list)
    assert config_from_dict(sections) == run
    assert config_from_dict(json.loads(json.dumps(sections))) == run
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(sections))) == run


@settings(max_examples=15, deadline=None)
@given(run=runs())
def test_saved_files_read_back_equal(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    save_config(run, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"]
    assert parse_run_config(["--config", str(path)]) == run


def test_dictionaries_may_leave_fields_out_but_not_invent_them():
    assert config_from_dict({"train": {"seed": 7}}).train.seed == 7
    with pytest.raises(ConfigError, match=r"^train.sed is unknown; did you mean train.seed\?$"):
        config_from_dict({"train": {"sed": 7}})
    with pytest.raises(ConfigError, match=r"^train.seed is 1.5; it must be an integer.$"):
        config_from_dict({"train": {"seed": 1.5}})
    with pytest.raises(
        ConfigError, match=r"^compression.policy.window belongs to policy dmc or dms; compression.policy.name"
    ):
        config_from_dict({"compression": {"policy": {"window": 3}}})


def test_a_configuration_that_reads_back_differently_is_not_put_in_place(tmp_path):
    path = tmp_path / "run.yaml"
    save_config(RunConfig(), path)
    before = path.read_text()
    run = config_from_dict({"logging": {"wandb_name": "\x85"}})
    with pytest.raises(ValueError, match="would be read back differently"):
        save_config(run, path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]
