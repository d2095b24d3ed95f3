"""Weights of a shared map from a plain model's: the official code's numbers, and the rule for every map,
layout and part."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.initialization import initialize
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dms.config import DMSConfig
from lckv.weights.checks import check_tensors
from lckv.weights.tensors import MemorySource
from megatron_ext.config import ModelConfig
from tests.golden.lckv_models import FOLDER

PLAIN = CompressionConfig()
LCKV = CompressionConfig(layer_types="0_2_2_3")
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=6,
    ffn_hidden_size=5,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=7,
    max_position_embeddings=16,
    add_qkv_bias=True,
    qk_layernorm=True,
)


def description_of(model: ModelConfig, compression: CompressionConfig = PLAIN) -> ModelDescription:
    return ModelDescription(model, compression, "llama", torch.float32)


def random_weights(description: ModelDescription, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    infos = description.expected_tensors()
    return {
        name: torch.randn(info.shape, generator=generator, dtype=info.dtype) for name, info in infos.items()
    }


def split(fused: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of a fused projection, heads in order."""
    heads = fused.unflatten(0, (model.query_groups, -1, model.head_dim))
    return heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)


def test_a_first_guess_is_added_as_zeros_and_left_out_again() -> None:
    plain = description_of(MODEL)
    weights = random_weights(plain)
    guessing = replace(LCKV, first_guess=True)
    source, description, _ = initialize(MemorySource(weights), plain, guessing, "copy")
    check_tensors(source.infos(), description.expected_tensors(), "the converted model")
    name = "decoder.layers.2.self_attention.linear_first_guess.weight"
    assert [key for key in source.infos() if "guess" in key] == [name]
    assert torch.equal(source.read(name), torch.zeros(8, 6))
    assert source.read(name, slice(1, 4)).shape == (3, 6)
    without, description, how = initialize(source, description, LCKV, "copy")
    assert how is None
    check_tensors(without.infos(), description.expected_tensors(), "the model without it")


@pytest.mark.parametrize("how", ["average", "copy"])
def test_a_policys_own_weights_begin_as_zeros_and_go_where_keys_and_values_go(how: str) -> None:
    plain = description_of(MODEL)
    adapting = DMSConfig(stage="retrofit", decision_source="adapter")
    sharing = replace(PLAIN, layer_types="0_0_2_3", policy=adapting)
    source, description, _ = initialize(MemorySource(random_weights(plain)), plain, sharing, how)
    check_tensors(source.infos(), description.expected_tensors(), "the converted model")
    attention = "decoder.layers.{}.self_attention.dms_proj_alpha"
    own = {name: source.read(name) for name in source.infos() if "dms_proj_alpha" in name}
    assert {name.partition("_alpha")[0] for name in own} == {
        attention.format(layer).partition("_alpha")[0] for layer in (0, 2, 3)
    }
    assert torch.equal(own[f"{attention.format(2)}_norm.weight"], torch.ones(6))
    assert torch.equal(own[f"{attention.format(2)}.weight"], torch.zeros(2, 6))
    assert torch.equal(own[f"{attention.format(2)}.bias"], torch.zeros(2))
    deciding = description_of(MODEL, replace(PLAIN, policy=adapting))
    weights = random_weights(deciding)
    shared, description, _ = initialize(MemorySource(weights), deciding, sharing, how)
    check_tensors(shared.infos(), description.expected_tensors(), "the model with a map")
    for part in ("_norm.weight", ".weight", ".bias"):
        first, second, third = (weights[attention.format(layer) + part] for layer in (0, 1, 2))
        expected = first if how == "copy" else (first + second) / 2
        torch.testing.assert_close(shared.read(attention.format(0) + part), expected)
        assert torch.equal(shared.read(attention.format(2) + part), third)


