"""What a stored model is, of whichever format, without reading its weights."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from checkpoints_conversion.conversion_record import ConversionRecord
from checkpoints_conversion.opening import OpenModel
from lckv.cost import kv_bytes_per_token
from lckv.families.registry import export_family
from lckv.rope_scaling import in_words
from lckv.sharing.doubts import doubts
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw
from lckv.weights.tensors import dtype_name
from megatron_ext.model.cost import model_shape


def facts(opened: OpenModel) -> dict[str, Any]:
    """Everything that is known of the model, fit for JSON."""
    description = opened.description
    model, compression = description.model, description.compression
    layer_types, plain = compression.map(model.num_layers), LayerTypes.plain(model.num_layers)
    shape = model_shape(
        model, vocab_size=description.vocab_size, seq_length=model.max_position_embeddings or 0
    )
    mine, whole = (kv_bytes_per_token(shape, kinds, bytes_per_number=2) for kinds in (layer_types, plain))
    infos = opened.source.infos()
    return {
        "format": opened.format,
        "path": str(opened.path),
        "family": description.family,
        "huggingface_class": export_family(description.decoder()).architecture,
        "dtype": dtype_name(description.dtype),
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "weights_bytes": sum(info.nbytes for info in infos.values()),
        "vocab_size": description.vocab_size,
        "stored_vocab_size": opened.stored_vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope": {"base": model.rotary_base, "scaling": asdict(model.rope_scaling)},
        "layernorm_epsilon": model.layernorm_epsilon,
        "tied_embeddings": not model.untie_embeddings_and_output_weights,
        "sizes": {
            name: getattr(model, name)
            for name in (
                "num_layers",
                "hidden_size",
                "ffn_hidden_size",
                "num_attention_heads",
                "num_query_groups",
                "kv_channels",
            )
        },
        "qkv_bias": model.add_qkv_bias,
        "qk_norm": model.qk_layernorm,
        "compression": compression.as_fields() | {"layer_types": str(layer_types)},
        "map_family": opened.map_family,
        "kv_layers": list(layer_types.kv_layers),
        "kv_bytes_per_token": mine,
        "kv_bytes_per_token_of_plain_model": whole,
        "token_ids": description.token_ids,
        "training": opened.training,
        "conversion": None if opened.record is None else opened.record.to_json(),
    }


def lines(opened: OpenModel) -> Iterator[str]:
    """The same for the user."""
    description, known = opened.description, facts(opened)
    model, compression = description.model, description.compression
    layer_types = compression.map(model.num_layers)
    yield f"{_FORMATS[opened.format]}: {known['path']}"
    yield f"family              {known['family']}, for Hugging Face {known['huggingface_class']}"
    yield (
        f"parameters          {known['parameters']:,} in {known['dtype']}, "
        f"{known['weights_bytes'] / 1e6:,.1f} MB"
    )
    yield (
        f"sizes               {model.num_layers} layers, hidden {model.hidden_size}, MLP {model.ffn_size}, "
        f"{model.num_attention_heads} query heads, {model.query_groups} key/value heads of {model.head_dim} "
        "channels"
    )
    stored = "" if opened.stored_vocab_size is None else f", {opened.stored_vocab_size:,} stored rows"
    yield f"vocabulary          {known['vocab_size']:,} tokens{stored}, {_heads(known)}"
    yield (
        f"positions           up to {known['max_position_embeddings']:,}; RoPE base {model.rotary_base:g}, "
        f"{in_words(model.rope_scaling.scaling, known['max_position_embeddings'])}"
    )
    yield (
        "norms               epsilon "
        f"{model.layernorm_epsilon:g}{', on queries and keys too' if model.qk_layernorm else ''}"
    )
    if model.add_qkv_bias:
        yield "biases              on queries, keys and values"
    yield (
        f"map                 {layer_types}: keys and values computed in {len(layer_types.kv_layers)} of "
        f"{model.num_layers} layers"
    )
    if layer_types.any_cyclic:
        passes = (
            f"{compression.forward_passes} passes without and {compression.backward_passes} with gradient"
            + (", from a learned first guess" if compression.first_guess else "")
        )
        yield f"iteration           {passes}"
    yield f"policy              {compression.policy.describe()}"
    mine, whole = known["kv_bytes_per_token"], known["kv_bytes_per_token_of_plain_model"]
    yield (
        f"KV cache            {mine:,} bytes per token in 16 bits, {whole / mine:.2f}x less than a plain "
        f"model's {whole:,}"
    )
    if not compression.policy.traits.keeps_every_token:
        ratio = compression.policy.compression_ratio
        yield (
            f"                    {mine / ratio:,.0f} at the {ratio:g} tokens per slot that training aims at"
        )
    yield ""
    yield draw(layer_types, window=compression.sliding_window)
    yield from (f"warning: {doubt}" for doubt in doubts(layer_types))
    yield from _history(opened)


_FORMATS = {
    "huggingface": "Hugging Face model",
    "megatron": "checkpoint of this project",
    "megatron-legacy": "checkpoint in Megatron's older layout",
}


def _heads(known: dict[str, Any]) -> str:
    return "one matrix for embedding and output" if known["tied_embeddings"] else "separate output layer"


def _history(opened: OpenModel) -> Iterator[str]:
    training, record = opened.training, opened.record
    if training is None and record is None:
        return
    yield ""
    if training is not None:
        progress = training["progress"]
        yield (
            f"trained             {progress.get('iteration', 0):,} iterations, "
            f"{progress.get('consumed_tokens', 0):,} tokens"
        )
    while record is not None:
        yield from _conversion(record)
        record = record.previous


def _conversion(record: ConversionRecord) -> Iterator[str]:
    source = record.source
    kind = _FORMATS.get(source.format, source.format)
    yield f"converted           {record.created} from {kind} {source.path}"
    if record.initialization is not None:
        yield f"                    keys and values of the map by {record.initialization}"
    for name, digest in source.files.items():
        yield f"                    {name} sha256 {digest[:16]}..."
    yield (
        "                    with "
        f"{', '.join(f'{name} {version}' for name, version in record.versions.items())}"
    )
