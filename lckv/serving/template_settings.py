"""What a request may hand to the tokenizer's chat template beside the messages (`chat_template_kwargs`)."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from lckv.serving.errors import ApiError
from lckv.serving.fields import BOOLEAN, OBJECT, Fields
from lckv.serving.limits import ServingLimits
from lckv.serving.sizes import check_count

FIELD = "chat_template_kwargs"

_NAMES_OF_TRANSFORMERS = ("self", "messages", "conversations", "raise_exception", "strftime_now")
"""Of templates and of what renders them, beside the parameters of `apply_chat_template`."""


def template_settings(fields: Fields, limits: ServingLimits) -> dict[str, Any]:
    """Where the template ends, at the beginning of an answer or within the last message, and what the request
    gives it. Raises ApiError."""
    goes_on = fields.take("continue_final_message", BOOLEAN, False)
    begins = fields.take("add_generation_prompt", BOOLEAN, not goes_on)
    if begins and goes_on:
        message = "continue_final_message is true, and add_generation_prompt too; give one of them."
        raise ApiError(400, message, param="continue_final_message")
    given = fields.take(FIELD, OBJECT, {})
    size = len(json.dumps(given, ensure_ascii=False))
    check_count(size, limits.max_template_characters, FIELD, "characters", least=0)
    ends = {"add_generation_prompt": begins, "continue_final_message": goes_on}
    for name in given:
        if name in ends:
            path = f"{FIELD}.{name}"
            raise ApiError(400, f"{path}: give {name} as a field of the request itself.", param=path)
    return {**given, **ends}


def check_names(settings: Mapping[str, Any], tokenizer: Any) -> None:
    """Raises ApiError for names that mean something else to the tokenizer or its template."""
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, *_NAMES_OF_TRANSFORMERS}
    own |= set(getattr(tokenizer, "special_tokens_map", ()))
    own -= {"add_generation_prompt", "continue_final_message"}
    taken = next((name for name in settings if name in own), None)
    if taken is not None:
        path = f"{FIELD}.{taken}"
        raise ApiError(400, f"{path}: the template gets {taken} from the server; leave it out.", param=path)
