"""The page of an exported model, README.md: what it shares and merges, what that saves, how it was made, how
to load it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from checkpoints_conversion.conversion_record import ConversionRecord
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.export.measured import Measured
from checkpoints_conversion.source_card import hub_name
from lckv.cost import kv_bytes_per_token
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw
from megatron_ext.data.order import TrainingOrder
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape

_REFERENCES = {
    "lckv": "LCKV: Wu, Tu. *Layer-Condensed KV Cache for Efficient Inference of Large Language Models.* "
    "ACL 2024, arXiv:2405.10637",
    "sharing": "Sharing maps: Wu, Wu, Tu. *A Systematic Study of Cross-Layer KV Sharing for Efficient LLM "
    "Inference.* NAACL 2025, arXiv:2410.14442",
    "mixed": "Mixed keys and values: *YOCO++: Enhancing YOCO with KV Residual Connections for Efficient LLM "
    "Inference.* Public code at github.com/wuyou2002/YOCO-plus",
    "average": "Averaged keys and values: Zuhri, Adilazuarda, Purwarianti, Aji. *MLKV: Multi-Layer Key-Value "
    "Heads for Memory Efficient Transformer Decoding.* 2024, arXiv:2406.09297",
}
_SHOWN_DATASETS = 10


def model_card(
    name: str,
    description: ModelDescription,
    record: ConversionRecord,
    *,
    measured: Measured | None = None,
    origin_card: Mapping[str, str] | None = None,
    with_code: bool = False,
) -> str:
    """The text of README.md for the model `name`.

    `origin_card` is what the page of the model that it began with says (`card_facts`); `with_code` says that
    modelling files lie beside the weights.
    """
    measured, origin = measured or Measured(), dict(origin_card or {})
    base = _hub_name(record) or origin.pop("base_model", None)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", **origin}
    if base is not None:
        front["base_model"] = base
    sections = [
        _introduction(name, description),
        _sharing(description),
        _cache(description, measured),
        _history(record, measured, base),
        _loading(with_code),
        _references(description, record),
    ]
    body = "\n\n".join("\n".join(section) for section in map(list, sections) if section)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"


def _introduction(name: str, description: ModelDescription) -> Iterator[str]:
    model, layer_types = description.model, description.compression.map(description.model.num_layers)
    parameters = sum(math.prod(info.shape) for info in description.expected_tensors().values())
    yield f"# {name}"
    yield ""
    yield (
        f"A decoder of the {description.family} family: {model.num_layers} layers of width "
        f"{model.hidden_size}, {model.num_attention_heads} query heads and {model.query_groups} key/value "
        f"heads of {model.head_dim} channels, {description.vocab_size:,} tokens of vocabulary, contexts of "
        f"{model.max_position_embeddings:,} tokens, {parameters:,} parameters in "
        f"{str(description.dtype).removeprefix('torch.')}. Keys and values are computed in "
        f"{len(layer_types.kv_layers)} of {model.num_layers} layers."
    )


def _sharing(description: ModelDescription) -> Iterator[str]:
    compression = description.compression
    layer_types = compression.map(description.model.num_layers)
    yield "## Whose keys and values a layer reads"
    yield ""
    yield "```"
    yield draw(layer_types, window=compression.sliding_window)
    yield "```"
    yield ""
    yield f"`layer_types`: `{layer_types}`"
    if layer_types.any_cyclic:
        yield (
            "\nLayers that read a layer above themselves are iterated when many tokens are processed at "
            f"once, in training and for a prompt: {compression.forward_passes} passes without and "
            f"{compression.backward_passes} with gradient. Generating a token takes one pass."
        )
    if layer_types.any_mixed:
        yield (
            "\nA layer `own + j` mixes keys and values of layer j into its own, and a layer `i + j` reads a "
            f"mixture of both, by learned weights, times {compression.mix_scaling_factor:g}."
        )
    if any(layer.values is not None for layer in layer_types):
        yield "\nA layer `i / j` reads the keys of layer i and the values of layer j."
    if compression.first_guess:
        yield "\nThe first pass reads keys and values that a learned linear map guesses."
    if compression.sliding_window is not None:
        yield f"\nLayers marked `s` see the newest {compression.sliding_window:,} tokens."
    if compression.force_nodiag:
        yield "\nNo layer sees the query's own position."


def _cache(description: ModelDescription, measured: Measured) -> Iterator[str]:
    model, policy = description.model, description.compression.policy
    layer_types, plain = description.compression.map(model.num_layers), LayerTypes.plain(model.num_layers)
    shape = model_shape(
        model, vocab_size=description.vocab_size, seq_length=model.max_position_embeddings or 0
    )
    size = description.dtype.itemsize
    whole, mine = (kv_bytes_per_token(shape, kinds, bytes_per_number=size) for kinds in (plain, layer_types))
    rows: list[tuple[str, float]] = [("a plain model of these sizes", whole), ("this sharing map", mine)]
    yield "## KV cache"
    yield ""
    yield f"Policy: {policy.card()}"
    if measured.compression_ratio is not None and not policy.traits.keeps_every_token:
        yield f"Measured{measured.where}: {measured.compression_ratio:.2f} tokens per slot."
        rows.append((f"and the policy {policy.name}, as measured", mine / measured.compression_ratio))
    yield ""
    yield "| | bytes per token | less by |"
    yield "|---|---|---|"
    for what, number in rows:
        yield f"| {what} | {number:,.0f} | {whole / number:.2f}x |"
    if layer_types.any_sliding:
        yield "\nLayers with a window stop growing when it is full."


def _history(record: ConversionRecord, measured: Measured, base: str | None) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    if base is not None:
        yield f"- From `{base}`."
    for conversion in _chain(record):
        if conversion.initialization is not None:
            how = {
                "average": "averaged over the layers that read them",
                "copy": "copied from their own layer",
                "svd": "fitted to a text, with the queries and outputs of the layers that read them",
            }
            yield f"- Keys and values taken from a plain model: {how[conversion.initialization]}."
        if conversion.training is not None:
            yield from _training(conversion.training)
    if measured.validation_loss is not None:
        loss = measured.validation_loss
        at = "" if measured.at_end else f" after {measured.iteration:,} iterations"
        yield f"- Validation loss{at} {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}."
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    day = record.created[:10]
    yield (
        f"- Converted from {record.source.format} weights on {day} with {versions}; `conversion.json` has "
        "the details."
    )


def _training(training: Mapping[str, Any]) -> Iterator[str]:
    progress, train, optimizer = (training.get(part) or {} for part in ("progress", "train", "optimizer"))
    if "iteration" in progress:
        tokens = f", {progress['consumed_tokens']:,} tokens" if "consumed_tokens" in progress else ""
        yield f"- Trained for {progress['iteration']:,} iterations{tokens}."
    if "map_family" in training:
        yield (
            f"- Each step drew its sharing map from a family, `{training['map_family']}`; this model has "
            "one of them."
        )
    yield from data_lines(training)
    if "global_batch_size" in train:
        yield (
            f"- {train['global_batch_size']:,} sequences of {train['seq_length']:,} tokens per step, "
            f"{train['precision']}."
        )
    if "lr" in optimizer:
        yield (
            f"- AdamW, peak learning rate {optimizer['lr']:g}, {optimizer['lr_decay_style']} schedule to "
            f"{optimizer['min_lr']:g} with {optimizer['lr_warmup_iters']:,} iterations of warm-up, weight "
            f"decay {optimizer['weight_decay']:g}."
        )


def data_lines(training: Mapping[str, Any]) -> Iterator[str]:
    """The datasets of a run by the last parts of their paths, with the tokens that were read of each."""
    tokens = _tokens_of_datasets(training)
    whole = sum(tokens.values())
    for name, number in sorted(tokens.items(), key=lambda item: -item[1])[:_SHOWN_DATASETS]:
        yield f"- Data: `{name}`, {number:,} tokens ({number / max(1, whole):.0%})."
    if len(tokens) > _SHOWN_DATASETS:
        yield f"- And {len(tokens) - _SHOWN_DATASETS} more datasets."


def _tokens_of_datasets(training: Mapping[str, Any]) -> dict[str, int]:
    """None where the run, of an earlier version, has not noted it."""
    progress = training.get("progress") or {}
    try:
        order = TrainingOrder.from_dict(progress["training_order"])
        counts = order.read_until(int(progress["consumed_samples"]))
    except (KeyError, TypeError, ValueError, ConfigError):
        return {}
    tokens: dict[str, int] = {}
    for source, samples in zip(order.sources, counts, strict=True):
        name = Path(source.prefix).name
        tokens[name] = tokens.get(name, 0) + samples * source.seq_length
    for source in order.left_out:
        name = Path(source.prefix).name
        tokens[name] = tokens.get(name, 0) + source.before * source.seq_length
    return {name: number for name, number in tokens.items() if number}


def _loading(with_code: bool) -> Iterator[str]:
    yield "## Loading"
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'folder = "PATH OF THIS FOLDER"'
    if with_code:
        yield "import lckv.models  # with the package lckv-megatron installed"
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
    yield "model = AutoModelForCausalLM.from_pretrained(folder)"
    if with_code:
        yield ""
        yield (
            "# or without the package, by the modelling files in this folder: code runs that came with the "
            "weights"
        )
        yield "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)"
        yield "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    yield "```"


def _references(description: ModelDescription, record: ConversionRecord) -> list[str]:
    layer_types = description.compression.map(description.model.num_layers)
    shared = len(layer_types.kv_layers) < len(layer_types)
    fits = {
        "lckv": layer_types.any_cyclic,
        "sharing": shared,
        "mixed": layer_types.any_mixed,
        "average": any(conversion.initialization == "average" for conversion in _chain(record)),
    }
    papers = [_REFERENCES[name] for name, used in fits.items() if used]
    lines = [f"- {paper}" for paper in (*papers, *description.compression.policy.references)]
    return ["## References", "", *lines] if lines else []


def _chain(record: ConversionRecord) -> Iterator[ConversionRecord]:
    """The conversions that led to a model, the first one first."""
    if record.previous is not None:
        yield from _chain(record.previous)
    yield record


def _hub_name(record: ConversionRecord) -> str | None:
    """The name on the Hugging Face Hub of the model that it all began with; a folder of this machine is
    nobody else's business."""
    source = next(_chain(record)).source
    if source.format != "huggingface":
        return None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and not Path(source.path).exists():
        return source.path
    return hub_name(Path(source.path))
