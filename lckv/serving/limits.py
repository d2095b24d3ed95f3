"""What one client may ask for, and how long things may take. Light: `serve` reads it for its --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingLimits:
    """Each is looked at before the work that it bounds."""

    context: int
    """Tokens of prompt and answer together."""

    max_prompt_tokens: int
    """Tokens of the longest prompt."""

    max_new_tokens: int
    """Tokens of the longest answer."""

    max_prompt_characters: int | None = None
    """Characters of the longest prompt, a chat's template included. Default: 16 for each of its tokens."""

    max_body_bytes: int = 2 * 2**20
    """Bytes of the largest request."""

    max_prompts: int = 64
    """Prompts in one request."""

    max_answers: int | None = None
    """Answers in one request, n for each of its prompts. Default: as many as prompts."""

    max_messages: int = 1024
    """Messages in one request."""

    max_stops: int = 64
    """Stop texts in one request, and tokens that end its answers."""

    max_stop_characters: int = 256
    """Characters of the longest stop text."""

    max_biases: int = 1024
    """Tokens in the logit_bias of one request."""

    max_template_characters: int = 4096
    """Characters of chat_template_kwargs as JSON."""

    max_prompt_logprobs: int = 2**18
    """Log-probabilities of prompts (echo with logprobs) in one request: of each token, and of each of the
    likeliest ones that are asked for with it."""

    allowed_origins: tuple[str, ...] = ()
    """Origins such as https://chat.example.org whose pages may ask from a browser (CORS), or *: all. Default:
    none."""

    tokenizer_threads: int = 2
    """Threads that check, template and tokenise requests."""

    max_preparing: int = 64
    """Most requests that wait for one of those threads; more are refused."""

    prepare_seconds: float = 10.0
    """Seconds in which a request must be tokenised, waiting included."""

    max_connections: int = 512
    """Most connections; more are refused."""

    idle_seconds: float = 30.0
    """Seconds that a connection may be idle, and that the head of a request may take."""

    body_seconds: float = 30.0
    """Seconds in which the body of a request must be there."""

    send_seconds: float = 60.0
    """Seconds after which a client that reads nothing is cut off."""

    shutdown_seconds: float = 30.0
    """Seconds that running requests have when the server ends, and the engine for its last step."""

    @property
    def prompt_characters(self) -> int:
        """Characters of the longest prompt."""
        return self.max_prompt_characters or 16 * self.max_prompt_tokens

    @property
    def answers(self) -> int:
        """Answers in one request."""
        return self.max_answers or self.max_prompts
