"""What goes to the host in a run, from its settings. Neither torch nor Megatron is loaded."""

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.layer_memory import LayerMemory
from megatron_ext.model.placement import Placement, place
from megatron_ext.offload.share import (
    POOL_SHARE,
    LayerLoad,
    Machine,
    OffloadSettings,
    host_bytes,
    largest_share,
)

REACHED_SHARE = 0.5
"""Of a GPU's peak, assumed where `train.offload_tflops` does not say what is reached."""


class OffloadShare:
    """The activations of a run, on the pipeline stage that keeps most of them for backward."""

    def __init__(
        self,
        model: ModelConfig,
        compression: CompressionConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        placement: Placement,
        *,
        fused: bool = True,
    ) -> None:
        """`fused`: see `layer_memory.py`."""
        self._train = train
        compression = compression.heaviest(model.num_layers)
        memory = LayerMemory(model, compression, parallel, train, fused=fused)
        ranks = parallel.tensor_model_parallel_size
        layer_types = compression.map(model.num_layers)
        shared = {source for layer in layer_types for source in layer.sources if source != layer.index}
        steps = [step for step in compression.plan(model.num_layers) if step.requires_grad]
        loads = {
            stage: [
                LayerLoad(
                    *memory.offloaded(run, shared=run.index in shared),
                    placement.costs[run.index].of(run.part) / ranks,
                )
                for step in steps
                for run in step.runs
                if run.index in placement.layers_of(stage)
            ]
            for stage in range(placement.stages)
        }
        self.loads = max(loads.values(), key=lambda of_stage: host_bytes(of_stage, 1, 1.0))
        in_flight = placement.in_flight(compression, parallel.pipeline_in_flight)
        rows = min(in_flight * train.micro_batch_size, train.global_batch_size)
        self.tokens = rows * parallel.tokens_of_rank(train.seq_length)
        """Between their forward and backward at once, at most."""

    @classmethod
    def of(cls, run: RunConfig, *, vocab_size: int) -> "OffloadShare":
        """Of a run whose sizes fit together; the size of the vocabulary weighs for
        `parallel.pipeline_model_parallel_layout: auto`."""
        seq_length = run.train.seq_length
        placement = place(
            run.model, run.compression, run.parallel, vocab_size=vocab_size, seq_length=seq_length
        )
        return cls(run.model, run.compression, run.parallel, run.train, placement)

    @property
    def host_bytes(self) -> int:
        """What a rank may take of the host's memory."""
        return round(self._train.offload_host_gib * 2**30)

    @property
    def usable_bytes(self) -> int:
        """What activations may fill of it."""
        return round(POOL_SHARE * self.host_bytes)

    def settings(self, peak_tflops: float | None) -> OffloadSettings:
        """The share, and what it takes. `peak_tflops`: of the GPU, where it is known.

        Raises ConfigError where the share is to be found and the speed of the GPU is not known.
        """
        share = self._train.offload_fraction
        if share == "auto":
            share = largest_share(self.loads, self.tokens, self._machine(peak_tflops))
        return OffloadSettings(share, self.host_bytes, host_bytes(self.loads, self.tokens, share))

    def _machine(self, peak_tflops: float | None) -> Machine:
        train = self._train
        reached = train.offload_tflops
        if reached is None and peak_tflops is not None:
            reached = REACHED_SHARE * peak_tflops
        if reached is None:
            raise ConfigError(
                "train.offload_fraction is auto and the peak of this device is not known; set "
                "train.offload_tflops to what it reaches in 10^12 operations per second, or "
                "train.offload_fraction to a share from 0 to 1."
            )
        return Machine(train.offload_gigabytes_per_second * 1e9, reached * 1e12, self.usable_bytes)
