"""The settings of published DMS models (nvidia/Qwen3-8B-DMS-8x), from fields beside those of the plain
model's Hugging Face config. The names of their weights are those of the plain model, and of an adapter."""

from collections.abc import Mapping
from typing import Any

from lckv.errors import Problem, SettingError
from lckv.policies.dms.config import DMSConfig

_NUMBERS = {
    "dms_cr": ("target_compression_ratio", 8.0),
    "dms_alpha_scale": ("decision_scale", 100.0),
    "dms_initial_alpha_offset": ("initial_decision_offset", 5.0),
    "dms_tau": ("temperature", 0.1),
}
"""Fields, with ours of the same meaning and what the published code takes where they are absent."""
_WINDOW = ("dms_window_size", 512)
_CHOICES: dict[str, tuple[str, dict[object, str]]] = {
    "dms_separate_alpha": ("decision_source", {False: "borrowed_channel", True: "adapter"}),
    "dms_alpha_per": ("decisions_per", {"head": "kv_head", "layer": "layer"}),
}
"""Fields, with ours of the same meaning; the first value is that of the published code where they are
absent."""
_ONLY = {
    "dms_disable_eviction": (False, "true is how the model is run to teach another one"),
}
"""Fields of which one value can be computed here, with the reason."""
_HOW_IT_IS_RUN = (
    "dms_paged_attention_block_size",
    "dms_manual_inference_mode",
    "dms_chunked_prefill",
    "dms_preallocate_for_tokens",
)
FIELDS = (*_NUMBERS, _WINDOW[0], *_CHOICES, *_ONLY, *_HOW_IT_IS_RUN)


def from_config(config: Mapping[str, Any]) -> DMSConfig | None:
    """See `PolicyConfig.from_huggingface_config`."""
    if all(config.get(name) is None for name in FIELDS):
        return None
    problems = [
        Problem(name, repr(config[name]), f"it must be {value!r}: {why}")
        for name, (value, why) in _ONLY.items()
        if config.get(name) not in (None, value)
    ]
    choices: dict[str, str] = {}
    for name, (ours, values) in _CHOICES.items():
        default, *_ = values
        chosen = default if config.get(name) is None else config[name]
        if type(chosen) is type(default) and chosen in values:
            choices[ours] = values[chosen]
        else:
            problems.append(Problem(name, repr(chosen), f"it must be {' or '.join(map(repr, values))}"))
    numbers: dict[str, float] = {}
    for name, (ours, default) in _NUMBERS.items():
        value = default if config.get(name) is None else config[name]
        if type(value) not in (int, float) or not value > 0:
            problems.append(Problem(name, repr(value), "it must be a number above 0"))
        else:
            numbers[ours] = float(value)
    name, default = _WINDOW
    window = default if config.get(name) is None else config[name]
    if type(window) is not int or window < 1:
        problems.append(Problem(name, repr(window), "it must be a number of tokens, at least 1"))
    if problems:
        raise SettingError(problems)
    return DMSConfig(stage="finetune", window=window, **choices, **numbers)  # type: ignore[arg-type]
