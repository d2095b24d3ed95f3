"""How well a model predicts windows of tokens: in one forward pass over each, or through its inference cache.

Shapes: b windows, s tokens, n predicted tokens, V tokens of the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lckv.generation.engine import Engine
from lckv.losses.linear_cross_entropy import linear_cross_entropy
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from lckv_megatron.cache_facts import CacheFacts
from lckv_megatron.scoring.text_windows import Window

_ROWS = 128
"""Tokens whose logits are float64 at once. In float32 a sum over 49,152 of them errs by 1e-5 of the loss."""


class WindowLosses(Protocol):
    """A way to run a model over windows."""

    def __call__(self, windows: Sequence[Window]) -> float:
        """Cross-entropy of the predicted tokens of all windows, in nats, summed."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the windows so far, for the report."""
        ...


class ParallelLosses:
    """One forward pass, as in training. Maps that iterate run `passes` passes (None: as in training)."""

    def __init__(self, model: LCKVLlamaForCausalLM, passes: int | None = None) -> None:
        self._model, self._iteration = model, None if passes is None else Iteration(passes)
        self._passes: int | None = None
        self._tokens = 0.0
        self._sums: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> float:
        """See `WindowLosses`; all windows at once."""
        model, device = self._model, self._model.device
        if len(windows) > 1 and model.config.rotary_embedding().follows_length:
            return sum(self([window]) for window in windows)  # a neighbour's length is none of theirs
        lengths = torch.tensor([len(window.tokens) - 1 for window in windows])
        tokens = torch.zeros(len(windows), int(lengths.max()) + 1, dtype=torch.int64)
        for row, window in enumerate(windows):
            tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
        place = torch.arange(tokens.shape[1] - 1)
        counted = place < lengths[:, None]
        first = lengths - torch.tensor([window.predicted for window in windows])
        wanted = (counted & (place >= first[:, None])).to(device)
        tokens = tokens.to(device)
        padded = None if bool(counted.all()) else counted.to(device)
        output = model.model.run(
            model.model.embed_tokens(tokens[:, :-1]), counted=padded, iteration=self._iteration
        )
        assert output.last_hidden_state is not None
        self._note(output.passes, output.statistics, lengths)
        return summed_loss(model, output.last_hidden_state[wanted], tokens[:, 1:][wanted])

    def facts(self) -> dict[str, Any]:
        """Passes over the layers that iterate, and what the KV policy reports."""
        means = [total / self._tokens for total in self._sums.values()]
        reported = self._model.model.policy.report(means, math.nan, None) if means else {}
        return {"passes": self._passes, "compression_ratio": None, **reported}

    def _note(self, passes: int | None, statistics: Mapping[str, Tensor] | None, lengths: Tensor) -> None:
        """`statistics`: [KV layers, b, g] each, means over the tokens of a row."""
        self._passes = passes if self._model.model.layer_types.any_cyclic else None
        self._tokens += float(lengths.sum())
        for name, values in (statistics or {}).items():
            total = (values.double().cpu() * lengths[:, None]).sum(1)  # [KV layers, g]
            self._sums[name] = self._sums.get(name, 0) + total


def summed_loss(model: LCKVLlamaForCausalLM, hidden_states: Tensor, targets: Tensor) -> float:
    """Cross-entropy in nats of `targets` int64 [n] after `hidden_states` [n, hidden], summed."""
    done = linear_cross_entropy(hidden_states, model.lm_head.weight, targets)
    return done.losses.double().sum().item()


class TransformersLosses:
    """One forward pass of transformers' own class for a model, whatever that is:
    an independent check of this project's."""

    def __init__(self, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True
        )
        self._model = model.to(device).eval()
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        """Tokens; None where the model does not say."""

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> float:
        """See `WindowLosses`; one window after the other."""
        total: list[float] = []
        for window in windows:
            tokens = torch.tensor([window.tokens], device=self._model.device)
            output = self._model(tokens[:, :-1], use_cache=False, logits_to_keep=window.predicted)
            targets = tokens[0, -window.predicted :]
            for rows, wanted in zip(output.logits[0].split(_ROWS), targets.split(_ROWS), strict=True):
                total.append(cross_entropy(rows.double(), wanted, reduction="sum").item())
        return math.fsum(total)

    def facts(self) -> dict[str, Any]:
        """Nothing is measured beside the loss."""
        return {}


class CachedLosses:
    """Through an engine's cache: in chunks, or token by token."""

    def __init__(self, engine: Engine, *, token_by_token: bool) -> None:
        self._engine, self._token_by_token, self._facts = engine, token_by_token, CacheFacts(engine)

    def __call__(self, windows: Sequence[Window]) -> float:
        """See `WindowLosses`."""
        scores = self._engine.score(
            [window.tokens for window in windows], token_by_token=self._token_by_token
        )
        self._facts.observe(sum(len(window.tokens) - 1 for window in windows))
        losses = (
            -score.logprobs[-window.predicted :].double().sum().item()
            for score, window in zip(scores, windows, strict=True)
        )
        return math.fsum(losses)

    def facts(self) -> dict[str, Any]:
        """Tokens per slot."""
        return {"compression_ratio": self._facts.compression_ratio}
