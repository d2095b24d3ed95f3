"""What validation says about the section `profile`, and about what is around a run."""

import importlib.util

import pytest

from megatron_ext.validation import profile
from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_run import run_with

SAVED = {"checkpoint.save": "x", "profile.start_iteration": 5}

CASES = [
    ({"profile.straggler_interval": -1}, "profile.straggler_interval is -1; it must be at least 0."),
    ({"profile.num_iterations": 0}, "profile.num_iterations is 0; it must be at least 1."),
    ({"profile.start_iteration": 0, "checkpoint.save": "x"}, "profile.start_iteration is 0; it must be at"),
    ({"profile.ranks": ["0", "2"]}, "profile.ranks is 0, 2; it must be all, or numbers from 0 to 1."),
    ({"profile.ranks": []}, "profile.ranks is empty; it must be all, or numbers"),
    ({"profile.kinds": ["torhc"]}, "profile.kinds is torhc; it must be some of torch, nsys, memory."),
    ({"profile.kinds": []}, "profile.kinds is empty; it must be some of"),
    ({"profile.kinds": ["torch", "nsys"]}, "profile.kinds has torch and nsys; only one program at a time"),
    (
        {**SAVED, "profile.kinds": ["nsys"]},
        "profile.kinds has nsys, which need CUDA, and there is no GPU here",
    ),
    (
        {**SAVED, "profile.kinds": ["torch", "memory"]},
        "profile.kinds has memory, which need CUDA, and there is no GPU here; set it to torch.",
    ),
    (
        {**SAVED, "profile.start_iteration": 1001},
        "profile.start_iteration is 1001 and train.train_iters is 1000; the former must be at most",
    ),
    (
        {"profile.start_iteration": 5},
        "profile.start_iteration is 5 and neither profile.folder nor checkpoint.save is set; give the folder",
    ),
    ({"train.manual_gc_interval": -1}, "train.manual_gc_interval is -1; it must be at least 0."),
    ({"parallel.start_timeout_minutes": 0}, "parallel.start_timeout_minutes is 0.0; it must be a number"),
    ({"parallel.flight_recorder_entries": -1}, "parallel.flight_recorder_entries is -1; it must be at"),
    (
        {"parallel.fault_tolerance": True},
        "parallel.fault_tolerance is true, but the package nvidia-resiliency-ext is not installed",
    ),
]


@pytest.mark.parametrize(("settings", "said"), CASES)
def test_each_problem_is_said(
    settings: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_has_cuda", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentences = problems(run_with(settings), 2)
    assert len(sentences) == 1, sentences
    assert said in sentences[0]


def test_with_a_gpu_every_kind_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_has_cuda", lambda: True)
    assert (
        problems(run_with({**SAVED, "profile.kinds": ["torch", "memory"], "profile.ranks": ["all"]}), 2) == []
    )
