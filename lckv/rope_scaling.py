"""How the rotary position embedding is stretched to contexts longer than those of pretraining: what can be
set, what of it cannot work, and what follows from it without torch. Frequencies are made in `rope.py`.

Fields have the names of Hugging Face's configs; one that is None was not given.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from lckv.errors import Problem


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by the factor."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies are divided by the factor,
    high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling of the base, which grows with the length of a text beyond max_position_embeddings,
    the context of pretraining (bloc97 and emozilla 2023)."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): channels that turn less than `beta_slow` times within the original context are
    divided by the factor, those that turn more than `beta_fast` times kept, those between blended; attention
    is sharpened."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    """Of cosines and sines. Default: 0.1 ln(factor) + 1, or with both mscales their ratio."""
    beta_fast: float | None = None
    """Default: 32."""
    beta_slow: float | None = None
    """Default: 1."""
    mscale: float | None = None
    """With mscale_all_dim: the attention factor is (0.1 mscale ln(factor) + 1), divided by the same of the
    other (DeepSeek-V2)."""
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    """Whether the first and the last channel of those between are whole numbers. Default: true."""

    @property
    def turns(self) -> tuple[float, float]:
        """beta_fast and beta_slow, defaults resolved."""
        return (32 if self.beta_fast is None else self.beta_fast), (
            1 if self.beta_slow is None else self.beta_slow
        )


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): a divisor of each frequency, other ones for texts longer than the original
    context than for others."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    """Decides on the attention factor. Default: max_position_embeddings /
    original_max_position_embeddings."""
    attention_factor: float | None = None
    """Of cosines and sines. Default: sqrt(1 + ln(factor) / ln(original_max_position_embeddings)), at least
    1."""


Scaling = LinearScaling | Llama3Scaling | DynamicScaling | YarnScaling | LongRopeScaling
SCALINGS: MappingProxyType[str, type[Scaling]] = MappingProxyType(
    {
        "linear": LinearScaling,
        "llama3": Llama3Scaling,
        "dynamic": DynamicScaling,
        "yarn": YarnScaling,
        "longrope": LongRopeScaling,
    }
)
"""By what Hugging Face's configs call them (rope_type)."""


def type_of(scaling: Scaling) -> str:
    """The rope_type of a scaling."""
    return next(name for name, kind in SCALINGS.items() if type(scaling) is kind)


def follows_length(scaling: Scaling | None) -> bool:
    """Whether the frequencies depend on the length of the text."""
    return isinstance(scaling, DynamicScaling | LongRopeScaling)


def longest_context(scaling: Scaling | None, max_position_embeddings: int) -> int:
    """Tokens of the longest text. Dynamic scaling goes beyond max_position_embeddings, by its factor; with
    the others that is the stretched context itself."""
    if isinstance(scaling, DynamicScaling) and 1 <= scaling.factor < math.inf:
        return int(max_position_embeddings * scaling.factor)
    return max_position_embeddings


def attention_factor(scaling: Scaling | None, max_position_embeddings: int) -> float:
    """What cosines and sines are multiplied by; attention scores grow by its square."""
    if not isinstance(scaling, YarnScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, YarnScaling):
        growth = math.log(scaling.factor) / 10
        if scaling.mscale and scaling.mscale_all_dim:
            return (scaling.mscale * growth + 1) / (scaling.mscale_all_dim * growth + 1)
        return growth + 1
    original = scaling.original_max_position_embeddings
    factor = max_position_embeddings / original if scaling.factor is None else scaling.factor
    return math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))


