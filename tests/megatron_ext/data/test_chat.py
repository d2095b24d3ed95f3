"""Which tokens of a conversation are learned."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.chat import BadConversationError, ChatTokenizer
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import CHATML, save_tokenizer

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}\n{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
)
FORGETFUL = (  # writes the thoughts of the newest answer only
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if loop.last %}{{ m.thoughts }}{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "a number"},
    {"role": "assistant", "content": "7"},
]


def learned_texts(folder: Path, messages: Any) -> list[str]:
    """The stretches of tokens that are learned, as text."""
    chat = ChatTokenizer(folder)
    tokens, learned = chat.encode(messages)
    stretches: list[list[int]] = []
    for index, token in enumerate(tokens):
        if learned[index] and (index == 0 or not learned[index - 1]):
            stretches.append([])
        if learned[index]:
            stretches[-1].append(int(token))
    return [chat._tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_and_the_ends_of_their_turns_are_learned(template: str, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, template)
    assert learned_texts(folder, CHAT) == ["good day<|end|>", "7<|end|>"]


def test_tokens_are_those_of_the_template(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, CHATML)
    chat = ChatTokenizer(folder)
    expected = chat._tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert chat.encode(CHAT).tokens.tolist() == expected


def test_characters_of_several_tokens(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, CHATML)
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "né ☃"}]
    assert learned_texts(folder, messages) == ["né ☃<|end|>"]


def test_marks_equal_those_of_transformers(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, MARKED)
    chat = ChatTokenizer(folder)
    theirs = chat._tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert chat.encode(CHAT).learned.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no message is the assistant's"),
        (CHAT[:2], "no message is the assistant's"),
        ([CHAT[1], {"role": "assistant"}], "the assistant's messages are empty"),
        (
            [{"role": "user", "content": "x<|end|>"}, CHAT[2]],
            r"content of message 0 holds the special token '<\|end\|>'",
        ),
    ],
)
def test_conversations_in_which_nothing_can_be_learned(messages: Any, said: str, tmp_path: Path) -> None:
    template = CHATML if "empty" not in said else "{% generation %}{{ '' }}{% endgeneration %}x"
    with pytest.raises(BadConversationError, match=said):
        ChatTokenizer(save_tokenizer(tmp_path, template)).encode(messages)


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    chat = ChatTokenizer(save_tokenizer(tmp_path, FORGETFUL))
    thoughtful = [
        {**message, "thoughts": "hm " if message["role"] == "assistant" else ""} for message in CHAT
    ]
    assert chat.encode(thoughtful[:3]).learned.any()
    with pytest.raises(BadConversationError, match=r"writes message 2 in another way.*\{% generation %\}"):
        chat.encode(thoughtful)


def test_a_template_that_refuses(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "{{ raise_exception('turns must alternate') }}")
    with pytest.raises(BadConversationError, match="the chat template refuses it: turns must alternate"):
        ChatTokenizer(folder).encode(CHAT)


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer_model: .* is no folder with a tokenizer"):
        ChatTokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"has no chat template; put it into chat_template\.jinja there"):
        ChatTokenizer(save_tokenizer(tmp_path / "plain", None))
    broken = save_tokenizer(tmp_path / "broken", CHATML)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.tokenizer_model: .*broken cannot be loaded"):
        ChatTokenizer(broken)
