"""What a model family is: a declaration, from which reading and writing of configs and weights follow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lckv.config import CompressionConfig
from lckv.errors import ModelError, SettingError
from lckv.families import rope
from lckv.families.decoder import TOKEN_IDS, Decoder, TokenIds, default_head_dim
from lckv.families.fields import Field, Fixed, token_problems
from lckv.families.harmless import is_harmless
from lckv.families.weights import LLAMA_NAMES, WeightNames, is_passed_over, weights_of
from lckv.families.windows import CompressionFields
from lckv.policies.dense.config import DenseConfig
from lckv.policies.registry import config_classes
from lckv.weights.checks import check_tensors
from lckv.weights.tensors import TensorInfo, TensorSource, dtype_name, dtype_of, row_chunks

_IDENTITY = ("model_type", "architectures", "dtype", "torch_dtype", *TOKEN_IDS)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face's."""

    name: str
    """The model_type in its configs, and what this project calls it."""

    architecture: str
    """Its class with a language-modelling head."""

    other_architectures: tuple[str, ...] = ()
    """What published configs of the family call that class too."""

    fields: Mapping[str, Field]
    """Config fields that are fields of `Decoder`."""

    fixed: Mapping[str, Fixed]
    """Config fields of which only one value can be computed here."""

    ignored: Mapping[str, str]
    """Config fields that do not matter, each with the reason."""

    constants: Mapping[str, object]
    """Fields of `Decoder` that have this value in every model of the family."""

    compression: CompressionFields
    """The config fields that say which keys and values a layer sees."""

    token_ids: TokenIds
    """Special tokens that transformers assumes where a config does not give them."""

    stock_type: str
    """The model_type of transformers' config class whose defaults change nothing
    where a config writes them out."""

    names: WeightNames = LLAMA_NAMES
    """Names of the weights."""

    divides_heads: bool = False
    """Whether transformers insists that num_attention_heads divides hidden_size."""

    old_spelling: bool = True
    """Whether software that knows only transformers 4 runs the family,
    so that configs are written in its spelling too."""

    read_only: bool = False
    """Whether models of the family are read, but written as another one."""

    def read_config(
        self, config: Mapping[str, Any], dtype: torch.dtype | None = None, where: object = "config.json"
    ) -> Decoder:
        """What the config in the file `where` says. `dtype` is that of the weights where it is known
        (default: what the config says, or float32).

        Raises ModelError that names every field that is unknown or has a value without meaning here.
        """
        _raise(self._config_problems(config), where)
        values: dict[str, Any] = {name: field.read(name, config) for name, field in self.fields.items()}
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        layers = values["num_hidden_layers"]
        try:
            if values["head_dim"] is None:
                values["head_dim"] = default_head_dim(values["hidden_size"], values["num_attention_heads"])
            compression = _with_policy(self.compression.read(config, layers), config)
            stated = dtype_of(config.get("dtype") or config.get("torch_dtype") or "float32", "dtype")
        except ModelError as error:
            _raise(str(error).splitlines(), where)
            raise
        base, scaling = rope.read_rope(config, values["max_position_embeddings"])
        decoder = Decoder(
            **{**values, **self.constants},
            family=self.name,
            rope_base=base,
            rope_scaling=scaling,
            compression=compression,
            token_ids={name: config.get(name, self.token_ids[name]) for name in TOKEN_IDS},
            dtype=dtype or stated,
        )
        _raise(decoder.problems(), where)
        return decoder

    def _config_problems(self, config: Mapping[str, Any]) -> Iterator[str]:
        if config.get("model_type") != self.name:
            yield f"model_type is {config.get('model_type')!r}; it must be {self.name!r}."
        yield from self._architecture_problems(config.get("architectures"))
        for name, field in self.fields.items():
            yield from field.problems(name, config)
        of_policy = _fields_of_policy(config)
        for name, fixed in self.fixed.items():
            if name != "auto_map" or not of_policy:  # the code that the model brings is the policy's
                yield from fixed.problems(name, config.get(name))
        yield from rope.rope_problems(config)
        for name in TOKEN_IDS:
            yield from token_problems(name, config.get(name))
        old_names = (field.old_name for field in self.fields.values())
        known = {
            *self.fields, *self.fixed, *self.ignored, *self.compression.names, *rope.FIELDS, *_IDENTITY,
            *old_names, *of_policy,
        }  # fmt: skip
        for name, value in config.items():
            if name not in known and not is_harmless(name, value, self.stock_type):
                yield (
                    f"{name} is {value!r}; this field of a {self.name} model is unknown here and may change "
                    "what the model computes. Only if you know that it does not, remove it from the file."
                )

    def _architecture_problems(self, given: Any) -> Iterator[str]:
        if given and not {self.architecture, *self.other_architectures}.intersection(given):
            yield f"architectures is {given}; it must be that of a language model, {self.architecture}."

    def problems(self, decoder: Decoder) -> list[str]:
        """What keeps a model from being written as one of this family; empty where nothing does."""
        if self.read_only:
            return [f"models of the family {self.name} are only read; write another one, such as lckv-llama"]
        problems = [
            f"{name} is {getattr(decoder, name)}, which is {value} in every model of the family"
            for name, value in self.constants.items()
            if getattr(decoder, name) != value
        ]
        if self.divides_heads and decoder.hidden_size % decoder.num_attention_heads:
            problems.append(
                f"num_attention_heads {decoder.num_attention_heads} does not divide hidden_size "
                f"{decoder.hidden_size}"
            )
        return [*problems, *self.compression.problems(decoder.compression, decoder.num_hidden_layers)]

    def write_config(self, decoder: Decoder) -> dict[str, Any]:
        """The content of config.json, in the spelling of transformers 5; where transformers 4 differs and
        knows the family, in its spelling too.

        Raises ModelError where the family cannot express the model.
        """
        problems = [
            f"{problem}: {self.architecture} cannot express it." for problem in self.problems(decoder)
        ]
        if problems:
            raise ModelError("\n".join(problems))
        content: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": dtype_name(decoder.dtype),
        }
        content |= {name: getattr(decoder, name) for name in self.fields}
        content |= {name: fixed.value for name, fixed in self.fixed.items() if fixed.written}
        content |= rope.write_rope(decoder.rope_base, decoder.rope_scaling)
        if self.old_spelling:
            content |= rope.write_old_rope(decoder.rope_base, decoder.rope_scaling)
        content |= self.compression.write(decoder.compression, decoder.num_hidden_layers)
        return content | {"use_cache": True} | {name: decoder.token_ids.get(name) for name in TOKEN_IDS}

    def tensors(self, decoder: Decoder) -> dict[str, TensorInfo]:
        """The tensors of the model by their names, from the embedding to the output layer."""
        return weights_of(decoder, self.names)

    def check_weights(self, source: TensorSource, decoder: Decoder, where: object = "the model") -> None:
        """Compares the tensors of `source`, which come from `where`, with those of the model.

        Passed over are the rotary frequencies that old checkpoints hold, and a head equal to the embedding to
        which it is tied. Raises ModelError that names all tensors that are missing, superfluous or misshapen.
        """
        given = {name: info for name, info in source.infos().items() if not is_passed_over(name)}
        head, embedding = f"{self.names.head}.weight", f"{self.names.embedding}.weight"
        if decoder.tie_word_embeddings and head in given and embedding in given:
            _check_tied(source, head, embedding, where)
            del given[head]
        check_tensors(given, self.tensors(decoder), where)


