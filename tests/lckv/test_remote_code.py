"""Modelling files: rewritten imports, and the exported model where the package is missing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lckv.models  # noqa: F401
from lckv.models.classification import LCKVLlamaForSequenceClassification
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.registry import config_class
from lckv.remote_code import Bundler, modelling_files

MODULES = {
    "pkg/__init__.py": "",
    "pkg/models/__init__.py": "",
    "pkg/models/modeling.py": (
        '"""A model."""\n\nimport math\n\nfrom torch import nn\n\nfrom pkg.models.configuration import '
        "Config\n"
        "from pkg.parts import blocks, pieces as bits\nfrom pkg.parts.blocks import (\n    DEPTH,\n    WIDTH "
        "as wide,\n)\n\n\n"
        "def area() -> float:\n    from pkg.kernels.fast import square\n\n    return square(DEPTH) + wide + "
        "blocks.DEPTH + bits.ONE\n"
    ),
    "pkg/models/configuration.py": "class Config:\n    pass\n",
    "pkg/parts/__init__.py": "",
    "pkg/parts/blocks.py": "DEPTH, WIDTH = 3, 4\n",
    "pkg/parts/pieces.py": "ONE = 1\n",
    "pkg/kernels/__init__.py": "",
    "pkg/kernels/fast.py": (
        "import missing_kernels.language as ml\n\n\ndef square(x):\n    return ml.multiply(x, x)\n"
    ),
    "pkg/unused.py": "import pkg.models\n",
}
ENTRIES = ("pkg.models.configuration", "pkg.models.modeling")


def bundler(root: Path, **changed: str) -> Bundler:
    for name, text in {
        **MODULES,
        **{name.replace("__", "/") + ".py": text for name, text in changed.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Bundler(root, "pkg", ENTRIES)


def unpack(files: dict[str, str], folder: Path) -> None:
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in files.items():
        (folder / name).write_text(text)


def test_files_are_flat_and_only_those_needed(tmp_path: Path) -> None:
    assert list(bundler(tmp_path).files()) == [
        "configuration.py", "modeling.py", "pkg_kernels_fast.py", "pkg_parts_blocks.py",
        "pkg_parts_pieces.py",
    ]  # fmt: skip


def test_flat_files_work_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(bundler(tmp_path / "source").files(), tmp_path / "flat_model")
    monkeypatch.syspath_prepend(tmp_path)
    from flat_model import modeling  # type: ignore[import-not-found]

    assert modeling.blocks.DEPTH == 3
    assert "pkg" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="missing_kernels"):
        modeling.area()


def test_transformers_finds_all_files_and_asks_for_no_optional_package(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import check_imports, get_relative_import_files

    files = bundler(tmp_path / "source").files()
    unpack(files, tmp_path / "flat")
    found = {Path(name).name for name in get_relative_import_files(tmp_path / "flat" / "modeling.py")}
    assert found == set(files) - {"modeling.py"}
    for name in files:
        check_imports(tmp_path / "flat" / name)


def test_only_imports_change(tmp_path: Path) -> None:
    text = bundler(tmp_path).files()["modeling.py"]
    header, _, rest = text.partition('"""A model."""\n')
    assert "Written by lckv-megatron" in header and "pkg/models/modeling.py" in header
    assert "\nimport math\n\nfrom torch import nn\n" in rest
    assert "from .pkg_parts_blocks import DEPTH, WIDTH as wide\n" in rest
    assert "    from .pkg_kernels_fast import square\n" in rest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from . import other", "pkg.models.configuration, line 1: a relative import"),
        ("import pkg.parts.blocks", "'import pkg.parts.blocks' has no counterpart in a model's folder"),
        ("NAME = 'pkg.parts.blocks'", "names the module 'pkg.parts.blocks' in a string"),
    ],
)
def test_code_that_cannot_be_bundled(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        bundler(tmp_path, pkg__models__configuration=text).files()


TOKENS = torch.arange(24).view(2, 12) % 19
MODELS = {
    "sandwich": {"layer_types": "0_2_2_3", "forward_passes": 3, "backward_passes": 1},
    "windows": {"layer_types": "0s_1_1_1s", "sliding_window": 4},
    "merging": {
        "layer_types": "0_2_2_3",
        "policy": {"name": "dmc", "stage": "finetune", "initial_decision_bias": 0.1},
    },
    "a policy of another package": {"layer_types": "0_2_2_3", "policy": {"name": "forgetful", "age": 2}},
}

LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["lckv"] = sys.modules["triton"] = sys.modules["tests"] = None  # importing either is an error
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    auto = AutoModelForSequenceClassification if folder.endswith("classifier") else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.arange(24).view(2, 12) % 19
    with torch.no_grad():
        seen = {"logits": model(tokens).logits}
    if auto is AutoModelForCausalLM:
        model.train()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        model.eval()
        seen["loss"] = loss.detach()
        seen["generated"] = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False)
    torch.save(seen, folder + "/seen.pt")
    model.save_pretrained(folder + "/again")
    again = auto.from_pretrained(folder + "/again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, seen["logits"])
    assert again.config.auto_map == model.config.auto_map
    assert type(again.config).__module__ == type(again).__module__
assert not any(name.partition(".")[0] == "lckv" for name in sys.modules if sys.modules[name])
"""


