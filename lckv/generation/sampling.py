"""From logits to tokens: how a request wants its tokens chosen, and the choice for a batch of requests.

A row's tokens depend on its own logits, parameters, earlier tokens and generator only, never on the other
rows.

Shapes: b rows, V tokens of the vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.generation.constraints import AllowedTokens
from lckv.generation.draws import Uniform
from lckv.generation.factors import RANGE, is_factor, is_finite
from lckv.generation.grammar import Grammar
from lckv.generation.penalties import (
    MOST_BIAS,
    MOST_PENALTY,
    add_biases,
    penalise_answered,
    penalise_repetition,
)
from lckv.surrogates import lone_surrogate

_SHOWN = 100
"""Characters of a wrong value that a message repeats."""

MAX_LOGPROBS = 20
"""Alternatives that a request may ask for with every token."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The grammar comes first, then logit_bias, the penalties, temperature, top_k, top_p and min_p, each on what
    the one before has left (as in transformers and vLLM).
    """

    temperature: float = 1.0
    """Logits are divided by it; 0: always the most probable token."""

    top_k: int | None = None
    """Only tokens as probable as the k-th one; None: all."""

    top_p: float = 1.0
    """Only the most probable tokens that together just reach this probability."""

    min_p: float = 0.0
    """Only tokens at least so probable, relative to the most probable one."""

    repetition_penalty: float = 1.0
    """Positive logits of tokens of the prompt and the answer are divided by it, negative ones multiplied
    (Keskar et al. 2019)."""

    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has."""

    frequency_penalty: float = 0.0
    """Taken from the logits of tokens as often as the answer has them."""

    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of some tokens: a number from -100 (never) to 100 (always) for each."""

    seed: int | None = None
    """The same seed gives the same answer, whatever else is running; None: another answer each time."""

    max_new_tokens: int = 128
    """The answer ends after so many tokens at the latest."""

    stop: tuple[str, ...] = ()
    """The answer ends before any of these texts, wherever they begin within tokens."""

    stop_token_ids: tuple[int, ...] = ()
    """The answer ends with any of these tokens."""

    ignore_eos: bool = False
    """Whether the model's end-of-sequence tokens are tokens like others."""

    grammar: Grammar | None = None
    """What the answer's text must be; tokens that do not fit are never chosen. The answer ends when it is
    complete and cannot go on. None: any text."""

    visible_tokens: tuple[int, ...] = ()
    """Special tokens whose names are part of the answer's text."""

    logprobs: int | None = None
    """With every token its log-probability and those of so many most probable ones, natural logarithms of the
    model's distribution before any of the settings above; None: none."""

    prompt_logprobs: int | None = None
    """The same with every token of the prompt but the first; None: none. Then max_new_tokens may be 0."""

    def problems(self, names: Mapping[str, str] | None = None) -> list[str]:
        """Everything that is wrong with these settings: field, value, required relation. `names`: what the
        user calls fields, where that differs."""
        least_tokens = 1 if self.prompt_logprobs is None else 0
        rules: tuple[tuple[str, bool, str], ...] = (
            (
                "temperature",
                is_factor(self.temperature) or (is_finite(self.temperature) and self.temperature == 0),
                f"0 (greedy), or {RANGE}",
            ),
            (
                "top_k",
                self.top_k is None or (_whole(self.top_k) and self.top_k >= 1),
                "an integer of at least 1, or None",
            ),
            ("top_p", is_finite(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", is_finite(self.min_p) and 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            (
                "repetition_penalty",
                is_factor(self.repetition_penalty),
                f"{RANGE} (1: no penalty)",
            ),
            *(
                (
                    name,
                    is_finite(value := getattr(self, name)) and abs(value) <= MOST_PENALTY,
                    f"a number from -{MOST_PENALTY:g} to {MOST_PENALTY:g} (0: no penalty)",
                )
                for name in ("presence_penalty", "frequency_penalty")
            ),
            (
                "logit_bias",
                self.logit_bias is None or _biases(self.logit_bias),
                f"a map of tokens to numbers from -{MOST_BIAS:g} to {MOST_BIAS:g}, or None",
            ),
            ("seed", self.seed is None or _whole(self.seed), "an integer, or None"),
            (
                "max_new_tokens",
                _whole(self.max_new_tokens) and self.max_new_tokens >= least_tokens,
                f"an integer of at least {least_tokens}",
            ),
            (
                "stop",
                _tuple_of(str, self.stop)
                and all(text and lone_surrogate(text) is None for text in self.stop),
                "a tuple of Unicode texts that are not empty",
            ),
            *(
                (name, _tuple_of(int, getattr(self, name)), "a tuple of integers")
                for name in ("stop_token_ids", "visible_tokens")
            ),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("grammar", self.grammar is None or isinstance(self.grammar, Grammar), "a Grammar, or None"),
            *(
                (
                    name,
                    (value := getattr(self, name)) is None or (_whole(value) and 0 <= value <= MAX_LOGPROBS),
                    f"an integer from 0 to {MAX_LOGPROBS}, or None",
                )
                for name in ("logprobs", "prompt_logprobs")
            ),
        )
        return [
            f"{(names or {}).get(name, name)} is {_shown(getattr(self, name))}; it must be {relation}."
            for name, right, relation in rules
            if not right
        ]


class Choice(NamedTuple):
    """A chosen token."""

    token: int

    logprob: float | None = None
    """Of the token; None where the request asked for none."""

    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, the best first, and their log-probabilities."""


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[Uniform],
    previous: Sequence[Sequence[int]],
    answered: Sequence[Mapping[int, int]] | None = None,
    allowed: AllowedTokens | None = None,
) -> list[Choice]:
    """One token for each row of `logits` [b, V].

    `previous` are the tokens of prompt and answer so far. `answered`: how often the answer has each of its
    tokens; None: there is no answer yet. `allowed`: what rows with a grammar may choose from.
    A row's generator gives one number, unless the row is greedy.
    """
    scores = logits.float()
    possible = scores if allowed is None else allowed.apply(scores)
    chosen = filtered(possible, params, previous, answered)
    best = chosen.argmax(-1)
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if drawn:
        uniform = torch.tensor([generators[row].random() for row in drawn], dtype=torch.float64).to(
            logits.device
        )
        index = torch.tensor(drawn, device=logits.device)
        best[index] = _draw(chosen[index], uniform)
    tokens = best.tolist()
    if all(row.logprobs is None for row in params):
        return [Choice(token) for token in tokens]
    return list(_with_logprobs(scores, best, tokens, params))


def filtered(
    scores: Tensor,
    params: Sequence[SamplingParams],
    previous: Sequence[Sequence[int]],
    answered: Sequence[Mapping[int, int]] | None = None,
) -> Tensor:
    """What is left of float32 logits [b, V] after bias and penalties, temperature (0: as 1)
    and the filters; -inf: never chosen. `answered`: as in `sample`."""
    scores = _penalised(scores, params, previous, answered or [{}] * len(params))

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=scores.device)[:, None]

    if any(row.temperature not in (0, 1) for row in params):
        scores = scores / column([row.temperature or 1.0 for row in params])
    if any(row.top_k is not None or row.top_p < 1 for row in params):
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        counts = torch.tensor(
            [min(row.top_k or scores.shape[1], scores.shape[1]) for row in params], device=scores.device
        )
        least = ordered.gather(1, counts[:, None] - 1)
        ordered = ordered.masked_fill(ordered < least, -torch.inf)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares
        # The first stays, also where float32 makes 0 of top_p; with top_p 1 all stay.
        beyond = (before >= column([row.top_p if row.top_p < 1 else torch.inf for row in params])) & (
            before > 0
        )
        scores = torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(beyond, -torch.inf))
    if any(row.min_p > 0 for row in params):
        floor = column([math.log(row.min_p) if row.min_p > 0 else -torch.inf for row in params])
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + floor, -torch.inf)
    return scores


def _penalised(
    scores: Tensor,
    params: Sequence[SamplingParams],
    previous: Sequence[Sequence[int]],
    answered: Sequence[Mapping[int, int]],
) -> Tensor:
    asking = [
        index
        for index, row in enumerate(params)
        if row.logit_bias
        or row.repetition_penalty != 1
        or ((row.presence_penalty or row.frequency_penalty) and answered[index])
    ]
    if not asking:
        return scores
    scores = scores.clone()
    for index in asking:
        row = params[index]
        if row.logit_bias:
            add_biases(scores[index], row.logit_bias)
        if row.repetition_penalty != 1:
            penalise_repetition(scores[index], row.repetition_penalty, previous[index])
        penalise_answered(scores[index], row.presence_penalty, row.frequency_penalty, answered[index])
    return scores


def _draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """int64 [b]: the inverse of each row's cumulative distribution at `uniform` float64 [b],
    at least 0 and below 1."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # A double below 1 times the total is below the total: a token with a share of its own is found.
    at = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1)


def _with_logprobs(
    scores: Tensor, chosen: Tensor, tokens: Sequence[int], params: Sequence[SamplingParams]
) -> Iterator[Choice]:
    logprobs = scores.log_softmax(-1)
    own = logprobs.gather(1, chosen[:, None]).squeeze(1).tolist()
    most = min(max(row.logprobs or 0 for row in params), scores.shape[1])
    values, best = logprobs.topk(most, -1)
    for row, token, logprob, numbers, names in zip(
        params, tokens, own, values.tolist(), best.tolist(), strict=True
    ):
        if row.logprobs is None:
            yield Choice(token)
        else:
            yield Choice(token, logprob, tuple(zip(names, numbers, strict=True))[: row.logprobs])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _biases(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _whole(token) and is_finite(bias) and abs(bias) <= MOST_BIAS for token, bias in value.items()
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tuple_of(kind: type, value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(entry, kind) and not isinstance(entry, bool) for entry in value
    )
