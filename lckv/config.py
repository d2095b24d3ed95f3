"""What makes a model's KV cache small: the sharing map, its iteration plan, the window and the KV policy."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from lckv.errors import Problem, SettingError
from lckv.policies.config import PolicyConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.registry import config_classes
from lckv.reading import read
from lckv.sharing.family import LayerTypesFamily
from lckv.sharing.layer_types import LayerType, LayerTypes
from lckv.sharing.plan import Step, iteration_plan

_MIX_SCALING_FACTOR = 35.0
"""The published one."""
_FIRST_GUESS_LOSS_COEFFICIENT = 0.1


class Sight(NamedTuple):
    """What the queries of one layer see; the first fields of `lckv.attention.visibility.Visibility`."""

    exclude_self: bool
    """Whether query t does not see key t."""

    window: int | None
    """Tokens that a query sees, its own place included; None: all."""


@dataclass(frozen=True)
class CompressionConfig:
    """Cross-layer KV sharing (which layer's keys and values a layer reads)
    and the KV policy (which tokens are kept)."""

    layer_types: str | tuple[str, ...] | None = None
    """Sharing map, one entry per layer joined by "_": the index of the layer whose keys and values it reads,
    with an optional "s" for a sliding window, such as 0_6_6_6_6_6_6_7 (LCKV), 0_0_2_2 (CLA) or 0s_1s_2s_3_3_3
    (YOCO). Entry i may be i+j: the layer mixes keys and values of layer j below into its own, such as
    0_1+0_2+0_2_2_2 (YOCO++). A layer that only reads may read two below it: 2/0 the keys of layer 2 and the
    values of layer 0, 2+0 a mixture of both. Default: every layer reads its own (a plain transformer). In
    training also a family of maps, of which each step draws one: alternatives, such as 0_0|1_1|2_2|3 (each
    layer its own or the previous layer's), or a list, such as [0_1_2_3, 0_0_2_2] (docs/map_families.md)."""

    forward_passes: int = 7
    """m: passes without gradient over each cyclic group of layers,
    before those with gradient (LCKV, section 3.2)."""

    backward_passes: int = 2
    """b: passes with gradient over each cyclic group of layers (LCKV, section 3.2)."""

    sliding_window: int | None = None
    """W: tokens that a layer marked "s" sees, its own included.
    Required iff the map marks a layer with "s"."""

    force_nodiag: bool = False
    """Hide the query's own position in every layer, not only in cyclic ones."""

    policy: PolicyConfig = field(default_factory=DenseConfig, metadata={"variants": config_classes})
    """What is kept along the sequence."""

    first_guess: bool = False
    """Passes over a cyclic group begin with keys and values that a learned linear map guesses from the
    group's input states; false: with zeros (as published). The map adds weights to each layer that a layer
    below it reads, begins at zero, and is trained on the last pass's keys and values alone."""

    first_guess_loss_coefficient: float = _FIRST_GUESS_LOSS_COEFFICIENT
    """Weight of the first guess's relative squared error in the loss. It trains the guess and nothing
    else."""

    agreement_loss_coefficient: float = 0.0
    """Weight, in the loss, of the relative squared difference between the shared keys and values of the last
    pass and of the one before. 0: none (as published)."""

    mix_scaling_factor: float = _MIX_SCALING_FACTOR
    """s: a layer i+j of the map computes, or reads, s (w0 K_j + w1 K_i), of values the same, with learned
    weights that begin at 0 and 1 / s. It multiplies their gradients (YOCO++; 35 as published)."""

    @classmethod
    def from_dict(cls, content: object) -> "CompressionConfig":
        """From what `dataclasses.asdict` makes of one, or a JSON file holds, with defaults for what is
        missing.

        Raises ModelError that names every field that is unknown or of another type.
        """
        return read(cls, content, "compression")

    def as_fields(self) -> dict[str, Any]:
        """What `from_dict` reads; without the scaling factor where no layer of the map mixes, so that configs
        of other maps are as they were before there was one."""
        fields = asdict(self)
        if "+" not in (self.layer_types or "") and self.mix_scaling_factor == _MIX_SCALING_FACTOR:
            del fields["mix_scaling_factor"]
        return fields

    def map(self, num_layers: int) -> LayerTypes:
        """The parsed sharing map of a model with `num_layers` layers; raises SettingError where it does not
        fit, or is a family."""
        family = self.family(num_layers)
        if family.only is None:
            raise SettingError([_family_for_map(family)])
        return family.only

    def family(self, num_layers: int) -> LayerTypesFamily:
        """The map or the family of maps of a training; raises SettingError where it does not fit."""
        return LayerTypesFamily.parse(self.layer_types, num_layers)

    def with_map(self, layer_types: LayerTypes) -> "CompressionConfig":
        """The same with one map of the family."""
        window = self.sliding_window if layer_types.any_sliding else None
        return replace(self, layer_types=str(layer_types), sliding_window=window)

    def chosen(self, layer_types: str | None, num_layers: int) -> "CompressionConfig":
        """The same with the map `layer_types`, which must be one of the family, or the only one; None: the
        only one. Raises SettingError."""
        family = self.family(num_layers)
        if layer_types is None:
            if family.only is None:
                raise SettingError([_family_for_map(family)])
            return self
        wanted = LayerTypes.parse(layer_types, num_layers)
        if wanted not in family:
            known = (
                f"no map of the family {family}" if family.only is None else f"not the model's map, {family}"
            )
            raise SettingError([Problem("layer_types", layer_types, f"it is {known}: give one that is")])
        return self if family.only is not None else self.with_map(wanted)

    def maps(self, num_layers: int) -> Mapping["CompressionConfig", float]:
        """These settings with each map that a step of training may have, and how likely it is; see
        `LayerTypesFamily.weights`."""
        family = self.family(num_layers)
        if family.only is not None:
            return {self: 1.0}
        return {self.with_map(layer_types): share for layer_types, share in family.weights.items()}

    def heaviest(self, num_layers: int) -> "CompressionConfig":
        """Of `maps` the one whose step runs most layers, and among these computes most keys and values."""

        def load(one: CompressionConfig) -> tuple[int, int]:
            runs = (run for step in one.plan(num_layers) if step.requires_grad for run in step.runs)
            computing = [run.computes_kv for run in runs]
            return len(computing), sum(computing)

        maps = self.maps(num_layers)
        return self if len(maps) == 1 else max(maps, key=load)

    def plan(self, num_layers: int) -> tuple[Step, ...]:
        """The steps of a training step of a model with `num_layers` layers; raises ValueError where the map
        does not fit."""
        return iteration_plan(
            self.map(num_layers), self.forward_passes, self.backward_passes, first_guess=self.first_guess
        )

    def sight(self, layer: LayerType) -> Sight:
        """What the queries of a layer of the map see."""
        return Sight(
            exclude_self=layer.cyclic or self.force_nodiag,
            window=self.sliding_window if layer.sliding else None,
        )

    def windows(self, num_layers: int) -> dict[int, int]:
        """Layers whose keys and values only windowed layers read, with the window in tokens:
        what a cache may drop."""
        if self.sliding_window is None:
            return {}
        return dict.fromkeys(self.map(num_layers).windowed_kv_layers, self.sliding_window)

    def problems(self, num_layers: int) -> list[Problem]:
        """Everything that is wrong with these settings for the training of a model of `num_layers` layers."""
        problems = [problem.under("policy") for problem in self.policy.problems()]
        for name, least in (("forward_passes", 0), ("backward_passes", 1)):
            if getattr(self, name) < least:
                problems.append(Problem(name, getattr(self, name), f"it must be at least {least}"))
        try:
            family = self.family(num_layers)
        except SettingError as error:
            return [*problems, *error.problems]
        return [
            *problems,
            *self._window_problems(family),
            *self._policy_problems(family),
            *self._mixing_problems(family),
            *self._iteration_problems(family),
        ]

    def problems_of_model(self, num_layers: int) -> list[Problem]:
        """The same for a model that is not trained here, which has one map."""
        problems = self.problems(num_layers)
        if not problems and (family := self.family(num_layers)).only is None:
            problems.append(_family_for_map(family))
        return problems

    def _window_problems(self, layer_types: LayerTypesFamily) -> Iterator[Problem]:
        if layer_types.any_sliding and self.sliding_window is None:
            obstacle = (
                "layers are marked with 's' but sliding_window is not set: give it in tokens, or remove "
                "the 's'"
            )
            yield Problem("layer_types", layer_types, obstacle)
        if self.sliding_window is not None and not layer_types.any_sliding:
            obstacle = (
                f"no layer of {layer_types} is marked with 's': mark the layers that shall have a window, or "
                "remove sliding_window"
            )
            yield Problem("sliding_window", self.sliding_window, obstacle)
        if self.sliding_window is not None and self.sliding_window < 1:
            yield Problem("sliding_window", self.sliding_window, "it must be at least 1 token")

    def _policy_problems(self, layer_types: LayerTypesFamily) -> Iterator[Problem]:
        """What the policy cannot live with."""
        name, traits = self.policy.name, self.policy.traits
        if self.sliding_window is not None and not traits.windows:
            obstacle = (
                f"the policy {name} cannot live with sliding windows: remove the window and the 's' in "
                "layer_types, or choose another policy"
            )
            yield Problem("sliding_window", self.sliding_window, obstacle)
        if not traits.shares and layer_types.any_sharing:
            obstacle = (
                f"the policy {name} works only where every layer reads its own keys and values: choose "
                "another one"
            )
            yield Problem("layer_types", layer_types, obstacle)
        of_two = layer_types.only.readers_of_two if layer_types.only else ()
        if of_two and not (traits.two_sources and traits.keeps_every_token):
            obstacle = (
                f"layer {of_two[0]} reads two layers, and the policy {name} does not keep every token in a "
                "slot of its own, now or in a later stage, so that slots of different layers do not belong "
                "together: let it read one layer, or choose another policy"
            )
            yield Problem("layer_types", layer_types, obstacle)

    def _mixing_problems(self, layer_types: LayerTypesFamily) -> Iterator[Problem]:
        """A scaling factor that nothing would read, or that is none."""
        factor = self.mix_scaling_factor
        if not 0 < factor < math.inf:
            yield Problem("mix_scaling_factor", factor, "it must be above 0, and finite")
        elif factor != _MIX_SCALING_FACTOR and not (layer_types.only and layer_types.only.any_mixed):
            yield Problem(
                "mix_scaling_factor",
                factor,
                f"no layer of {layer_types} mixes keys and values: leave it out, or write i+j for a layer "
                "that shall mix those of layer j into those of layer i",
            )

    def _iteration_problems(self, layer_types: LayerTypesFamily) -> Iterator[Problem]:
        """Settings of the passes that nothing would read, or that contradict each other."""
        for name in ("first_guess_loss_coefficient", "agreement_loss_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                yield Problem(name, getattr(self, name), "it must be at least 0, and finite")
        coefficient = self.first_guess_loss_coefficient
        if not self.first_guess and coefficient != _FIRST_GUESS_LOSS_COEFFICIENT and coefficient >= 0:
            yield Problem(
                "first_guess_loss_coefficient",
                coefficient,
                "there is no first guess, whose error it weighs: leave it at "
                f"{_FIRST_GUESS_LOSS_COEFFICIENT}, or set first_guess to true",
            )
        on = [name for name in ("first_guess", "agreement_loss_coefficient") if getattr(self, name)]
        for name in on:
            if layer_types.only is None:
                yield Problem(
                    name,
                    getattr(self, name),
                    f"layer_types is a family of maps, {layer_types}, in each of which other layers are "
                    "iterated: leave the former out, or choose one map",
                )
            elif not layer_types.any_cyclic:
                yield Problem(
                    name,
                    getattr(self, name),
                    f"no layer of {layer_types} reads a layer above itself, so that nothing is iterated: "
                    "leave it out, or choose a map with cyclic layers",
                )
            if not self.policy.traits.keeps_every_token:
                yield Problem(
                    name,
                    getattr(self, name),
                    f"the policy {self.policy.name} does not keep every token, and what it decides cannot be "
                    "guessed or compared as numbers: leave one of them out",
                )
        if self.agreement_loss_coefficient and self.forward_passes + self.backward_passes < 2:
            yield Problem(
                "agreement_loss_coefficient",
                self.agreement_loss_coefficient,
                "there is one pass, so that none is before the last: raise forward_passes or "
                "backward_passes, or set it to 0",
            )


def _family_for_map(family: LayerTypesFamily) -> Problem:
    return Problem(
        "layer_types",
        family,
        f"it is a family of maps, of which training draws one for each step, and here one map is needed: "
        f"give one of them, such as {family.first}",
    )
