"""Heads that classify sequences and tokens and find answers, as transformers has them for Llama.

In training their loss is that of the labels alone: a KV policy that has a loss of its own is not driven to
its target here.
"""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from lckv.models.modeling_lckv_llama import LCKVLlamaPreTrainedModel


class LCKVLlamaForSequenceClassification(GenericForSequenceClassification, LCKVLlamaPreTrainedModel):
    """Classifies a row by its last token that is not padding."""


class LCKVLlamaForTokenClassification(GenericForTokenClassification, LCKVLlamaPreTrainedModel):
    """Classifies every token."""


class LCKVLlamaForQuestionAnswering(GenericForQuestionAnswering, LCKVLlamaPreTrainedModel):
    """Finds where an answer starts and ends."""
