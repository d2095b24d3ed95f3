"""What an engine can be asked for, and what is said of requests that it can never answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index

from lckv.generation.sampling import SamplingParams
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM


@dataclass(frozen=True)
class Limits:
    """Of one engine."""

    vocabulary: int
    """Tokens are 0 .. vocabulary - 1."""

    context: int
    """Tokens of prompt and answer together, at most."""

    prompt_tokens: int
    """Of the longest prompt that is wanted."""

    pages: int
    """That the cache has."""

    pool_tokens: int
    """Of the longest sequence that has room in them."""

    has_tokenizer: bool

    def request_problems(self, prompt: Sequence[int], params: SamplingParams) -> list[str]:
        """Everything that is wrong with a request."""
        wrong = params.problems() or list(unknown_tokens(params, self.vocabulary))
        if params.stop and not self.has_tokenizer:
            wrong.append(
                "stop needs the texts of tokens; give the engine a tokenizer, or use stop_token_ids."
            )
        return [*wrong, *self.text_problems(prompt, "the prompt", self.prompt_tokens)]

    def text_problems(self, tokens: Sequence[int], name: str, most: int) -> Iterator[str]:
        """Everything that is wrong with a text of tokens, of at most `most`."""
        if not tokens:
            yield f"{name} is empty; it must have at least one token."
        unknown = next((place for place, token in enumerate(tokens) if not self._known(token)), None)
        if unknown is not None:
            yield (
                f"{name}'s token {unknown} is {tokens[unknown]}; the model's tokens are 0 to "
                f"{self.vocabulary - 1}."
            )
        if len(tokens) > most:
            yield (
                f"{name} has {len(tokens)} tokens; it must have at most {most}. (There is room for "
                f"{self.context} tokens of prompt and answer together; see max_tokens and max_prompt_tokens.)"
            )
        elif len(tokens) > self.pool_tokens:
            yield (
                f"{name} has {len(tokens)} tokens; the cache has room for {self.pool_tokens}, in "
                f"{self.pages} pages. Give the engine more memory_bytes."
            )

    def _known(self, token: int) -> bool:
        return 0 <= token < self.vocabulary


def unknown_tokens(params: SamplingParams, vocabulary: int) -> Iterator[str]:
    """What is wrong with settings that name tokens which the model does not have."""
    for name in ("stop_token_ids", "logit_bias"):
        unknown = [token for token in getattr(params, name) or () if not 0 <= token < vocabulary]
        if unknown:
            yield f"{name} has {unknown[0]}; the model's tokens are 0 to {vocabulary - 1}."


def token_ids(tokens: Sequence[int]) -> tuple[int, ...]:
    """Tokens as integers. Raises ValueError for anything else."""
    try:
        return tuple(index(token) for token in tokens)
    except TypeError:
        raise ValueError(
            f"a prompt must be a sequence of token ids; here is a {type(tokens).__name__} that is none. "
            "Texts are to be tokenised before."
        ) from None


def end_tokens(model: LCKVLlamaForCausalLM) -> frozenset[int]:
    """The model's end-of-sequence tokens."""
    tokens: set[int] = set()
    for given in (model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        tokens |= set(given if isinstance(given, list) else () if given is None else (given,))
    return frozenset(tokens)