def in_words(scaling: Scaling | None, max_position_embeddings: int) -> str:
    """What a scaling does, on one line."""
    if scaling is None:
        return "not scaled"
    if isinstance(scaling, LongRopeScaling):
        text = f"longrope: other factors beyond {scaling.original_max_position_embeddings:,} positions"
    else:
        text = f"scaled by {scaling.factor:g}, {type_of(scaling)}"
    if isinstance(scaling, DynamicScaling):
        text += f": its base grows beyond {max_position_embeddings:,} positions"
    if isinstance(scaling, Llama3Scaling):
        text += f": frequency factors {scaling.low_freq_factor:g} and {scaling.high_freq_factor:g}"
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        separator = ", " if isinstance(scaling, Llama3Scaling) else ": "
        text += f"{separator}originally {scaling.original_max_position_embeddings:,} positions"
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        text += f", attention factor {attention_factor(scaling, max_position_embeddings):g}"
    return text


def scaling_problems(scaling: Scaling | None, head_dim: int, base: float) -> Iterator[Problem]:
    """What cannot work in a scaling of heads of `head_dim` channels with this base."""
    if scaling is None:
        return
    if scaling.factor is not None and not 1 <= scaling.factor < math.inf:
        yield Problem("factor", scaling.factor, "it must be a number of at least 1")
    given = getattr(scaling, "attention_factor", None)
    if given is not None and not 0 < given < math.inf:
        obstacle = "it must be a number greater than 0, or left out to follow from the factor"
        yield Problem("attention_factor", given, obstacle)
    if isinstance(scaling, DynamicScaling) and head_dim == 2:
        obstacle = "it needs heads of more than 2 channels: choose another type, such as linear"
        yield Problem("type", "dynamic", obstacle)
    if isinstance(scaling, Llama3Scaling):
        yield from _llama3_problems(scaling)
    if isinstance(scaling, YarnScaling):
        yield from _yarn_problems(scaling, base)
    if isinstance(scaling, LongRopeScaling):
        yield from _longrope_problems(scaling, head_dim)


def _above_zero(scaling: Scaling, *names: str) -> Iterator[Problem]:
    for name in names:
        value = getattr(scaling, name)
        if value is not None and not 0 < value < math.inf:
            yield Problem(name, value, "it must be a number greater than 0")


def _llama3_problems(scaling: Llama3Scaling) -> Iterator[Problem]:
    yield from _above_zero(scaling, "low_freq_factor", "original_max_position_embeddings")
    if not scaling.low_freq_factor < scaling.high_freq_factor < math.inf:
        obstacle = (
            f"it must be greater than low_freq_factor, which is {scaling.low_freq_factor} (Llama 3.1 has 4 "
            "and 1)"
        )
        yield Problem("high_freq_factor", scaling.high_freq_factor, obstacle)


def _yarn_problems(scaling: YarnScaling, base: float) -> Iterator[Problem]:
    yield from _above_zero(scaling, "original_max_position_embeddings", "beta_fast", "beta_slow")
    fast, slow = scaling.turns
    if 0 < fast < slow:
        obstacle = f"it must be at least beta_slow, which is {slow:g} (usual are 32 and 1)"
        yield Problem("beta_fast", fast, obstacle)
    for name in ("mscale", "mscale_all_dim"):
        value = getattr(scaling, name)
        if value is not None and not 0 <= value < math.inf:
            yield Problem(name, value, "it must be a number of at least 0, or left out")
    if base <= 1:
        obstacle = f"it needs a base (rope_theta) above 1, and that is {base:g}: choose another type or base"
        yield Problem("type", "yarn", obstacle)


def _longrope_problems(scaling: LongRopeScaling, head_dim: int) -> Iterator[Problem]:
    for name in ("short_factor", "long_factor"):
        factors = getattr(scaling, name)
        if len(factors) != head_dim // 2:
            obstacle = f"it must have one for each pair of a head's channels, {head_dim // 2}"
            yield Problem(name, f"a list of {len(factors)} numbers", obstacle)
        wrong = [factor for factor in factors if not 0 < factor < math.inf]
        if wrong:
            yield Problem(name, f"a list with {wrong[0]}", "all must be numbers greater than 0")
    if scaling.original_max_position_embeddings < 2:
        obstacle = "it must be at least 2: the context of pretraining, in tokens"
        yield Problem("original_max_position_embeddings", scaling.original_max_position_embeddings, obstacle)
