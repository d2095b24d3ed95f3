"""Models and tokenizers from Hugging Face folders: this project's, and plain Llama, Mistral, Qwen2 and Qwen3
models.

A plain model is an `LCKVLlamaForCausalLM` whose layers read their own keys and values; the weights have the
same names.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lckv.generation.sentencepiece_conversion import use_own_splitting
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.tokenizer_files import MODEL_NAME, is_only_sentencepiece

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype", "architectures",
)  # fmt: skip
"""Fields that mean the same in every family and here."""
_OF_THE_MAP = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
_REFUSED = {
    "attention_bias": "it adds a bias to the output projection",
    "mlp_bias": "it adds biases to the MLP",
    "rope_interleaved": "rotary embeddings turn channel i with channel i + D/2 here",
    "use_mrope": "positions are those of a text here",
    "quantization_config": "weights have to be floating-point numbers",
    "auto_map": "the model brings its own code, which may compute something else",
    "is_encoder_decoder": "the model here is a decoder",
    "add_cross_attention": "the model here is a decoder",
}
"""Fields that must be absent, null or false, and why."""
_WITHOUT_BEARING = (
    *PreTrainedConfig().to_dict(), "pretraining_tp", "rope_theta", "rope_scaling", "torch_dtype", "transformers.js_config", "unsloth_fixed",
    "_attn_implementation_autoset", "attn_implementation", "num_labels", "return_dict", "torchscript",
)  # fmt: skip
"""Fields that have no bearing on what is computed, or whose content transformers moves to others."""
_FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
"""The families of plain models, and what in LCKVLlamaConfig makes them."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
    "tekken.json",
)


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LCKVLlamaForCausalLM, PreTrainedTokenizerBase | None]:
    """The model of a folder, in evaluation mode, and its tokenizer, None where the folder has none.

    `dtype`: default what the folder says. `device`: default a GPU where there is one. Raises OSError for a
    folder that has no config.json or no safetensors, and ValueError for models that would not be computed
    right: of another kind, with fields that have no meaning here, with weights that are missing or
    superfluous.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}/config.json does not exist; give the folder of a model in Hugging Face's format."
        )
    config = model_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no *.safetensors; weights in other formats are not read, since they are pickled."
        )
    device = (
        torch.device(device)
        if device is not None
        else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    loaded: Any = LCKVLlamaForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # to be told of them all
        output_loading_info=True,
    )
    model, report = loaded
    problems = [
        f"{folder}: weights are {what}: {'; '.join(sorted(map(str, report[key])))}"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "superfluous"),
            ("mismatched_keys", "of other shapes (there, here)"),
        )
        if report[key]
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return model.eval().to(device), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, None where it has none. A SentencePiece model splits text as its file says.

    Raises ValueError where transformers cannot read it so.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if is_only_sentencepiece(folder):
        use_own_splitting(tokenizer, folder / MODEL_NAME)
    return tokenizer


def model_config(folder: Path) -> LCKVLlamaConfig:
    """What the config.json of a folder means here. Raises ValueError with every field that means nothing
    here."""
    content, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    family = content.get("model_type")
    if family == LCKVLlamaConfig.model_type:
        return LCKVLlamaConfig.from_pretrained(folder, local_files_only=True)
    if family not in _FAMILIES:
        known = ", ".join((LCKVLlamaConfig.model_type, *_FAMILIES))
        raise ValueError(
            f"{folder}/config.json: model_type is {family!r}; models of these types can be run: {known}."
        )
    theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    problems = [f"{folder}/config.json: {problem}" for problem in _problems(content, family)]
    if problems:
        raise ValueError("\n".join(problems))
    same: dict[str, Any] = {
        name: getattr(theirs, name) for name in _SAME if getattr(theirs, name, None) is not None
    }
    same |= {name: None for name in ("bos_token_id", "eos_token_id") if getattr(theirs, name, None) is None}
    same |= _FAMILIES[family]
    return LCKVLlamaConfig(**same, compression=_windows(theirs))


def _problems(content: Mapping[str, Any], family: str) -> Iterator[str]:
    for name, why in _REFUSED.items():
        if content.get(name) not in (None, False):
            yield f"{name} is {content[name]!r}; models with it cannot be run: {why}."
    known = {*_SAME, *_REFUSED, *_WITHOUT_BEARING, *(() if family == "llama" else _OF_THE_MAP)}
    for name, value in content.items():
        if name not in known and value is not None:
            yield (
                f"{name} is {value!r}; this field of a {family} model is unknown here and may change what "
                "the model computes. Only if you "
                "know that it does not, remove it from the file."
            )
    kinds = {*(content.get("layer_types") or ())} - {"full_attention", "sliding_attention"}
    if kinds:
        yield (
            f"layer_types has {', '.join(sorted(map(repr, kinds)))}; layers must be full_attention or "
            "sliding_attention."
        )


def _windows(theirs: PreTrainedConfig) -> dict[str, Any] | None:
    """Every layer reads its own keys and values; some see a window of them."""
    window = getattr(theirs, "sliding_window", None)
    if window is None:
        return None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    entries = [f"{layer}{'s' if kind == 'sliding_attention' else ''}" for layer, kind in enumerate(kinds)]
    if not any(entry.endswith("s") for entry in entries):
        return None
    return {"layer_types": "_".join(entries), "sliding_window": window}
