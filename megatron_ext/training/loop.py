"""The training run: build, resume, iterate."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from lckv.pass_errors import reporter_of
from lckv.precision import exact_products
from megatron_ext.checkpointing.load import load_checkpoint
from megatron_ext.command_line import config_to_dict
from megatron_ext.config import DataConfig, ModelConfig, RunConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.data.checks import find_vocabulary
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.first_rank import on_first_rank
from megatron_ext.data.order import Continuation
from megatron_ext.errors import ConfigError
from megatron_ext.model.architecture import (
    ARCHITECTURE,
    architecture,
    but_positions,
    changed_positions,
    setting_of,
)
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.model.cost import model_shape
from megatron_ext.model.parameters import padded_vocab_size
from megatron_ext.model.trainable import trained_parameters
from megatron_ext.parallel.process_groups import chunks_of_rank, device_of_rank
from megatron_ext.parallel.userbuffers import userbuffers
from megatron_ext.restoring.foreign import OpenForeign
from megatron_ext.training.continuation import continuation_of
from megatron_ext.training.iteration import Position, Training, is_evaluated, iterate
from megatron_ext.training.measured import Measurements
from megatron_ext.training.metrics import check_places
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.report import lacks_validation, open_report
from megatron_ext.training.start import Start, check_space, prepared, write_settings
from megatron_ext.training.succession import check_succession, check_weights, policy_of
from megatron_ext.training.teacher import build_teacher

logger = logging.getLogger(__name__)


def fit(run: RunConfig, open_foreign: OpenForeign | None = None) -> Position:
    """Train `run` to its last iteration, or until it is asked to stop. Needs process groups. `open_foreign`
    opens a teacher in Hugging Face's format. Returns how far it came."""
    torch.use_deterministic_algorithms(run.train.deterministic)
    _check_places(run)
    products = exact_products() if run.train.precision == "fp32" else nullcontext()
    with products, prepared(run.checkpoint) as start:
        return _fit(run, start, open_foreign)


def _fit(run: RunConfig, start: Start, open_foreign: OpenForeign | None) -> Position:
    vocab_size, eod = vocabulary(run.model, run.data)
    with userbuffers(run.model, run.parallel, run.train):
        return _train(run, start, vocab_size, eod, open_foreign)


def _train(
    run: RunConfig, start: Start, vocab_size: int, eod: int | None, open_foreign: OpenForeign | None
) -> Position:
    stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=vocab_size)
    parameters = _count_parameters(stage.parameters())
    check_space(run, parameters, _count_parameters(trained_parameters(stage, run.train.trainable)))
    teach = build_teacher(run, stage, open_foreign)
    model = wrap(stage, run.parallel, run.train)
    optimizer, scheduler = build_optimizer(run.optimizer, run.parallel, run.train, model)
    defining = {ARCHITECTURE: architecture(run.model, run.compression, vocab_size=vocab_size)}
    position, continuation, progress = _resume(run, start, model, optimizer, scheduler, defining)
    if teach is not None:
        teach.share_weights(stage)
    owes_evaluation = is_evaluated(run.train, position) and lacks_validation(run.logging, position.iteration)
    if position.iteration >= run.train.train_iters and not owes_evaluation:
        logger.info(
            "nothing to do: the checkpoint in %s is of iteration %d, and train.train_iters is %d",
            start.load,
            position.iteration,
            run.train.train_iters,
        )
        return position
    training = Training(
        run,
        model,
        optimizer,
        scheduler,
        _datasets(run, position, continuation, vocab_size, eod),
        partial(
            make_batch,
            data=run.data,
            eod=eod,
            device=device_of_rank(),
            chunks=chunks_of_rank(),
            reach=run.compression.policy.traits.reach,
        ),
        {**config_to_dict(run), **defining},
        Measurements(reporter_of(run.compression), progress),
        teach,
    )
    write_settings(run)
    padded = padded_vocab_size(vocab_size, run.model, run.parallel)
    shape = model_shape(run.model, vocab_size=padded, seq_length=run.train.seq_length)
    uses = training.datasets.uses
    with open_report(
        run,
        shape,
        parameters=parameters,
        start_iteration=position.iteration,
        uses=uses,
        teacher=None if teach is None else teach.sizes,
    ) as report:
        return iterate(training, position, report, owes_evaluation=owes_evaluation)


