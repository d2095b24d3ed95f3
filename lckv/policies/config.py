"""What the settings of a KV policy tell of it. Neither torch nor Megatron is loaded.

A policy is a folder with two classes: its settings, which know everything that follows from them for a run, a
cache, a report; and the policy itself (`base.py`), which works on tensors. Nothing outside the folder asks
which policy it is."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from lckv.attention.key_bias import KeyBias
from lckv.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from lckv.policies.base import KVPolicy


@dataclass(frozen=True)
class Reach:
    """How far around a token a policy looks for its key, its value and its statistics."""

    before: int = 0
    """Tokens in front of it; what `RowPart.carried` brings does not count."""

    after: int = 0
    """Tokens behind it."""

    def own(self, tokens: "Tensor") -> "Tensor":
        """Without the `before` first and the `after` last of [s, ...]."""
        return tokens[self.before : len(tokens) - self.after]


@dataclass(frozen=True)
class Projection:
    """Parameters of a policy's own, in each layer that computes keys and values: a linear map of the layer's
    input, before the norm in front of attention, to one number for each KV head.

    It has an RMSNorm of its own in front, and a bias where the model's projections have one. Weight and bias
    begin as zeros, the norm's weight as ones."""

    name: str
    """Of the module in attention, in models of Hugging Face's and in Megatron's; its norm is NAME_norm."""

    per_layer: bool = False
    """Whether the number of the first KV head is that of all."""

    def parameters(self, hidden_size: int, kv_heads: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
        """Shapes by name within attention."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name}_norm.weight": (hidden_size,),
            f"{self.name}.weight": (kv_heads, hidden_size),
        }
        return shapes | ({f"{self.name}.bias": (kv_heads,)} if bias else {})

    @property
    def norm_name(self) -> str:
        """Of the norm's module."""
        return f"{self.name}_norm"


@dataclass(frozen=True)
class Traits:
    """What a policy does to attention and caches, and what it can live with."""

    key_bias: KeyBias | None = None
    """Set where keys carry a bias. In evaluation it is 0 or `HIDDEN`: a hidden key is dropped from caches at
    the age at which it would carry its bias."""

    merges: bool = False
    """Whether a key that is dropped lives on in the one that comes after it."""

    reads_query: bool = False
    """Whether keys and values depend on the queries of the layer that computes them."""

    projection: Projection | None = None
    """Parameters of the policy's own, whose numbers keys and values depend on, in the place of queries."""

    mixes_heads: bool = False
    """Whether keys and values of a KV head depend on the queries of others,
    which must be on the same rank."""

    windows: bool = True
    """Whether layers may have a sliding window. Not where keys carry a bias: caches find what a window leaves
    behind by counting slots, and drop none of these before."""

    shares: bool = True
    """Whether other layers may read a layer's keys and values."""

    two_sources: bool = True
    """Whether a layer may read two others, whose slots must then hold the same tokens. False also in a stage
    that keeps every token, where a later one does not."""

    min_head_dim: int = 2
    """Fewest channels of a head."""

    reach: Reach | None = None
    """How far around a token the policy looks. None: not known, so that rows cannot be cut into parts
    (context parallelism)."""

    def __post_init__(self) -> None:
        if self.windows and self.key_bias is not None:
            raise ValueError(
                "windows is true, and key_bias is set: caches cannot drop keys and keep a sliding window at "
                "once. Say windows=False; runs with such a map are then refused."
            )

    @property
    def token_wise(self) -> bool:
        """Whether the key and value of a token follow from that token alone (and its position)."""
        return self.reach == Reach()

    @property
    def extra_channels(self) -> int:
        """Channels that queries and keys have beyond those of values."""
        return 0 if self.key_bias is None else self.key_bias.extra_channels

    @property
    def keeps_every_token(self) -> bool:
        """Whether every token has a slot of its own for good,
        so that the newest tokens can be forgotten again."""
        return self.key_bias is None

    def read(self, query: "Tensor | None", projected: "Tensor | None") -> "Tensor | None":
        """What keys and values depend on besides: queries, what the projection made, or nothing."""
        return query if self.reads_query else projected

    @property
    def dropout(self) -> bool:
        """Whether attention weights may have dropout."""
        return self.key_bias is None


class PolicyConfig:
    """Settings of a KV policy: the base of a frozen dataclass whose field `name` is a `Literal` with one
    value.

    The methods here are those of a policy that keeps every token and has no stages.
    """

    name: str
    """Name of the policy, under which settings choose it."""

    stage: str | None = None
    """The part of training that the settings describe; None where there is only one."""

    @property
    def traits(self) -> Traits:
        """What it does to attention and caches."""
        return Traits()

    def build(self) -> "KVPolicy":
        """The policy itself."""
        raise TypeError(f"{type(self).__name__} must say how its policy is built.")

    def settings(self) -> dict[str, Any]:
        """The fields by name, fit for JSON; `CompressionConfig.from_dict` reads them back."""
        return asdict(cast(Any, self))

    def problems(self) -> Iterable[Problem]:
        """What is wrong with these settings by themselves; fields by their own names."""
        return ()

    # How training goes from one policy or stage to another. An obstacle is a sentence with the way out.

    def obstacle_to_leaving(self, after: "PolicyConfig") -> str | None:
        """What keeps a model that was trained with this policy from going
        on with `after`; None if nothing does."""
        return None

    def obstacle_to_converting(self, before: "PolicyConfig") -> str | None:
        """What keeps a model of the policy `before` from getting this policy
        without training; None if nothing does."""
        return None

    # What a cache takes.

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot that training aims at, at least 1."""
        return 1.0

    def slots(self, tokens: int, compression_ratio: float) -> int:
        """Slots that a KV head needs for `tokens` tokens at so many tokens per slot."""
        return ceil(tokens / compression_ratio)

    def state_numbers(self, head_dim: int) -> int:
        """float32 numbers that a cache keeps of a sequence for each KV head, besides slots."""
        return 0

    def kept_bytes(
        self, *, query_heads: float, kv_heads: float, head_dim: int, bytes_per_number: int
    ) -> float:
        """Bytes per token that a layer keeps for backward because of the policy; `kv_heads` is 0 where the
        layer reads keys and values of another."""
        return 0.0

    # What is said of it.

    def describe(self) -> str:
        """The policy and its settings in a few words."""
        return f"{self.name}: every token is kept"

    def card(self) -> str:
        """Sentences for the page of a published model."""
        return "Every token is kept."

    @property
    def references(self) -> tuple[str, ...]:
        """Papers, as lines of Markdown."""
        return ()

    @classmethod
    def from_megatron_arguments(cls, arguments: Mapping[str, Any]) -> "PolicyConfig | None":
        """The settings in the arguments of a run of Megatron's older training program, among them
        `params_dtype`, the name of the weights' dtype; None where the run did not use this policy.

        Raises SettingError, with the names of arguments, where they cannot be understood.
        """
        return None

    @classmethod
    def huggingface_fields(cls) -> tuple[str, ...]:
        """Fields that published models of this policy have beside those of a plain model's Hugging Face
        config."""
        return ()

    @classmethod
    def from_huggingface_config(cls, config: Mapping[str, Any]) -> "PolicyConfig | None":
        """The settings in `huggingface_fields` of a config; None where it has none of them.

        Raises SettingError, with the names of fields, where they cannot be understood.
        """
        return None
