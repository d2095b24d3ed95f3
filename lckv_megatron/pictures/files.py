"""Pictures become files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_ext.errors import ConfigError


def write_picture(draw: Callable[[], Figure], look: dict[Any, Any], output: Path) -> None:
    """Write what `draw` gives under the settings `look` of matplotlib to `output`, as PNG.

    Raises ConfigError as `draw` does, and where the file cannot be written.
    """
    try:
        with rc_context(look):
            draw().savefig(output, format="png")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}.") from error
