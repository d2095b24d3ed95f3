"""The command line: options, help that teaches, errors as one message."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion import __main__ as program
from checkpoints_conversion import convert
from checkpoints_conversion.compression_options import CompressionSection, changed_compression
from checkpoints_conversion.options import build_parser
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.errors import ConfigError
from megatron_ext.settings import settings_of

SUBCOMMANDS = ("hf-to-megatron", "megatron-to-hf", "legacy-to-megatron", "verify", "inspect")


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        program.main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys=capsys)
    assert all(name in said for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_has_examples_that_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys=capsys).replace("\\\n", "")
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"  {name} ")]
    assert examples
    for example in examples:
        build_parser("convert").parse_args(shlex.split(example))


def test_help_explains_the_settings_of_compression(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of("hf-to-megatron", capsys=capsys)
    for key in settings_of(CompressionSection):
        assert f"--{key} VALUE" in said


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the conversions were called with."""
    found: dict[str, Any] = {}

    def note(*arguments: Any, **options: Any) -> None:
        found.update(options, arguments=arguments)

    for name in ("hf_to_megatron", "megatron_to_hf", "legacy_to_megatron"):
        monkeypatch.setattr(convert, name, note)
    for name in ("check_free", "check_huggingface", "check_export", "check_legacy"):
        monkeypatch.setattr(program, name, lambda *places: None)
    return found


def test_hf_to_megatron(called: dict[str, Any]) -> None:
    command = (
        "hf-to-megatron --hf-path a/b --megatron-path c --init copy --dtype bfloat16 --no-verify "
        "--allow-pickle"
    )
    settings = "--compression.layer_types 0_1 --compression.policy.name dmc --compression.policy.window null"
    assert program.main([*command.split(), *settings.split()]) == 0
    assert called == {
        "arguments": ("a/b", Path("c")),
        "changes": {
            "compression.layer_types": "0_1",
            "compression.policy.name": "dmc",
            "compression.policy.window": None,
        },
        "how": "copy",
        "calibration": None,
        "dtype": torch.bfloat16,
        "allow_pickle": True,
        "proof": "never",
    }


def test_megatron_to_hf(called: dict[str, Any]) -> None:
    command = (
        "megatron-to-hf --megatron-path a --hf-path b --family llama --max-shard-size 1.5GB --tokenizer t "
        "--verify always --layer-types 0_1"
    )
    assert program.main(command.split()) == 0
    assert called == {
        "arguments": (Path("a"), Path("b")),
        "layer_types": "0_1",
        "family": "llama",
        "dtype": None,
        "max_shard_bytes": 1_500_000_000,
        "tokenizer": Path("t"),
        "metrics_file": None,
        "proof": "always",
    }


def test_legacy(called: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    command = "legacy-to-megatron --legacy-path a --megatron-path b --vocab-size 32000 --argument"
    assert program.main([*command.split(), "cr=4", "--argument", "tokenizer_type=null"]) == 0
    assert (called["vocab_size"], called["proof"]) == (32000, "auto")
    assert called["given"] == {"cr": 4, "tokenizer_type": None}
    assert program.main([*command.split(), "cr"]) == 2
    assert "--argument is cr; it must be NAME=VALUE." in capfd.readouterr().err


@pytest.mark.parametrize(("size", "expected"), [("5", 5), ("200k", 200_000), ("5 TB", 5 * 10**12)])
def test_sizes(size: str, expected: int, called: dict[str, Any]) -> None:
    command = ["megatron-to-hf", "--megatron-path", "a", "--hf-path", "b", f"--max-shard-size={size}"]
    assert program.main(command) == 0
    assert called["max_shard_bytes"] == expected


@pytest.mark.parametrize("size", ["GB", "0GB", "-1GB", "5 potatoes"])
def test_a_bad_size(size: str, called: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    command = ["megatron-to-hf", "--megatron-path", "a", "--hf-path", "b", f"--max-shard-size={size}"]
    with pytest.raises(SystemExit) as ended:
        program.main(command)
    assert ended.value.code == 2
    assert f"argument --max-shard-size: {size!r} is not a size in memory" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "convert",
        "hf-to-megatron --hf-path a",
        "inspect a --compression.layer_types 0",
        "verify --hf a --megatron b",
    ],
)
def test_options_that_are_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(command.split())
    assert ended.value.code == 2
    assert "usage: python -m checkpoints_conversion" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "megatron_to_hf", stopped)
    monkeypatch.setattr(program, "check_export", lambda *places: None)
    assert program.main(["megatron-to-hf", "--megatron-path", "a", "--hf-path", "b"]) == 130
    assert "stopped by SIGINT; nothing was written" in capsys.readouterr().err


def test_errors_are_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hf-path", str(tmp_path / "no" / "model"), "--megatron-path", str(tmp_path / "new")]
    assert program.main(["hf-to-megatron", *arguments]) == 2
    said = capfd.readouterr().err
    assert "is not a folder that exists" in said
    assert "Traceback" not in said


def test_settings_given_go_before_those_of_the_model() -> None:
    before = CompressionConfig("0_0_2_2", forward_passes=3)
    assert changed_compression(before, {"compression.forward_passes": "5"}) == CompressionConfig("0_0_2_2", 5)
    assert changed_compression(before, {}) == before
    dmc = CompressionConfig(policy=DMCConfig(stage="finetune", window=None))
    assert changed_compression(dmc, {}) == dmc
    assert changed_compression(dmc, {"compression.policy.name": "dense"}) == CompressionConfig()
    with pytest.raises(ConfigError, match=r"compression\.policy\.window belongs to policy dmc"):
        changed_compression(before, {"compression.policy.window": "3"})
