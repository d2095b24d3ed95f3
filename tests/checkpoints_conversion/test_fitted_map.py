"""Sharing maps fitted to a text: layers run as transformers runs them, a model whose layers are copies in
another basis keeps its function, whole conversions, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints_conversion import convert
from checkpoints_conversion.__main__ import main
from checkpoints_conversion.calibration import Calibration
from checkpoints_conversion.conversion_record import read_record
from checkpoints_conversion.convert import megatron_to_hf
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.fitted_map import FittedSource, merged_layers
from checkpoints_conversion.formats.megatron import MegatronCheckpoint, write_checkpoint
from checkpoints_conversion.initialization import initialize
from checkpoints_conversion.opening import OpenModel, open_huggingface
from checkpoints_conversion.streamed_layer import StreamedLayer, embed
from checkpoints_conversion.writing import write_huggingface
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.sharing.initialization import Initialization
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.low_rank import as_channels, as_pairs
from lckv.weights.tensors import TensorSource
from megatron_ext.errors import ConfigError
from tests.checkpoints_conversion.test_convert import _megatron_in_a_pool  # noqa: F401 - a fixture
from tests.lckv.families.tiny_models import saved_model, tiny_model
from tests.lckv.tokenizer_json import TEXTS, write_tokenizer_json

VOCAB = 300
TOKENS = torch.randint(VOCAB, (6, 40), generator=torch.Generator().manual_seed(3))
SVD = ("--init", "svd", "--calibration-text")


def opened(folder: Path, model: PreTrainedModel) -> OpenModel:
    model.save_pretrained(folder)
    return open_huggingface(folder)


def shared_model(
    source: OpenModel, layer_types: str, how: Initialization, folder: Path, **settings: int
) -> PreTrainedModel:
    """The Hugging Face model of the conversion to a map."""
    import lckv.models  # noqa: F401 - lets AutoModelForCausalLM know LCKVLlamaForCausalLM

    compression = replace(source.description.compression, layer_types=layer_types, **settings)
    tokens = TOKENS if how == "svd" else None
    made, description, done = initialize(source.source, source.description, compression, how, tokens)
    assert done == how
    folder.mkdir()
    write_huggingface(folder, description, made)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_streamed_layer_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, vocab_size=VOCAB)
    source = opened(tmp_path, model)
    description, tokens = source.description, TOKENS[:2, :30]
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(embed(source.source, tokens), states[0])
    layer_types = description.compression.map(description.model.num_layers)
    # The last of transformers' states has gone through the final norm.
    for index in range(description.model.num_layers - 1):
        layer = StreamedLayer.read(source.source, description.model, index)
        inputs = layer.inputs(states[index])
        sight = description.compression.sight(layer_types[index])
        heads = layer.attend(inputs, layer.keys_values(inputs), sight)
        middle = states[index] + heads @ layer.output_matrix.T
        torch.testing.assert_close(middle + layer.mlp(middle), states[index + 1], atol=2e-5, rtol=1e-4)


def in_another_basis(model: PreTrainedModel, order: list[int] | None = None) -> None:
    """Layer 0 adds nothing, and layer 1, which so has the same input, has its keys and values, every pair of
    key channels turned and scaled, values mixed: one function in two bases."""
    below, above = (model.model.layers[index] for index in (0, 1))
    groups, channels = model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator().manual_seed(5)
    factors = torch.complex(*torch.randn(2, groups, channels // 2, 1, generator=generator))
    mixes = torch.randn(groups, channels, channels, generator=generator)
    below.self_attn.o_proj.weight.zero_()
    below.mlp.down_proj.weight.zero_()
    above.input_layernorm.weight.copy_(below.input_layernorm.weight)
    for kind in ("weight", "bias"):
        own, other = above.self_attn, below.self_attn
        projections = other.k_proj, other.v_proj, own.k_proj, own.v_proj
        key, value, own_key, own_value = (getattr(projection, kind) for projection in projections)
        if key is None:
            continue
        rows = key.view(groups, channels, -1)
        own_key.copy_(as_channels(as_pairs(rows) * factors).view_as(key))
        own_value.copy_((mixes @ value.view(groups, channels, -1)).view_as(value))


@pytest.mark.parametrize(
    ("family", "groups"),
    [("llama", 1), ("llama", 2), ("llama", 4), ("qwen2", 2)],
    ids=lambda value: str(value),
)
def test_one_function_in_two_bases_is_kept(family: str, groups: int, tmp_path: Path) -> None:
    settings = {"sliding_window": None, "use_sliding_window": False} if family == "qwen2" else {}
    model = tiny_model(family, vocab_size=VOCAB, num_key_value_heads=groups, head_dim=8, **settings)
    with torch.no_grad():
        in_another_basis(model)
    source = opened(tmp_path / "plain", model)
    expected = logits(model)
    fitted = logits(shared_model(source, "0_0_2", "svd", tmp_path / "svd"))
    torch.testing.assert_close(fitted, expected, atol=2e-4 * expected.abs().max().item(), rtol=0)
    for how in ("average", "copy"):
        other = logits(shared_model(source, "0_0_2", how, tmp_path / how))
        assert (other - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize("layer_types", ["0_0_2", "0_2_2", "1_0_2", "1_1_1", "0_1+0_1", "0_1_1+0"])
def test_a_fit_is_nearer_to_the_plain_model(layer_types: str, tmp_path: Path) -> None:
    """Also where layers read from above, so that they do not see their own position, or swap."""
    model = tiny_model("llama", vocab_size=VOCAB)
    source = opened(tmp_path / "plain", model)
    expected = logits(model)
    errors = {}
    for how in ("svd", "average"):
        made = shared_model(source, layer_types, how, tmp_path / how)
        errors[how] = (logits(made) - expected).square().mean().item()
    assert errors["svd"] < errors["average"]


def conversion(folder: Path, family: str, tmp_path: Path, *words: str) -> int:
    """The program's status: it makes and proves a checkpoint of a tiny model with a tokenizer."""
    saved_model(folder, family, vocab_size=VOCAB)
    write_tokenizer_json(folder / "tokenizer.json")
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    options = ["--hf-path", str(folder), "--megatron-path", str(tmp_path / "megatron"), "--verify", "always"]
    text = ["--init", "svd", "--calibration-text", str(tmp_path / "text.txt"), "--calibration-tokens", "64"]
    return main(["hf-to-megatron", *options, *text, *words])


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "megatron"
    assert conversion(tmp_path / "plain", "llama", tmp_path, "--compression.layer_types", "0_2_2") == 0
    record = read_record(MegatronCheckpoint(made).path)
    assert record is not None and record.calibration is not None
    assert (record.initialization, record.calibration["file"]) == ("svd", "text.txt")
    assert record.calibration["tokens"] == 64
    assert len(record.calibration["sha256"]) == 64
    megatron_to_hf(made, tmp_path / "back", proof="always", tokenizer=tmp_path / "plain")
    assert "fitted to a text" in (tmp_path / "back" / "README.md").read_text()
    models = ["--hf-path", str(tmp_path / "plain"), "--megatron-path", str(made)]
    assert main(["verify", *models]) == 2
    assert "were fitted to a text (--init svd)" in capsys.readouterr().err
    ranks = ["--parallel.tensor_model_parallel_size", "2"]
    assert main(["verify", *models[2:], "--hf-path", str(tmp_path / "back"), *ranks]) == 0


