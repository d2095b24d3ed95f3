"""The numbers recorded in golden/dmc; tolerances are those that its README states."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lckv.attention import reference, sdpa
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.cache.contiguous import ContiguousCache
from lckv.policies.base import TokenContext, unturned
from lckv.policies.binary_decisions import decision_rate as merge_rate
from lckv.policies.binary_decisions import straight_through
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.policies.dmc.pooling import pool_by_formula, pool_in_torch
from lckv.policies.stages import compression_ratio, fade, hinge_loss
from lckv.rope import Rotation, rotate

FOLDER = Path(__file__).parents[3] / "golden" / "dmc"
BIAS = KeyBias(age=1)
WHOLE = TokenContext(unturned)
OUTPUT, TRAINING_OUTPUT, GRADIENT, LOSS = 1e-5, 2e-5, 5e-5, 1e-6


def load(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return load_file(FOLDER / f"{name}.safetensors"), json.loads(file.metadata()["json"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


def close_gradient(actual, expected):
    close(actual, expected, max(GRADIENT, 1e-5 * float(expected.abs().max())))


def context(tensors, *, at=slice(None), **facts):
    angles = tensors["rope_angles"][at][:, None, None]
    return TokenContext(partial(rotate, angles=Rotation(angles.cos(), angles.sin())), **facts)


def attend(query, key, value, backend=sdpa, key_bias=BIAS):
    """[L, B, heads, D] to [L, B, H * D]."""
    heads = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    output = backend.attend(*heads, Visibility(), scale=query.shape[-1] ** -0.5, key_bias=key_bias)
    return output.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("pool", [pool_in_torch, None], ids=["torch", "formula"])
@pytest.mark.parametrize("case", ["fractional_ws1", "fractional_ws12", "hard_ws12", "high_ws12"])
def test_pooling_and_its_gradients(case, pool):
    tensors, header = load(f"a_poolsum_{case}")
    x, b, w = (tensors[name].requires_grad_() for name in ("x", "b", "w"))
    features, merge = x[:, :, None], torch.cat((torch.ones_like(b[:1]), b))[:, :, None]
    if pool is None:
        y = pool_by_formula(features, merge, w[:, :, None], header["window"])
    else:
        y, _ = pool(features, torch.zeros_like(features), merge, w[:, :, None], header["window"])
    close(y.squeeze(2), tensors["y"], OUTPUT)
    gradients = torch.autograd.grad(
        (y.squeeze(2) * tensors["functional"]).sum(), (x, b, w), materialize_grads=True
    )
    for name, gradient in zip("xbw", gradients, strict=True):
        close_gradient(gradient, tensors[f"grad_{name}"])


TRAINING = ("b_train_kv4_ws12_temp0.1", "b_train_kv4_ws12_temp1")


def trained(tensors, header, backend):
    """Leaves q, k, v; the attention's output; each sample's merge rate with the raw decision of token 0, per
    head."""
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    query, key, value = leaves
    policy = DMCPolicy(DMCConfig(stage="retrofit", temperature=header["temp"]))
    noise = tensors["gumbel1"] - tensors["gumbel2"]
    facts = context(tensors, training=True, noise=noise)
    key_value, statistics = policy.keys_values(key, value, query, facts)
    output = attend(policy.query(query, facts), *key_value, backend)
    # The reference counts the decision that token 0 would have made, were it not forced.
    logits = key[..., -1] - 5.0
    raw = straight_through(torch.sigmoid((logits + noise) / header["temp"]))
    close(statistics[0], (raw.sum(0) - raw[0]) / len(raw), 1e-6)
    return (
        leaves,
        output,
        merge_rate(torch.sigmoid((logits + noise) / header["temp"]), logits, WHOLE),
        key_value,
    )


@pytest.mark.parametrize("backend", [sdpa, reference], ids=["sdpa", "reference"])
@pytest.mark.parametrize("case", TRAINING)
def test_training_attention_and_its_gradients(case, backend):
    tensors, header = load(case)
    leaves, output, rate, key_value = trained(tensors, header, backend)
    close(output, tensors["out"], TRAINING_OUTPUT)
    close(key_value.key[:-1, ..., -1], tensors["key_bias"][:-1], OUTPUT)
    close(key_value.value, tensors["pooled_v"], OUTPUT)
    close(rate.mean(1), tensors["sample_mean_decision"], LOSS)
    objective = (output * tensors["functional"]).sum()
    for name, gradient in zip("qkv", torch.autograd.grad(objective, leaves, retain_graph=True), strict=True):
        close_gradient(gradient, tensors[f"grad_{name}__attn_only"])
    for ratio, name in ((4.0, "cr4"), (header["cr_mid"], "crmid")):
        loss = hinge_loss(rate.mean(1), ratio).mean()
        gradients = torch.autograd.grad(objective + loss, leaves, retain_graph=True)
        for letter, gradient in zip("qkv", gradients, strict=True):
            if f"grad_{letter}__{name}" in tensors:
                close_gradient(gradient, tensors[f"grad_{letter}__{name}"])
        (of_key,) = torch.autograd.grad(loss, leaves[1], retain_graph=True)
        close_gradient(of_key[..., -1], tensors[f"grad_k_last__loss_only_{name}"])
        assert of_key[..., :-1].count_nonzero() == 0


@pytest.mark.parametrize("case", TRAINING)
def test_training_loss_for_every_target(case):
    tensors, header = load(case)
    rate = trained(tensors, header, sdpa)[2]
    for number, ratio in enumerate(tensors["target_cr"].tolist()):
        policy = DMCPolicy(DMCConfig(stage="finetune", target_compression_ratio=ratio, loss_per_tp_rank=True))
        close(policy.auxiliary_loss([rate.mean(1)], 0.5).mean(), tensors["dmc_loss"][number], LOSS)
        per_rank = rate.unflatten(1, (2, -1)).mean(-1)
        close(policy.auxiliary_loss([per_rank], 0.5).mean(), tensors["dmc_loss_tp2"][number], LOSS)


@pytest.mark.parametrize("backend", [sdpa, reference], ids=["sdpa", "reference"])
@pytest.mark.parametrize("case", ["c_eval_kv4_ws12", "c_eval_kv4_ws12_allappend"])
def test_evaluation(case, backend):
    tensors, header = load(case)
    query, key, value = (tensors[name] for name in "qkv")
    policy = DMCPolicy(DMCConfig(stage="finetune"))
    facts = context(tensors)
    key_value, statistics = policy.keys_values(key, value, query, facts)
    close(attend(policy.query(query, facts), *key_value, backend), tensors["out"], OUTPUT)
    close(key_value.value, tensors["pooled_v"], OUTPUT)
    kept = 1 - statistics[0]
    assert torch.equal((kept * len(key)).round().int(), tensors["final_lens"])
    assert 1 / kept.mean() == pytest.approx(header["cr_from_lengths"], rel=1e-6)
    raw = (tensors["router_logits"] > 0).float()
    assert torch.equal(raw, tensors["decisions"])
    close(merge_rate(raw, tensors["router_logits"], WHOLE).mean(1), tensors["sample_mean_decision_raw"], LOSS)


def decode(tensors, eps, sizes):
    """Outputs [L, B, H * D], slots [L, B, KV] and tokens in the newest slot as far as the state has them, at
    the end of each piece; and the cache."""
    policy = DMCPolicy(DMCConfig(stage="finetune", eps=eps))
    cache, start, found = ContiguousCache([0], policy, {}), 0, []
    for size in sizes:
        at = slice(start, start + size)
        query, key, value = (tensors[name][at] for name in "qkv")
        facts = context(tensors, at=at)
        extension = policy.extend(None if cache.empty else cache.state(0), key, value, query, facts)
        if cache.empty:
            output = attend(policy.query(query, facts), extension.key, extension.value)
        else:
            heads = policy.query(query, facts).permute(1, 2, 0, 3)
            output = cache.attend(
                0, heads, extension, None, Visibility(), scale=query.shape[-1] ** -0.5, key_bias=BIAS
            )
            output = output.permute(2, 0, 1, 3).flatten(2)
        cache.commit({0: extension}, None)
        start += size
        found.append((start - 1, output, cache.lengths(0), (cache.state(0)[..., -1] > 0).sum(0)))
    return found, cache


@pytest.mark.parametrize(
    "sizes", [[1] * 32, [5, 1, 1, 11, 14], [32]], ids=["token by token", "in pieces", "at once"]
)
@pytest.mark.parametrize(("eps", "name"), [(2.0**-7, "out_official_eps"), (None, "out_eps32")])
def test_decoding(eps, name, sizes):
    tensors, _ = load("d_decode_kv4_ws12")
    found, cache = decode(tensors, eps, sizes)
    outputs = torch.cat([output for _, output, _, _ in found])
    close(outputs, tensors[name], OUTPUT)
    for token, _, lengths, members in found:
        assert torch.equal(lengths.int(), tensors["lens"][token])
        assert torch.equal(members.int(), tensors["segment_len"][token].clamp(max=11))
    if eps is None:
        close(outputs, tensors["eval_out_same_window"], OUTPUT)
        slots = cache._layers[0].past
        used = torch.arange(32) < slots.lengths[..., None]
        for part, name in ((slots.key, "final_k_cache"), (slots.value, "final_v_cache")):
            close(part[used[:, :, : part.shape[2]]], tensors[name][used], OUTPUT)
        assert tensors["final_v_cache"][~used].count_nonzero() == 0


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_stage_zero_out(kv_heads):
    tensors, header = load(f"e_stage1_kv{kv_heads}")
    policy = DMCPolicy(DMCConfig(stage="zero_out"))
    for number, iteration in enumerate(tensors["iterations"].tolist()):
        progress = iteration / header["train_iters"]
        assert fade(progress) == pytest.approx(float(tensors["multiplier"][number]), abs=1e-12)
        leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
        query, key, value = leaves
        facts = context(tensors, progress=progress, training=True)
        key_value, statistics = policy.keys_values(key, value, None, facts)
        assert statistics == ()
        rotated = policy.query(query, facts)
        close(rotated.permute(1, 2, 0, 3), tensors["q_rot"][number], OUTPUT)
        close(key_value.key.permute(1, 2, 0, 3), tensors["k_rot"][number], OUTPUT)
        output = attend(rotated, *key_value, key_bias=policy.traits.key_bias)
        close(output, tensors["out"][number], OUTPUT)
        if iteration == 100:
            objective = (output * tensors["functional"]).sum()
            for name, gradient in zip("qkv", torch.autograd.grad(objective, leaves), strict=True):
                close_gradient(gradient, tensors[f"grad_{name}__it100"])


def test_the_end_of_stage_zero_out():
    tensors, _ = load("e_zero_rows")
    weight = tensors["weight_before_H4_KV2_D16"]
    # For each KV head two query heads, a key and a value: [g, 4, d, hidden].
    heads = weight.unflatten(0, (2, 4, 16))

    def rows(kind, channel):
        yield from heads[:, {"query": slice(0, 2), "key": slice(2, 3), "value": slice(3, 4)}[kind], channel]

    policy = DMCPolicy(DMCConfig(stage="zero_out"))
    assert (
        policy.end_stage(rows) == "stage zero_out is over: the decision channel of all queries and keys is 0"
    )
    assert torch.equal(weight, tensors["weight_after_H4_KV2_D16"])
    assert DMCPolicy(DMCConfig(stage="retrofit")).obstacle_in_weights(rows, DMCConfig()) is None


def test_schedule():
    tensors, _ = load("f_schedule")
    for iteration, iterations, target, finetune, ratio, prior in tensors["table"].tolist():
        found = compression_ratio(target, "finetune" if finetune else "retrofit", iteration / iterations)
        assert found == pytest.approx(ratio, abs=1e-12)
        assert 1 - 1 / found == pytest.approx(prior, abs=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_of_several_layers(ranks):
    tensors, _ = load("f_loss_layers")
    probabilities = tensors["probs"].requires_grad_()
    decisions = straight_through(probabilities)
    assert torch.equal(decisions.round(), tensors["decisions"])
    layers = torch.stack([merge_rate(layer, torch.zeros(1), WHOLE) for layer in probabilities])
    close(1 / (1 - layers.mean()), tensors["measured_cr"], LOSS)
    close(layers.mean((0, 2)), tensors["sample_mean_decision"], LOSS)
    per_rank = layers.unflatten(2, (ranks, -1)).mean((0, 3))
    for number, ratio in enumerate(tensors["target_cr"].tolist()):
        policy = DMCPolicy(
            DMCConfig(stage="finetune", target_compression_ratio=ratio, loss_per_tp_rank=ranks > 1)
        )
        loss = policy.auxiliary_loss([per_rank if ranks > 1 else per_rank[:, 0]], 0.0).mean()
        close(loss, tensors[f"dmc_loss_tp{ranks}"][number], LOSS)
        if ranks < 4:
            (gradient,) = torch.autograd.grad(loss, probabilities, retain_graph=True)
            close(gradient, tensors[f"grad_probs_tp{ranks}"][number], LOSS)
