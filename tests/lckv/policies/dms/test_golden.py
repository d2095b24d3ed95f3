"""The numbers recorded in golden/dms; tolerances are those that its README states."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import rms_norm

from lckv.attention import reference, sdpa
from lckv.attention.past import NewTokens, attend_past, nothing_before
from lckv.attention.visibility import Visibility
from lckv.cache.contiguous import ContiguousCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.layers import LCKVLlamaAttention
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.base import TokenContext, unturned
from lckv.policies.binary_decisions import straight_through
from lckv.policies.dms import eviction
from lckv.policies.dms.channels import of_first_head
from lckv.policies.dms.config import DMSConfig
from lckv.policies.dms.policy import DMSPolicy
from lckv.rope import Rotation, rotate
from tests.lckv.cache.models import contiguous_cache, logits, paged_cache

FOLDER = Path(__file__).parents[3] / "golden" / "dms"
OUTPUT, GRADIENT, LOSS, LOGITS = 1e-5, 5e-5, 1e-6, 3e-5
RETROFIT = DMSConfig(stage="retrofit")


def load(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return load_file(FOLDER / f"{name}.safetensors"), json.loads(file.metadata()["json"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


def close_gradient(actual, expected):
    close(actual, expected, max(GRADIENT, 2e-5 * float(expected.abs().max())))


def ours(tensor):
    """[B, heads, L, ...] to [L, B, heads, ...]."""
    return tensor.permute(2, 0, 1, *range(3, tensor.dim()))


def theirs(tensor):
    """The inverse of `ours`."""
    return tensor.permute(1, 2, 0, *range(3, tensor.dim()))


def deciding(logits, query):
    """Queries that say these decision logits [L, B, KV] at a scale of 1 and an offset of 0."""
    says = torch.zeros_like(query).unflatten(2, (logits.shape[2], -1))
    says[:, :, :, 0, -1] = logits
    return says.flatten(2, 3)


def attend(policy, query, key_value, backend=sdpa):
    """[L, B, heads, D]."""
    heads = (tensor.permute(1, 2, 0, 3) for tensor in (query, *key_value))
    output = backend.attend(
        *heads, Visibility(), scale=key_value.value.shape[-1] ** -0.5, key_bias=policy.traits.key_bias
    )
    return output.permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    "case", ["qneuron_kv2", "qneuron_kv4", "qneuron_kv2_layer", "adapter_kv2", "adapter_kv4_init"]
)
def test_decisions(case):
    """Of a borrowed channel, of an adapter, of an adapter of zeros; per head, and per layer."""
    tensors, header = load(f"a_decisions_{case}")
    adapts = header["adapter"]
    groups, channels, raw = header["KV"], header["D"], tensors["q_raw"].requires_grad_()

    def heads(projected, weight):
        split = projected.unflatten(-1, (-1, channels))
        return rms_norm(split, (channels,), weight, header["rms_eps"]).transpose(0, 1)

    query, key = heads(raw, tensors["q_norm_weight"]), heads(tensors["k_raw"], tensors["k_norm_weight"])
    value = tensors["v_raw"].unflatten(-1, (-1, channels)).transpose(0, 1)
    half = channels // 2
    angles = Rotation(tensors["rope_cos"][:, None, None, :half], tensors["rope_sin"][:, None, None, :half])
    settings = replace(
        RETROFIT,
        decision_scale=header["scale"],
        initial_decision_offset=header["offset"],
        temperature=header["tau"],
        window=4,
        decision_source="adapter" if adapts else "borrowed_channel",
        decisions_per={"head": "kv_head"}.get(header["per"], header["per"]),
    )
    policy = DMSPolicy(settings)
    noise = ours(tensors["noise"])
    context = TokenContext(partial(rotate, angles=angles), noise=noise)
    read, leaves = query, {}
    if adapts:
        attention = adapter(settings, tensors, header)
        read = attention.projected(tensors["hidden"])
        leaves = {"alpha_weight": attention.dms_proj_alpha.weight}
        leaves["alpha_norm_weight"] = attention.dms_proj_alpha_norm.weight
    x = policy._logits(read, key)
    scale = max(1.0, float(tensors["eval_logits"].abs().max()))
    close(theirs(x), tensors["eval_logits"], 1e-6 * scale)
    (wide, attended), rate = policy.keys_values(key, value, read, context)
    assert torch.equal(rate[0], tensors["eval_decisions"].mean(-1))
    assert torch.equal(wide[:-1, ..., -1] < 0, ours(tensors["eval_decisions"])[1:] > 0)
    close(theirs(wide[..., :channels]), tensors["k"], OUTPUT)
    assert torch.equal(theirs(attended), tensors["v"])
    rotated = policy.query(query, context, groups)[..., :channels]
    close(theirs(rotated), tensors["q"], OUTPUT)
    z = eviction.noisy_logits(x, noise, header["tau"])
    z = of_first_head(z) if header["per"] == "layer" else z
    close(theirs(z), tensors["train_logits"], 1e-6 * scale / header["tau"])
    trained, rate = policy.keys_values(key, value, read, replace(context, training=True))
    close(rate[0], tensors["train_decisions"].mean(-1), LOSS)
    close(trained.key[:-1, ..., -1], torch.nn.functional.logsigmoid(-ours(tensors["train_logits"]))[1:], 1e-3)
    leaves["q_raw"] = raw
    d = straight_through(torch.sigmoid(z))
    for result, name in ((z, "z"), (d, "d"), (rotated, "q")):
        objective = (theirs(result) * tensors[f"functional_{name}"]).sum()
        recorded = {leaf: tensors[key] for leaf in leaves if (key := f"grad_{leaf}__{name}") in tensors}
        assert recorded
        wanted = [leaves[leaf] for leaf in recorded]
        gradients = torch.autograd.grad(objective, wanted, retain_graph=True)
        for gradient, expected in zip(gradients, recorded.values(), strict=True):
            close_gradient(gradient, expected)


def adapter(settings, tensors, header):
    """An attention layer with the recorded adapter."""
    config = LCKVLlamaConfig(
        hidden_size=header["hidden"],
        num_hidden_layers=1,
        num_attention_heads=header["H"],
        num_key_value_heads=header["KV"],
        head_dim=header["D"],
        rms_norm_eps=header["rms_eps"],
        compression={"layer_types": "0", "policy": settings.settings()},
    )
    attention = LCKVLlamaAttention(config, 0)
    with torch.no_grad():
        attention.dms_proj_alpha.weight.copy_(tensors["alpha_weight"])
        attention.dms_proj_alpha_norm.weight.copy_(tensors["alpha_norm_weight"])
    return attention


@pytest.mark.parametrize("backend", [sdpa, reference], ids=["sdpa", "reference"])
@pytest.mark.parametrize("case", ["kv2_w16_tau1", "kv2_w8_tau0.1", "kv4_w4_tau1"])
def test_training_attention_its_loss_and_their_gradients(case, backend):
    tensors, header = load(f"b_train_{case}")
    leaves = [tensors[name].clone().requires_grad_() for name in "qkvx"]
    query, key, value, x = map(ours, leaves)
    settings = DMSConfig(
        stage="finetune",
        decision_scale=1.0,
        initial_decision_offset=0.0,
        temperature=header["tau"],
        window=header["window"],
        target_compression_ratio=header["cr"],
    )
    policy = DMSPolicy(settings)
    context = TokenContext(unturned, noise=ours(tensors["noise"]), training=True)
    key_value, (rate,) = policy.keys_values(key, value, deciding(x, query), context)
    close(theirs(key_value.key[:-1, ..., -1]), tensors["key_bias"][..., :-1], OUTPUT * 10)
    output = attend(policy, policy.query(query, context), key_value, backend)
    close(theirs(output), tensors["out"], OUTPUT)
    close(rate.mean(1), tensors["frac"], LOSS)
    loss = policy.auxiliary_loss([rate.mean(1)], 0.5).mean()
    close(loss, tensors["dms_loss"], LOSS)
    objective = (theirs(output) * tensors["functional"]).sum()
    for name, gradient in zip("qkvx", torch.autograd.grad(objective, leaves, retain_graph=True), strict=True):
        close_gradient(gradient, tensors[f"grad_{name}"])
    (of_loss,) = torch.autograd.grad(loss, leaves[3], retain_graph=True)
    close_gradient(of_loss, tensors["grad_x__loss_only"])
    (of_both,) = torch.autograd.grad(objective + loss, leaves[3])
    close_gradient(of_both, tensors["grad_x__with_loss"])
    hard = ours(tensors["decisions"] * 2.0 - 1)
    whole = TokenContext(unturned)
    key_value, _ = policy.keys_values(key, value, deciding(hard, query), whole)
    close(theirs(attend(policy, policy.query(query, whole), key_value, backend)), tensors["out_hard"], OUTPUT)


def test_loss_of_several_layers():
    tensors, header = load("c_loss_layers")
    x = tensors["x"].requires_grad_()
    settings = replace(RETROFIT, stage="finetune", decision_scale=1.0, initial_decision_offset=0.0)
    rates = []
    for layer, noise in zip(x, tensors["noise"], strict=True):
        logits = ours(layer)
        context = TokenContext(unturned, noise=ours(noise), training=True)
        heads = torch.zeros(*logits.shape, 2)
        says = deciding(logits, heads)
        rates.append(DMSPolicy(settings).keys_values(heads, heads, says, context)[1][0])
    rates = torch.stack(rates)
    assert settings.temperature == header["tau"]
    close(rates.mean((0, 2)), tensors["frac_per_sample"], LOSS)
    report = DMSPolicy(settings).report([rates.mean(1).double()], 0.0, None)
    assert report["compression_ratio"] == pytest.approx(float(tensors["measured_cr"]), rel=1e-6)
    for number, ratio in enumerate(tensors["target_cr"].tolist()):
        policy = DMSPolicy(replace(settings, target_compression_ratio=ratio))
        loss = policy.auxiliary_loss([rates.mean((0, 2))], 0.0).mean()
        close(loss, tensors["dms_loss"][number], LOSS)
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        close(gradient, tensors["grad_x"][number], LOSS)


def test_schedule():
    tensors, _ = load("c_schedule")
    for step, steps, final, initial, target, ratio, share in tensors["table"].tolist():
        settings = replace(
            RETROFIT,
            target_compression_ratio=target,
            initial_compression_ratio=initial,
            ramp=1.0 if final < 0 else final / steps,
        )
        asked = DMSPolicy(settings).target(step / steps)
        assert asked == pytest.approx(ratio, abs=1e-12)
        assert 1 - 1 / asked == pytest.approx(share, abs=1e-12)


def test_noise_is_that_of_the_formula():
    """The recorded noise has short tails, because it was drawn in bfloat16; ours is what its formula says."""
    _, header = load("a_noise")
    noise = DMSPolicy(RETROFIT).draw_noise((50000, 1, 4), [3], torch.device("cpu"))
    assert float(noise.std()) == pytest.approx(header["stats"]["logistic_std"], rel=0.01)
    assert float((noise > 5).float().mean()) == pytest.approx(header["stats"]["logistic_p_gt_5"], rel=0.1)


class Decoded:
    """Recorded queries, keys, values and decisions, that a policy and a contiguous cache decode."""

    def __init__(self, tensors, header):
        settings = replace(RETROFIT, stage="finetune", decision_scale=1.0, initial_decision_offset=0.0)
        self.policy = DMSPolicy(replace(settings, window=header["window"]))
        self.heads = [ours(tensors[name]) for name in "qkv"]
        self.decisions = ours(tensors["decisions"] * 2.0 - 1)
        self.cache, self.start = ContiguousCache([0], self.policy, {}), 0

    def take(self, size, counted=None):
        """Output [s, B, H, D] of the next tokens; `counted` bool [B, s]."""
        at = slice(self.start, self.start + size)
        query, key, value = (tensor[at] for tensor in self.heads)
        context = TokenContext(unturned, counted=None if counted is None else counted.T)
        state = None if self.cache.empty else self.cache.state(0)
        says = deciding(self.decisions[at], query)
        extension = self.policy.extend(state, key, value, says, context)
        query, bias = self.policy.query(query, context).permute(1, 2, 0, 3), self.policy.traits.key_bias
        facts = {"scale": value.shape[-1] ** -0.5, "key_bias": bias}
        if self.cache.empty:
            new = NewTokens(*(part.permute(1, 2, 0, 3) for part in extension[:2]), counted, None)
            output = attend_past(query, new, nothing_before(new), Visibility(), **facts)
        else:
            output = self.cache.attend(0, query, extension, counted, Visibility(), **facts)
        self.cache.commit({0: extension}, counted)
        self.start += size
        return output.permute(2, 0, 1, 3)

    def alive(self):
        """uint8 [B, KV, L]: tokens whose values the cache holds, which must stand in order."""
        slots, value = self.cache._layers[0].past, theirs(self.heads[2])
        used = torch.arange(slots.value.shape[2]) < slots.lengths[..., None]
        same = (slots.value[:, :, :, None] == value[:, :, None]).all(-1) & used[..., None]
        assert torch.equal(same.sum(-1), used.long())
        return same.any(2).to(torch.uint8)


@pytest.mark.parametrize("case", ["kv2_w16", "kv2_w8", "kv4_w4"])
def test_decoding(case):
    tensors, header = load(f"d_decode_{case}")
    total = header["chunked_prefill_total"]
    chunks = [header["chunk"]] * (total // header["chunk"])
    chunks += [total - sum(chunks)] if total > sum(chunks) else []
    runs = {"token": ([1] * 48, "lens", 0), "chunked": (chunks + [1] * (48 - total), None, 0)}
    for size in header["prefills"]:
        runs[f"prefill{size}"] = ([size] + [1] * (48 - size), f"lens_prefill{size}", size - 1)
    for name, (sizes, lens, first) in runs.items():
        decoded, outputs = Decoded(tensors, header), []
        for size in sizes:
            outputs.append(decoded.take(size))
            if lens is not None:
                lengths = tensors[lens][decoded.start - 1 - first]
                assert torch.equal(decoded.cache.lengths(0).int(), lengths.int()), (name, decoded.start)
            assert torch.equal(decoded.alive(), tensors["alive"][decoded.start - 1])
            if name.startswith("prefill") and decoded.start == sizes[0]:
                assert torch.equal(decoded.alive(), tensors[f"alive_{name}"])
        close(theirs(torch.cat(outputs)), tensors[f"out_{name}"], OUTPUT)
        close(theirs(torch.cat(outputs)), tensors["out_train_hard"], OUTPUT)
        final = tensors["final_slots_token"]
        kept = [sorted(set(head.tolist()) - {-1}) for row in final for head in row]
        assert kept == [head.nonzero().flatten().tolist() for row in decoded.alive() for head in row]


@pytest.mark.parametrize("case", ["kv2_w16", "kv2_w8", "kv4_w4"])
def test_padding_leaves_no_trace(case):
    tensors, header = load(f"d_decode_{case}")
    decoded, size = Decoded(tensors, header), header["leftpad_prefill"]
    counted = torch.ones(2, size, dtype=torch.bool)
    counted[0, : header["left_pad"]] = False
    outputs = [decoded.take(size, counted), *(decoded.take(1) for _ in range(48 - size))]
    close(theirs(torch.cat(outputs)), tensors["out_leftpad"], OUTPUT)
    assert torch.equal(decoded.cache.lengths(0).int(), tensors["final_lens_leftpad"].int())


def recorded_model(tensors, header, **settings):
    written = header["config"]
    policy = DMSConfig(
        stage="finetune",
        target_compression_ratio=header["cr_target"],
        window=written["dms_window_size"],
        decision_scale=written["dms_alpha_scale"],
        initial_decision_offset=settings.pop("offset", written["dms_initial_alpha_offset"]),
        temperature=written["dms_tau"],
        decision_source="adapter" if written["dms_separate_alpha"] else "borrowed_channel",
    )
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps tie_word_embeddings"
    )
    sizes = {name: written[name] for name in names.split()}
    compression = {"layer_types": "0_1", "policy": policy.settings()}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": written["rope_theta"]}}
    config = LCKVLlamaConfig(**sizes, **rope, qk_norm=True, qkv_bias=False, compression=compression)
    built = LCKVLlamaForCausalLM(config)
    state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
    missing = built.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    built.tie_weights()
    return built


@pytest.mark.parametrize("name", ["e_model_qneuron", "e_model_adapter"])
def test_a_model_in_training(name):
    tensors, header = load(name)
    built = recorded_model(tensors, header).train()
    noise = iter(ours(layer) for layer in tensors["noise"])
    built.model.policy.draw_noise = lambda shape, seeds, device: next(noise)
    ids = tensors["input_ids"].long()
    output = built(ids, labels=ids, use_cache=False)
    close(output.logits, tensors["train_logits"], LOGITS)
    close(output.auxiliary_loss, tensors["dms_loss"], LOSS)
    close(output.statistics["eviction_rate"].mean(), tensors["frac_mean"], LOSS)
    with torch.no_grad():
        teacher = recorded_model(tensors, header, offset=1e6).eval()
        teacher = teacher(ids, use_cache=False).logits
    close(teacher, tensors["teacher_logits"], LOGITS)
    own, other = output.logits.log_softmax(-1), tensors["teacher_logits"].log_softmax(-1)
    mask = tensors["loss_mask"].float()
    distilled = ((own.exp() * (own - other)).sum(-1) * mask).sum() / mask.sum()
    close(distilled, tensors["distill_loss"], LOSS * 10)
    (distilled + output.auxiliary_loss).backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    recorded = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("grad.")}
    assert recorded and recorded.keys() <= gradients.keys()
    for name, gradient in recorded.items():
        close_gradient(gradients[name], gradient)


@pytest.mark.parametrize("make_cache", [contiguous_cache, paged_cache])
@pytest.mark.parametrize("recorded", ["e_model_qneuron", "e_model_adapter"])
def test_a_model_in_inference(recorded, make_cache):
    tensors, header = load(recorded)
    built, ids = recorded_model(tensors, header).eval(), tensors["input_ids"].long()
    with torch.no_grad():
        close(built(ids, use_cache=False).logits, tensors["eval_prefill_logits"], LOGITS)
    for sizes, name in (
        ([1] * ids.shape[1], "eval_token_logits"),
        ([header["prefill"]] + [1] * (ids.shape[1] - header["prefill"]), "eval_prefill_decode_logits"),
    ):
        for row, text in enumerate(ids.tolist()):
            cache, start, said = make_cache(built), 0, []
            view = cache if make_cache is contiguous_cache else cache.rows([sequence := cache.open()])
            for size in sizes:
                said.append(logits(built, [text[start : start + size]], view)[0])
                start += size
                if name == "eval_token_logits" and start > 1:
                    for layer in range(2):
                        used = (
                            cache.lengths(layer)[0]
                            if make_cache is contiguous_cache
                            else cache.lengths(sequence, layer)
                        )
                        assert torch.equal(
                            used.int(), tensors["eval_token_lens"][start - 2, layer, row].int()
                        )
            close(torch.cat(said), tensors[name][row], LOGITS)
