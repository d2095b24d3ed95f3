"""What a run shows while it trains: a progress bar in a terminal, one line per report elsewhere.
Built by one rank only."""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_ext.training.metrics import Value

logger = logging.getLogger(__name__)


def si(value: float) -> str:
    """A number with three digits and a decimal prefix: 12300 is 12.3k."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _norm(value: float) -> str:
    return f"{value:.2e}" if 0 < value < 0.001 else f"{value:.3f}"


_SHOWN: dict[str, Callable[[float], str]] = {
    "lm_loss": lambda value: f"loss {value:.4f}",
    "distillation_loss": lambda value: f"distillation {value:#.4g}",
    "validation_loss": lambda value: f"validation loss {value:.4f}",
    "validation_perplexity": lambda value: f"validation perplexity {value:.2f}",
    "learning_rate": lambda value: f"learning rate {value:.3e}",
    "grad_norm": lambda value: f"gradient norm {_norm(value)}",
    "tokens_per_second": lambda value: f"{si(value)} tokens/s",
    "mfu": lambda value: f"MFU {100 * value:.1f} %",
    "current_memory_bytes": lambda value: f"memory {value / 2**30:.2f} GiB",
    "peak_memory_bytes": lambda value: f"peak {value / 2**30:.2f} GiB",
    "save_stall_seconds": lambda value: f"stood still for saves {value:.2f} s",
}
_OF_MAP = "validation_loss/"
_IN_BAR = (
    "lm_loss",
    "distillation_loss",
    "tokens_per_second",
    "mfu",
    "current_memory_bytes",
    "peak_memory_bytes",
)


def step_line(values: Mapping[str, Value], names: tuple[str, ...] = tuple(_SHOWN)) -> str:
    """Those of `values` that `names` lists, with units, in one line, and the validation losses of a family's
    maps."""
    shown = [_SHOWN[name](values[name]) for name in names if isinstance(values.get(name), float | int)]  # type: ignore[arg-type]
    of_maps = {
        name.removeprefix(_OF_MAP): value for name, value in values.items() if name.startswith(_OF_MAP)
    }
    return " | ".join([*shown, *(f"{name} {value:.4f}" for name, value in of_maps.items())])


class Progress:
    """Shows how far a run is. With `enabled`, and where stderr is a terminal, as a bar;
    otherwise as lines of the log."""

    def __init__(self, total_iterations: int, start_iteration: int, enabled: bool) -> None:
        self._total = total_iterations
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._stack.enter_context(logging_redirect_tqdm())  # lines of the log stay above the bar
            bar = tqdm(
                total=total_iterations,
                initial=start_iteration,
                unit="it",
                dynamic_ncols=True,
                file=sys.stderr,
            )
            self._bar = self._stack.enter_context(bar)

    def report(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Show that `iteration` is done, with `values` by the names of the metrics file."""
        if self._bar is None:
            logger.info(
                "iteration %d/%d | %s",
                iteration,
                self._total,
                step_line(values) + self._remaining(iteration, values),
            )
            return
        if "validation_loss" in values:
            self._bar.write(f"iteration {iteration}: {step_line(values)}", file=sys.stderr)
        else:
            self._bar.set_postfix_str(step_line(values, _IN_BAR), refresh=False)
        self._bar.update(iteration - self._bar.n)

    def _remaining(self, iteration: int, values: Mapping[str, Value]) -> str:
        seconds = values.get("iteration_seconds")
        if not isinstance(seconds, float | int):
            return ""
        return (
            f" | {seconds:.3g} s/iteration, {timedelta(seconds=round(seconds * (self._total - iteration)))} "
            "left"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stack.close()
        self._bar = None
