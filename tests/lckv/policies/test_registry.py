"""KV policies are found in folders, and where the environment names them."""

import sys
from pathlib import Path

import pytest

from lckv.attention.key_bias import KeyBias
from lckv.errors import SettingError
from lckv.policies import registry
from lckv.policies.config import Traits
from lckv.policies.dense.config import DenseConfig
from lckv.policies.registry import VARIABLE, config_class, config_classes

MODULE = """
from dataclasses import dataclass
from typing import Literal
from lckv.policies.config import PolicyConfig

@dataclass(frozen=True)
class Config(PolicyConfig):
    name: Literal["{name}"] = "{name}"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python finds modules in."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_folders_of_the_package_and_what_the_environment_names() -> None:
    known = config_classes()
    folders = [path.parent.name for path in Path(__file__).parents[3].glob("lckv/policies/*/config.py")]
    assert {*folders, "forgetful"} == {*known}
    assert [kind.name for kind in known.values()] == [*known]
    assert config_class("dense") is DenseConfig


def test_packages_and_lone_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "named_package").mkdir()
    (folder / "named_package" / "__init__.py").touch()
    (folder / "named_package" / "config.py").write_text(MODULE.format(name="packed"))
    (folder / "named_module.py").write_text(MODULE.format(name="lone"))
    monkeypatch.setenv(VARIABLE, " named_package, named_module,")
    assert {"dense", "packed", "lone"} <= {*config_classes()} and "forgetful" not in config_classes()
    assert config_class("lone").__module__ == "named_module"


@pytest.mark.parametrize("name", ["h2o", None, 3])
def test_an_unknown_name(name: object) -> None:
    with pytest.raises(
        SettingError, match=f"name is {name!r}; the KV policies are dense, .*, forgetful .*{VARIABLE}"
    ):
        config_class(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "odd_policy is no KV policy: No module named 'odd_policy'. LCKV_POLICIES and entry points"),
        ("", "odd_policy has 0 classes derived from PolicyConfig; it must have one"),
        (MODULE.format(name="dense"), "both define the KV policy 'dense'; rename one"),
    ],
)
def test_what_is_no_policy(
    text: str | None, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (folder / "odd_policy.py").write_text(text)
    monkeypatch.delitem(sys.modules, "odd_policy", raising=False)
    monkeypatch.setenv(VARIABLE, "odd_policy")
    registry._config_classes.cache_clear()
    with pytest.raises(ValueError, match=said):
        config_classes()


def test_keys_with_a_bias_and_windows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"windows is true, and key_bias is set: .* Say windows=False"):
        Traits(KeyBias())
    assert not Traits(KeyBias(), windows=False).keeps_every_token
