"""What of transformers' common tests does not hold here, and why."""

_WEIGHTS = "attention weights are never in memory as a whole: output_attentions is refused"
_LAYERS = "the smallest map of this kind has more than two layers"

EXPECTED: dict[tuple[str, str], str] = {
    ("*", "test_attention_outputs"): _WEIGHTS,
    ("*", "test_model_outputs_equivalence"): _WEIGHTS,
    ("*", "test_retain_grad_hidden_states_attentions"): _WEIGHTS,
    ("TestLowest", "test_num_layers_is_small"): _LAYERS,
    ("TestSandwich", "test_num_layers_is_small"): _LAYERS,
}
"""(class in models.py or "*" for all but Llama, test) -> reason."""
