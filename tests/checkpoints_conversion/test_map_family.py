"""A checkpoint that was trained with a family of maps: exported with any of them, exactly and without the
weights that it does not need; and refused where nobody says which is meant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lckv.models
from checkpoints_conversion.__main__ import main
from checkpoints_conversion.conversion_record import read_record
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.formats.megatron import MegatronCheckpoint
from checkpoints_conversion.megatron_logits import write_logits
from lckv_megatron.commands import dump_logits, kv_memory, perplexity, plan
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.restoring.model import restore
from tests.lckv.families.tiny_models import saved_model
from tests.megatron_ext.training.runs import logged_to, reports, tiny_run, train
from tests.ranks import run_on_ranks

assert lckv.models
FAMILY = "0_0|1_1|2_2|3"
TOKENS = torch.arange(24).view(2, 12) * 5 % 97


@pytest.fixture(autouse=True)
def _megatron_in_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are there already compute Megatron's logits, instead of new processes."""

    def compute(*arguments: Any, layer_types: str | None, timeout_seconds: float) -> None:
        run_on_ranks(1, write_logits, *arguments, layer_types, timeout=timeout_seconds)

    monkeypatch.setattr("checkpoints_conversion.verify.compute", compute)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoints of a run, and metrics.jsonl beside them."""
    folder = tmp_path_factory.mktemp("family")
    run = tiny_run(
        model={"qk_layernorm": True, "add_qkv_bias": True},
        compression={"layer_types": FAMILY},
        train={
            "train_iters": 4,
            "eval_interval": 2,
            "eval_iters": 1,
            "eval_layer_types": ["0_0_2_2", "0_1_2_3"],
        },
        optimizer={"lr_warmup_iters": 0},
        checkpoint={"save": str(folder / "checkpoints")},
    )
    run_on_ranks(1, train, logged_to(run, folder / "metrics.jsonl"))
    return folder


def dump(load: Path, folder: Path, *options: str) -> int:
    """Runs inside a rank: logits.npy of TOKENS; the exit status."""
    np.save(folder / "tokens.npy", TOKENS.numpy())
    files = ["--tokens", str(folder / "tokens.npy"), "--output", str(folder / "logits.npy")]
    return dump_logits.main(["--load", str(load), *files, *options])


@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_0_0_3", "0_1_2_3"])
def test_any_map_is_exported_exactly(trained: Path, layer_types: str, tmp_path: Path) -> None:
    source = trained / "checkpoints"
    description = megatron_to_hf(source, tmp_path / "hf", layer_types=layer_types, proof="always")
    assert description.compression.layer_types == layer_types
    weights, owners = load_file(tmp_path / "hf" / "model.safetensors"), set(map(int, layer_types.split("_")))
    for name in ("k_proj.weight", "v_proj.bias", "k_norm.weight"):
        with_it = {int(key.split(".")[2]) for key in weights if key.endswith(name)}
        assert with_it == owners
    checkpoint = MegatronCheckpoint(source)
    for layer in range(4):  # 2 KV heads, each of 2 query heads, a key and a value, of 8 channels
        fused = checkpoint.read(f"decoder.layers.{layer}.self_attention.linear_qkv.weight").unflatten(
            0, (2, 4, 8)
        )
        prefix = f"model.layers.{layer}.self_attn"
        assert torch.equal(weights[f"{prefix}.q_proj.weight"], fused[:, :2].flatten(0, 2))
        if layer in owners:
            assert torch.equal(weights[f"{prefix}.v_proj.weight"], fused[:, 3].flatten(0, 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits
    layout = "--pipeline-model-parallel-size=2"
    assert run_on_ranks(2, dump, source, tmp_path, "--layer-types", layer_types, layout) == [0, 0]
    expected = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    evaluated = {
        line["iteration"]: line for line in reports(trained / "metrics.jsonl") if "validation_loss" in line
    }
    card, loss = (
        (tmp_path / "hf" / "README.md").read_text(),
        evaluated[4].get(f"validation_loss/{layer_types}"),
    )
    assert f"from a family, `{FAMILY}`" in card
    assert ("Validation loss" in card) == (loss is not None)
    assert loss is None or f"Validation loss {loss:.4f}" in card
    record = read_record(tmp_path / "hf")
    assert record is not None
    assert record.training is not None
    noted = record.training["progress"].get("measured", {}).get("validation", {}).get("loss")
    before = evaluated[2].get(f"validation_loss/{layer_types}")  # a checkpoint is saved, then evaluated
    assert noted == (None if before is None else pytest.approx(before))


def restored(load: Path) -> None:
    """Runs inside a rank."""
    initialize(ParallelConfig(), seed=1)
    restore(load, ParallelConfig())


def test_nobody_guesses_which_map_is_meant(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = trained / "checkpoints"
    export = ["megatron-to-hf", "--megatron-path", str(source), "--hf-path", str(tmp_path / "hf")]
    missing = (
        f"was trained with a family of maps, {FAMILY}, so that it must be said which one is meant: give "
    )
    for arguments in (export, ["inspect", str(source)]):
        assert main(arguments) == 2
        assert f"{missing}--layer-types MAP, such as 0_0_0_0." in capfd.readouterr().err
    assert main([*export, "--layer-types", "0_0_1_3"]) == 2
    assert (
        f"--layer-types is 0_0_1_3; it is no map of the family {FAMILY}: give one that is"
        in capfd.readouterr().err
    )
    assert main([*export, "--layer-types", "0_0_1"]) == 2
    assert "it has 3 entries but the model has 4 layers" in capfd.readouterr().err
    assert not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match="give --layer-types MAP"):
        run_on_ranks(1, restored, source)
    assert main(["inspect", str(source), "--layer-types", "0_0_2_2"]) == 0
    assert "0_0_2_2: keys and values computed in 2 of 4 layers" in capfd.readouterr().out
    (tmp_path / "text.txt").write_text("a text")
    perplexity_of = [
        "--model",
        str(tmp_path),
        "--text",
        str(tmp_path / "text.txt"),
        "--layer-types",
        "0_0_2_2",
    ]
    assert perplexity.main(perplexity_of) == 2
    assert "--layer-types is 0_0_2_2, which is for --load" in capfd.readouterr().err


def test_a_plain_model_becomes_a_family_and_comes_back(tmp_path: Path) -> None:
    saved_model(tmp_path / "plain", "qwen3", num_hidden_layers=4)
    changes = {"compression.layer_types": FAMILY}
    hf_to_megatron(str(tmp_path / "plain"), tmp_path / "family", changes=changes, proof="always")
    assert MegatronCheckpoint(tmp_path / "family").description.compression.layer_types == FAMILY
    megatron_to_hf(tmp_path / "family", tmp_path / "back", layer_types="0_1_2_3", proof="always")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hf_to_megatron(
        str(tmp_path / "plain"), tmp_path / "map", changes={"compression.layer_types": "0_0_2_2"}, how="copy"
    )
    for name, source, options in (("one", "family", {"layer_types": "0_0_2_2"}), ("other", "map", {})):
        megatron_to_hf(tmp_path / source, tmp_path / name, proof="never", **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    verify = ["verify", "--hf-path", str(tmp_path / "plain"), "--megatron-path", str(tmp_path / "family")]
    for some in ([], ["--layers", "0,3"]):
        assert main([*verify, "--layer-types", "0_0_0_3", "--seq-length", "16", *some]) == 0


@pytest.mark.parametrize(
    ("layer_types", "how", "said"),
    [
        ("0_0|1_1_2|3", "average", "in which layers 2 never compute keys and values"),
        ("0_0|1_1_2|3", "svd", "--init is svd, which fits keys and values to one map"),
        ("0_0|1_1_2|3", "copy", None),
    ],
)
def test_layers_without_weights_in_every_map(
    layer_types: str, how: Any, said: str | None, tmp_path: Path
) -> None:
    saved_model(tmp_path / "plain", "llama", num_hidden_layers=4)
    changes, target = {"compression.layer_types": layer_types}, tmp_path / "family"
    if said is not None:
        with pytest.raises(ConfigError, match=said):
            hf_to_megatron(str(tmp_path / "plain"), target, changes=changes, how=how, proof="never")
        return
    hf_to_megatron(str(tmp_path / "plain"), target, changes=changes, how=how, proof="always")
    assert "decoder.layers.2.self_attention.linear_q.weight" in MegatronCheckpoint(target).infos()
    megatron_to_hf(target, tmp_path / "back", layer_types="0_1_1_3", proof="always")
    with pytest.raises(ConfigError, match=r"cannot be made from this model: its map is 0_1_1_3"):
        hf_to_megatron(str(tmp_path / "back"), tmp_path / "again", changes=changes, how=how, proof="never")


def test_what_is_planned_for_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model.num_layers", "4", "--model.vocab_size", "97", "--data.mock", "true"]
    settings += ["--compression.layer_types", FAMILY, "--train.global_batch_size", "4"]
    assert plan.main(settings) == 0
    said = capsys.readouterr().out
    assert f"each step draws its map from {FAMILY} (8 maps)." in said
    assert "keys and values computed in 4 of 4 layers" in said
    assert "a plain model's step, the mean over the maps" in said
    with pytest.raises(SystemExit) as stopped:
        plan.main([*settings, "--dry-run"])
    assert stopped.value.code == 2
    assert "--dry-run runs steps with one map" in capsys.readouterr().err
    assert kv_memory.main(["--memory", "1GiB", *settings]) == 2
    assert "here one map is needed" in capsys.readouterr().err
