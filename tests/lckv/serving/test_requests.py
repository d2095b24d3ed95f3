"""Requests: every field is read, or refused by the name that the client gave it; sizes come first."""

import pytest
from fastapi.testclient import TestClient

from lckv.serving.accepted import ACCEPTED_OF_VLLM, ACCEPTED_OF_VLLM_CHATS
from lckv.serving.errors import ApiError
from lckv.serving.protocol import chat_request, completion_request
from tests.lckv.serving.served_model import LIMITS, ask, greedy

BAD = [
    ({"prompt": ""}, 400, "prompt: 0 tokens; 1 to 64 are allowed"),
    ({"prompt": []}, 400, "0 prompts; 1 to 4 are allowed"),
    ({"prompt": ["a"] * 5}, 400, "5 prompts; 1 to 4 are allowed"),
    ({"prompt": [300]}, 400, "the model's tokens are 0 to 256"),
    ({"prompt": "x" * 65}, 400, "prompt: 65 tokens; 1 to 64 are allowed"),
    ({"max_tokens": 41}, 400, "max_tokens is 41; at most 40 are allowed"),
    ({"prompt": "x" * 60, "max_tokens": 40}, 400, "together they may be at most 96"),
    ({"max_tokens": 0}, 400, "max_tokens is 0; it must be an integer of at least 1"),
    ({"temperature": -1}, 400, "temperature is -1; it must be"),
    ({"top_p": 0}, 400, "top_p is 0; it must be above 0"),
    ({"n": 5}, 400, "n: 5 answers to all prompts; 1 to 4 are allowed"),
    ({"n": 2, "prompt": ["a", "b", "c"]}, 400, "n: 6 answers to all prompts; 1 to 4 are allowed"),
    ({"n": 0}, 400, "n: 0 answers to all prompts; 1 to 4 are allowed"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty is 2.5; it must be a number from -2 to 2"),
    ({"frequency_penalty": "x"}, 400, "frequency_penalty is 'x'; it must be a number"),
    ({"best_of": 2}, 400, "best_of is 2 and n is 1; this server only supports as many, and null"),
    ({"n": True}, 400, "n is True; it must be an integer"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5 is 101; it must be a number from -100 to 100"),
    ({"logit_bias": {"5": True}}, 400, "logit_bias.5 is True; it must be a number from -100 to 100"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias has the name 'x'; names must be tokens, such as '42'"),
    ({"logit_bias": {" 5": 1}}, 400, "logit_bias has the name ' 5'; names must be tokens"),
    ({"logit_bias": {"257": 1}}, 400, "logit_bias has 257; the model's tokens are 0 to 256"),
    ({"logit_bias": [5]}, 400, "logit_bias is [5]; it must be an object"),
    ({"logit_bias": {str(n): 1 for n in range(9)}}, 400, "logit_bias: 9 tokens; 0 to 8 are allowed"),
    ({"suffix": "x"}, 400, "suffix is 'x'; this server only supports '' and null"),
    ({"stream": "yes"}, 400, "stream is 'yes'; it must be true or false"),
    ({"max_tokens": "5"}, 400, "max_tokens is '5'; it must be an integer"),
    ({"max_tokens": True}, 400, "max_tokens is True; it must be an integer"),
    ({"stop": ["a", ""]}, 400, "stop[1]: 0 characters; 1 to 256 are allowed"),
    ({"stop": [7]}, 400, "stop[0] is 7; it must be a text"),
    ({"stop": ["a"] * 65}, 400, "stop: 65 texts; 0 to 64 are allowed"),
    ({"stop_token_ids": [999]}, 400, "stop_token_ids has 999; the model's tokens are 0 to 256"),
    ({"logprobs": 21}, 400, "logprobs is 21; it must be an integer from 0 to 20"),
    ({"prompt": ["a", 7]}, 400, "prompt[1] is 7; it must be a text or a list of token ids"),
    ({"prompt": [5, "a"]}, 400, "prompt[1] is 'a'; it must be an integer"),
    ({"prompt": [5] * 65}, 400, "prompt: 65 tokens; 1 to 64 are allowed"),
    ({"prompt": ["a", "x" * 65]}, 400, "prompt[1]: 65 tokens; 1 to 64 are allowed"),
    ({"prompt": "x" * 1025}, 400, "prompt: 1025 characters; 0 to 1024 are allowed"),
    ({"prompt": 7}, 400, "prompt is 7; it must be a text, a list of texts"),
    ({"prompt": None}, 400, "prompt is missing; it must be"),
    ({"model": 7}, 400, "model is 7; it must be a text"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x: there is no such field"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        400,
        "stream_options.continuous_usage_stats is True; this server only supports False and null",
    ),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options is given, but stream is false"),
    ({"echo": True, "logprobs": 21}, 400, "logprobs is 21; it must be an integer from 0 to 20"),
    ({"echo": True, "max_tokens": -1}, 400, "max_tokens is -1; it must be an integer of at least 0"),
    (
        {"echo": True, "logprobs": 20, "prompt": ["x" * 60] * 2},
        400,
        "logprobs: 2520 log-probabilities of prompts; 1 to 2000 are allowed",
    ),
    ({"prompts": "x"}, 400, "prompts: there is no such field"),
    ({"prompt": ...}, 400, "prompt is missing; it must be a text"),
    ({"temperature": "hot"}, 400, "temperature is 'hot'; it must be a number"),
    ({"skip_special_tokens": False}, 400, "skip_special_tokens is False; this server only supports True"),
    ({"min_tokens": 3}, 400, "min_tokens is 3; this server only supports 0 and null"),
    ({"prompt_logprobs": 1}, 400, "prompt_logprobs is 1; this server only supports null"),
    ({"logprobs": True}, 400, "logprobs is True; it must be an integer"),
    ({"add_special_tokens": 1}, 400, "add_special_tokens is 1; it must be true or false"),
    ({"model": "other"}, 404, "model 'other' is not served here; this is 'tiny'"),
    ({"prompt": "x" * 5000}, 413, "The body may have at most 4096 bytes"),
]


@pytest.mark.parametrize(("fields", "status", "message"), BAD, ids=[case[2] for case in BAD])
def test_what_cannot_be_done_is_said(client: TestClient, fields: dict, status: int, message: str) -> None:
    response = ask(client, **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert status == 413 or error["param"] in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: 0 messages; 1 to 1024 are allowed"),
        ({"messages": "Hi"}, "messages is 'Hi'; it must be a list"),
        ({"messages": [{"role": "user", "content": "x"}, "Hi"]}, "messages[1] is 'Hi'; it must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing; it must be a text"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "messages[0].content is 7; it must be a text, or a list",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "Bob"}]},
            "messages[0].name is 'Bob'; this server",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "nmae": "Bob"}]},
            "messages[0].nmae: there is no such field",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls is [{'id': 'a'}]; this server only supports [] and null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control: there is no such field",
        ),
        ({"messages": [{"role": "user", "content": "x" * 1025}]}, "messages: 1025 characters; 0 to 1024"),
        ({"max_tokens": 41}, "max_tokens is 41; at most 40 are allowed"),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_completion_tokens is 6 and max_tokens is 5; give one",
        ),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens is 0; it must be"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; it must be an integer from 0 to 20"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format is {'type': 'json_object'}; this server",
        ),
        (
            {"tool_choice": "required"},
            "tool_choice is 'required'; this server only supports 'none' and 'auto'",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is [1]; it must be an object"),
        ({"chat_template_kwargs": {"x": "y" * 200}}, "chat_template_kwargs: 209 characters; 0 to 100 are"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt: give add_generation_prompt as a field of",
        ),
        *(
            ({"chat_template_kwargs": {name: []}}, f"{name}: the template gets {name} from the server; leave")
            for name in (
                "messages",
                "tools",
                "chat_template",
                "tokenize",
                "eos_token",
                "self",
                "conversation",
            )
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type is 'image_url'; only 'text' is supported",
        ),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages[0].role is 'king'; it must be one of system, developer, user",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template is '{{ 1 }}'; this server only supports null"),
        ({"documents": [{}]}, "documents is [{}]; this server only supports [] and null"),
        ({"store": True}, "store is True; this server only supports False and null"),
        ({"reasoning_effort": "high"}, "reasoning_effort is 'high'; this server only supports 'none' and"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message is true, and add_generation_prompt too; give one of them",
        ),
        ({"top_logprobs": 2}, "top_logprobs is given, but logprobs is false"),
        (
            {"tools": [{"type": "function"}]},
            "tools is [{'type': 'function'}]; this server only supports [] and null",
        ),
    ],
)
def test_bad_conversations(client: TestClient, fields: dict, message: str) -> None:
    response = ask(client, "chat/completions", **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_template_reads_what_the_request_gives_it(client: TestClient) -> None:
    for settings, before in (
        ({"system": "Be é."}, "<system>Be é."),
        ({"system": ""}, ""),
        ({"not_read": {"a": [1]}}, ""),
        ({}, ""),
    ):
        answer = ask(client, "chat/completions", chat_template_kwargs=settings)
        assert answer.json()["choices"][0]["message"]["content"] == greedy(f"{before}<user>Hi<assistant>")


def test_the_servers_own_messages_are_accepted(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    first = ask(client, "chat/completions", messages=messages, max_tokens=4).json()["choices"][0]["message"]
    assert first["refusal"] is None
    nothing = dict.fromkeys(
        ("tool_calls", "function_call", "audio", "reasoning", "reasoning_content", "name")
    )
    text = f"<user>Hi<assistant>{first['content']}<user>x<assistant>"
    for more in ({}, {**nothing, "annotations": []}):
        turns = [*messages, {**first, **more}, {"role": "user", "content": "x"}]
        second = ask(client, "chat/completions", messages=turns)
        assert second.json()["choices"][0]["message"]["content"] == greedy(text)
    empty = [{"role": "assistant", "content": None, "refusal": None}, *messages]
    answer = ask(client, "chat/completions", messages=empty).json()["choices"][0]["message"]["content"]
    assert answer == greedy("<assistant><user>Hi<assistant>")


_BOTH = [
    "model",
    "add_special_tokens",
    "stream",
    "stream_options",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "user",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
]
_COMPLETIONS = ["echo", "best_of", "suffix", *ACCEPTED_OF_VLLM]
_CHATS = [
    *ACCEPTED_OF_VLLM_CHATS,
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "prompt_cache_retention",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "parallel_tool_calls",
    "store",
    "response_format",
    "modalities",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "metadata",
    "service_tier",
    "web_search_options",
    "safety_identifier",
    "prompt_cache_key",
]


@pytest.mark.parametrize(("path", "names"), [("completions", _COMPLETIONS), ("chat/completions", _CHATS)])
def test_null_is_as_if_a_field_were_not_there(client: TestClient, path: str, names: list[str]) -> None:
    nothing = ask(client, path, **dict.fromkeys([*_BOTH, *names]))
    assert nothing.status_code == 200
    assert nothing.json()["choices"] == ask(client, path).json()["choices"]


_DEFAULTS = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
_DEFAULTS |= {"logprobs": False, "add_special_tokens": True}


@pytest.mark.parametrize(("path", "fields"), [
    ("completions", {"best_of": 1, "suffix": ""}),
    (
        "chat/completions",
        {
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "store": False,
            "service_tier": "auto",
            "reasoning_effort": "medium",
            "verbosity": "medium",
            "top_logprobs": 0,
            "metadata": {},
            "prompt_cache_retention": "in_memory",
        },
    ),
])  # fmt: skip
def test_values_that_change_nothing_are_accepted(client: TestClient, path: str, fields: dict) -> None:
    accepted = ACCEPTED_OF_VLLM if path == "completions" else ACCEPTED_OF_VLLM_CHATS
    usual = {name: values[0] for name, values in accepted.items() if values}
    given = ask(client, path, **_DEFAULTS, **fields, **usual)
    assert given.status_code == 200, given.text
    assert given.json()["choices"] == ask(client, path).json()["choices"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_model_need_not_be_named(client: TestClient, path: str) -> None:
    answer = ask(client, path, model=...).json()
    assert answer["model"] == "tiny"
    assert answer["choices"] == ask(client, path).json()["choices"]


def test_a_chat_may_end_within_its_last_message(client: TestClient) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    for fields, text in (
        ({"add_generation_prompt": False}, "<user>Hi<assistant>So"),
        ({"continue_final_message": True}, "<user>Hi<assistant>So"),
        ({"add_generation_prompt": True}, "<user>Hi<assistant>So<assistant>"),
    ):
        answer = ask(client, "chat/completions", messages=turns, **fields)
        assert answer.json()["choices"][0]["message"]["content"] == greedy(text)


def test_a_chat_may_say_its_length_in_either_way(client: TestClient) -> None:
    for fields in (
        {"max_tokens": 3},
        {"max_tokens": ..., "max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 3},
    ):
        assert ask(client, "chat/completions", **fields).json()["usage"]["completion_tokens"] == 3
    answer = ask(client, "chat/completions", max_tokens=..., ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == LIMITS.max_new_tokens


def test_what_is_too_much_is_refused_before_it_is_looked_at() -> None:
    for content, message in (
        ({"messages": [7] * 150_000}, "messages: 150000 messages; 1 to 1024 are allowed"),
        ({"prompt": [[7.5]] * 150_000}, "prompt: 150000 prompts; 1 to 4 are allowed"),
        ({"prompt": [7] + ["x"] * 150_000}, "prompt: 150001 tokens; 1 to 64 are allowed"),
        ({"prompt": "x", "stop": [7] * 150_000}, "stop: 150000 texts; 0 to 64 are allowed"),
        ({"prompt": "x", "stop": "x" * 5000}, "stop: 5000 characters; 1 to 256 are allowed"),
        ({"prompt": "x", "stop_token_ids": ["x"] * 150_000}, "stop_token_ids: 150000 tokens; 0 to 64 are"),
    ):
        read = chat_request if "messages" in content else completion_request
        with pytest.raises(ApiError) as caught:
            read({"model": "tiny", **content}, "tiny", LIMITS)
        assert message in caught.value.message
