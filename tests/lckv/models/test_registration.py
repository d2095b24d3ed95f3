"""The Auto classes know the models after `import lckv.models`, and `import lckv` loads next to nothing. Each
case needs a process of its own."""

import subprocess
import sys

import pytest

from tests.thinning import thinned

_USE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
sizes = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=9)
config = AutoConfig.for_model("lckv-llama", **sizes, compression={"layer_types": "1_1"})
models = AutoModel.from_config(config), AutoModelForCausalLM.from_config(config)
print(*(type(made).__name__ for made in (config, *models)))
"""
_IMPORTS = {
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
    "lckv.models first": "import lckv.models",
    "transformers first": "import transformers, lckv.models",
    "by a module of it": "from lckv.models.tokens import positions",
}


@pytest.mark.parametrize("name", thinned(_IMPORTS, 2))
def test_auto_classes_know_the_models(name: str) -> None:
    command = [sys.executable, "-c", _IMPORTS[name] + _USE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LCKVLlamaConfig", "LCKVLlamaModel", "LCKVLlamaForCausalLM"]
