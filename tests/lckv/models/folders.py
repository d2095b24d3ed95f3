"""Hugging Face folders with tiny random models, as programs are given them."""

import json
from pathlib import Path

from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import MERGING, PLAIN, model
from tests.lckv.tokenizer_json import write_tokenizer_json

END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% "
    "endif %}"
)


def save_folder(
    folder: Path,
    layer_types: str | None = PLAIN,
    policy: DMCConfig | None = None,
    *,
    begins: bool = False,
    chat: bool = False,
    context: int = 64,
) -> LCKVLlamaForCausalLM:
    """Write a model of `context` tokens with a byte-level tokenizer; `begins`: one that puts a token before
    texts."""
    made = model(
        layer_types,
        policy,
        vocab_size=300,
        max_position_embeddings=context,
        pad_token_id=None,
        eos_token_id=0,
    )
    made.save_pretrained(folder)
    special = (END, "<|begin|>")
    write_tokenizer_json(folder / "tokenizer.json", special)
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if begins:
        settings["bos_token"] = "<|begin|>"
        _put_before_texts(folder / "tokenizer.json", "<|begin|>", 1)
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def save_merging_folder(folder: Path, layer_types: str | None = PLAIN) -> LCKVLlamaForCausalLM:
    """With DMC, merging about two of five tokens."""
    return save_folder(folder, layer_types, MERGING)


def _put_before_texts(path: Path, token: str, number: int) -> None:
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    path.write_text(json.dumps(content))
