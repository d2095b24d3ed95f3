"""Good folders of every kind, tiny, for damaging copies of them."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from checkpoints_conversion.formats.huggingface import write_safetensors
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.weights.tensors import MemorySource
from lckv_megatron.__main__ import main as run_program
from lckv_megatron.faults.children import in_child
from lckv_megatron.faults.training import settings, train

VOCABULARY = 257
CONTEXT = 96
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
_END = "</s>"
_PADDED = 384


@dataclass(frozen=True)
class Materials:
    """Where they are."""

    huggingface: Path
    """A model with its tokenizer, in two shards."""
    checkpoints: Path
    """Two checkpoints of a training."""
    dataset: Path
    """A folder with corpus.bin, corpus.idx and what is beside them."""
    pickled: Path
    """The model as pytorch_model.bin."""
    legacy: Path
    """A checkpoint in Megatron's older layout."""
    texts: Path
    """A folder with a corpus and a run's YAML file."""


def make(folder: Path) -> Materials:
    """Makes all of them below `folder`."""
    made = Materials(
        *(folder / name for name in ("hf", "checkpoints", "dataset", "pickled", "legacy", "texts"))
    )
    model = _model()
    made.huggingface.mkdir(parents=True)
    model.config.save_pretrained(made.huggingface)
    model.generation_config.save_pretrained(made.huggingface)
    write_safetensors(made.huggingface, MemorySource(model.state_dict()), max_shard_bytes=60_000)
    tokenizer_files(made.huggingface)
    made.texts.mkdir()
    texts = (f"Document {number}: " + "the quick brown fox. " * (number % 7) for number in range(200))
    (made.texts / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (made.texts / "run.yaml").write_text(json.dumps(settings()))
    made.dataset.mkdir()
    _expect(lambda: f"status {run_program(_preprocessing(made))}", "status 0")
    run = settings(checkpoint={"save": str(made.checkpoints), "save_interval": 1}, train={"train_iters": 2})
    _expect(lambda: train(run), "2")
    made.pickled.mkdir()
    torch.save(model.state_dict(), made.pickled / "pytorch_model.bin")
    os.link(made.huggingface / "config.json", made.pickled / "config.json")
    _write_legacy(made.legacy)
    return made


def _expect(action: Callable[[], str], result: str) -> None:
    ending = in_child(action, seconds=300)
    if ending.how != "value" or ending.text != result:
        raise RuntimeError(f"the material could not be made: {ending.text}")


def _model() -> LCKVLlamaForCausalLM:
    torch.manual_seed(1)
    config = LCKVLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        compression={"layer_types": "0_2_2_3", "policy": {"name": "dense"}},
        bos_token_id=None,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=None,
    )
    return LCKVLlamaForCausalLM(config).eval()


def tokenizer_files(folder: Path) -> None:
    """Write a tokenizer of bytes with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, _END])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    tokenizer.save(str(folder / "tokenizer.json"))
    content: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": _END}))


def _preprocessing(made: Materials) -> list[str]:
    return [
        "preprocess",
        "--input", str(made.texts / "corpus.jsonl"), "--output-prefix", str(made.dataset / "corpus"),
        "--tokenizer-type", "huggingface", "--tokenizer-model", str(made.huggingface), "--workers", "1",
    ]  # fmt: skip


def legacy_arguments() -> dict[str, Any]:
    """Arguments of a run of Megatron's older training program."""
    return {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
        "group_query_attention": True, "num_query_groups": 2, "kv_channels": 8,
        "max_position_embeddings": CONTEXT, "padded_vocab_size": _PADDED, "norm_epsilon": 1e-5,
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True, "use_rotary_position_embeddings": True,
        "position_embedding_type": "rope", "params_dtype": torch.float32,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "vocab_size": VOCABULARY,
    }  # fmt: skip


def _write_legacy(folder: Path) -> None:
    torch.manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (_PADDED, 32),
        "output_layer.weight": (_PADDED, 32),
        "decoder.final_layernorm.weight": (32,),
    }
    for layer in range(2):
        at = f"decoder.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (32,),
            f"{at}self_attention.linear_qkv.weight": (64, 32),
            f"{at}self_attention.linear_proj.weight": (32, 32),
            f"{at}pre_mlp_layernorm.weight": (32,),
            f"{at}mlp.linear_fc1.weight": (96, 32),
            f"{at}mlp.linear_fc2.weight": (32, 48),
        }
    content = {
        "args": argparse.Namespace(**legacy_arguments()),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {name: torch.randn(shape) for name, shape in shapes.items()},
    }
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
