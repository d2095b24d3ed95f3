"""How well a model in a checkpoint of this project predicts windows of tokens, on any layout."""

import argparse
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state

from lckv_megatron.checkpoint_options import layout, tokenizer_of_run
from lckv_megatron.scoring.text_windows import Coder, Window
from megatron_ext.evaluation.logits import compute_losses
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from megatron_ext.restoring.model import restore


class CheckpointLosses:
    """The newest good checkpoint in `options.load`, in the precision of its run. Process groups end with the
    context. Implements `WindowLosses` on the process that `has_result`; on the others losses are 0."""

    def __init__(self, options: argparse.Namespace) -> None:
        tokenizer, parallel = tokenizer_of_run(options), layout(options)
        initialize(parallel, seed=1)
        restored = restore(options.load, parallel, layer_types=options.layer_types)
        self._stage = restored.stage
        self.context = restored.run.model.max_position_embeddings or restored.run.train.seq_length
        self.coder = Coder(tokenizer.encode, tokenizer.decode)

    def __enter__(self) -> "CheckpointLosses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        destroy()

    @property
    def has_result(self) -> bool:
        """On one process."""
        data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        ranks = parallel_state.get_tensor_model_parallel_rank(), data
        return ranks == (0, 0) and parallel_state.is_pipeline_last_stage()

    def __call__(self, windows: Sequence[Window]) -> float:
        """See `WindowLosses`; one window after the other."""
        return math.fsum(map(self._loss, windows))

    def facts(self) -> dict[str, Any]:
        """Nothing is measured beside the loss."""
        return {}

    def _loss(self, window: Window) -> float:
        tokens = torch.tensor(window.tokens, device=device_of_rank())
        losses = compute_losses(self._stage, tokens[None, :-1], tokens[None, 1:])
        return 0.0 if losses is None else losses[0, -window.predicted :].double().sum().item()
