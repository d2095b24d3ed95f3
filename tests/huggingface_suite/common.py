"""Imports transformers' `ModelTesterMixin` from where `bring` put it."""

import importlib
import sys
import types
from typing import Any

from transformers.models.auto import modeling_auto

from tests.huggingface_suite.bring import folder, packages

_PACKAGE = "transformers_tests"
_MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Modules that the source distribution lacks, and the class that is wanted of each."""


_NAMES = {
    "MODEL_MAPPING_NAMES": "LCKVLlamaModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LCKVLlamaForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LCKVLlamaForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LCKVLlamaForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "LCKVLlamaForQuestionAnswering",
}
"""By these the tests know which class has which head and which labels."""


def import_mixins() -> tuple[type[Any], type[Any]]:
    """`ModelTesterMixin`, and an empty `GenerationTesterMixin`."""
    for mapping, name in _NAMES.items():
        getattr(modeling_auto, mapping)["lckv-llama"] = name
    sys.path.append(str(packages()))
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder())]
    sys.modules[_PACKAGE] = package
    for name, wanted in _MISSING.items():
        for module in (name.partition(".")[0], name):
            sys.modules.setdefault(f"{_PACKAGE}.{module}", types.ModuleType(f"{_PACKAGE}.{module}"))
        setattr(sys.modules[f"{_PACKAGE}.{name}"], wanted, type(wanted, (), {}))
    common = importlib.import_module(f"{_PACKAGE}.test_modeling_common")
    return common.ModelTesterMixin, common.GenerationTesterMixin
