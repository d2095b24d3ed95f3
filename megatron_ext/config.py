"""The configuration of a training run: one frozen dataclass per section.

Field names are Megatron's. The text under each field is its `--help`. A function takes the section that it
needs, never the whole. Nothing here looks at the machine: whether values fit together and fit the machine is
said by `validation.py`.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from lckv.config import CompressionConfig
from lckv.rope_scaling import SCALINGS, LongRopeScaling, Scaling

USUAL_FACTOR = 8.0
"""Of Llama 3.1. Earlier versions saved it as the factor of runs without scaling, too."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """Stretching of the rotary position embedding to contexts longer than those of pretraining."""

    type: Literal["none", "linear", "llama3", "dynamic", "yarn", "longrope"] = "none"
    """none; linear: positions are divided by the factor; llama3: only low frequencies are (Llama 3.1 and
    later); yarn: likewise, and attention is sharpened; dynamic: the base grows with rows longer than
    max_position_embeddings; longrope: frequencies are divided by short_factor or long_factor, as the length
    of a row says."""

    factor: float | None = None
    """By how much the context grows. Default: 8;
    longrope: max_position_embeddings / original_max_position_embeddings."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are scaled in full."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are not scaled."""

    original_max_position_embeddings: int = 8192
    """llama3, yarn, longrope: context of pretraining, in tokens."""

    attention_factor: float | None = None
    """yarn, longrope: cosines and sines are multiplied by it. Default: it follows from the factor."""

    beta_fast: float | None = None
    """yarn: channels that turn more often within the original context are not scaled. Default: 32."""

    beta_slow: float | None = None
    """yarn: channels that turn less often within the original context are scaled in full. Default: 1."""

    mscale: float | None = None
    """yarn: with mscale_all_dim, the attention factor is
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""

    mscale_all_dim: float | None = None
    """yarn: see mscale."""

    truncate: bool | None = None
    """yarn: channels between full and no scaling are bounded by whole numbers. Default: true."""

    short_factor: tuple[float, ...] = ()
    """longrope: divisors of the frequencies, one for each pair of a head's channels, in rows of up to
    original_max_position_embeddings tokens."""

    long_factor: tuple[float, ...] = ()
    """longrope: the same in longer rows."""

    @property
    def scaling(self) -> Scaling | None:
        """For lckv.rope; defaults resolved."""
        if self.type == "none":
            return None
        kind = SCALINGS[self.type]
        given = {entry.name: getattr(self, entry.name) for entry in fields(kind)}
        if given["factor"] is None and kind is not LongRopeScaling:
            given["factor"] = USUAL_FACTOR
        return kind(**given)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: int = 8
    """Number of transformer layers."""

    hidden_size: int = 256
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the gated MLP. Default: 8/3 of hidden_size, rounded up to a multiple of 64."""

    num_attention_heads: int = 4
    """Number of query heads."""

    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). Default: num_attention_heads."""

    kv_channels: int | None = None
    """Channels of one head. Default: hidden_size / num_attention_heads."""

    vocab_size: int | None = None
    """True vocabulary size, in tokens, before padding. Default: that of the tokenizer."""

    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times tensor_model_parallel_size; padding is masked in
    loss and export."""

    max_position_embeddings: int | None = None
    """Longest context, in tokens; with dynamic rope_scaling, that of pretraining. Default:
    train.seq_length."""

    rotary_base: float = 10000.0
    """Base of the rotary position embedding (theta)."""

    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Scaling of the rotary position embedding."""

    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""

    untie_embeddings_and_output_weights: bool = True
    """Separate weights for the embedding and the output layer; false: one matrix serves both."""

    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""

    qk_layernorm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""

    attention_dropout: float = 0.0
    """Dropout probability of attention weights."""

    hidden_dropout: float = 0.0
    """Dropout probability of the outputs of attention and MLP."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections are divided by sqrt(2 * num_layers)."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers from Megatron's local modules or from Transformer Engine; auto:
    the latter where installed with CUDA."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """Format in which Transformer Engine's layers multiply in FP8. hybrid: e4m3, and e5m2 for gradients.
    Default: they multiply in train.precision."""

    fp8_recipe: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] = "tensorwise"
    """fp8: scales of numbers. tensorwise: of each tensor as it is; blockwise: of blocks of it (Hopper, CUDA
    12.9); delayed: of each tensor, from those of earlier steps; mxfp8: of blocks of 32 (Blackwell)."""

    fp8_passes: Literal["all", "no_gradient"] = "all"
    """fp8: which passes multiply so. no_gradient: only the passes of cyclic groups that have no gradient and
    approach their fixed point (compression.forward_passes); all others in train.precision."""

    attention_backend: Literal["auto", "sdpa", "flash", "flash3", "reference"] = "auto"
    """Attention kernel: PyTorch's, flash-attn's, FlashAttention 3's (Hopper; dropout and biased keys go
    through PyTorch's), or the plain oracle. An explicit request never falls back."""

    operator_backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of RMSNorm, SwiGLU and the rotary embedding: PyTorch's operations, or one Triton kernel each,
    the first two liger-kernel's. auto: of each the kernel, where it serves with CUDA. Norms of Transformer
    Engine's layers are its own. An explicit request never falls back."""

    cross_entropy_backend: Literal["auto", "chunked", "liger", "cut", "cut_filtered"] = "auto"
    """How the loss is computed, always without the logits of all tokens: PyTorch's operations chunk by chunk,
    the same with liger-kernel's softmax, or cut-cross-entropy, exact or with gradients that leave out what
    hardly counts. auto: liger-kernel where installed with CUDA. An explicit request never falls back."""

    cross_entropy_chunk_size: int = 0
    """Tokens of a rank whose logits are in memory at a time. 0: as many as have logits of 64 MiB."""

    cross_entropy_z_loss: float = 0.0
    """Weight of the squared logsumexp of a token's logits, which is added to its loss in training. Reported
    losses are without it."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the gated MLP."""
        return self.ffn_hidden_size or 64 * math.ceil(self.hidden_size * 8 / 3 / 64)


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes.
    Data parallelism takes what the other sizes leave."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each weight matrix."""

    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers. Keys and values shared across stages travel with the hidden states."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Stretches of layers per pipeline rank (interleaving): the ranks wait less, and send more often."""

    pipeline_model_parallel_layout: str | None = None
    """Layers of each stage, in Megatron's notation: Et*3|(t*4|)*2,t*3L has four stages, the first and the
    last with three layers. auto: stages that cost the same, counting all passes and the output layer.
    Default: equally many layers."""

    pipeline_in_flight: int | None = None
    """Micro-batches that may be between forward and backward at once, where they come to a stage several
    times: with layers on several stages that are iterated together, or with interleaving. More of them
    shorten the step and take more memory. Default: the number of stages; twice that where no pass is
    without gradient."""

    context_parallel_size: int = 1
    """Ranks that split each sequence. A layer that computes keys and values gathers those of the whole
    sequence once per pass; layers that read them send nothing. train.seq_length must be a multiple of twice
    this."""

    context_parallel_communication: Literal["gather", "ring"] = "gather"
    """How ranks that split sequences get each other's keys and values. gather: those of the whole sequence,
    once per layer that computes them. ring: part by part, while attention to the part before runs; a rank
    then never holds more than three parts, and backward sends three times as much. ring is for maps in which
    every layer reads its own keys and values, without windows."""

    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence too."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state and main weights over data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward already runs.
    Needs use_distributed_optimizer and overlap_grad_reduce."""

    num_distributed_optimizer_instances: int = 1
    """Groups of data-parallel ranks that each hold the whole optimizer state: each group shards it, and
    gradients are reduced inside of a group, then between them."""

    align_param_gather: bool = False
    """overlap_param_gather: all pipeline stages start to gather all weights at the beginning of a step, so
    that they do it at the same time; false: each stage, bucket by bucket, when its forward needs them."""

    ddp_bucket_size: int | None = None
    """Parameters whose gradients are reduced together while backward still runs. Default: Megatron's, the
    larger of 40 million and a million per data-parallel rank."""

    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    """Pad the buckets to multiples of 65,536 numbers, with which NCCL is fast over many ranks."""

    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with products of matrices, by Transformer Engine's userbuffers.
    Needs sequence_parallel, and the ranks of a tensor-parallel group on one NVLink domain."""

    tp_comm_overlap_cfg: str | None = None
    """tp_comm_overlap: YAML file with Transformer Engine's settings of each product (qkv_fprop, proj_dgrad,
    ...). Default: Transformer Engine's own."""

    tp_comm_overlap_ag: bool = True
    """tp_comm_overlap: gather inputs piece by piece while their product runs."""

    tp_comm_overlap_rs: bool = True
    """tp_comm_overlap: reduce and scatter outputs piece by piece while their product runs."""

    tp_comm_overlap_rs_dgrad: bool = False
    """tp_comm_overlap: the same for gradients of inputs."""

    tp_comm_bulk_dgrad: bool = True
    """tp_comm_overlap: gather whole inputs for gradients of weights while those of inputs are computed."""

    tp_comm_bulk_wgrad: bool = True
    """tp_comm_overlap: reduce and scatter whole gradients of inputs while gradients of weights are
    computed."""

    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = "nccl"
    """tp_comm_overlap: by what the ranks meet to make the buffers."""

    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run with an error instead of hanging."""

    start_timeout_minutes: float | None = None
    """The same until the first step is done, in which kernels and connections are made, and for meeting at
    MASTER_ADDR. Default: distributed_timeout_minutes."""

    flight_recorder_entries: int = 2000
    """How many of the last collectives NCCL keeps, to write them into checkpoint.save/flight_recorder on a
    time-out; 0: as the environment says."""

    fault_tolerance: bool = False
    """Send signs of life to the monitor of nvidia-resiliency-ext; the run is then started by its
    ft_launcher."""

    @property
    def replica_size(self) -> int:
        """Ranks that work on the same samples, with one copy of the model per context-parallel rank."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return model * self.context_parallel_size

    def tokens_of_rank(self, seq_length: int) -> int:
        """Those of a sequence that each rank works on."""
        return seq_length // self.context_parallel_size

    @property
    def sends_keys_round(self) -> bool:
        """Whether keys and values go round the ranks that split sequences."""
        return self.context_parallel_size > 1 and self.context_parallel_communication == "ring"

    def key_tokens_of_rank(self, seq_length: int) -> int:
        """Those of a sequence whose keys and values each rank keeps."""
        return self.tokens_of_rank(seq_length) if self.sends_keys_round else seq_length


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from a teacher's tokens as well as from the data's."""

    teacher: str | None = None
    """Checkpoint of the teacher, saved from any layout, a directory of checkpoints: the newest, or the folder
    of a Hugging Face model. It reads the same tokens, has the same vocabulary, and is not changed. None:
    there is no teacher."""

    divergence: Literal["student_teacher", "teacher_student"] = "teacher_student"
    """Kullback-Leibler divergence of token distributions. teacher_student, D(teacher || student): the
    student learns everything that the teacher deems likely. student_teacher, D(student || teacher): it learns
    nothing that the teacher deems unlikely (as NVIDIA's public code for delayed eviction)."""

    top_k: int | None = None
    """Tokens that the teacher deems most likely, each of which counts in the divergence; all others count as
    one. Default: every token of the vocabulary counts."""

    weight: float = 1.0
    """Of the divergence in the loss."""

    lm_loss_weight: float = 0.0
    """Of the cross-entropy of the data's tokens in the loss."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and numerics of the run."""

    train_iters: int = 1000
    """Number of optimizer steps."""

    micro_batch_size: int = 1
    """Sequences per forward pass and data-parallel rank."""

    global_batch_size: int = 8
    """Sequences per optimizer step, over all ranks and micro-batches."""

    seq_length: int = 1024
    """Tokens per sequence."""

    seed: int = 1234
    """Seed of weights, dropout and data order."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: weights and activations in bfloat16 with float32 main weights and gradients;
    fp32: everything in float32."""

    trainable: Literal["all", "policy"] = "all"
    """Which parameters are trained: all, or policy: those of the KV policy's own alone. The others keep their
    values bit for bit, and have neither gradients nor optimizer state."""

    forward_passes_schedule: Literal["constant", "falling", "rising", "random"] = "constant"
    """How many passes without gradient (m) a step runs over each cyclic group. constant:
    compression.forward_passes, as published. falling: from that to least_forward_passes, every number for
    equally many of train_iters; rising: the other way round. random: any of these numbers, drawn from seed
    and iteration alone. Evaluation always runs compression.forward_passes."""

    least_forward_passes: int = 1
    """Of forward_passes_schedule."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none; selective: those of recompute_modules; full: whole layers."""

    recompute_modules: tuple[str, ...] = ("mlp",)
    """What selective recomputes: mlp, the largest part of a layer; core_attn, attention without its
    projections. Attention's kernels keep no scores, so core_attn saves next to nothing (4 bytes per head and
    token, and outputs kept twice: maps that exclude a token itself, context parallelism)."""

    recompute_num_layers: int | None = None
    """full: how many layers of each pipeline stage are recomputed, from the bottom. Default: all."""

    activation_offload: Literal["none", "token_wise"] = "none"
    """token_wise: of each layer the attention output goes to the host's memory, of its other activations the
    first share of the tokens; the rest is computed again in backward, without attention."""

    offload_fraction: float | Literal["auto"] = "auto"
    """token_wise: the share, 0 .. 1. auto: the largest whose copies are done while a layer computes and that
    fits into offload_host_gib."""

    offload_host_gib: float = 128.0
    """token_wise: GiB of the host's memory for each rank's activations."""

    offload_tflops: float | None = None
    """token_wise, auto: what a rank computes, 10^12 operations per second. Default: half of its GPU's
    peak."""

    offload_gigabytes_per_second: float = 20.0
    """token_wise, auto: what a rank copies to the host, 10^9 bytes per second, while all ranks of the machine
    do. PCIe 4 x16 has about 25 for one, PCIe 5 x16 about 50."""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Learning from a teacher."""

    eval_interval: int = 0
    """Evaluate every so many iterations and at the end; 0: never."""

    eval_iters: int = 10
    """Global batches per evaluation."""

    eval_layer_types: tuple[str, ...] = ()
    """Where compression.layer_types is a family: the maps of it with which the model is evaluated. The loss
    of the first is validation_loss, that of each validation_loss/MAP. Default: all maps where there are at
    most 4, else that in which each layer has its first alternative."""

    deterministic: bool = False
    """Choose deterministic kernels on CUDA, at some cost in speed; CPU runs always are."""

    manual_gc_interval: int = 0
    """Collect Python's garbage every so many iterations, on all ranks together, and not in between; what is
    there after the start is never looked at again. 0: Python decides, each rank for itself."""

    check_for_nan_in_loss: bool = True
    """Stop when the loss is not finite, naming the iteration and the rank."""

    exit_duration_minutes: float | None = None
    """Save and exit cleanly after this long (for batch systems with time limits)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Shape of the schedule after warm-up; WSD: stable, then a decay of lr_wsd_decay_iters."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from lr / lr_warmup_iters."""

    lr_decay_iters: int | None = None
    """Iteration at which min_lr is reached. Default: train.train_iters."""

    lr_wsd_decay_iters: int | None = None
    """WSD: iterations of the final decay. Default: a tenth of lr_decay_iters."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine"] = "linear"
    """WSD: shape of the final decay."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the denominator."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    use_precision_aware_optimizer: bool = False
    """Keep main weights and moments in the dtypes below, by Transformer Engine's Adam."""

    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Of main weights; fp16: with a scale for each tensor."""

    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of first moments; fp16 and fp8: with a scale for each tensor. Checkpoints hold them in fp32."""

    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Of second moments; as exp_avg_dtype."""

    optimizer_cpu_offload: bool = False
    """Keep main weights and moments in the host's memory, in fp32, and update them there. Needs a GPU and
    use_precision_aware_optimizer."""

    optimizer_offload_fraction: float = 1.0
    """Share of the optimizer's state that optimizer_cpu_offload moves."""

    overlap_cpu_optimizer_d2h_h2d: bool = False
    """optimizer_cpu_offload: copy gradients and weights while the update runs."""


DataFormat = Literal["pretraining", "chat"]
"""What the documents of a dataset are: texts, or conversations of which the assistant's part is learned."""


@dataclass(frozen=True)
class DataConfig:
    """Indexed datasets, their blend, and the tokenizer that made them."""

    format: DataFormat = "pretraining"
    """pretraining: documents end to end; chat: conversations
    (preprocess --data-format chat) packed whole into sequences, loss on what the assistant says."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx files: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...
    (weights are fractions of the tokens)."""

    split: str = "969,30,1"
    """Shares of data_path's documents for training, validation and test."""

    train_data_path: tuple[str, ...] = ()
    """Like data_path, for training only (then give valid_data_path too, not data_path and split)."""

    valid_data_path: tuple[str, ...] = ()
    """Like data_path, for validation only."""

    test_data_path: tuple[str, ...] = ()
    """Like data_path, for test only."""

    mock: bool = False
    """Random documents instead of files, for dry runs; needs model.vocab_size or a tokenizer."""

    data_cache_path: str | None = None
    """Directory of the sample indices. Default: beside the dataset."""

    index_timeout_minutes: float = 60.0
    """How long the other ranks wait for the one that builds the sample indices."""

    tokenizer_type: Literal["none", "huggingface", "sentencepiece", "tiktoken"] = "none"
    """Kind of tokenizer; it must be the one that made the dataset (this is checked)."""

    tokenizer_model: str | None = None
    """Directory or file of the tokenizer."""

    reset_position_ids: bool = False
    """Positions start at 0 in every document of a sequence; in conversations they always do."""

    reset_attention_mask: bool = False
    """Keys of another document of the sequence are invisible, in every kind of layer. Those of another
    conversation always are."""

    eod_mask_loss: bool = False
    """No loss on predicting what follows an end-of-document token."""

    chat_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """chat: what becomes of a conversation of more than train.seq_length + 1 tokens: its end is cut off, it
    is left out, or the run does not begin. A line of the log has their number."""

    allow_changed_data: bool = False
    """Resume although seed, seq_length, split or files changed so that some text is read twice within the
    present epoch and some not at all."""

    num_workers: int = 2
    """Processes per rank that read samples ahead; 0: read in the training process."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints are written and read."""

    save: str | None = None
    """Directory to write checkpoints into. One run at a time: it is locked."""

    load: str | None = None
    """Directory to start from, or one checkpoint in it. The newest good one is used. Once checkpoint.save
    holds checkpoints, the run goes on from those, unless this is checkpoint.save or a checkpoint in it."""

    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to go on from the newest good checkpoint in checkpoint.save. auto: if there is one, so that one
    command starts and continues a run (with all state, whatever checkpoint.finetune says). must: without one
    it is an error. never: with one it is an error."""

    save_interval: int = 0
    """Save every so many iterations, and at the end; 0: only at the end."""

    async_save: bool = False
    """Copy the state to the host's memory and write it while training goes on. Each rank needs memory for
    another copy of what it writes. One save at a time: the next, the end and a signal wait for it."""

    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """State of the distributed optimizer. fully_reshardable: any layout can go on with it. dp_reshardable:
    its buffers as they are; only the same layout and layers can go on with it. Neither is sent between
    ranks."""

    keep_last: int | None = None
    """How many checkpoints to keep; older ones are deleted after a successful save. Default: all."""

    finetune: bool = False
    """Load only weights from checkpoint.load: optimizer, schedule, iteration, data position and random state
    start afresh."""

    verify_hashes: bool = True
    """Check every file's hash on loading, not only its size."""

    save_timeout_minutes: float = 30.0
    """How long the other ranks wait at a step of a save for one that does not come to it."""

    load_timeout_minutes: float = 30.0
    """How long the other ranks wait at a step of a load for one that does not come to it."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 1
    """Iterations between reports."""

    metrics_file: str | None = None
    """JSON lines, one object per report."""

    heartbeat_file: str | None = None
    """JSON with the iteration and the time, in seconds since 1970, replaced whenever rank 0 gets on; at most
    once per second."""

    tensorboard_dir: str | None = None
    """Directory of TensorBoard event files."""

    wandb_project: str | None = None
    """Weights & Biases project (needs the extra `wandb`)."""

    wandb_name: str | None = None
    """Name of the run in Weights & Biases."""

    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """offline: write to disk only."""

    progress_bar: bool = True
    """Show a progress bar on rank 0."""

    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s at the training precision, for MFU. Default: known for common GPUs,
    else no MFU."""


@dataclass(frozen=True)
class ProfileConfig:
    """Measurements of single iterations, and of ranks that are slower than others (docs/profiling.md)."""

    start_iteration: int | None = None
    """The first iteration that is profiled; iterations count from 1. Default: none is."""

    num_iterations: int = 2
    """How many iterations are profiled."""

    ranks: tuple[str, ...] = ("0",)
    """Which ranks are profiled: numbers, or all."""

    kinds: tuple[str, ...] = ("torch",)
    """torch: trace for chrome://tracing or Perfetto, and a table of operators; nsys: ranges for
    `nsys profile -c cudaProfilerApi`; memory: snapshot of CUDA's memory for pytorch.org/memory_viz."""

    folder: str | None = None
    """Where the files go. Default: checkpoint.save/profile."""

    straggler_interval: int = 0
    """Compare the ranks' own time for forward and backward every so many iterations, and name ranks that are
    slower than the others; 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
