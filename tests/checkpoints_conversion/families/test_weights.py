"""Weights from Hugging Face's names to canonical ones and back."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.families import mapping
from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.lckv_llama import LCKV_LLAMA
from checkpoints_conversion.families.llama import LLAMA
from checkpoints_conversion.families.registry import FAMILIES, describe
from checkpoints_conversion.formats.huggingface import HuggingFaceFolder, read_config_file, write_safetensors
from checkpoints_conversion.tensors import (
    ConversionError,
    MemorySource,
    TensorInfo,
    TensorSource,
    check_tensors,
)
from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig
from tests.checkpoints_conversion.tiny_models import CLASSES, SIZES, logits, saved_model, tiny_model
from tests.golden.lckv_models import NAMES, Golden


def _whole(source: TensorSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _description(**settings: Any) -> ModelDescription:
    """Of a Llama of 3 layers, with settings of the model or the compression."""
    compression = {name: settings.pop(name) for name in ("layer_types", "sliding_window") if name in settings}
    model = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 20,
        "num_attention_heads": 4,
        "vocab_size": 11,
    }
    return ModelDescription(
        model=ModelConfig(**(model | {"max_position_embeddings": 8} | settings)),
        compression=CompressionConfig(**compression),
        family="lckv-llama",
        dtype=torch.float32,
    )


def _random(infos: dict[str, TensorInfo]) -> MemorySource:
    generator = torch.Generator().manual_seed(5)
    return MemorySource(
        {name: torch.randn(info.shape, generator=generator).to(info.dtype) for name, info in infos.items()}
    )


HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", HEADS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_model_comes_back_with_the_same_weights_and_logits(
    family: str, groups: str, tied: bool, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    model = saved_model(before, family, num_key_value_heads=HEADS[groups], tie_word_embeddings=tied)
    folder = HuggingFaceFolder(before)
    description = describe(read_config_file(before), folder.infos())
    canonical = FAMILIES[family].canonical_from_hf(folder, description, before)
    check_tensors(canonical.infos(), description.expected_tensors(), before)
    assert list(canonical.infos()) == list(description.expected_tensors())

    held = MemorySource(_whole(canonical))
    back = FAMILIES[family].hf_from_canonical(held, description)
    assert back.infos() == FAMILIES[family].hf_tensors(description)
    _assert_equal(_whole(back), _whole(folder))
    _assert_equal(_whole(FAMILIES[family].canonical_from_hf(back, description)), dict(held.tensors))

    after.mkdir()
    write_safetensors(after, back, max_shard_bytes=20_000)
    (after / "config.json").write_text(json.dumps(FAMILIES[family].write_config(description)))
    again = CLASSES[family][1].from_pretrained(after).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_where_the_golden_models_have_them(name: str) -> None:
    golden = Golden.load(name)
    description = ModelDescription(
        model=replace(golden.model, max_position_embeddings=32),
        compression=golden.compression,
        family="lckv-llama",
        dtype=torch.float32,
    )
    theirs = {
        name: tensor for name, tensor in golden.tensors.items() if name.startswith(("model.", "lm_head."))
    }
    canonical = LCKV_LLAMA.canonical_from_hf(MemorySource(theirs), description)
    _assert_equal(_whole(canonical), golden.weights())
    _assert_equal(_whole(LCKV_LLAMA.hf_from_canonical(canonical, description)), theirs)


@given(
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    width=st.sampled_from([2, 4]),
    bias=st.booleans(),
    norm=st.booleans(),
    layer_types=st.sampled_from([None, "0_0_0", "0_2_2", "2_2_2", "1_1_2"]),
)
def test_query_key_value_are_interleaved_by_key_value_head(
    groups: int, queries: int, width: int, bias: bool, norm: bool, layer_types: str | None
) -> None:
    description = _description(
        hidden_size=5, num_attention_heads=groups * queries, num_query_groups=groups, kv_channels=width,
        add_qkv_bias=bias, qk_layernorm=norm, layer_types=layer_types,
    )  # fmt: skip
    theirs = _random(LCKV_LLAMA.hf_tensors(description))
    canonical = LCKV_LLAMA.canonical_from_hf(theirs, description)
    for index in range(3):
        ours = f"decoder.layers.{index}.self_attention."
        attention = f"model.layers.{index}.self_attn."
        computes_kv = index in description.compression.map(3).kv_layers
        for kind in ("weight", "bias") if bias else ("weight",):
            query = theirs.tensors[f"{attention}q_proj.{kind}"]
            if not computes_kv:
                assert torch.equal(canonical.read(f"{ours}linear_q.{kind}"), query)
                assert f"{attention}k_proj.{kind}" not in theirs.tensors
                continue
            key, value = (theirs.tensors[f"{attention}{part}_proj.{kind}"] for part in "kv")
            rows = []
            for head in range(groups):
                rows += [query[head * queries * width : (head + 1) * queries * width]]
                rows += [part[head * width : (head + 1) * width] for part in (key, value)]
            assert torch.equal(canonical.read(f"{ours}linear_qkv.{kind}"), torch.cat(rows))
        assert (f"{ours}k_layernorm.weight" in canonical.infos()) == (norm and computes_kv)
        if norm:
            assert torch.equal(
                canonical.read(f"{ours}q_layernorm.weight"), theirs.tensors[f"{attention}q_norm.weight"]
            )
    _assert_equal(_whole(LCKV_LLAMA.hf_from_canonical(canonical, description)), dict(theirs.tensors))


@given(data=st.data(), chunk=st.sampled_from([1, 100, 1000, 10**6]))
def test_any_rows_are_those_of_the_whole(data: st.DataObject, chunk: int) -> None:
    description = _description(num_query_groups=2, add_qkv_bias=True, layer_types="0_2_2")
    theirs = _random(LCKV_LLAMA.hf_tensors(description))
    canonical = LCKV_LLAMA.canonical_from_hf(theirs, description)
    whole = MemorySource(_whole(canonical))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "CHUNK_BYTES", chunk)
        for source, expected in (
            (canonical, whole),
            (LCKV_LLAMA.hf_from_canonical(whole, description), theirs),
        ):
            name = data.draw(st.sampled_from(list(expected.tensors)))
            count = len(expected.tensors[name])
            start = data.draw(st.integers(0, count))
            rows = slice(start, data.draw(st.integers(start, count)))
            assert torch.equal(source.read(name, rows), expected.tensors[name][rows])


@dataclass(frozen=True)
class _WatchedSource:
    """Notes what is read."""

    source: TensorSource
    sizes: list[int] = field(default_factory=list)

    def infos(self) -> Any:
        return self.source.infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.source.read(name, rows)
        self.sizes.append(tensor.nbytes)
        return tensor


@pytest.mark.parametrize("direction", ["canonical_from_hf", "hf_from_canonical"])
def test_fused_tensors_are_read_in_pieces(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "CHUNK_BYTES", 500)
    description = _description(num_query_groups=2)
    infos = (
        LCKV_LLAMA.hf_tensors(description)
        if direction == "canonical_from_hf"
        else description.expected_tensors()
    )
    watched = _WatchedSource(_random(infos))
    source = getattr(LCKV_LLAMA, direction)(watched, description)
    assert watched.sizes == []
    fused = [name for name in source.infos() if re.search(r"qkv|fc1|[qkv]_proj|gate|up_proj", name)]
    assert len(fused) in (6, 15)
    for name in fused:
        watched.sizes.clear()
        assert source.read(name).nbytes == sum(watched.sizes)
        assert max(watched.sizes) <= 500
        watched.sizes.clear()
        source.read(name, slice(3, 5))
        assert sum(watched.sizes) == 2 * 24 * 4


def _theirs(family: Family = LLAMA, **settings: Any) -> tuple[ModelDescription, dict[str, Tensor]]:
    model = tiny_model(family.name, **settings)
    tensors = dict(model.state_dict())
    return describe(model.config.to_dict(), MemorySource(tensors).infos()), tensors


def _complaint(description: ModelDescription, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(ConversionError) as caught:
        LLAMA.canonical_from_hf(MemorySource(tensors), description, "some/folder")
    return str(caught.value)


def test_missing_superfluous_and_misshapen_tensors_are_named_at_once() -> None:
    description, tensors = _theirs()
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(4)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(7, 32)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    assert _complaint(description, tensors).splitlines() == [
        "some/folder: the tensors are not those of the model that its configuration describes.",
        "  1 missing: model.layers.1.self_attn.k_proj.weight",
        "  1 not part of the model: model.layers.1.self_attn.k_proj.bias",
        "  1 of another shape: model.layers.2.mlp.up_proj.weight [7, 32] instead of [40, 32]",
        "  1 not of float32, bfloat16, float16: model.norm.weight int8",
        "Give the configuration that belongs to these weights, or all of the weights.",
    ]


def test_what_becomes_one_tensor_must_have_one_dtype() -> None:
    description, tensors = _theirs()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].bfloat16()
    message = _complaint(description, tensors)
    assert "model.layers.0.self_attn.k_proj.weight bfloat16" in message
    assert "these tensors become one; give them one dtype" in message
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].float()
    canonical = LLAMA.canonical_from_hf(MemorySource(tensors), description)
    assert canonical.read("decoder.final_layernorm.weight").dtype == torch.bfloat16


def test_rotary_frequencies_of_old_checkpoints_are_passed_over() -> None:
    description, tensors = _theirs()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert len(LLAMA.canonical_from_hf(MemorySource(tensors), description).infos()) == 3 * 6 + 3


def test_a_tied_head_must_be_the_embedding() -> None:
    description, tensors = _theirs(tie_word_embeddings=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert "output_layer.weight" not in LLAMA.canonical_from_hf(MemorySource(tensors), description).infos()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][60, 31] += 1
    message = "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true"
    assert message in _complaint(description, tensors)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    assert message in _complaint(description, tensors)


def test_a_canonical_model_must_be_whole() -> None:
    description = _description()
    source = _random(description.expected_tensors())
    del source.tensors["decoder.final_layernorm.weight"]  # type: ignore[attr-defined]
    with pytest.raises(ConversionError, match=r"here: .*\n  1 missing: decoder.final_layernorm.weight"):
        LCKV_LLAMA.hf_from_canonical(source, description, "here")


def test_a_family_without_such_a_tensor() -> None:
    description = _description(add_qkv_bias=True)
    with pytest.raises(ConversionError, match=r"linear_qkv.bias: the family of the model has no such tensor"):
        LLAMA.hf_tensors(description)


def test_names_and_shapes_are_those_of_transformers() -> None:
    for family in CLASSES:
        for tied in (False, True):
            model = tiny_model(family, tie_word_embeddings=tied)
            description = FAMILIES[family].read_config(model.config.to_dict())
            expected = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
            assert FAMILIES[family].hf_tensors(description) == expected
            assert description.vocab_size == SIZES["vocab_size"]
