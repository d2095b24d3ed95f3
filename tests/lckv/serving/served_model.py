"""A tiny model with a tokenizer of bytes and a chat template, as a folder and as an application."""

from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.serving.app import create_app
from lckv.serving.limits import ServingLimits

CONTEXT = 96
LIMITS = ServingLimits(
    context=CONTEXT,
    max_prompt_tokens=64,
    max_new_tokens=40,
    max_body_bytes=4096,
    max_prompts=4,
    max_biases=8,
    max_prompt_logprobs=2000,
    max_template_characters=100,
)
PROMPT = "Once upon"
CHAT_TEMPLATE = (
    "{% if system %}<system>{{ system }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, chat: bool = True, size: int = 257) -> PreTrainedTokenizerFast:
    """One token per byte, and </s>; of a smaller `size` the first bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    vocabulary = {token: index for index, token in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(layer_types: str = "0_2_2_3", policy: str = "dense") -> LCKVLlamaForCausalLM:
    """Random weights, float32."""
    torch.manual_seed(1)
    stage = {"stage": "finetune"} if policy == "dmc" else {}
    config = LCKVLlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        compression={"layer_types": layer_types, "policy": {"name": policy, **stage}},
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    return LCKVLlamaForCausalLM(config).eval()


def write_folder(folder: Path) -> Path:
    """A model folder as users have it."""
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_engine(**options: int) -> Engine:
    """With a small cache."""
    config = EngineConfig(memory_bytes=2**20, **{"max_batch_size": 4, **options})
    return Engine(tiny_model(), config, tokenizer=byte_tokenizer())


def make_app(engine: Engine, limits: ServingLimits = LIMITS, **options: str | None) -> FastAPI:
    """Serving the model as "tiny"."""
    options = {"api_key": None, **options}
    return create_app(engine, byte_tokenizer(), model="tiny", limits=limits, **options)


def greedy(prompt: str, tokens: int = 12) -> str:
    """The answer of an engine of its own."""
    ids = byte_tokenizer()(prompt).input_ids
    completion = make_engine().generate([ids], SamplingParams(temperature=0, max_new_tokens=tokens))[0]
    return completion.text


def ask(client: TestClient, path: str = "completions", **fields: Any) -> httpx.Response:
    """A greedy answer of 12 tokens, unless `fields` say otherwise; ...: without that field."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    body |= {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body |= fields
    return client.post(f"/v1/{path}", json={name: value for name, value in body.items() if value is not ...})
