"""Attention functions of others, as vLLM brings one, and the plans by which others split the model."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lckv.models  # noqa: F401
from lckv.models.cache import CACHE_NAME
from lckv.models.layers import LCKVLlamaAttention
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, SHARED, WINDOWS, close, config, model, tokens
from tests.ranks import run_on_ranks

IDS = tokens(1, 9)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
"""Two sequences one behind the other, as vLLM gives them."""


class Elsewhere(nn.Module):
    """In the place of what lies on another stage."""

    def forward(self, hidden_states: Tensor, *rest: Any) -> Tensor:
        return hidden_states


class Instance:
    """One layer's attention in somebody's engine: knows by itself what belongs together."""

    def __init__(self) -> None:
        self.shapes: list[list[int]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
        self.shapes.append([*query.shape, *key.shape, *value.shape])
        outputs = []
        for part in (slice(0, 4), slice(4, 9)):
            q, k, v = (
                tensor[part].unflatten(1, (-1, query.shape[1] // heads)).transpose(0, 1)[None]
                for tensor in (query, key, value)
            )
            outputs.append(
                scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            )
        return torch.cat(outputs, 2)[0].transpose(0, 1).flatten(1)


def of_engine(
    module: LCKVLlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, Instance] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As an engine with a cache of its own does it: flat tokens, one instance for each layer."""
    assert attention_mask is None
    assert attention_instances is not None
    assert scaling is not None
    assert set(kwargs) == {"dropout"}
    flat = [tensor.transpose(1, 2).flatten(0, 1).flatten(1) for tensor in (query, key, value)]
    instance = attention_instances[module.layer_idx]
    return instance.forward(*flat, heads=query.shape[1], scale=scaling), None


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS["of_engine"] = of_engine
    ALL_ATTENTION_FUNCTIONS["of_transformers"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    for name in ("of_engine", "of_transformers"):
        del ALL_ATTENTION_FUNCTIONS[name]


def of_others(layer_types: str | None, name: str = "of_engine", **fields: Any) -> LCKVLlamaForCausalLM:
    one = model(layer_types, **fields)
    one.set_attn_implementation(name)
    return one


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "qk_norm": True, "head_dim": 12}])
@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, "0_1_1_0"])
def test_an_engine_sees_every_layer_once(layer_types: str | None, fields: dict[str, Any]) -> None:
    one = of_others(layer_types, **fields)
    layers, width = one.config.num_hidden_layers, one.config.head_dim
    instances = {layer: Instance() for layer in range(layers)}
    with torch.no_grad():
        states, *rest = one.model(
            input_ids=IDS, inputs_embeds=None, use_cache=False, position_ids=POSITIONS,
            attention_instances=instances, return_dict=False,
        )  # fmt: skip
        expected = model(layer_types, **fields)(IDS, position_ids=POSITIONS, use_cache=False).logits
    assert rest == []
    close(one.lm_head(states), expected)
    for instance in instances.values():
        assert instance.shapes == [[9, 4 * width, 9, 2 * width, 9, 2 * width]]


def test_where_an_engine_looks_for_the_call() -> None:
    """vLLM reads the source: one call of what is looked up there, with `scaling=self.scaling`."""
    source = inspect.getsource(LCKVLlamaAttention.forward)
    assert source.count("attention_interface = ALL_ATTENTION_FUNCTIONS[") == 1
    assert source.count("attention_interface(") == 1
    assert "scaling=self.scaling" in source
    attention = model(PLAIN).model.layers[1].self_attn
    assert (attention.layer_idx, attention.is_causal, attention.num_key_value_groups) == (1, True, 2)


