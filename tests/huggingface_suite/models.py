"""transformers' common tests of models, on several maps and on transformers' own Llama.

Run with `make test-hf`; expected failures stand in `expected_failures.py`.
"""

import unittest
from dataclasses import asdict
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import lckv.models  # noqa: F401
from lckv.models.classification import (
    LCKVLlamaForQuestionAnswering,
    LCKVLlamaForSequenceClassification,
    LCKVLlamaForTokenClassification,
)
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM, LCKVLlamaModel
from lckv.policies.dmc.config import DMCConfig
from tests.huggingface_suite.common import import_mixins

ModelTesterMixin, GenerationTesterMixin = import_mixins()

_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Tester:
    """What the tests ask for: sizes, configurations and inputs."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size

    def get_config(self) -> PreTrainedConfig:
        """A new one each time."""
        return type(self._config)(**self._config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """A configuration and a batch, whose mask is that of transformers' Llama tests: a triangle."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids).tril()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Common(ModelTesterMixin, GenerationTesterMixin):
    """All tests, of one configuration."""

    config: PreTrainedConfig
    all_model_classes = (LCKVLlamaModel, LCKVLlamaForCausalLM, LCKVLlamaForSequenceClassification)

    def setUp(self) -> None:
        """Before each test."""
        torch.manual_seed(0)
        self.model_tester = Tester(self.config)


def _config(layer_types: str | None, **fields: Any) -> LCKVLlamaConfig:
    layers = 2 if layer_types is None else layer_types.count("_") + 1
    compression = {"layer_types": layer_types, "forward_passes": 1, "backward_passes": 2, **fields}
    return LCKVLlamaConfig(**_SIZES, num_hidden_layers=layers, compression=compression)


class TestPlain(Common, unittest.TestCase):
    """Every layer reads its own keys and values."""

    config = _config(None)
    all_model_classes = (
        LCKVLlamaModel,
        LCKVLlamaForCausalLM,
        LCKVLlamaForSequenceClassification,
        LCKVLlamaForTokenClassification,
        LCKVLlamaForQuestionAnswering,
    )


class TestCrossLayer(Common, unittest.TestCase):
    """CLA and YOCO: layers read those of one below."""

    config = _config("0_0")


class TestLowest(Common, unittest.TestCase):
    """MLKV: groups of layers read those of their lowest."""

    config = _config("0_0_2_2")


class TestCyclic(Common, unittest.TestCase):
    """LCKV: layers read those of the top."""

    config = _config("1_1", forward_passes=0)  # passes without gradient are not recomputed


class TestSandwich(Common, unittest.TestCase):
    """LCKV, sandwich-middle: a cyclic slice between layers of their own."""

    config = _config("0_2_2_3")


class TestWindowed(Common, unittest.TestCase):
    """Some layers see a window only."""

    config = _config("0s_1", sliding_window=4)


class TestMerging(Common, unittest.TestCase):
    """DMC."""

    config = _config(None, policy=asdict(DMCConfig(stage="finetune")))


class TestLlama(Common, unittest.TestCase):
    """transformers' own: what fails here is a fault of this harness."""

    config = LlamaConfig(**_SIZES, num_hidden_layers=2)
    all_model_classes = (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )
