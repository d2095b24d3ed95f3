"""What makes a model's KV cache small: the sharing map, its iteration plan, the window and the KV policy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lckv.errors import Problem, SettingError
from lckv.policies.config import PolicyConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.registry import config_class, config_classes
from lckv.sharing.layer_types import LayerType, LayerTypes


@dataclass(frozen=True)
class CompressionConfig:
    """Cross-layer KV sharing (which layer's keys and values a layer reads) and the KV policy (which tokens
    are kept)."""

    layer_types: str | None = None
    """Sharing map, one entry per layer joined by "_": the index of the layer whose keys and values it reads,
    with an optional "s" for a sliding window, such as 0_6_6_6_6_6_6_7 (LCKV), 0_0_2_2 (CLA) or 0s_1s_2s_3_3_3
    (YOCO). Default: every layer reads its own (a plain transformer)."""

    forward_passes: int = 7
    """m: passes without gradient over each cyclic group of layers, before those with gradient (LCKV, section
    3.2)."""

    backward_passes: int = 2
    """b: passes with gradient over each cyclic group of layers (LCKV, section 3.2)."""

    sliding_window: int | None = None
    """W: tokens that a layer marked "s" sees, its own included. Required iff the map marks a layer with
    "s"."""

    force_nodiag: bool = False
    """Hide the query's own position in every layer, not only in cyclic ones."""

    policy: PolicyConfig = field(default_factory=DenseConfig, metadata={"variants": config_classes})
    """What is kept along the sequence."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CompressionConfig":
        """From what `dataclasses.asdict` makes of one, with defaults for what is missing. Raises SettingError for an
        unknown key or policy."""
        given = dict(content)
        policy = given.pop("policy", None)
        if policy is not None and not isinstance(policy, PolicyConfig):
            name = policy.get("name") if isinstance(policy, Mapping) else None
            try:
                policy = _build(config_class(name), policy)
            except SettingError as error:
                raise error.under("policy") from None
        return _build(cls, given if policy is None else {**given, "policy": policy})

    def map(self, num_layers: int) -> LayerTypes:
        """The parsed sharing map of a model with `num_layers` layers; raises ValueError where it does not
        fit."""
        return LayerTypes.parse(self.layer_types, num_layers)

    def hidden_from(self, layer: LayerType) -> tuple[bool, int | None]:
        """What queries of `layer` do not see: whether their own position, and all but the newest how many
        tokens (None: nothing more)."""
        return layer.cyclic or self.force_nodiag, self.sliding_window if layer.sliding else None

    def windows(self, num_layers: int) -> dict[int, int]:
        """Layers whose keys and values only windowed layers read, with the window in tokens: what a cache may
        drop."""
        if self.sliding_window is None:
            return {}
        return dict.fromkeys(self.map(num_layers).windowed_kv_layers, self.sliding_window)

    def problems(self, num_layers: int) -> list[Problem]:
        """Everything that is wrong with these settings for a model of `num_layers` layers."""
        problems = [problem.under("policy") for problem in self.policy.problems()]
        for name, least in (("forward_passes", 0), ("backward_passes", 1)):
            if getattr(self, name) < least:
                problems.append(Problem(name, getattr(self, name), f"it must be at least {least}"))
        try:
            layer_types = self.map(num_layers)
        except SettingError as error:
            return [*problems, *error.problems]
        return [*problems, *self._window_problems(layer_types), *self._policy_problems(layer_types)]

    def _window_problems(self, layer_types: LayerTypes) -> Iterator[Problem]:
        if layer_types.any_sliding and self.sliding_window is None:
            obstacle = "layers are marked with 's' but sliding_window is not set: give it in tokens, or remove the 's'"
            yield Problem("layer_types", layer_types, obstacle)
        if self.sliding_window is not None and not layer_types.any_sliding:
            obstacle = (
                f"no layer of {layer_types} is marked with 's': mark the layers that shall have a window, or remove "
                "sliding_window"
            )
            yield Problem("sliding_window", self.sliding_window, obstacle)
        if self.sliding_window is not None and self.sliding_window < 1:
            yield Problem("sliding_window", self.sliding_window, "it must be at least 1 token")

    def _policy_problems(self, layer_types: LayerTypes) -> Iterator[Problem]:
        """What the policy cannot live with."""
        name, traits = self.policy.name, self.policy.traits
        if self.sliding_window is not None and not traits.windows:
            obstacle = (
                f"the policy {name} cannot live with sliding windows: remove the window and the 's' in layer_types, or choose "
                "another policy"
            )
            yield Problem("sliding_window", self.sliding_window, obstacle)
        if not traits.shares and any(layer.source != layer.index for layer in layer_types):
            obstacle = f"the policy {name} works only where every layer reads its own keys and values: choose another one"
            yield Problem("layer_types", layer_types, obstacle)


def _build(kind: type, content: Mapping[str, Any]) -> Any:
    """A frozen dataclass from its fields by name."""
    known = [entry.name for entry in fields(kind)]
    unknown = [name for name in content if name not in known]
    if unknown:
        obstacle = f"there is no such field. Known: {', '.join(known)}"
        raise SettingError([Problem(unknown[0], repr(content[unknown[0]]), obstacle)])
    return kind(**content)
