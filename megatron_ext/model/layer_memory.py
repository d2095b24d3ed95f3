"""What one run of a layer keeps for backward, predicted without building the model. Neither torch nor
Megatron is loaded.

Bytes per token on one rank, with e bytes per number, h hidden size, a = query heads x d and k = KV heads x d
of the rank, f MLP width of the rank, T ranks that share the sequence out (1 without sequence parallelism):

    each of two norms   input and output: 2 e h / T          not fused: (8 + e) h / T, in float32
    attention           query, output: 2 e a; logsumexp: 4 per query head
    MLP                 both halves of its first layer, their product: 3 e f        not fused: 4 e f
    query and key norm  input: e (a + k), 4 per head         not fused: 8 (a + k), 4 per head
    policy              `PolicyConfig.kept_bytes`; a norm's output, of parameters of its own
    mixing              of a layer that mixes what another lends, its own keys and values: 2 e k
                        of a layer that reads a mixture, that mixture, of whole rows: 2 e k

Keys and values are counted where they are read: one copy serves all layers. Attention that leaves out a
query's own token (where fused, or under a window), walks a window or has several chunks of a row (context
parallelism) keeps its output once more. Selective recompute leaves out logsumexp and those outputs
(`core_attn`), and the MLP (`mlp`). What is kept for gradients of weights alone is not kept where these are
frozen (`train.trainable: policy`): outputs of norms, in float32 and as inputs of matrices, the MLP's product,
the output of attention that is computed again, what is mixed. Of parameters of the policy's own it is; so is
the input of an MLP that is computed again. Fused are the kernels on a GPU, those of Transformer Engine,
liger-kernel or PyTorch 2.9, and flash-attn; not fused what runs on a CPU. Dropout is not counted.
"""

from lckv.config import CompressionConfig
from lckv.sharing.plan import LayerRun, Part
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.precision import precision

_CHUNK = 256
"""Queries under a window that share a mask where windows are walked in chunks (`lckv.attention.sdpa`)."""


