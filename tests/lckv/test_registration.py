"""The Auto classes know the models after `import lckv`, in whatever order packages are imported. Each order
needs a process of its own."""

import subprocess
import sys

import pytest

_USE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
sizes = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=9)
config = AutoConfig.for_model("lckv-llama", **sizes, compression={"layer_types": "1_1"})
print(type(config).__name__, type(AutoModel.from_config(config)).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)
"""
_ORDERS = {
    "lckv first": """
import sys
import lckv
assert "torch" not in sys.modules and "transformers" not in sys.modules
import importlib.util
assert importlib.util.find_spec("transformers") is not None  # looking for it is not importing it
assert "transformers" not in sys.modules
lckv.register_with_transformers()
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig  # brings transformers in
import transformers
assert type(transformers.__spec__.loader).__module__ != "lckv.registration"
assert not any(type(finder).__module__ == "lckv.registration" for finder in sys.meta_path)
""",
    "transformers first": "import transformers, lckv",
}


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen[str]]:
    """All at once: each takes seconds to import transformers."""
    return {
        order: subprocess.Popen(
            [sys.executable, "-c", code + _USE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for order, code in _ORDERS.items()
    }


@pytest.mark.parametrize("order", _ORDERS)
def test_import_order(processes: dict[str, subprocess.Popen[str]], order: str) -> None:
    output, errors = processes[order].communicate(timeout=200)
    assert processes[order].returncode == 0, errors
    assert output.split() == ["LCKVLlamaConfig", "LCKVLlamaModel", "LCKVLlamaForCausalLM"]