def test_a_fit_is_deterministic(tmp_path: Path) -> None:
    source = opened(tmp_path, tiny_model("llama", vocab_size=VOCAB))
    compression = CompressionConfig("0_2_2")
    first, second = (
        initialize(source.source, source.description, compression, "svd", TOKENS)[0] for _ in range(2)
    )
    for name in first.infos():
        assert torch.equal(first.read(name), second.read(name))
        assert torch.equal(first.read(name, slice(1, 3)), first.read(name)[1:3])


def test_merged_layers() -> None:
    def merged(text: str) -> tuple[int, ...]:
        return merged_layers(LayerTypes.parse(text, 4))

    assert merged("0_1_2_3") == ()
    assert merged("0_2_2_3") == (1, 2)
    assert merged("1_0_2_3") == (0, 1)
    assert merged("0s_1_2_2") == (2, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SVD[:2]], "there is no text: give --calibration-text"),
        (["--init", "average", "--calibration-text", "TEXT"], "--init is average, which reads no text"),
        (["--calibration-tokens", "64"], "--calibration-tokens is given without --calibration-text"),
        ([*SVD, "absent"], "--calibration-text absent cannot be read"),
        ([*SVD, "TEXT", "--calibration-tokens", "700"], "a multiple of 512"),
        ([*SVD, "TEXT", "--calibration-tokens", "1"], "at least 2"),
        ([*SVD, "TEXT", "--calibration-tokens", "100"], "knows 64 positions"),
        ([*SVD, "SHORT", "--calibration-tokens", "64"], "fewer than"),
        ([*SVD, "BINARY", "--calibration-tokens", "8"], "is no text in UTF-8"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_model(tmp_path / "plain", "llama", vocab_size=VOCAB)
    write_tokenizer_json(tmp_path / "plain" / "tokenizer.json")
    for name, content in (
        ("TEXT", "".join(TEXTS).encode()),
        ("SHORT", b"hello"),
        ("BINARY", b"\xff\xfe\x00"),
    ):
        (tmp_path / name).write_bytes(content)
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    options = ["--hf-path", str(tmp_path / "plain"), "--megatron-path", str(tmp_path / "megatron")]
    assert main(["hf-to-megatron", *options, "--compression.layer_types", "0_2_2", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConversionError, match="holds no tokenizer"):
        Calibration(tmp_path / "text").tokens(tmp_path, 512)
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration(tmp_path / "absent")


def test_models_that_cannot_be_fitted(tmp_path: Path) -> None:
    normed = opened(tmp_path / "qwen3", tiny_model("qwen3", vocab_size=VOCAB))
    with pytest.raises(ConversionError, match=r"model\.qk_layernorm"):
        initialize(normed.source, normed.description, CompressionConfig("0_0_2"), "svd", TOKENS)
    plain = opened(tmp_path / "llama", tiny_model("llama", vocab_size=VOCAB))
    arguments = plain.source, plain.description
    with_policy = CompressionConfig("0_0_2", policy=DMCConfig(stage="zero_out"))
    with pytest.raises(ConversionError, match=r"--init is svd, but compression\.policy is dmc"):
        initialize(*arguments, with_policy, "svd", TOKENS)
    with pytest.raises(ConversionError, match="layer 2 reads keys of one layer and values of another, which"):
        initialize(*arguments, CompressionConfig("0_1_1/0"), "svd", TOKENS)
    with pytest.raises(ConversionError, match="so that nothing is fitted"):
        initialize(*arguments, CompressionConfig(), "svd", TOKENS)
    shared, description, _ = initialize(*arguments, CompressionConfig("0_0_2"), "copy")
    with pytest.raises(ConversionError, match="so that nothing is fitted"):
        initialize(shared, description, CompressionConfig("0_0_2"), "svd", TOKENS)


def test_a_text_that_breaks_the_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e38)
    source = opened(tmp_path, model)
    with pytest.raises(ConversionError, match="became infinite or NaN"):
        initialize(source.source, source.description, CompressionConfig("0_1_1"), "svd", TOKENS)


def test_a_fit_that_is_written_wrongly_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(staging: Path, description: ModelDescription, source: TensorSource, **options: Any) -> Path:
        name = "decoder.layers.1.self_attention.linear_proj.weight"
        fitted = FittedSource(source, {name: 1.01 * source.read(name)})
        return write_checkpoint(staging, description, fitted, **options)

    monkeypatch.setattr(convert, "write_checkpoint", damaged)
    status = conversion(tmp_path / "plain", "llama", tmp_path, "--compression.layer_types", "0_2_2")
    assert status != 0
    assert not (tmp_path / "megatron").exists()