def test_an_engine_may_compile_the_whole_decoder() -> None:
    one = of_others(SHARED)
    instances = {layer: Instance() for layer in range(4)}
    options = {"use_cache": False, "position_ids": POSITIONS, "attention_instances": instances}
    with torch.no_grad():
        expected = one.model(IDS, **options).last_hidden_state
        compiled = torch.compile(one.model, backend="eager", fullgraph=True)
        close(compiled(IDS, **options).last_hidden_state, expected)


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED])
def test_functions_with_a_mask_of_transformers(layer_types: str | None) -> None:
    """A function that has transformers' kind of mask gets it: padding, packed sequences."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("of_transformers", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    own, one = model(layer_types), of_others(layer_types, "of_transformers")
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, 2] = mask[0, 8] = 0
    split = torch.tensor([[0] * 4 + [1] * 5])
    try:
        for options in (
            {}, {"attention_mask": mask}, {"position_ids": POSITIONS}, {"seq_idx": split},
            {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "position_ids": torch.arange(9)[None]},
        ):  # fmt: skip
            with torch.no_grad():
                found = one(IDS, use_cache=False, **options).logits
                expected = own(IDS, use_cache=False, **{**options, "position_ids": None}
                               if "cu_seq_lens_q" in options else options).logits  # fmt: skip
            kept = options.get("attention_mask", torch.ones(1, 9)).bool()
            close(found[kept], expected[kept], 1e-4)
        with pytest.raises(
            ValueError, match="seq_idx and attention_mask are both given to an attention function"
        ):
            one(IDS, seq_idx=split, attention_mask=mask)
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["of_transformers"]


@pytest.mark.parametrize(
    ("layer_types", "policy", "fields", "reason"),
    [
        (CYCLIC, None, {}, "layers of the map read keys and values of layers above them, in several passes"),
        (WINDOWS, None, {}, "windowed layers stand in the map"),
        (SHARED, MERGING, {}, "it knows nothing of the KV policy dmc"),
        (SHARED, None, {"force_nodiag": True}, "force_nodiag hides every token's own key"),
    ],
)
def test_what_functions_of_others_cannot_serve(
    layer_types: str, policy: DMCConfig | None, fields: dict[str, Any], reason: str
) -> None:
    said = rf"attn_implementation is 'of_engine', but {reason}.*; this model has .*lckv-megatron serve"
    asked = config(layer_types, policy, **fields)
    asked._attn_implementation = "of_engine"
    for auto_class in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=said):
            auto_class.from_config(asked)
    one = model(layer_types, policy, **fields)
    one.set_attn_implementation("of_engine")
    with pytest.raises(ValueError, match=said):
        one(IDS)


def test_functions_of_others_have_no_cache() -> None:
    one = of_others(PLAIN, "of_transformers")
    with pytest.raises(
        ValueError, match=r"use_cache is set, but attn_implementation is 'of_transformers', .*use_c"
    ):
        one(IDS, use_cache=True)
    with pytest.raises(ValueError, match=f"{CACHE_NAME} is given, but attn_implementation"):
        one.generate(IDS, max_new_tokens=2)
    assert one(IDS).past_key_values is None


def test_backend_compatible() -> None:
    assert LCKVLlamaForCausalLM.is_backend_compatible()


@pytest.mark.parametrize(
    "call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_of_transformers_is_refused(call: str) -> None:
    with pytest.raises(
        ValueError, match=r"does not read this model's cache; .* lckv.generation.engine.Engine, or"
    ):
        getattr(model(), call)(inputs=[[1, 2]])


@pytest.mark.parametrize(
    ("layer_types", "policy", "splits", "stages"),
    [(PLAIN, None, True, True), (SHARED, None, True, False), (CYCLIC, None, False, False),
     (WINDOWS, None, True, False), (PLAIN, MERGING, False, True)],
)  # fmt: skip
def test_plans(layer_types: str | None, policy: DMCConfig | None, splits: bool, stages: bool) -> None:
    one = config(layer_types, policy)
    assert (one.base_model_tp_plan is not None, one.base_model_pp_plan is not None) == (splits, stages)
    assert not {"base_model_tp_plan", "base_model_pp_plan"} & {*one.to_dict()}
    with_head = LCKVLlamaForCausalLM(one)
    assert ("lm_head" in with_head._tp_plan, "lm_head" in with_head._pp_plan) == (splits, stages)


def test_stages_of_others() -> None:
    """An engine that cuts the model leaves the layers of other stages out and hands states on."""
    whole, parts = of_others(PLAIN), [of_others(PLAIN) for _ in range(2)]
    instances = {layer: Instance() for layer in range(3)}
    for part, missing in zip(parts, ((2,), (0, 1)), strict=True):
        for layer in missing:
            part.model.layers[layer] = Elsewhere()
    parts[0].model.norm = Elsewhere()

    def run(one: LCKVLlamaForCausalLM, **inputs: Any) -> Tensor:
        return one.model(
            **inputs,
            use_cache=False,
            position_ids=POSITIONS,
            attention_instances=instances,
            return_dict=False,
        )[0]

    with torch.no_grad():
        close(run(parts[1], inputs_embeds=run(parts[0], input_ids=IDS)), run(whole, input_ids=IDS))


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED])
def test_tensor_parallel(layer_types: str | None, tmp_path: Path) -> None:
    one = model(layer_types, qk_norm=True)
    one.save_pretrained(tmp_path)
    expected = one(IDS).logits
    for logits, width, generated in run_on_ranks(2, _split, str(tmp_path), IDS):
        close(logits, expected.detach(), 1e-4)
        assert width == 16  # half of the queries
        assert torch.equal(generated, one.generate(IDS, max_new_tokens=4, do_sample=False))


def _split(folder: str, ids: Tensor) -> tuple[Tensor, int, Tensor]:
    one = LCKVLlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    weight: Any = one.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        logits = one(ids).logits
        generated = one.generate(ids, max_new_tokens=4, do_sample=False)
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return logits, local.shape[0], generated
