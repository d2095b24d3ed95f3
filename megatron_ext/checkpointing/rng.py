"""The states of all random number generators of a rank, as tensors.

They are saved per rank, because every rank draws other numbers. On the layout that they were saved from, they
come back bit for bit; on another one no rank has a state of its own, and all are seeded anew.
"""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from torch import Tensor

from megatron_ext.parallel.process_groups import seed_of_rank

_TRACKER = "tracker."


def rng_states() -> dict[str, Tensor]:
    """States of Python's random, NumPy's global generator, torch on CPU and CUDA,
    and Megatron's tracked generators."""
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries use it
    states = {
        "python.words": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.key": torch.tensor(np.asarray(key, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKER + name] = convert_cuda_rng_state(state, to_graphable=False).clone()
    return states


def restore_rng_states(states: dict[str, Tensor]) -> None:
    """Puts all generators back into the states of `rng_states`."""
    version, *words = states["python.words"].tolist()
    gauss = states["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    key = states["numpy.key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, states["numpy.gauss"].item()))  # noqa: NPY002 - libraries use it
    tracker = get_cuda_rng_tracker()
    graph_safe = is_graph_safe_cuda_rng_tracker(tracker)
    tracked = {
        name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)
    }
    tracker.set_states(
        {name: convert_cuda_rng_state(state, to_graphable=graph_safe) for name, state in tracked.items()}
    )
    if torch.cuda.is_available() and "torch.cuda" in states:
        torch.cuda.set_rng_state(states["torch.cuda"])
    torch.set_rng_state(states["torch.cpu"])


def reseed(seed: int, iteration: int) -> None:
    """Seeds all generators from the run's seed and the iteration: other numbers than at the start, the same
    on every try."""
    mixed = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0]) >> 1
    own_seed = seed_of_rank(mixed)
    random.seed(own_seed)
    np.random.seed(own_seed)  # noqa: NPY002 - libraries use it
    torch.manual_seed(own_seed)
    model_parallel_cuda_manual_seed(own_seed)
