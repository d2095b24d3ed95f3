"""Makes transformers' Auto classes know the models."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lckv.models.classification import (
    LCKVLlamaForQuestionAnswering,
    LCKVLlamaForSequenceClassification,
    LCKVLlamaForTokenClassification,
)
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM, LCKVLlamaModel

_MODELS = (
    (AutoModel, LCKVLlamaModel),
    (AutoModelForCausalLM, LCKVLlamaForCausalLM),
    (AutoModelForSequenceClassification, LCKVLlamaForSequenceClassification),
    (AutoModelForTokenClassification, LCKVLlamaForTokenClassification),
    (AutoModelForQuestionAnswering, LCKVLlamaForQuestionAnswering),
)


def register() -> None:
    """Let AutoConfig and the AutoModels know `lckv-llama`. Can be called again."""
    AutoConfig.register(LCKVLlamaConfig.model_type, LCKVLlamaConfig, exist_ok=True)
    for auto_class, model in _MODELS:
        auto_class.register(LCKVLlamaConfig, model, exist_ok=True)
