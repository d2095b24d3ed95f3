"""Serves a model over HTTP, with OpenAI's interface, from one paged cache.

    lckv-megatron serve --model out/model --port 8000

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "model", "prompt": "Once upon a time", "max_tokens": 32}'

Completions and chats are answered, streamed or whole. The name of the model is that of its folder unless
--served-model-name is given. With LCKV_API_KEY in the environment, clients must send it as a bearer token.
/health says whether requests are answered, /metrics is for Prometheus, /docs and /openapi.json describe the
requests; these four need no key. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 let running requests end
(--shutdown-seconds) and then stop the server, with status 0; a second one does not wait.
"""

import argparse
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from lckv_megatron.engine_options import (
    add_engine_options,
    add_model_options,
    add_setting,
    add_speculation_options,
    build_engine,
    check_folders,
    engine_config,
    load,
    served_context,
)
from megatron_ext.arguments import ProgramParser, memory_size, positive, seconds
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.signals import Repetition, end_at_once, handling

logger = logging.getLogger(__name__)

_SIZES = (
    "max_body_bytes",
    "max_prompt_characters",
    "max_prompts",
    "max_answers",
    "max_messages",
    "max_stops",
    "max_stop_characters",
    "max_biases",
    "max_schema_characters",
    "max_tools",
    "max_template_characters",
    "max_prompt_logprobs",
    "tokenizer_threads",
    "max_preparing",
    "max_connections",
)
_TIMES = ("prepare_seconds", "idle_seconds", "body_seconds", "send_seconds", "shutdown_seconds")

API_KEY_VARIABLE = "LCKV_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    options = parser().parse_args(argv)
    set_up_logging()
    return exit_status(lambda: serve(options))


def parser() -> argparse.ArgumentParser:
    """The options."""
    from lckv.serving.limits import ServingLimits

    made = ProgramParser("serve", __doc__)
    add_model_options(made)
    add_engine_options(made, batch_size=32)
    add_speculation_options(made)
    group = made.add_argument_group("server")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call it (default: the folder's name)"
    )
    group.add_argument(
        "--host", default="127.0.0.1", help="to listen on; 0.0.0.0: everywhere (default: %(default)s)"
    )
    add_setting(
        group,
        "--allowed-origins",
        "allowed_origins",
        config=ServingLimits,
        nargs="+",
        type=_origin,
        metavar="ORIGIN",
        default=None,
    )
    group.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    add_setting(group, "--max-waiting", "max_waiting", default=256)
    add_setting(group, "--max-prompt-tokens", "max_prompt_tokens")
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the context)"
    )
    limits = made.add_argument_group("limits of requests and connections")
    for name in _SIZES:
        kind = {"type": memory_size, "metavar": "SIZE"} if name == "max_body_bytes" else {}
        add_setting(limits, _option(name), name, config=ServingLimits, **kind)
    for name in _TIMES:
        add_setting(limits, _option(name), name, config=ServingLimits, type=seconds, metavar="SECONDS")
    return made


def _origin(text: str) -> str:
    """As browsers write it, to which it is compared letter by letter."""
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin such as https://chat.example.org or http://localhost:3000, in small "
            "letters and without a path; * allows all"
        )
    return text


def _option(name: str) -> str:
    return "--" + name.removesuffix("_bytes").replace("_", "-")


def serve(options: argparse.Namespace) -> None:
    """Load the model and serve until a signal comes."""
    check_folders([options.model])
    try:
        import uvicorn

        from lckv.serving.app import create_app
        from lckv.serving.connections import server_config
        from lckv.serving.limits import ServingLimits
    except ImportError as error:
        raise ConfigError(
            f"serving needs the extra 'serve': pip install 'lckv-megatron[serve]' ({error})"
        ) from error
    listening = _listen(options.host, options.port)
    model, tokenizer = load(options)
    context = served_context(options, model.config)
    limits = ServingLimits(
        context=context,
        max_prompt_tokens=_limit("--max-prompt-tokens", options.max_prompt_tokens, context),
        max_new_tokens=_limit("--max-new-tokens", options.max_new_tokens, context),
        allowed_origins=tuple(options.allowed_origins or ()),
        **{name: getattr(options, name) for name in _SIZES + _TIMES},
    )
    config = replace(
        engine_config(options), max_waiting=options.max_waiting, max_prompt_tokens=limits.max_prompt_tokens
    )
    engine = build_engine(config, model, tokenizer)
    name = options.served_model_name or options.model.resolve().name
    app = create_app(
        engine, tokenizer, model=name, limits=limits, api_key=os.environ.get(API_KEY_VARIABLE) or None
    )
    serving = server_config(app, limits)
    _begin_to_listen(listening, options)
    logger.info("serving %s at http://%s:%d/v1", name, *listening.getsockname()[:2])
    server = uvicorn.Server(serving)
    request = _EndRequest(server)
    # uvicorn's own knows fewer signals, and sends them again
    server.capture_signals = lambda: handling(request.note)  # type: ignore[method-assign]
    server.run(sockets=[listening])
    logger.info("stopped serving: %s", request.reason)


class _EndRequest:
    """The first signal lets running requests end, a second one does not wait for them."""

    def __init__(self, server: Any) -> None:
        self.reason = "the server ended"
        self._server, self._repetition = server, Repetition()

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self._repetition.is_second():
            end_at_once(number, f"stopped at once by a second signal, {signal.Signals(number).name}")
        self.reason = f"signal {signal.Signals(number).name}"
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Done before the model is loaded, so that a port in use is said at once;
    clients are accepted when it is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _begin_to_listen(listening: socket.socket, options: argparse.Namespace) -> None:
    """Another server that was started at the same time may have been faster."""
    try:
        listening.listen()
    except OSError as error:
        raise _cannot_listen(options.host, options.port, error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(f"--host {host} --port {port}: cannot listen there: {error}; choose another --port.")


def _limit(name: str, given: int | None, context: int) -> int:
    if given is not None and given > context:
        raise ConfigError(f"{name} is {given}; it must be at most the model's context, {context} tokens.")
    return given or context


if __name__ == "__main__":
    sys.exit(main())
