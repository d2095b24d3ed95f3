"""What comes of a request token by token: text, log-probabilities, stop texts and tokens."""

from copy import deepcopy
from dataclasses import replace

import pytest

from lckv.generation.requests import Completion, TokenEvent
from tests.lckv.cache.models import model, text
from tests.lckv.generation.engines import GREEDY, empty, engine
from tests.lckv.generation.tokenizers import byte_level


class _Words:
    """A tokenizer of 50 words w0 w1 ..."""

    all_special_ids = ()

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"w{token} "

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(self.convert_ids_to_tokens, token_ids))


def _words(answer: Completion) -> str:
    return "".join(f"w{token} " for token in answer.token_ids)


def test_events_add_up_to_the_answer() -> None:
    tried = engine(model("plain"), tokenizer=_Words())
    events: list[TokenEvent] = []
    request = tried.submit(text(5), replace(GREEDY, logprobs=2), on_token=events.append)
    returned = []
    while not request.finished:
        returned += tried.step()
    answer = request.result(0)
    assert events == returned
    assert answer.text == _words(answer) == "".join(event.text for event in events)
    assert answer.token_ids == tuple(event.token for event in events)
    assert [event.text_offset for event in events] == [
        len("".join(e.text for e in events[:n])) for n in range(len(events))
    ]
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]
    assert answer.logprobs == tuple(event.logprob for event in events)
    assert answer.top_logprobs == tuple(event.top_logprobs for event in events)
    best = [best[0] for best, _ in answer.top_logprobs or ()]
    assert best == list(answer.token_ids)


def test_the_text_goes_on_from_the_prompt_and_is_cut_before_stop_texts() -> None:
    built, words = model("plain"), _Words()
    free = engine(built, tokenizer=words).generate([text(5)], GREEDY)[0]
    second, third = free.token_ids[1:3]
    stop = f"w{second} w{third} "[1:-1]  # begins and ends within tokens
    events: list[TokenEvent] = []
    tried = engine(built, tokenizer=words)
    request = tried.submit(text(5), replace(GREEDY, stop=("never", stop)), on_token=events.append)
    tried.run_until_idle()
    answer = request.result(0)
    assert answer.text == free.text[: free.text.index(stop)] == "".join(event.text for event in events)
    assert (answer.finish_reason, answer.stopped_by, len(answer.token_ids)) == ("stop", stop, 3)
    assert empty(tried)


def test_stop_tokens_and_the_end_of_the_sequence() -> None:
    built, words = model("plain"), _Words()
    assert built.config.eos_token_id == 2
    free = engine(built, tokenizer=words).generate(
        [text(5)], replace(GREEDY, max_new_tokens=40, temperature=1.0, seed=6)
    )[0]
    token = free.token_ids[3]
    first = free.token_ids.index(token)
    params = replace(GREEDY, max_new_tokens=40, temperature=1.0, seed=6, stop_token_ids=(token,))
    answer = engine(built, tokenizer=words).generate([text(5)], params)[0]
    assert answer.token_ids == free.token_ids[: first + 1]
    assert (answer.finish_reason, answer.stopped_by) == ("stop", token)
    assert answer.text == "".join(f"w{each} " for each in free.token_ids[:first])
    end = free.token_ids.index(2)
    answer = engine(built).generate([text(5)], replace(params, stop_token_ids=(), ignore_eos=False))[0]
    assert answer.token_ids == free.token_ids[: end + 1]
    assert (answer.finish_reason, answer.stopped_by, answer.text) == ("stop", 2, "")


def test_a_stop_text_of_special_tokens_ends_an_answer() -> None:
    built = deepcopy(model("plain"))
    built.lm_head.weight.data.zero_()  # all tokens are as probable, and the first one comes
    tried = engine(built, tokenizer=byte_level())
    answer = tried.generate([text(5)], replace(GREEDY, stop=("<end><end>",)))[0]
    assert (answer.token_ids, answer.text, answer.stopped_by) == ((0, 0), "", "<end><end>")


def test_a_tokenizer_of_transformers() -> None:
    tokenizer = byte_level(merges=())
    built = model("plain")
    answer = engine(built, tokenizer=tokenizer).generate([text(5)], GREEDY)[0]
    assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)


class _Halves:
    """A tokenizer of tokens that are the first byte of a character."""

    all_special_ids = ()

    def convert_ids_to_tokens(self, token: int) -> str:
        return "<0xE2>"


@pytest.mark.parametrize(("longest", "reason"), [(5, "cancelled"), (1, "stop")])
def test_a_stop_text_in_what_was_held_back_counts_unless_the_request_was_cancelled(
    longest: int, reason: str
) -> None:
    tried = engine(model("plain"), tokenizer=_Halves())
    request = tried.submit(text(5), replace(GREEDY, stop=("\ufffd",), max_new_tokens=longest))
    tried.step()
    tried.cancel(request.request_id)
    answer = request.result(0)
    assert (answer.finish_reason, answer.text, len(answer.token_ids)) == (reason, "", 1)
