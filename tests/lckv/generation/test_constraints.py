"""Answers of a model with random weights follow their grammars, whatever else runs, and whatever becomes of
others."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.generation.config import EngineConfig
from lckv.generation.constraints import AllowedTokens, Constraint
from lckv.generation.engine import Engine
from lckv.generation.grammar import JSON_OBJECT, Grammar
from lckv.generation.grammars import Grammars
from lckv.generation.requests import Completion
from lckv.generation.sampling import SamplingParams, sample
from lckv.generation.token_bytes import TokenBytes
from lckv.generation.unbounded import Continuation
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.cache.models import paged_cache
from tests.lckv.generation.engines import empty
from tests.lckv.generation.tokenizers import byte_level

TOKENIZER = byte_level()
PROMPTS = ([5, 6, 7], [9], [30, 31, 32, 33, 34], [8, 8], [200] * 9, [77])
RANDOM = SamplingParams(temperature=1.0, max_new_tokens=200)

FLAG = {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy", None]}}
OBJECT = {"type": "object", "properties": FLAG, "required": ["a", "b"], "additionalProperties": False}
GRAMMARS = (
    Grammar("json_schema", json.dumps(OBJECT)),
    None,
    Grammar("regex", "(ab|c)+d"),
    Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 3})),
    Grammar("json_schema", json.dumps({"type": "string", "maxLength": 9})),
    None,
)


@cache
def model() -> LCKVLlamaForCausalLM:
    """Of more tokens than the tokenizer has."""
    torch.manual_seed(0)
    config = LCKVLlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        compression={"layer_types": "0_2_2_3", "policy": {"name": "dense"}},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LCKVLlamaForCausalLM(config).eval()


def engine(pages: int = 600, **settings: Any) -> Engine:
    """With grammars that others have compiled."""
    made = _engine(pages, **settings)
    made.grammars = grammars()
    return made


@cache
def grammars() -> Grammars | None:
    return _engine().grammars


def _engine(pages: int = 600, **settings: Any) -> Engine:
    pool = paged_cache(model(), pages=pages, max_sequences=6, max_tokens=255)
    config = EngineConfig(**{"prefill_tolerance": 0.0, **settings})
    return Engine(model(), config, tokenizer=TOKENIZER, cache=pool)


def all_params(**changes: Any) -> list[SamplingParams]:
    """Short answers where there is no grammar."""
    return [
        replace(RANDOM, seed=seed, grammar=made, max_new_tokens=200 if made else 20, **changes)
        for seed, made in enumerate(GRAMMARS)
    ]


def fits(completion: Completion, grammar: Grammar | None) -> bool:
    if grammar is None:
        return True
    if grammar.kind == "regex":
        return completion.text.endswith("d") and not completion.text.strip("abcd")
    value = json.loads(completion.text)
    if grammar is GRAMMARS[0]:
        return list(value) == ["a", "b"] and value["a"] in (True, False) and value["b"] in ("x", "yy", None)
    if grammar is GRAMMARS[3]:
        return len(value) <= 3 and set(value) <= {True, False}
    return isinstance(value, str) and len(value) <= 9


def test_each_answer_follows_its_own_grammar_and_is_the_same_alone() -> None:
    together = engine()
    answers = together.generate(PROMPTS, all_params())
    for prompt, params, answer in zip(PROMPTS, all_params(), answers, strict=True):
        assert fits(answer, params.grammar)
        assert params.grammar is None or answer.finish_reason == "stop"
        (alone,) = engine().generate([prompt], params)
        assert alone.token_ids == answer.token_ids and alone.text == answer.text
    assert empty(together)


def test_answers_without_a_grammar_are_those_of_a_batch_without_grammars() -> None:
    held = [replace(params, max_new_tokens=12) for params in all_params()]
    free = [replace(params, grammar=None) for params in held]
    mixed, unmixed = engine().generate(PROMPTS, held), engine().generate(PROMPTS, free)
    for params, one, other in zip(held, mixed, unmixed, strict=True):
        assert (params.grammar is None) == (one.token_ids == other.token_ids)


def test_preempted_answers_are_the_same() -> None:
    tight = engine(pages=70)
    answers = tight.generate(PROMPTS, all_params())
    assert tight.stats().preemptions > 0
    roomy = engine().generate(PROMPTS, all_params())
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in roomy]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.9},
        {"repetition_penalty": 5.0, "ignore_eos": True},
        {"logit_bias": dict.fromkeys(range(1, 200), -100.0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_grammars_come_before_everything_else(changes: dict[str, Any]) -> None:
    for params in [replace(params, max_new_tokens=60) for params in all_params(**changes)[:4:3]]:
        (answer,) = engine().generate([[5, 6]], params)
        if answer.finish_reason == "stop":
            assert fits(answer, params.grammar)
        else:  # the greedy one may go on with white space, and is a beginning
            assert answer.finish_reason == "length" and answer.text.startswith(("{", "["))


def test_an_answer_that_can_go_on_ends_with_the_models_end() -> None:
    params = replace(RANDOM, seed=3, grammar=Grammar("regex", "a*"))
    (answer,) = engine().generate([[5]], params)
    assert answer.token_ids[-1] == 0 and answer.stopped_by == 0 and not answer.text.strip("a")


def test_an_answer_that_cannot_go_on_ends_without_another_token() -> None:
    (answer,) = engine().generate([[5]], replace(RANDOM, grammar=Grammar("regex", "abc")))
    assert (answer.text, answer.finish_reason, answer.stopped_by) == ("abc", "stop", None)
    assert len(answer.token_ids) == 3


def test_the_longest_answer_and_stop_texts_end_it_before_it_is_complete() -> None:
    params = replace(RANDOM, grammar=Grammar("regex", "abcdef"))
    short = engine().generate([[5]], replace(params, max_new_tokens=3))[0]
    assert (short.text, short.finish_reason) == ("abc", "length")
    stopped = engine().generate([[5]], replace(params, stop=("cd",)))[0]
    assert (stopped.text, stopped.stopped_by) == ("ab", "cd")
    exact = engine().generate([[5]], replace(params, max_new_tokens=6))[0]
    assert (exact.text, exact.finish_reason) == ("abcdef", "stop")


def test_logprobs_are_those_of_the_model_without_the_grammar() -> None:
    free = engine().generate([[5]], replace(RANDOM, max_new_tokens=1, temperature=0, logprobs=3))[0]
    held = replace(RANDOM, max_new_tokens=1, logprobs=3, grammar=Grammar("regex", "q+"))
    answer = engine().generate([[5]], held)[0]
    assert answer.top_logprobs == free.top_logprobs
    assert answer.text == "q" and answer.logprobs is not None and answer.logprobs[0] < -1


class _Broken(Constraint):
    """Allows nothing, or has failed."""

    def __init__(self, said: str | None) -> None:
        self._said = said

    def allowed(self) -> bytes:
        return bytes(40)

    def problem(self) -> str | None:
        return self._said


@pytest.mark.parametrize(
    ("said", "message"), [(None, "no token is allowed"), ("too many states", "too many states")]
)
def test_a_grammar_that_allows_nothing_ends_its_own_request_only(said: str | None, message: str) -> None:
    tried = engine()
    requests = [tried.submit(prompt, params) for prompt, params in zip(PROMPTS, all_params(), strict=True)]
    tried._jobs[requests[0].request_id].constraint = _Broken(said)
    tried.run_until_idle()
    failed = requests[0].result()
    assert failed.finish_reason == "error"
    assert failed.error == f"the answer cannot follow its grammar: {message}"
    others = engine().generate(PROMPTS[1:], all_params()[1:])
    assert [request.result().token_ids for request in requests[1:]] == [other.token_ids for other in others]
    assert empty(tried)


def test_other_rows_keep_their_scores() -> None:
    scores = torch.randn(3, 5)
    tokens = torch.tensor([[True, False, False, True, False]])
    held = AllowedTokens(torch.tensor([1]), tokens).apply(scores)
    assert torch.equal(held[[0, 2]], scores[[0, 2]])
    assert torch.equal(held[1].isfinite(), tokens[0]) and torch.equal(held[1, [0, 3]], scores[1, [0, 3]])
    greedy = SamplingParams(temperature=0)
    given_away = torch.tensor([[0.0, 9.0, 8.0, 1.0, 0.0]])
    allowed = AllowedTokens(torch.tensor([0]), tokens)
    assert sample(given_away, [greedy], [None], [[]], None, allowed)[0].token == 3  # type: ignore[list-item]


def test_engines_that_cannot_hold_to_a_grammar_say_so() -> None:
    params = replace(RANDOM, grammar=JSON_OBJECT)
    with pytest.raises(ValueError, match="grammar needs the texts of tokens; give the engine a tokenizer"):
        Engine(model(), cache=paged_cache(model(), max_tokens=50)).submit([5], params)
    with pytest.raises(ValueError, match="Invalid type: nothing"):
        engine().submit([5], replace(RANDOM, grammar=Grammar("json_schema", '{"type": "nothing"}')))
    with pytest.raises(ValueError, match="grammar is 'any'; it must be a Grammar, or None"):
        engine().submit([5], replace(RANDOM, grammar="any"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grammar must be None here; the engine"):
        Continuation(model(), TOKENIZER, None, [5], params)  # type: ignore[arg-type]


def test_special_tokens_that_are_wanted_are_part_of_the_text() -> None:
    shows = Grammar("lark", 'start: "a" <[0]> "b"')
    made = engine()
    made.grammars = Grammars(TokenBytes(TOKENIZER), vocabulary=300, ends=frozenset({299}))
    params = replace(RANDOM, grammar=shows, ignore_eos=True)
    assert made.generate([[5]], params)[0].text == "ab"
    assert made.generate([[5]], replace(params, visible_tokens=(0,)))[0].text == "a<end>b"
    with pytest.raises(ValueError, match="visible_tokens has 300; the model's tokens are 0 to 299"):
        made.submit([5], replace(params, visible_tokens=(300,)))


SCHEMAS = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.integers(-50, 50).map(lambda least: {"type": "integer", "minimum": least, "maximum": least + 30}),
        st.integers(0, 4).map(lambda most: {"type": "string", "maxLength": most}),
        st.lists(st.sampled_from(["a", 1, None, "é\n", True]), min_size=1, max_size=3, unique_by=repr).map(
            lambda values: {"enum": values}
        ),
    ),
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.dictionaries(st.sampled_from(["x", "y z", '"']), inner, min_size=1, max_size=2).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=2, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=3,
)


def valid(value: Any, schema: Any) -> bool:
    """As JSON Schema says, for the schemas above."""
    if "anyOf" in schema:
        return any(valid(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(repr(value) == repr(option) for option in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            return 1 <= len(value) <= 2 and all(valid(item, schema["items"]) for item in value)
    inner = schema["properties"]
    return set(value) == set(inner) and all(valid(value[name], inner[name]) for name in inner)


@settings(max_examples=8, deadline=None)
@given(SCHEMAS, st.integers(0, 9))
def test_answers_are_valid_by_any_schema(schema: dict[str, Any], seed: int) -> None:
    grammar = Grammar("json_schema", json.dumps(schema))
    (answer,) = engine().generate([[5, 6]], replace(RANDOM, seed=seed, grammar=grammar))
    if answer.finish_reason == "stop":
        assert valid(json.loads(answer.text), schema)