@pytest.mark.parametrize("how", ["average", "copy"])
@pytest.mark.parametrize(
    ("layer_types", "alike", "mixers"),
    [("0_1+0_2+1_2", "0_1_2_2", (1, 2)), ("0_1+0_1+0_1+0", "0_1_1_1", (1, 2, 3))],
)
def test_mixing_begins_as_if_nothing_were_mixed_in(
    how: str, layer_types: str, alike: str, mixers: tuple[int, ...]
) -> None:
    plain = description_of(MODEL)
    mixing = replace(PLAIN, layer_types=layer_types, mix_scaling_factor=8.0)
    source, description, done = initialize(MemorySource(random_weights(plain)), plain, mixing, how)
    assert done == how
    check_tensors(source.infos(), description.expected_tensors(), "the converted model")
    added = [name for name in source.infos() if name.endswith(("key_weight", "value_weight"))]
    attention = "decoder.layers.{}.self_attention.{}_weight"
    assert added == [attention.format(layer, part) for layer in mixers for part in ("key", "value")]
    for name in added:
        assert torch.equal(source.read(name), torch.tensor([0, 1 / 8]))
    without = replace(PLAIN, layer_types=alike)
    other, _, _ = initialize(MemorySource(random_weights(plain)), plain, without, how)
    for name in other.infos():
        assert torch.equal(source.read(name), other.read(name))


def test_keys_and_values_are_averaged_where_they_are_read() -> None:
    """Layer 1 has keys for layers 1, 2 and 3, and values for layer 1 alone."""
    plain = description_of(MODEL)
    weights = random_weights(plain)
    apart = replace(PLAIN, layer_types="0_1_1/0_1/0")
    source, description, _ = initialize(MemorySource(weights), plain, apart, "average")
    check_tensors(source.infos(), description.expected_tensors(), "the converted model")
    name, groups = "decoder.layers.{}.self_attention.linear_qkv.weight", MODEL.query_groups
    parts = [weights[name.format(layer)].unflatten(0, (groups, -1, MODEL.head_dim)) for layer in range(4)]
    for owner, keys, values in ((0, [0], [0, 2, 3]), (1, [1, 2, 3], [1])):
        found = source.read(name.format(owner)).unflatten(0, (groups, -1, MODEL.head_dim))
        torch.testing.assert_close(found[:, -2], torch.stack([parts[layer][:, -2] for layer in keys]).mean(0))
        torch.testing.assert_close(
            found[:, -1], torch.stack([parts[layer][:, -1] for layer in values]).mean(0)
        )
        assert torch.equal(found[:, :-2], parts[owner][:, :-2])


def test_weights_that_mix_stay_with_their_scaling_factor_and_map() -> None:
    mixing = replace(PLAIN, layer_types="0_1+0_2_3")
    description = description_of(MODEL, mixing)
    source = MemorySource(random_weights(description))
    same, _, how = initialize(source, description, mixing, "copy")
    name = "decoder.layers.1.self_attention.key_weight"
    assert how is None and torch.equal(same.read(name), source.tensors[name])
    with pytest.raises(ConversionError, match=r"mix_scaling_factor is 2\.0, but the model's weights"):
        initialize(source, description, replace(mixing, mix_scaling_factor=2.0), "copy")
    with pytest.raises(ConversionError, match="cannot be made from this model"):
        initialize(source, description, PLAIN, "copy")


@dataclass
class Watched:
    """Remembers the most rows read at once."""

    tensors: Mapping[str, Tensor]
    read_bytes: list[int] = field(default_factory=list)

    def infos(self):  # type: ignore[no-untyped-def]
        return MemorySource(self.tensors).infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = MemorySource(self.tensors).read(name, rows)
        self.read_bytes.append(tensor.nbytes)
        return tensor


