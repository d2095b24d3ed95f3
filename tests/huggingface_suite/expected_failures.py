"""What of transformers' common tests does not hold here, and why."""

_WEIGHTS = "attention weights are never in memory as a whole: output_attentions is refused"
_ROPE = (
    "the checkpoints of this project know RoPE of the kinds default, linear and llama3; others are refused"
)
_LAYERS = "the smallest map of this kind has more than two layers"

EXPECTED: dict[tuple[str, str], str] = {
    ("*", "test_attention_outputs"): _WEIGHTS,
    ("*", "test_model_outputs_equivalence"): _WEIGHTS,
    ("*", "test_retain_grad_hidden_states_attentions"): _WEIGHTS,
    ("*", "test_model_rope_scaling_from_config_1_dynamic"): _ROPE,
    ("*", "test_model_rope_scaling_from_config_2_yarn"): _ROPE,
    ("TestLowest", "test_num_layers_is_small"): _LAYERS,
    ("TestSandwich", "test_num_layers_is_small"): _LAYERS,
}
"""(class in models.py or "*" for all but Llama, test) -> reason."""
