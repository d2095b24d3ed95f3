"""Whether a text is one that tokenizers take."""

from lckv.surrogates import lone_surrogate
from megatron_ext.errors import ConfigError


def check_text(text: str, where: str) -> None:
    """Raises ConfigError, which names `where`, for what is no Unicode text: no tokenizer takes it."""
    problem = lone_surrogate(text)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}. Is the text encoded in UTF-8?")
