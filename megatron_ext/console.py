"""How programs talk to whoever started them: logging by rank, and errors without tracebacks where the user
can mend them."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from lckv.errors import ModelError
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 10.0


def set_up_logging() -> None:
    """Rank 0 says what happens, other ranks what goes wrong; what libraries remark on the way is left out."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"rank {rank}: "
    level = logging.INFO if rank == "0" else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", force=True
    )
    for library in ("megatron.core", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def exit_status(program: Callable[[], None]) -> int:
    """Run `program`; 0, or after an error that is shown as one message 2 (ConfigError, ModelError) or 1
    (ArithmeticError: a loss that is not finite)."""
    try:
        program()
    except (ConfigError, ModelError) as error:
        if os.environ.get("RANK", "0") == "0" or (_groups_exist() and not getattr(error, "agreed", False)):
            logger.error("error: %s", error)
        else:
            let_first_rank_speak()
        return 2
    except ArithmeticError as error:
        logger.error("error: %s", error)
        return 1
    return 0


def let_first_rank_speak() -> None:
    """torchrun ends all processes as soon as one has failed:
    wait until rank 0 has had the time to say why."""
    time.sleep(_PATIENCE_SECONDS)


def _groups_exist() -> bool:
    """Whether ranks may have come to different errors: settings alone are judged alike by all, and rank 0
    speaks for them."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