def test_the_registry_lists_the_policies_of_the_model() -> None:
    for policy, others in (("dense", 0), ("dmc", 5), ("dms", 5), ("forgetful", 2)):
        files = modelling_files(policy)
        text = files["lckv_policies_registry.py"]
        assert f"in (DenseConfig{'' if policy == 'dense' else f', {policy_class(policy)}'},)" in text
        assert len([name for name in files if f"policies_{policy}_" in name]) >= others
    assert "lckv_policies_dmc_config.py" not in files and "tests_policies_forgetful_policy.py" in files


def policy_class(policy: str) -> str:
    return config_class(policy).__name__


def tiny_config(compression: dict[str, Any]) -> LCKVLlamaConfig:
    return LCKVLlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        compression=compression,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )


def save_tiny(folder: Path, compression: dict[str, Any]) -> LCKVLlamaForCausalLM:
    """A model with its modelling files in `folder`."""
    torch.manual_seed(1)
    model = LCKVLlamaForCausalLM(tiny_config(compression)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def save_trained(folder: Path) -> LCKVLlamaForCausalLM:
    """What `Trainer` saves of a model that it has trained for two steps."""
    model = LCKVLlamaForCausalLM(tiny_config(MODELS["merging"]))
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    rows: Any = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(
        model, TrainingArguments(str(folder / "run"), max_steps=2, **options), train_dataset=rows
    )
    trainer.train()
    trainer.save_model(str(folder))
    return model.eval()


def save_classifier(folder: Path) -> LCKVLlamaForSequenceClassification:
    model = LCKVLlamaForSequenceClassification(tiny_config(MODELS["sandwich"])).eval()
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return model


def test_a_folder_loads_where_the_package_is_missing(tmp_path: Path) -> None:
    models: dict[str, Any] = {
        **{name: save_tiny(tmp_path / name, compression) for name, compression in MODELS.items()},
        "trained": save_trained(tmp_path / "trained"),
        "classifier": save_classifier(tmp_path / "classifier"),
    }
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, *(str(tmp_path / name) for name in models)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    for name, model in models.items():
        seen = torch.load(tmp_path / name / "seen.pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(seen["logits"], model(TOKENS).logits), name
        if name == "classifier":
            continue
        generated = model.generate(TOKENS[:, :5], max_new_tokens=6, do_sample=False)
        assert torch.equal(seen["generated"], generated), name
        assert seen["loss"].isfinite(), name


def test_an_installed_package_takes_precedence(tmp_path: Path) -> None:
    save_tiny(tmp_path, MODELS["sandwich"])
    for trust in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model) is LCKVLlamaForCausalLM
