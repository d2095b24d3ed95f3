"""Loading models: the logits of transformers, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lckv.errors import ModelError
from lckv.generation.loading import load_model, model_config
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.cache.models import model, text
from tests.lckv.generation.engines import GREEDY, engine
from tests.lckv.generation.tokenizers import byte_level

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5, head_dim=16)),
    "mistral, no window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2, windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def _random(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = PLAIN[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_compute_what_they_compute_in_transformers(name: str, tmp_path: Path) -> None:
    theirs = _random(name)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load_model(tmp_path)
    assert tokenizer is None
    assert type(ours) is LCKVLlamaForCausalLM and not ours.training
    tokens = torch.randint(61, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=2e-5)
    answer = engine(ours).generate([tokens[0].tolist()], GREEDY)[0]
    expected = theirs.generate(tokens[:1], do_sample=False, max_new_tokens=10)
    assert list(answer.token_ids) == expected[0, 20:].tolist()


def test_models_of_this_project_with_their_tokenizer_and_dtype(tmp_path: Path) -> None:
    built = model("sandwich", "dmc")
    built.to(torch.bfloat16).save_pretrained(tmp_path)
    built.to(torch.float32)
    byte_level().save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "cpu")
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("the é")) == "the é"
    loaded, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert loaded.dtype == torch.float32
    expected = built.bfloat16().float()
    assert (
        engine(loaded).generate([text(9)], GREEDY)[0].token_ids
        == engine(expected).generate([text(9)], GREEDY)[0].token_ids
    )


def _saved(tmp_path: Path, name: str = "llama", **changes: Any) -> Path:
    _random(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2'; models of these types can be read: llama, mistral, qwen2,",
        ),
        (
            {"attention_bias": True},
            "attention_bias is True; it must be False: true adds a bias to the output",
        ),
        ({"mlp_bias": True}, "mlp_bias is True; it must be False: the MLP here has no bias."),
        ({"auto_map": {"AutoModel": "x.Y"}}, "it must be left out: the model brings its own code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "it must be left out: quantized weights are no"),
        (
            {"logit_softcapping": 30.0},
            "logit_softcapping is 30.0; this field of a llama model is unknown here",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'proportional'",
        ),
    ],
)
def test_models_that_would_not_be_computed_right_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = _saved(tmp_path, **changes)
    with pytest.raises(ValueError) as raised:
        load_model(folder)
    assert message in str(raised.value)


def test_layers_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "qwen2", layer_types=["full_attention", "chunked_attention", "full_attention"])
    with pytest.raises(ValueError, match="chunked_attention"):
        load_model(folder)


@pytest.mark.parametrize("what", ["missing", "not part of the model", "of another shape", "NaN or infinite"])
def test_weights_that_do_not_fit_are_refused(what: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del weights[name]
    elif what == "NaN or infinite":
        weights[name][3, 4] = float("nan")
    elif what == "not part of the model":
        name = "model.layers.1.self_attn.o_proj.bias"
        weights[name] = torch.zeros(32)
    else:
        weights[name] = torch.zeros(5, 32)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError) as raised:
        load_model(folder)
    assert what in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("iter_0000100/manifest.json", "convert megatron-to-hf --megatron-path PATH --hf-path NEW"),
        (
            "mp_rank_00/model_optim_rng.pt",
            "convert legacy-to-megatron --legacy-path PATH --megatron-path NEW",
        ),
    ],
)
@pytest.mark.parametrize("load", [load_model, model_config])
def test_a_model_of_another_format_names_its_converter(
    load: Callable[[Path], object], file: str, command: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"lckv-megatron {command.replace('PATH', str(tmp_path))}"):
        load(tmp_path)


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"config\.json does not exist; give the folder of a model in Hugging Face's format\.",
    ):
        load_model(tmp_path / "nowhere")
    folder = _saved(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights .* Pickles can run programs"):
        load_model(folder)
