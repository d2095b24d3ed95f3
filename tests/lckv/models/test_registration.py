"""The Auto classes know the models after `import lckv.models`, and `import lckv` loads next to nothing. Each
case needs a process of its own."""

import subprocess
import sys

import pytest

_USE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
sizes = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=9)
config = AutoConfig.for_model("lckv-llama", **sizes, compression={"layer_types": "1_1"})
models = AutoModel.from_config(config), AutoModelForCausalLM.from_config(config)
print(*(type(made).__name__ for made in (config, *models)))
"""
_IMPORTS = {
    "lckv.models first": "import lckv.models",
    "transformers first": "import transformers, lckv.models",
    "by a module of it": "from lckv.models.tokens import positions",
    "lckv alone": """
import sys
before = list(sys.meta_path)
import lckv
assert not {"torch", "transformers"} & set(sys.modules)
assert sys.meta_path == before
from transformers import AutoConfig
try:
    AutoConfig.for_model("lckv-llama")
except ValueError as error:
    assert "lckv-llama" in str(error)
else:
    raise AssertionError("import lckv has an effect")
import lckv.models
lckv.models.register()  # again: no error
""",
}


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen[str]]:
    """All at once: each takes seconds to import transformers."""
    return {
        name: subprocess.Popen(
            [sys.executable, "-c", code + _USE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, code in _IMPORTS.items()
    }


@pytest.mark.parametrize("name", _IMPORTS)
def test_auto_classes_know_the_models(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    output, errors = processes[name].communicate(timeout=200)
    assert processes[name].returncode == 0, errors
    assert output.split() == ["LCKVLlamaConfig", "LCKVLlamaModel", "LCKVLlamaForCausalLM"]
