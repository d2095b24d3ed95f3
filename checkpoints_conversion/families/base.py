"""What a model family is: a declaration, from which reading and writing of configs and weights follow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_conversion.description import ModelDescription, TokenIds, dtype_of
from checkpoints_conversion.families import rope
from checkpoints_conversion.families.fields import EMBEDDING, HEAD, Field, Fixed, token_problems
from checkpoints_conversion.families.mapping import (
    FusedSource,
    Fusion,
    SplitSource,
    WeightNames,
    fusion_of,
    infos_of_parts,
)
from checkpoints_conversion.families.windows import CompressionFields
from checkpoints_conversion.tensors import (
    ConversionError,
    TensorInfo,
    TensorSource,
    check_tensors,
    row_chunks,
)
from megatron_ext.config import ModelConfig
from megatron_ext.validation.layout import model_problems, rope_problems

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_IDENTITY = ("model_type", "architectures", "dtype", "torch_dtype", *TOKEN_IDS)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face's."""

    name: str
    """The model_type in its configs, and what this project calls it."""

    architecture: str
    """Its class with a language-modelling head."""

    fields: Mapping[str, Field]
    """Config fields that are fields of `ModelConfig`."""

    fixed: Mapping[str, Fixed]
    """Config fields of which only one meaning can be converted."""

    ignored: Mapping[str, str]
    """Config fields that do not matter, each with the reason."""

    constants: Mapping[str, object]
    """Fields of `ModelConfig` that have this value in every model of the family."""

    compression: CompressionFields
    """The config fields that say which keys and values a layer sees."""

    weights: WeightNames
    """Names of the weights, by canonical names."""

    token_ids: TokenIds
    """Special tokens that transformers assumes where a config does not give them."""

    divides_heads: bool = False
    """Whether transformers insists that num_attention_heads divides hidden_size."""

    old_spelling: bool = True
    """Whether software that knows only transformers 4 runs the family, so that configs are written in its
    spelling too."""

    def read_config(self, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> ModelDescription:
        """What a config.json says; `dtype` is that of the weights where it is known (default: what the config
        says, or float32).

        Raises ConversionError that names every field that is unknown or has a value that cannot be converted.
        """
        _raise(self._config_problems(config))
        values = {each.target: each.read(config.get(name)) for name, each in self.fields.items()}
        model = ModelConfig(**{**values, **self.constants, **rope.read_rope(config)})
        layers = model.num_layers
        _raise(
            [*model_problems(model), *rope_problems(model), *self.compression.config_problems(config, layers)]
        )
        stated = config.get("dtype") or config.get("torch_dtype") or "float32"
        return ModelDescription(
            model=model,
            compression=self.compression.read(config, layers),
            family=self.name,
            dtype=dtype or dtype_of(stated, "config.json: dtype"),
            token_ids={name: config.get(name, self.token_ids[name]) for name in TOKEN_IDS},
        )

    def _config_problems(self, config: Mapping[str, Any]) -> Iterator[str]:
        if config.get("model_type") != self.name:
            yield f"model_type is {config.get('model_type')!r}; it must be {self.name!r}."
        architectures = config.get("architectures")
        if architectures and self.architecture not in architectures:
            yield (
                f"architectures is {architectures}; only a language model, {self.architecture}, can be "
                "converted."
            )
        for name, each in self.fields.items():
            yield from each.problems(name, config.get(name))
        for name, fixed in self.fixed.items():
            yield from fixed.problems(name, config.get(name))
        yield from rope.rope_problems(config)
        for name in TOKEN_IDS:
            yield from token_problems(name, config.get(name))
        known = {*self.fields, *self.fixed, *self.ignored, *self.compression.names, *rope.FIELDS, *_IDENTITY}
        for name in config:
            if name not in known:
                yield (
                    f"{name} is {config[name]!r}; this field of a {self.name} model is unknown here and may "
                    "change what the "
                    "model computes. Only if you know that it does not, remove it from the file."
                )

    def problems(self, description: ModelDescription) -> list[str]:
        """What keeps a model from being written as one of this family; empty where nothing does."""
        model = description.model
        found = [
            f"model.{name} is {getattr(model, name)}, which is {value} in every model of the family"
            for name, value in self.constants.items()
            if getattr(model, name) != value
        ]
        if self.divides_heads and model.hidden_size % model.num_attention_heads:
            found.append(
                f"model.num_attention_heads {model.num_attention_heads} does not divide {model.hidden_size}"
            )
        return [*found, *self.compression.problems(description.compression, model.num_layers)]

    def write_config(self, description: ModelDescription) -> dict[str, Any]:
        """The content of config.json, in the spelling of transformers 5; where transformers 4 differs and
        knows the family, in its spelling too.

        `model.hidden_dropout`, which only training knows, has no field. Raises ConversionError where the
        family cannot express the model.
        """
        _raise(
            (f"{problem}: {self.architecture} cannot express it." for problem in self.problems(description)),
            "",
        )
        model = description.model
        content: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": str(description.dtype).removeprefix("torch."),
        }
        content |= {name: each.write(getattr(model, each.target)) for name, each in self.fields.items()}
        content |= {name: each.value for name, each in self.fixed.items() if each.written}
        content |= rope.write_rope(model)
        if self.old_spelling:
            content |= rope.write_old_rope(model)
        content |= self.compression.write(description.compression, model.num_layers)
        return content | {"use_cache": True} | {name: description.token_ids.get(name) for name in TOKEN_IDS}

    def hf_tensors(self, description: ModelDescription) -> dict[str, TensorInfo]:
        """The tensors of the model under Hugging Face's names, in writing order."""
        return infos_of_parts(description.expected_tensors(), self._fusions(description))

    def canonical_from_hf(
        self, hf: TensorSource, description: ModelDescription, where: object = "the model"
    ) -> TensorSource:
        """Canonical tensors that are read from Hugging Face's when they are asked for.

        Raises ConversionError naming all tensors of `hf`, which come from `where`, that are missing,
        superfluous or misshapen. Passed over are the rotary frequencies that old checkpoints hold, and a head
        equal to the embedding to which it is tied.
        """
        found = {
            name: info
            for name, info in hf.infos().items()
            if not name.endswith(".self_attn.rotary_emb.inv_freq")
        }
        if not description.model.untie_embeddings_and_output_weights and HEAD in found and EMBEDDING in found:
            _check_tied(hf, where)
            del found[HEAD]
        check_tensors(found, self.hf_tensors(description), where)
        source = FusedSource(hf, self._fusions(description))
        source.infos()  # says what cannot become one tensor
        return source

    def hf_from_canonical(
        self, source: TensorSource, description: ModelDescription, where: object = "the model"
    ) -> TensorSource:
        """Hugging Face's tensors that are read from canonical ones when they are asked for; errors as in
        `canonical_from_hf`."""
        check_tensors(source.infos(), description.expected_tensors(), where)
        return SplitSource(source, self._fusions(description))

    def _fusions(self, description: ModelDescription) -> dict[str, Fusion]:
        expected = description.expected_tensors()
        return {
            name: fusion_of(name, info, self.weights, description.model) for name, info in expected.items()
        }


def _raise(problems: Iterable[str], where: str = "config.json: ") -> None:
    found = [f"{where}{problem}" for problem in problems]
    if found:
        raise ConversionError("\n".join(found))


def _check_tied(hf: TensorSource, where: object) -> None:
    infos = hf.infos()
    same = infos[HEAD] == infos[EMBEDDING]
    if not same or not all(
        torch.equal(hf.read(HEAD, rows), hf.read(EMBEDDING, rows)) for rows in row_chunks(infos[HEAD])
    ):
        raise ConversionError(
            f"{where}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config.json. Set "
            "it to false if the head "
            "is one of its own, or remove the tensor."
        )
