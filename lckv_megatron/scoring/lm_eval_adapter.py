"""The generation engine as a model of EleutherAI's evaluation harness (lm-eval): every score is computed
through the compressed cache.

lm-eval is an optional package: `adapter` imports it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from lckv.generation.answering import answers
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv_megatron.cache_facts import CacheFacts
from lckv_megatron.unicode_text import check_text
from megatron_ext.errors import ConfigError

DEFAULT_NEW_TOKENS = 256
"""Of generation tasks that do not say how many."""

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
}


class EngineRequests:
    """What lm-eval asks of a causal language model, answered by an engine."""

    backend = "causal"

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int,
        token_by_token: bool = False,
        seed: int = 0,
    ) -> None:
        """`max_length`: longest text in tokens, from whose left is cut; `batch_size`: texts that are scored
        at once; `token_by_token`: as generation would see them; `seed`: of tasks that sample."""
        super().__init__()
        self.tokenizer, self.max_length, self.cache_facts = tokenizer, max_length, CacheFacts(engine)
        self._engine, self._batch_size, self._token_by_token, self._seed = (
            engine,
            batch_size,
            token_by_token,
            seed,
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; by default with those that the tokenizer adds, unless it begins with them."""
        check_text(string, "a text of a task")
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the likeliest one."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; of longer ones than the context
        in windows, as lm-eval cuts them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._score(list(itertools.chain(*windows)), disable_tqdm))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Longest first, so that memory that does not suffice is seen at once."""
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self._batch_size):
                part = order[start : start + self._batch_size]
                texts = [(pairs[index][0] + pairs[index][1])[-(self.max_length + 1) :] for index in part]
                scores = self._engine.score(texts, token_by_token=self._token_by_token)
                self.cache_facts.observe(sum(len(text) - 1 for text in texts))
                for index, score in zip(part, scores, strict=True):
                    length = len(pairs[index][1])
                    logprobs, greedy = score.logprobs[-length:], score.greedy[-length:]
                    results[index] = (logprobs.double().sum().item(), bool(greedy.all()))
                bar.update(len(part))
        return [results[index] for index in range(len(pairs))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop texts."""
        prompts = [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        completions = answers(self._engine, prompts, on_step=self.cache_facts.observe)
        bar = tqdm(completions, total=len(prompts), desc="generating", disable=disable_tqdm)
        return list(self._texts(bar))

    def _prompt(
        self, number: int, context: str, settings: Mapping[str, Any]
    ) -> tuple[list[int], SamplingParams]:
        params = sampling_params(settings, self._seed + number)
        room = self.max_length - params.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"a task asks for {params.max_new_tokens} new tokens, but the model's context is "
                f"{self.max_length}; set max_gen_toks lower."
            )
        return self.tok_encode(context)[-room:], params

    @staticmethod
    def _texts(completions: Any) -> Iterator[str]:
        for completion in completions:
            if isinstance(completion, ValueError):
                raise ConfigError(f"the engine refuses a task's prompt: {completion}")
            if completion.error is not None:
                raise ConfigError(f"the engine could not answer a task's prompt: {completion.error}")
            yield completion.text


def sampling_params(settings: Mapping[str, Any], seed: int) -> SamplingParams:
    """From a task's generation_kwargs, transformers' and some of lm-eval's own. Null: as if not given.

    As lm-eval's own models do, tasks sample where `do_sample` or a temperature above 0 says so; `do_sample`
    alone is sampling at transformers' temperature, 1. Raises ConfigError for what has no counterpart.
    """
    left = {name: value for name, value in settings.items() if value is not None}
    lengths = {name: left.pop(name) for name in _LENGTH_NAMES if name in left}
    if len(set(map(str, lengths.values()))) > 1:
        shown = " and ".join(f"{name} is {value!r}" for name, value in lengths.items())
        raise ConfigError(f"generation_kwargs: {shown}; give one of them.")
    length_name, length = next(iter(lengths.items()), ("max_gen_toks", DEFAULT_NEW_TOKENS))
    until = left.pop("until", ())
    temperature = _temperature(left.pop("do_sample", None), left.pop("temperature", None))
    named = {name: left.pop(name) for name in _SAMPLING_NAMES if name in left}
    if named.get("top_k") == 0:  # transformers: all
        del named["top_k"]
    unknown = [name for name, value in left.items() if value not in _WITHOUT_EFFECT.get(name, ())]
    if unknown:
        raise ConfigError(
            f"generation_kwargs.{unknown[0]} is {left[unknown[0]]!r}; the engine has nothing of the kind."
        )
    params = SamplingParams(
        temperature=temperature,
        max_new_tokens=length,
        stop=tuple(until) if isinstance(until, list | tuple) else (until,),
        seed=seed,
        **named,
    )
    problems = params.problems({"max_new_tokens": length_name, "stop": "until"})
    if problems:
        raise ConfigError("\n".join(f"generation_kwargs: {problem}" for problem in problems))
    return params


def _temperature(do_sample: Any, given: Any) -> Any:
    """0 for tasks that do not sample."""
    if do_sample not in (None, True, False):
        raise ConfigError(f"generation_kwargs.do_sample is {do_sample!r}; it must be true or false.")
    if do_sample and given == 0:
        raise ConfigError(
            f"generation_kwargs.do_sample is true and temperature is {given!r}; set do_sample to false, or "
            "the temperature above 0."
        )
    if do_sample is False:
        return 0.0
    if given is None:
        return 1.0 if do_sample else 0.0
    return given


def adapter(engine: Engine, tokenizer: Any, **options: Any) -> Any:
    """An lm_eval.api.model.LM; `options` as `EngineRequests`. Its tokenization of contexts and continuations
    is lm-eval's own."""
    from lm_eval.api.model import TemplateLM

    return type("LCKVEngine", (EngineRequests, TemplateLM), {})(engine, tokenizer, **options)