def _fields_of_policy(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that published models of a KV policy have beside the family's, where the config has some."""
    of_policies = (kind.huggingface_fields() for kind in config_classes().values())
    return next((names for names in of_policies if any(config.get(name) is not None for name in names)), ())


def _with_policy(compression: CompressionConfig, config: Mapping[str, Any]) -> CompressionConfig:
    """With the KV policy that knows fields of the config as its own. Raises ModelError."""
    try:
        candidates = (kind.from_huggingface_config(config) for kind in config_classes().values())
        policy = next((policy for policy in candidates if policy is not None), None)
    except SettingError as error:
        raise ModelError(str(error)) from error
    if policy is None:
        return compression
    if compression.policy.name != DenseConfig.name and compression.policy != policy:
        raise ModelError(
            f"compression.policy.name is {compression.policy.name}, and "
            f"{', '.join(name for name in _fields_of_policy(config) if name in config)} are fields of "
            f"{policy.name}; remove one of them."
        )
    return replace(compression, policy=policy)


def _raise(problems: Iterable[str], where: object) -> None:
    lines = [f"{where}: {problem}" for problem in problems]
    if lines:
        raise ModelError("\n".join(lines))


def _check_tied(source: TensorSource, head: str, embedding: str, where: object) -> None:
    infos = source.infos()
    same = infos[head] == infos[embedding]
    if not same or not all(
        torch.equal(source.read(head, rows), source.read(embedding, rows)) for rows in row_chunks(infos[head])
    ):
        raise ModelError(
            f"{where}: {head} differs from {embedding}, but tie_word_embeddings is true in config.json. Set "
            "it to false if the head is one of its own, or remove the tensor."
        )
