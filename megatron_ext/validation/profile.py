"""What cannot work in the section `profile`."""

from collections.abc import Iterator

from megatron_ext.config import ProfileConfig, RunConfig
from megatron_ext.validation.rules import at_least

KINDS = ("torch", "nsys", "memory")
OF_CUDA = ("nsys", "memory")


def profile_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Everything in `run.profile` that cannot work on `world_size` processes, one sentence each."""
    profile = run.profile
    yield from at_least("profile", profile, 0, "straggler_interval")
    yield from at_least("profile", profile, 1, "start_iteration", "num_iterations")
    yield from _ranks(profile, world_size)
    yield from _kinds(profile)
    start = profile.start_iteration
    if start is None:
        return
    if start > run.train.train_iters:
        yield (
            f"profile.start_iteration is {start} and train.train_iters is {run.train.train_iters}; the "
            "former must be at most the latter."
        )
    writes = any(kind != "nsys" for kind in profile.kinds)
    if writes and profile.folder is None and run.checkpoint.save is None:
        yield (
            f"profile.start_iteration is {start} and neither profile.folder nor checkpoint.save is set; give "
            "the folder to write the profile into."
        )


def _ranks(profile: ProfileConfig, world_size: int) -> Iterator[str]:
    known = {"all", *map(str, range(world_size))}
    wrong = [rank for rank in profile.ranks if rank not in known]
    if wrong or not profile.ranks:
        yield (
            f"profile.ranks is {', '.join(profile.ranks) or 'empty'}; it must be all, or numbers from 0 to "
            f"{world_size - 1}."
        )


def _kinds(profile: ProfileConfig) -> Iterator[str]:
    unknown = [kind for kind in profile.kinds if kind not in KINDS]
    if unknown or not profile.kinds:
        yield (
            f"profile.kinds is {', '.join(profile.kinds) or 'empty'}; it must be some of {', '.join(KINDS)}."
        )
    if {"torch", "nsys"} <= {*profile.kinds}:
        yield (
            "profile.kinds has torch and nsys; only one program at a time can read the GPU's counters: leave "
            "one of them out."
        )
    of_cuda = [kind for kind in profile.kinds if kind in OF_CUDA]
    if profile.start_iteration is not None and of_cuda and not _has_cuda():
        yield (
            f"profile.kinds has {' and '.join(of_cuda)}, which need CUDA, and there is no GPU here; set it "
            "to torch."
        )


def _has_cuda() -> bool:
    import torch  # slow, and asked for by few

    return torch.cuda.is_available()