@pytest.mark.parametrize("how", ["average", "copy"])
def test_golden(how: str) -> None:
    from safetensors.torch import load_file

    found = load_file(FOLDER / "init_average.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("model.layers."))
    key = found["model.layers.0.self_attn.k_proj.weight"]
    query = found["model.layers.0.self_attn.q_proj.weight"]
    model = ModelConfig(
        num_layers=layers,
        hidden_size=64,
        ffn_hidden_size=found["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=found["model.embed_tokens.weight"].shape[0],
        max_position_embeddings=64,
    )
    assert (query.shape, key.shape) == ((64, 64), (32, 64))
    plain = {}
    for index in range(layers):
        projections = (
            found[f"model.layers.{index}.self_attn.{part}_proj.weight"].view(2, -1, 64) for part in "qkv"
        )
        fused = torch.cat(list(projections), 1).flatten(0, 1)
        plain[f"decoder.layers.{index}.self_attention.linear_qkv.weight"] = fused
    source, _, _ = initialize(
        MemorySource(plain), description_of(model), CompressionConfig("0_6_6_6_6_6_6_7"), how
    )
    for index in range(layers):
        name = f"model.layers.{index}.self_attn.{{}}_proj.weight"
        if index not in (0, 6, 7):
            assert torch.equal(
                source.read(f"decoder.layers.{index}.self_attention.linear_q.weight"), found[name.format("q")]
            )
            continue
        parts = split(source.read(f"decoder.layers.{index}.self_attention.linear_qkv.weight"), model)
        assert torch.equal(parts[0], found[name.format("q")])
        for part, projection in zip(parts[1:], "kv", strict=True):
            if how == "copy":
                assert torch.equal(part, found[name.format(projection)])
            else:
                torch.testing.assert_close(
                    part, found["converted." + name.format(projection)], atol=1e-6, rtol=0
                )


@pytest.mark.parametrize("how", ["average", "copy"])
def test_the_tensors_are_those_of_the_shared_model(how: str) -> None:
    plain = random_weights(description_of(MODEL))
    source, changed, done = initialize(MemorySource(plain), description_of(MODEL), LCKV, how)
    assert done == how
    assert changed == description_of(MODEL, LCKV)
    check_tensors(source.infos(), changed.expected_tensors(), "it")
    for name, info in source.infos().items():
        assert source.read(name).shape == info.shape
        assert source.read(name).dtype == info.dtype


def test_average_of_every_part() -> None:
    """Layers 1 and 2 read layer 2."""
    plain = random_weights(description_of(MODEL))
    source, _, _ = initialize(MemorySource(plain), description_of(MODEL), LCKV, "average")
    attention = "decoder.layers.{}.self_attention."
    for part in ("linear_qkv.weight", "linear_qkv.bias"):
        one, two = (split(plain[attention.format(index) + part], MODEL) for index in (1, 2))
        query, key, value = split(source.read(attention.format(2) + part), MODEL)
        assert torch.equal(query, two[0])
        torch.testing.assert_close(key, (one[1] + two[1]) / 2)
        torch.testing.assert_close(value, (one[2] + two[2]) / 2)
        reader = source.read(attention.format(1) + part.replace("qkv", "q"))
        assert torch.equal(reader, one[0])
    norms = [plain[attention.format(index) + "k_layernorm.weight"] for index in (1, 2)]
    torch.testing.assert_close(source.read(attention.format(2) + "k_layernorm.weight"), sum(norms) / 2)
    assert attention.format(1) + "k_layernorm.weight" not in source.infos()
    for name in source.infos():
        if ".2." not in name and "linear_q." not in name:
            assert torch.equal(source.read(name), plain[name]), name


@given(st.data())
def test_rows_are_those_of_the_whole(data: st.DataObject) -> None:
    groups, per_group, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    layers = data.draw(st.integers(1, 4))
    sources = data.draw(st.lists(st.integers(0, layers - 1), min_size=layers, max_size=layers))
    for index in sorted(set(sources)):
        sources[index] = index
    model = replace(
        MODEL,
        num_layers=layers,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=2 * width,
    )
    compression = CompressionConfig("_".join(map(str, sources)))
    how = data.draw(st.sampled_from(["copy", "average"]))
    plain = MemorySource(random_weights(description_of(model)))
    source, changed, _ = initialize(plain, description_of(model), compression, how)
    check_tensors(source.infos(), changed.expected_tensors(), "it")
    name = data.draw(
        st.sampled_from([name for name in source.infos() if "linear_q" in name or "layernorm" in name])
    )
    start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, source.infos()[name].shape[0])])))
    assert torch.equal(source.read(name, slice(start, stop)), source.read(name)[start:stop])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_nothing_larger_than_a_chunk_is_read(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lckv.weights import tensors

    chunk = 64
    monkeypatch.setattr(tensors.row_chunks, "__defaults__", (chunk,))
    model = replace(MODEL, num_query_groups=groups)
    watched = Watched(random_weights(description_of(model)))
    source, _, _ = initialize(watched, description_of(model), LCKV, "average")
    for index, part in ((1, "linear_q"), (2, "linear_qkv")):
        source.read(f"decoder.layers.{index}.self_attention.{part}.weight")
    assert max(watched.read_bytes) <= chunk


def test_dmc_changes_no_weights() -> None:
    plain = MemorySource(random_weights(description_of(MODEL)))
    dmc = CompressionConfig(policy=DMCConfig(target_compression_ratio=4))
    source, changed, how = initialize(plain, description_of(MODEL), dmc, "average")
    assert source is plain
    assert how is None
    assert changed.compression.policy == DMCConfig(stage="zero_out", target_compression_ratio=4)


def test_windows_change_no_weights() -> None:
    plain = MemorySource(random_weights(description_of(MODEL)))
    windows = CompressionConfig("0s_1s_2_3", sliding_window=4)
    source, changed, how = initialize(plain, description_of(MODEL), windows, "copy")
    assert (source, how) == (plain, None)
    assert changed.compression == windows


def test_a_shared_model_keeps_its_map() -> None:
    shared = description_of(MODEL, LCKV)
    source = MemorySource(random_weights(shared))
    kept, changed, how = initialize(source, shared, replace(LCKV, forward_passes=3), "average")
    assert (kept, how) == (source, None)
    assert changed.compression.forward_passes == 3


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            LCKV,
            CompressionConfig("0_3_3_3"),
            r"0_3_3_3 .* cannot be made .* shares keys and values already \(0_2_2_3,",
        ),
        (LCKV, PLAIN, "start from a plain model"),
        (LCKV, replace(LCKV, force_nodiag=True), "force_nodiag True"),
        (
            PLAIN,
            CompressionConfig("0_1_2_3_3"),
            "compression.layer_types is '0_1_2_3_3'; it has 5 entries but the model has 4 layers",
        ),
        (PLAIN, CompressionConfig("0_1_2_9"), "entry 3"),
        (
            PLAIN,
            CompressionConfig(policy=DMCConfig(stage="retrofit")),
            "compression.policy is dmc: stage is retrofit, but the model knows no merging",
        ),
        (CompressionConfig(policy=DMCConfig(stage="finetune")), PLAIN, "a conversion keeps the policy"),
        (
            CompressionConfig(policy=DMCConfig()),
            CompressionConfig(policy=DMCConfig(stage="retrofit")),
            "new stage starts",
        ),
    ],
)
def test_what_cannot_be_made(before: CompressionConfig, after: CompressionConfig, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        initialize(MemorySource({}), description_of(MODEL, before), after, "copy")


def test_a_doubtful_map_is_warned_about_with_its_picture(caplog: pytest.LogCaptureFixture) -> None:
    description = description_of(MODEL)
    source = MemorySource(random_weights(description))
    initialize(source, description, LCKV, "copy")
    assert not caplog.records
    initialize(source, description, CompressionConfig(layer_types="0_2_3_3"), "copy")
    assert "layer 3  KV  <- own   ┐ iterated" in caplog.text
    assert "layer 1 reads layer 2, which itself reads layer 3" in caplog.text
