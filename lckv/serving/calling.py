"""What the model's chat template and a request's tools mean for its answers."""

from dataclasses import dataclass, replace
from typing import Any

from lckv.generation.detokenize import TokenTexts
from lckv.generation.sampling import SamplingParams
from lckv.serving.errors import ApiError
from lckv.serving.protocol import ChatRequest
from lckv.serving.tool_calls import CallReader
from lckv.serving.tool_formats import ToolFormat, call_grammar, format_of
from lckv.serving.tool_turns import has_tools
from lckv.serving.tools import Tools


@dataclass(frozen=True)
class CallFormat:
    """How answers may call functions."""

    tool_format: ToolFormat
    tools: Tools

    def reader(self) -> CallReader:
        """Of one answer."""
        return CallReader(self.tool_format, self.tools.parameters, parallel=self.tools.parallel)

    def held(self, params: SamplingParams, texts: TokenTexts) -> SamplingParams:
        """Answers show the marks of calls; those that must be calls can be nothing else."""
        marks = (self.tool_format.opens, self.tool_format.closes or "")
        tokens = [texts.special_token(mark) for mark in marks]
        params = replace(params, visible_tokens=tuple(token for token in tokens if token is not None))
        if not self.tools.required:
            return params
        grammar = call_grammar(
            self.tool_format,
            self.tools.parameters,
            parallel=self.tools.parallel,
            special_token=texts.special_token,
        )
        return replace(params, grammar=grammar)


def call_format(request: ChatRequest, tokenizer: Any) -> CallFormat | None:
    """None where nothing may be called. Raises ApiError where the model's template knows nothing of tools
    that the request has, or its format is not known here."""
    turn = next((place for place, turn in enumerate(request.conversation) if has_tools(dict(turn))), None)
    if request.tools is None and turn is None:
        return None
    template = _template(tokenizer, request.tools)
    if request.tools is None:
        if "tool" not in template:
            path = f"messages[{turn}]"
            message = f"{path} is of calls of tools; the chat template of this model has none."
            raise ApiError(400, message, param=path)
        return None
    if "tools" not in template:
        raise ApiError(400, "tools: the chat template of this model has none.", param="tools")
    tool_format = format_of(template)
    if tool_format is None:
        message = "tools: the chat template of this model wants calls in a format that is not supported here."
        raise ApiError(400, message, param="tools")
    return CallFormat(tool_format, request.tools)


def _template(tokenizer: Any, tools: Tools | None) -> str:
    """The text of the template that is used; empty where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    try:
        return str(tokenizer.get_chat_template(tools=None if tools is None else tools.described))
    except ValueError:  # several, and none of them is the default; rendering will say it
        return ""