class LayerMemory:
    """The sizes of one rank, from which its layers' bytes follow."""

    def __init__(
        self,
        model: ModelConfig,
        compression: CompressionConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        *,
        fused: bool,
    ) -> None:
        ranks = parallel.tensor_model_parallel_size
        self._model, self._compression, self._train, self._fused = model, compression, train, fused
        self._layer_types = compression.map(model.num_layers)
        self._bytes = precision(train.precision).bytes
        self._tokens = parallel.tokens_of_rank(train.seq_length)
        self._kept_rows = parallel.key_tokens_of_rank(train.seq_length) / max(1, self._tokens)
        self._shards = ranks if parallel.sequence_parallel else 1
        self._frozen = train.trainable != "all"
        self._heads = model.num_attention_heads / ranks
        self._kv_heads = max(1.0, model.query_groups / ranks)
        self._ffn = model.ffn_size / ranks
        selective = train.recompute_granularity == "selective"
        self._again = frozenset(train.recompute_modules if selective else ())

    def kept(self, run: LayerRun) -> int:
        """Bytes of a micro-batch that a run which is not recomputed keeps, besides the keys and values that
        it reads."""
        return round(self._tokens * self._train.micro_batch_size * self._per_token(run))

    def offloaded(self, run: LayerRun, *, shared: bool) -> tuple[float, float]:
        """Bytes per token that go to the host where activations are offloaded: of all tokens, and of the
        share of them. `shared`: other layers read the layer's keys and values, which then stay."""
        whole = self._bytes * self._model.hidden_size / self._shards  # the input, which the norm keeps too
        if run.part is Part.WHOLE:
            width = self._heads * self._model.head_dim
            whole += self._bytes * width + 4 * self._heads + self._copies(run)
            whole += self._policy(self._heads, run) + self._mixture(run)
        part = max(0.0, self._per_token(run) - whole)
        if not (run.computes_kv and run.part is Part.WHOLE) or shared:
            return whole, part
        key_value = self._bytes * self._kv_heads * (2 * self._model.head_dim + self._extra_channels)
        if self._compression.policy.traits.token_wise and self._kept_rows == 1:
            return whole, part + key_value
        window = self._compression.sight(self._layer_types[run.index]).window
        if self._kept_rows == 1 or window is None:
            return whole + key_value * self._kept_rows, part  # those of whole rows
        # of each of two chunks what its queries see, and the queries with as many zeros in front
        seen = min(self._kept_rows, 1 + 2 * (window - 1) / self._tokens)
        return whole + key_value * seen + self._bytes * self._heads * self._model.head_dim, part

    @property
    def _extra_channels(self) -> int:
        return self._compression.policy.traits.extra_channels

    @property
    def norm(self) -> float:
        """Of a norm over hidden states and the matrix behind it, per token."""
        return self._norm(frozen=self._frozen)

    def _norm(self, *, frozen: bool) -> float:
        width = self._model.hidden_size / self._shards
        number = self._norm_bytes
        if frozen:
            number = self._bytes if self._fused else 4
        return number * width + 4 / self._shards

    def _projection(self, run: LayerRun) -> float:
        """What the norm of the policy's own parameters keeps besides the layer's input."""
        if not run.computes_kv or self._compression.policy.traits.projection is None:
            return 0.0
        shares_input = self._fused or self._bytes == 4  # else it keeps a copy in float32
        width = self._model.hidden_size / self._shards
        return self._norm(frozen=False) - self._bytes * width * shares_input

    def _per_token(self, run: LayerRun) -> float:
        if run.part is Part.KEYS_VALUES:
            return self.norm + self._projection(run) + self._policy(0, run) + self._mixing(run)
        widths = (3 if self._fused else 4) - self._frozen
        mlp = self.norm
        if "mlp" not in self._again:
            mlp += widths * self._bytes * self._ffn
        elif self._frozen:  # its input, which only gradients of weights need else
            mlp += self._bytes * self._model.hidden_size / self._shards
        if run.part is Part.WITHOUT_SOURCE:
            return mlp + (self.norm + self._projection(run) if run.computes_kv else 0)
        return self.norm + self._projection(run) + self._attention(run) + mlp

    @property
    def _norm_bytes(self) -> int:
        """For each number that a norm sees."""
        return 2 * self._bytes if self._fused else 8 + self._bytes

    def _attention(self, run: LayerRun) -> float:
        head_dim = self._model.head_dim
        queries, keys = self._heads * head_dim, self._kv_heads * head_dim * run.computes_kv
        kept = self._bytes * (2 * queries + self._heads * self._extra_channels)
        if "core_attn" in self._again:
            kept -= self._bytes * queries * self._frozen
        else:
            kept += 4 * self._heads + self._copies(run)
        if self._model.qk_layernorm:
            heads = self._heads + self._kv_heads * run.computes_kv
            number = self._bytes if self._fused else 4 if self._frozen else 8
            kept += number * (queries + keys) + 4 * heads
        return kept + self._policy(self._heads, run) + self._mixing(run)

    def _mixing(self, run: LayerRun) -> float:
        key_value = 2 * self._bytes * self._kv_heads * self._model.head_dim
        return key_value * (run.mixes is not None and not self._frozen) + self._mixture(run)

    def _mixture(self, run: LayerRun) -> float:
        """Keys and values that a layer mixes of the two layers that it reads."""
        if run.second is None or self._layer_types[run.index].mixes is None:
            return 0.0
        return 2 * self._bytes * self._kv_heads * self._model.head_dim * self._kept_rows

    def _policy(self, query_heads: float, run: LayerRun) -> float:
        return self._compression.policy.kept_bytes(
            query_heads=query_heads,
            kv_heads=self._kv_heads if run.computes_kv else 0,
            head_dim=self._model.head_dim,
            bytes_per_number=self._bytes,
        )

    def _copies(self, run: LayerRun) -> float:
        """What attention keeps beyond a plain layer's."""
        exclude_self, window = self._compression.sight(self._layer_types[run.index])
        output = self._bytes * self._heads * self._model.head_dim
        hides = window is not None and window < self._train.seq_length
        walks = hides and not self._fused
        mask = 0.0
        if walks:
            width = min(self._train.seq_length, (window or 0) + _CHUNK)
            mask = self._bytes * width / self._train.micro_batch_size
        return output * ((exclude_self and (hides or self._fused)) + walks + (self._kept_rows > 1)) + mask
