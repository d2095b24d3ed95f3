"""The engine's answers: those of the model, whatever runs beside them and however little memory there is."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.golden.lckv_models import FOLDER, NAMES, Golden
from tests.lckv.cache.models import CASES, MIXED_CASES, model, paged_cache, parallel_logits, text
from tests.lckv.generation.engines import GREEDY, empty, engine
from tests.ranks import run_on_ranks

PROMPTS = [text(length, seed=length) for length in (1, 7, 3, 9)]
"""None longer than the passes over iterated layers, which therefore are exact."""
SAMPLED = [replace(GREEDY, temperature=1.5, seed=seed) for seed in range(len(PROMPTS))]


@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES])
def test_answers_are_those_of_generate(name: str, policy: str) -> None:
    built = model(name, policy)
    tried = engine(built)
    answers = tried.generate(PROMPTS, GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        alone = built.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=None)
        assert list(answer.token_ids) == alone[0, len(prompt) :].tolist()
        assert (answer.finish_reason, answer.prompt_tokens) == ("length", len(prompt))
    assert empty(tried)


@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES])
def test_neighbours_chunks_exactness_and_lack_of_memory_change_nothing(name: str, policy: str) -> None:
    """Four requests alone, together, with prompts in chunks of 4 tokens, with prompts token by token, and in
    a cache so small that they give their pages to one another."""
    built = model(name, policy)
    alone = engine(built)
    expected = [
        alone.generate([prompt], each)[0].token_ids for prompt, each in zip(PROMPTS, SAMPLED, strict=True)
    ]
    pages_of_one = alone.cache.pages_needed([alone.cache.open()], len(PROMPTS[-1]) + GREEDY.max_new_tokens)
    tight = engine(built, pages=int(1.6 * pages_of_one))
    for tried in (engine(built), engine(built, prefill_chunk=4), engine(built, prefill="exact"), tight):
        answers = tried.generate(PROMPTS, SAMPLED)
        assert [answer.token_ids for answer in answers] == expected
        assert empty(tried)
    if policy == "dense" and "YOCO" not in name:
        assert tight.stats().preemptions > 0


@pytest.mark.parametrize(("name", "policy", "tolerance"), [("LCKV", "dense", 0.05), ("sandwich", "dmc", 0.2)])
def test_prompts_that_are_read_approximately_do_not_depend_on_neighbours_either(
    name: str, policy: str, tolerance: float
) -> None:
    """Prompts of more tokens than passes, ended by the tolerance at different passes."""
    built = model(name, policy)
    prompts = [text(length, seed=length) for length in (40, 12, 61)]
    params = [replace(GREEDY, temperature=0.7, seed=seed, max_new_tokens=16, logprobs=0) for seed in range(3)]
    settings = {"prefill_tolerance": tolerance, "prefill_chunk": 25}
    alone = engine(built, **settings)
    expected = [alone.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert len({answer.prefill_passes for answer in expected}) > 1
    together, interrupted = engine(built, **settings), engine(built, **settings)
    answers = together.generate(prompts, params)
    requests = [interrupted.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    for steps in (9, 6):
        for _ in range(steps):
            interrupted.step()
        interrupted.score([[1]])  # sets all requests aside
    interrupted.run_until_idle()
    answers += [request.result(0) for request in requests]
    assert max(answer.preemptions for answer in answers) > 1
    for answer, right in zip(answers, expected * 2, strict=True):
        assert (answer.token_ids, answer.prefill_passes) == (right.token_ids, right.prefill_passes)
        assert answer.logprobs == pytest.approx(right.logprobs, abs=1e-4)


def _answers_on_a_gpu(name: str, policy: str) -> bool:
    built = model(name, policy).cuda()
    tried = Engine(built, EngineConfig(memory_bytes=2**22, prefill_tolerance=0.0))
    expected = [
        built.generate(torch.tensor([prompt]).cuda(), do_sample=False, max_new_tokens=10, eos_token_id=None)
        for prompt in PROMPTS
    ]
    answers = tried.generate(PROMPTS, GREEDY)
    return all(
        [*prompt, *answer.token_ids] == right[0].tolist()
        for prompt, answer, right in zip(PROMPTS, answers, expected, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "policy"), [("YOCO", "dense"), ("LCKV", "dmc")])
def test_answers_on_a_gpu_are_those_of_generate(name: str, policy: str) -> None:
    assert run_on_ranks(1, _answers_on_a_gpu, name, policy, device="cuda") == [True]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_answers(name: str) -> None:
    golden = Golden.load(name)
    header = golden.header
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config = LCKVLlamaConfig(
        **{field: header[field] for field in names},
        rms_norm_eps=header["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": header["rope_theta"]},
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=128,
        compression={
            field: header[field]
            for field in (
                "layer_types",
                "forward_passes",
                "backward_passes",
                "sliding_window",
                "force_nodiag",
            )
        },
    )
    built = LCKVLlamaForCausalLM(config).eval()
    weights = {
        key: tensor
        for key, tensor in load_file(FOLDER / f"{name}.safetensors").items()
        if key in built.state_dict()
    }
    built.load_state_dict(weights)
    generated = golden.tensors["generated"]
    prompts = golden.tensors["input_ids"][:, : golden.tensors["input_ids"].shape[1] // 2].tolist()
    answers = engine(built).generate(prompts, replace(GREEDY, max_new_tokens=generated.shape[1], logprobs=0))
    assert [list(answer.token_ids) for answer in answers] == generated.tolist()
    expected = golden.tensors["generated_logits"].log_softmax(-1).gather(-1, generated[..., None]).squeeze(-1)
    logprobs = torch.tensor([answer.logprobs for answer in answers])
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2 * golden.tolerance["generated_logits"])


def test_a_seed_decides_and_no_seed_does_not() -> None:
    tried = engine(model("plain"))
    hot = replace(GREEDY, temperature=5.0)
    seeds = (3, 3, -3, 4, None, None)
    answers = tried.generate([PROMPTS[1]] * 6, [replace(hot, seed=seed) for seed in seeds])
    first, *others = [answer.token_ids for answer in answers]
    assert others[0] == first
    assert len({first, *others}) == 5


def test_page_size_does_not_matter() -> None:
    built = model("CLA", "dmc")
    answers = []
    for page_size in (1, 3, 16):
        cache = paged_cache(
            built, pages=4000 // page_size, page_size=page_size, max_sequences=4, max_tokens=127
        )
        answers.append([answer.token_ids for answer in Engine(built, cache=cache).generate(PROMPTS, SAMPLED)])
    assert answers[0] == answers[1] == answers[2]


def test_a_repetition_penalty_sees_prompt_and_answer() -> None:
    built = model("plain")
    prompt = text(20, seed=3)
    answer = engine(built).generate([prompt], replace(GREEDY, repetition_penalty=1.7, max_new_tokens=20))[0]
    theirs = built.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, repetition_penalty=1.7
    )
    assert list(answer.token_ids) == theirs[0, len(prompt) :].tolist()


def test_presence_and_frequency_count_in_the_answer_only_also_after_preemptions() -> None:
    built = model("plain")
    prompt = text(20, seed=3)
    params = replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={prompt[0]: 1.5})
    tokens = list(prompt)
    for _ in range(20):
        logits = parallel_logits(built, tokens)[-1].clone()
        logits[prompt[0]] += 1.5
        for token in tokens[20:]:
            logits[token] -= 0.4
        for token in set(tokens[20:]):
            logits[token] -= 0.7
        tokens.append(int(logits.argmax()))
    tried = engine(built)
    request = tried.submit(prompt, replace(params, max_new_tokens=20))
    for step in range(9):
        tried.step()
        if step == 5:
            tried.score([prompt])  # sets it aside
    tried.run_until_idle()
    assert list(request.result(0).token_ids) == tokens[20:]
    assert len(set(tokens[20:])) > len(set(engine(built).generate([prompt], GREEDY)[0].token_ids))


def test_the_answer_ends_with_the_context() -> None:
    tried = engine(model("plain"))
    prompt = text(120)
    answer = tried.generate([prompt], replace(GREEDY, max_new_tokens=1000))[0]
    assert (len(answer.token_ids), answer.finish_reason) == (8, "length")


def test_a_text_that_outgrows_the_cache_ends_with_it_and_others_wait_for_their_turn() -> None:
    built = model("plain")
    small = engine(built, pages=4 * 2 * 5)  # of 4 layers, 2 heads: 20 tokens
    answers = small.generate([text(6), text(7)], replace(GREEDY, max_new_tokens=100))
    roomy = engine(built).generate([text(6), text(7)], replace(GREEDY, max_new_tokens=100))
    for answer, more in zip(answers, roomy, strict=True):
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == 21 - answer.prompt_tokens
        assert answer.token_ids == more.token_ids[: len(answer.token_ids)]
    assert empty(small)


def test_a_prompt_that_fits_only_merged_is_read_token_by_token() -> None:
    built = model("plain", "dmc")
    prompt = text(60)
    expected = engine(built).generate([prompt], GREEDY)[0].token_ids
    whole = engine(built).cache
    pages = whole.pages_needed([whole.open()], 60)
    small = engine(built, pages=int(0.75 * pages))
    assert small.generate([prompt, prompt[:30]], GREEDY)[0].token_ids == expected
    assert empty(small)


def test_measured_compression_is_that_of_the_slots() -> None:
    dense, merged = engine(model("plain")), engine(model("plain", "dmc"))
    for tried in (dense, merged):
        tried.generate([text(30)], GREEDY)
    assert dense.stats().compression_ratio == 1
    assert merged.stats().compression_ratio > 1.5