def _check_places(run: RunConfig) -> None:
    """ConfigError on all ranks where rank 0 cannot write what logging asks for."""
    on_first_rank(
        lambda: check_places(run.logging),
        what="check of the places that are reported to",
        timeout_minutes=run.parallel.distributed_timeout_minutes,
        timeout_setting="parallel.distributed_timeout_minutes",
    )


def vocabulary(model: ModelConfig, data: DataConfig) -> tuple[int, int | None]:
    """True vocabulary size and end-of-document token, from model.vocab_size, the tokenizer or the datasets.

    Raises ConfigError where none of them says, or where they contradict each other.
    """
    known = find_vocabulary(data)
    if model.vocab_size is None and known is None:
        raise ConfigError(
            "model.vocab_size is not set and neither a tokenizer nor the dataset's description tells it; "
            "set model.vocab_size, or data.tokenizer_type and data.tokenizer_model."
        )
    if known is not None and model.vocab_size is not None and model.vocab_size < known.size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the vocabulary of {known.origin} has {known.size} "
            f"tokens; leave model.vocab_size out, or set it to at least {known.size}."
        )
    size = model.vocab_size or (known.size if known is not None else 0)
    return size, known.eod if known is not None else None


def _count_parameters(of_stage: Iterable[torch.nn.Parameter]) -> int:
    """Those of all stages, from those of this rank's; tensor-parallel duplicates and a tied output layer
    count once. Collective."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    count = 0.0
    for parameter in of_stage:
        if getattr(parameter, "shared", False):
            continue
        split = getattr(parameter, "tensor_model_parallel", False)
        count += parameter.numel() / (1 if split else tensor)
    total = torch.tensor(count, dtype=torch.float64, device=device_of_rank())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return round(total.item())


def _resume(
    run: RunConfig,
    start: Start,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    defining: Mapping[str, Any],
) -> tuple[Position, Continuation | None, Mapping[str, Any] | None]:
    """Where the run stands after loading; from where it goes on in its data, and the progress that the
    checkpoint has noted: None at its beginning."""
    if start.load is None:
        return Position(), None, None
    here = defining[ARCHITECTURE]
    with start.explained():
        loaded = load_checkpoint(
            Path(start.load),
            model=[model],
            optimizer=optimizer,
            scheduler=scheduler,
            finetune=start.finetune,
            verify_hashes=run.checkpoint.verify_hashes,
            expected_model={ARCHITECTURE: but_positions(here)} if start.finetune else defining,
            setting_of=setting_of,
            seed=run.train.seed,
            timeout_minutes=run.checkpoint.load_timeout_minutes,
        )
        before, policy = policy_of(loaded.config), run.compression.policy
        check_succession(before, policy, finetune=start.finetune)
        check_weights(model, policy.build(), before)
        if start.finetune:
            for change in changed_positions(loaded.config.get(ARCHITECTURE, {}), here):
                logger.info("%s", change)
            return Position(), None, None
        position = Position(**{name: int(loaded.progress[name]) for name in asdict(Position())})
        return position, continuation_of(run, loaded.config, loaded.progress), loaded.progress


def _datasets(
    run: RunConfig, position: Position, continuation: Continuation | None, vocab_size: int, eod: int | None
) -> Datasets:
    """Those that the run reads: of a split that it does not read there may be none."""
    train = run.train
    left = max(0, train.train_iters - position.iteration)
    evaluated = train.eval_iters * train.global_batch_size if train.eval_interval else 0
    return build_datasets(
        run.data,
        seq_length=train.seq_length,
        num_samples=(position.consumed_samples + left * train.global_batch_size, evaluated, 0),
        seed=train.seed,
        vocab_size=vocab_size,
        eod=eod,
        resumed=continuation,
    )
