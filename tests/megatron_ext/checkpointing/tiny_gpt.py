"""A tiny GPT of Megatron's own local layers with optimizer and schedule, for tests of checkpoints; runs
inside a rank."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_ext.checkpointing.folders import checkpoint_name
from megatron_ext.checkpointing.load import LoadedCheckpoint, load_checkpoint
from megatron_ext.checkpointing.save import saves
from megatron_ext.checkpointing.writing import RunState
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import initialize

VOCABULARY, SEQUENCE = 128, 16


@dataclass(frozen=True)
class Case:
    """One run."""

    tp: int = 1
    pp: int = 1
    bf16: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    num_layers: int = 2
    hidden_size: int = 32
    vocabulary: int = VOCABULARY
    dropout: float = 0.1
    train_iters: int = 10
    padded_buckets: bool = False

    def __str__(self) -> str:
        """The fields that are not at their defaults, as the name of a test case."""
        changed = [f"{key}={value}" for key, value in asdict(self).items() if value != getattr(Case, key)]
        return ",".join(changed) or "plain"

    @property
    def config(self) -> dict[str, Any]:
        """Settings to save; the model's are compared on loading."""
        return {
            "model": {"num_layers": self.num_layers, "hidden_size": self.hidden_size},
            "train": {"seed": 7},
        }


class Run:
    """Model, optimizer and schedule of a case on this rank."""

    def __init__(self, case: Case, seed: int = 7) -> None:
        self.case = case
        initialize(
            ParallelConfig(tensor_model_parallel_size=case.tp, pipeline_model_parallel_size=case.pp), seed
        )
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        self.config = _transformer_config(case, dtype)
        gpt: torch.nn.Module = GPTModel(
            self.config,
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            vocab_size=case.vocabulary,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        if case.bf16:
            gpt = Float16Module(self.config, gpt)
        sharded = case.distributed_optimizer
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap,
            pad_buckets_for_high_nccl_busbw=case.padded_buckets,
        )
        self.model = [DistributedDataParallel(self.config, ddp_config, gpt)]
        self.config.finalize_model_grads_func = finalize_model_grads
        if case.overlap:
            self.config.no_sync_func = self.model[0].no_sync
        optimizer_config = OptimizerConfig(
            lr=1e-2,
            min_lr=0.0,
            weight_decay=0.1,
            bf16=case.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=sharded,
            overlap_param_gather=case.overlap,
        )
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(optimizer_config, self.model)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=case.train_iters,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=case.train_iters,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )

    def train(self, steps: int) -> list[float]:
        """Trains on data drawn from torch's generator; returns this rank's losses (last stage only)."""
        losses = []
        for _ in range(steps):
            self.model[0].zero_grad_buffer()
            self.optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=None,
                model=self.model,
                num_microbatches=1,
                seq_length=SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
            assert self.optimizer.step()[0]
            self.scheduler.step(1)
            losses += [float(report["loss"]) for report in reports]
        return losses

    def save(self, directory: Path, iteration: int, **options: Any) -> Path:
        """Saves everything; returns the checkpoint."""
        with saves(directory, **options) as made:
            made.save(iteration, self.state(iteration))
        return directory / checkpoint_name(iteration)

    def state(self, iteration: int) -> RunState:
        """What is saved."""
        progress = {"consumed_samples": 4 * iteration, "note": "x"}
        return RunState(self.model, self.optimizer, self.scheduler, progress, self.case.config)

    def load(self, path: Path, **options: Any) -> LoadedCheckpoint:
        """Loads everything."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        expected = {"model": self.case.config["model"]}
        return load_checkpoint(path, model=self.model, **{**parts, "expected_model": expected, **options})

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's weights by global name, on every rank."""
        return self._whole(
            {name: parameter.detach() for name, parameter in unwrap_model(self.model)[0].named_parameters()}
        )

    def moments(self, key: str) -> dict[str, torch.Tensor]:
        """One tensor of the optimizer's state (exp_avg, exp_avg_sq, main) per weight of the whole model, on
        every rank."""
        return self._whole(
            {
                name: self._optimizer_tensor(p, key)
                for name, p in unwrap_model(self.model)[0].named_parameters()
            }
        )

    def _optimizer_tensor(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """Reads Megatron's optimizers from inside, not through the state dicts that are tested."""
        leaf = self.optimizer.chained_optimizers[0]
        if not self.case.distributed_optimizer:
            main = getattr(parameter, "main_param", None)
            main = parameter if main is None else main
            return main.detach() if key == "main" else leaf.optimizer.state[main][key]
        whole = torch.zeros(parameter.numel())
        if parameter in leaf.model_param_gbuf_map:
            tensors = leaf._get_main_param_and_optimizer_states(parameter)
            place = leaf._get_model_param_range_map(parameter)["param"]
            whole[place.start : place.end] = tensors["param" if key == "main" else key]
        dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return whole.view(parameter.shape)

    def _whole(self, local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parameters = dict(unwrap_model(self.model)[0].named_parameters())
        offset = parallel_state.get_pipeline_model_parallel_rank() * (self.case.num_layers // self.case.pp)
        named = {
            _global_name(name, offset): (tensor.clone(), getattr(parameters[name], "partition_dim", -1))
            for name, tensor in local.items()
        }
        parts: list[Any] = [None] * self.case.tp
        dist.all_gather_object(parts, named, group=parallel_state.get_tensor_model_parallel_group())
        joined = {name: _join([part[name] for part in parts], name) for name in named}
        stages: list[Any] = [None] * self.case.pp
        dist.all_gather_object(stages, joined, group=parallel_state.get_pipeline_model_parallel_group())
        return {name: tensor for stage in stages for name, tensor in stage.items()}


def _transformer_config(case: Case, dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=case.num_layers,
        hidden_size=case.hidden_size,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        use_cpu_initialization=True,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=case.bf16,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=case.dropout,
        hidden_dropout=case.dropout,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _forward(_: Any, model: torch.nn.Module) -> Any:
    # Without dependence on the layout: every rank of a data-parallel group sees other tokens, all of a
    # pipeline the same.
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE)[None].expand(2, -1)
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.float().mean()
        return mean, {"loss": mean.detach()}

    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), loss


def _global_name(name: str, offset: int) -> str:
    parts = name.split(".")
    if "layers" in parts:
        i = parts.index("layers") + 1
        parts[i] = str(int(parts[i]) + offset)
    return ".".join(parts)


def _join(parts: list[tuple[torch.Tensor, int]], name: str) -> torch.Tensor:
    tensors, dimension = [tensor for tensor, _ in parts], parts[0][1]
    if dimension < 0:
        return tensors[0]
    if "linear_fc1" in name:  # gate and up are split separately
        halves = [tensor.chunk(2) for tensor in tensors]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(tensors, dimension)
