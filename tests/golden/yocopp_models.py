"""The models recorded in golden/yocopp, as those of golden/lckv."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from tests.golden.lckv_models import Golden

FOLDER = Path(__file__).parent / "yocopp"
NAMES = ("yocopp_6", "yocopp_8_kv4", "yocopp_6_init")
_TOLERANCE = {
    "logits": 1e-4, "loss": 2e-6, "grad_rel": 1e-4, "logits_sequential": 1e-4, "generated_logits": 1e-4,
    "cache": 1e-4,
}  # fmt: skip
"""As its README says."""


def load(name: str) -> Golden:
    """One recorded model; its map says what the published method does to each layer that computes keys and
    values, above the lowest."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["json"])
    tensors = load_file(FOLDER / f"{name}.safetensors")
    entries = recorded["layer_types"].split("_")
    owners = [index for index, source in enumerate(entries) if int(source) == index]
    header = {
        "num_hidden_layers": len(entries),
        "hidden_size": recorded["hidden"],
        "intermediate_size": recorded["inter"],
        "num_attention_heads": recorded["H"],
        "num_key_value_heads": recorded["KV"],
        "vocab_size": recorded["vocab"],
        "rms_norm_eps": recorded["rms_eps"],
        "rope_theta": recorded["rope_theta"],
        "layer_types": "_".join(f"{e}+0" if i and i in owners else e for i, e in enumerate(entries)),
        "forward_passes": 7,
        "backward_passes": 2,
        "sliding_window": None,
        "force_nodiag": False,
        "prompt": recorded["prompt"],
        "owners": owners,
        "tolerance": _TOLERANCE,
    }
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("grad.")}
    gradients = {name: tensor for name, tensor in tensors.items() if name.startswith("grad.")}
    ids = weights["input_ids"].long()
    return Golden(header, {**weights, "input_ids": ids, "labels": ids}, gradients)
