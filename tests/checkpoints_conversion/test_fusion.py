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

from checkpoints_conversion import fusion
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.formats.huggingface import write_safetensors
from checkpoints_conversion.fusion import canonical_from_hf, canonical_tensors, hf_from_canonical
from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.base import Family
from lckv.families.decoder import Decoder
from lckv.families.lckv_llama import LCKV_LLAMA
from lckv.families.llama import LLAMA
from lckv.families.registry import FAMILIES, describe
from lckv.weights.checks import check_tensors
from lckv.weights.huggingface import HuggingFaceFolder, read_config_file
from lckv.weights.tensors import MemorySource, TensorInfo, TensorSource
from tests.golden import yocopp_models
from tests.golden.lckv_models import NAMES, Golden
from tests.lckv.families.tiny_models import CLASSES, logits, saved_model, tiny_model


def _whole(source: TensorSource) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _decoder(**settings: Any) -> Decoder:
    """A decoder of 3 layers, with settings of its own or of the compression."""
    compression = {name: settings.pop(name) for name in ("layer_types", "sliding_window") if name in settings}
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "vocab_size": 11,
    }
    sizes |= {"num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 8} | settings
    return Decoder(**sizes, compression=CompressionConfig(**compression))


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
    decoder = describe(read_config_file(before), folder.infos())
    canonical = canonical_from_hf(folder, decoder, FAMILIES[family], before)
    check_tensors(canonical.infos(), canonical_tensors(decoder, FAMILIES[family]), before)
    assert list(canonical.infos()) == list(canonical_tensors(decoder, FAMILIES[family]))

    held = MemorySource(_whole(canonical))
    back = hf_from_canonical(held, decoder, FAMILIES[family])
    assert back.infos() == FAMILIES[family].tensors(decoder)
    _assert_equal(_whole(back), _whole(folder))
    _assert_equal(_whole(canonical_from_hf(back, decoder, FAMILIES[family])), dict(held.tensors))

    after.mkdir()
    write_safetensors(after, back, max_shard_bytes=20_000)
    (after / "config.json").write_text(json.dumps(FAMILIES[family].write_config(decoder)))
    again = CLASSES[family][1].from_pretrained(after).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", [*NAMES, "yocopp_6"])
def test_weights_are_where_the_golden_models_have_them(name: str) -> None:
    golden = yocopp_models.load(name) if name in yocopp_models.NAMES else Golden.load(name)
    decoder = ModelDescription(
        model=replace(golden.model, max_position_embeddings=32),
        compression=golden.compression,
        family="lckv-llama",
        dtype=torch.float32,
    ).decoder()
    theirs = {
        name: tensor for name, tensor in golden.tensors.items() if name.startswith(("model.", "lm_head."))
    }
    canonical = canonical_from_hf(MemorySource(theirs), decoder, LCKV_LLAMA)
    _assert_equal(_whole(canonical), golden.weights())
    _assert_equal(_whole(hf_from_canonical(canonical, decoder, LCKV_LLAMA)), theirs)


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
    decoder = _decoder(
        hidden_size=5, num_attention_heads=groups * queries, num_key_value_heads=groups, head_dim=width,
        qkv_bias=bias, qk_norm=norm, layer_types=layer_types,
    )  # fmt: skip
    theirs = _random(LCKV_LLAMA.tensors(decoder))
    canonical = canonical_from_hf(theirs, decoder, LCKV_LLAMA)
    for index in range(3):
        ours = f"decoder.layers.{index}.self_attention."
        attention = f"model.layers.{index}.self_attn."
        computes_kv = index in decoder.compression.map(3).kv_layers
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
    _assert_equal(_whole(hf_from_canonical(canonical, decoder, LCKV_LLAMA)), dict(theirs.tensors))


@given(data=st.data(), chunk=st.sampled_from([1, 100, 1000, 10**6]))
def test_any_rows_are_those_of_the_whole(data: st.DataObject, chunk: int) -> None:
    decoder = _decoder(num_key_value_heads=2, qkv_bias=True, layer_types="0_2_2")
    theirs = _random(LCKV_LLAMA.tensors(decoder))
    canonical = canonical_from_hf(theirs, decoder, LCKV_LLAMA)
    whole = MemorySource(_whole(canonical))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "CHUNK_BYTES", chunk)
        for source, expected in (
            (canonical, whole),
            (hf_from_canonical(whole, decoder, LCKV_LLAMA), theirs),
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
    monkeypatch.setattr(fusion, "CHUNK_BYTES", 500)
    decoder = _decoder(num_key_value_heads=2)
    infos = (
        LCKV_LLAMA.tensors(decoder)
        if direction == "canonical_from_hf"
        else canonical_tensors(decoder, LCKV_LLAMA)
    )
    watched = _WatchedSource(_random(infos))
    source = getattr(fusion, direction)(watched, decoder, LCKV_LLAMA)
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


def _theirs(family: Family = LLAMA, **settings: Any) -> tuple[Decoder, dict[str, Tensor]]:
    model = tiny_model(family.name, **settings)
    tensors = dict(model.state_dict())
    return describe(model.config.to_dict(), MemorySource(tensors).infos()), tensors


def _complaint(decoder: Decoder, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(ModelError) as caught:
        canonical_from_hf(MemorySource(tensors), decoder, LLAMA, "some/folder")
    return str(caught.value)


def test_missing_superfluous_and_misshapen_tensors_are_named_at_once() -> None:
    decoder, tensors = _theirs()
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(4)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(7, 32)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    assert _complaint(decoder, tensors).splitlines() == [
        "some/folder: the tensors are not those of the model that its configuration describes.",
        "  1 missing: model.layers.1.self_attn.k_proj.weight",
        "  1 not part of the model: model.layers.1.self_attn.k_proj.bias",
        "  1 of another shape: model.layers.2.mlp.up_proj.weight [7, 32] instead of [40, 32]",
        "  1 not of float32, bfloat16, float16: model.norm.weight int8",
        "Give the configuration that belongs to these weights, or all of the weights.",
    ]


def test_what_becomes_one_tensor_must_have_one_dtype() -> None:
    decoder, tensors = _theirs()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].bfloat16()
    message = _complaint(decoder, tensors)
    assert "model.layers.0.self_attn.k_proj.weight bfloat16" in message
    assert "these tensors become one; give them one dtype" in message
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].float()
    canonical = canonical_from_hf(MemorySource(tensors), decoder, LLAMA)
    assert canonical.read("decoder.final_layernorm.weight").dtype == torch.bfloat16


def test_rotary_frequencies_of_old_checkpoints_are_passed_over() -> None:
    decoder, tensors = _theirs()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert len(canonical_from_hf(MemorySource(tensors), decoder, LLAMA).infos()) == 3 * 6 + 3


def test_a_tied_head_must_be_the_embedding() -> None:
    decoder, tensors = _theirs(tie_word_embeddings=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert "output_layer.weight" not in canonical_from_hf(MemorySource(tensors), decoder, LLAMA).infos()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][60, 31] += 1
    message = "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true"
    assert message in _complaint(decoder, tensors)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    assert message in _complaint(decoder, tensors)


def test_a_canonical_model_must_be_whole() -> None:
    decoder = _decoder()
    source = _random(canonical_tensors(decoder, LCKV_LLAMA))
    del source.tensors["decoder.final_layernorm.weight"]  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"here: .*\n  1 missing: decoder.final_layernorm.weight"):
        hf_from_canonical(source, decoder, LCKV_LLAMA, "here")
