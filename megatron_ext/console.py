"""How programs talk to whoever started them: logging by rank, and errors without tracebacks where the user
can mend them."""

import hashlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from lckv.errors import ModelError
from megatron_ext.errors import ConfigError, LostRankError
from megatron_ext.last_word import say_last
from megatron_ext.signals import Interrupted, interruptible

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 10.0
_FAILURES = "console/failures"


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


def exit_status(program: Callable[[], None], *, on_stop: str = "") -> int:
    """Run `program`; 0, or after what is shown as one message:

    - 2 for ConfigError and ModelError: settings or input that cannot work,
    - 1 for ArithmeticError (a loss that is not finite) and LostRankError (another rank failed or hangs),
    - 128 and the signal's number for a signal; `on_stop` is added to its line.
    """
    try:
        with interruptible():
            program()
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        if _may_speak(str(stop)):
            _say(logging.WARNING, f"{stop}{on_stop}")
        return stop.exit_status
    except LostRankError as error:  # mostly what follows from the error of another rank
        return _fail(error, 1) if not _others_have_failed() else 1
    except (ConfigError, ModelError) as error:
        return _fail(error, 2)
    except ArithmeticError as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, status: int) -> int:
    if _may_speak(f"error: {error}"):
        _say(logging.ERROR, f"error: {error}")
    else:
        let_first_rank_speak()
    return status


def _say(level: int, line: str) -> None:
    logger.log(level, "%s", line)
    say_last(line)


def let_first_rank_speak() -> None:
    """torchrun ends all processes as soon as one has failed:
    wait until the rank that speaks has had the time to say why."""
    time.sleep(_PATIENCE_SECONDS)


def _may_speak(line: str) -> bool:
    """Whether this rank says `line`. Settings alone are judged alike by all ranks, and rank 0 speaks for
    them. Once process groups exist, ranks may come to different lines: each is said once."""
    store = _store()
    if store is None:
        return os.environ.get("RANK", "0") == "0"
    digest = hashlib.sha256(line.encode()).hexdigest()
    try:
        store.add(_FAILURES, 1)
        return bool(store.add(f"console/said/{digest}", 1) == 1)
    except RuntimeError:  # it is gone, with whoever kept it
        return True


def _others_have_failed() -> bool:
    store = _store()
    try:
        return store is not None and store.add(_FAILURES, 0) > 0
    except RuntimeError:
        return False


def _store() -> Any:
    """What the ranks share, or None before process groups exist, and after. Does not load torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()
