"""Makes transformers' Auto classes know the models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM, LCKVLlamaModel


def register() -> None:
    """Let AutoConfig and the AutoModels know `lckv-llama`. Can be called again."""
    AutoConfig.register(LCKVLlamaConfig.model_type, LCKVLlamaConfig, exist_ok=True)
    AutoModel.register(LCKVLlamaConfig, LCKVLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(LCKVLlamaConfig, LCKVLlamaForCausalLM, exist_ok=True)
