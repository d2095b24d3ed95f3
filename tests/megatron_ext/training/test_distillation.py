"""Learning from a teacher: what is measured is the plain divergence of two models, on any layout; what cannot
work is said before the run starts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from checkpoints_conversion.convert import megatron_to_hf
from checkpoints_conversion.for_training import open_for_training
from lckv_megatron.planning.inputs import find_teacher
from lckv_megatron.planning.memory import rank_memory
from lckv_megatron.planning.plan import Plan
from lckv_megatron.planning.teacher import teacher_memory
from megatron_ext.config import DistillationConfig, ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.training.step import NonFiniteLossError, StepResult, require_finite
from megatron_ext.training.teacher import build_teacher
from megatron_ext.validation.distillation import distillation_problems
from tests.lckv.losses.test_linear_distillation import coarser
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks

TEACHER = {"layer_types": "0_1_2_3"}
STUDENT = {"layer_types": "0_0_2_2"}
NAMES = ("lm_loss", "distillation_loss", "grad_norm")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoints of a plain model that has learned a little."""
    folder = tmp_path_factory.mktemp("teacher")
    run = tiny_run(compression=TEACHER, checkpoint={"save": str(folder / "run")}, train={"seed": 7})
    run_on_ranks(1, train, run)
    return str(folder / "run")


def student(teacher: str, path: Path, *, compression: dict[str, Any] = STUDENT, **sections: Any) -> RunConfig:
    run = tiny_run(compression=compression, **sections)
    distillation = replace(run.train.distillation, teacher=teacher, lm_loss_weight=0.25)
    run = replace(run, train=replace(run.train, distillation=distillation))
    return logged_to(run, path)


@pytest.fixture(scope="module")
def exported(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model for Hugging Face."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    megatron_to_hf(Path(teacher), folder, proof="never")
    return str(folder)


@pytest.fixture(scope="module")
def one_rank(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("one") / "reports.jsonl"
    run_on_ranks(1, train, student(teacher, path))
    return reports(path)


def test_the_student_comes_nearer(one_rank: list[dict[str, Any]]) -> None:
    distances = [report["distillation_loss"] for report in one_rank]
    assert len(distances) == 6
    assert 0 < distances[-1] < 0.8 * distances[0]


@pytest.mark.parametrize(
    ("world_size", "parallel", "more"),
    [
        (2, {"context_parallel_size": 2}, {}),
        (2, {"pipeline_model_parallel_size": 2}, {}),
        (
            4,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
            {},
        ),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
        (1, {}, {"train": {"micro_batch_size": 2, "recompute_granularity": "full"}}),
        (1, {}, {"model": {"cross_entropy_chunk_size": 5}}),
    ],
    ids=["cp2", "pp2", "tp2-sp-pp2", "vpp2", "tp2-sp-dp2", "recompute", "small-chunks"],
)
def test_nothing_depends_on_the_layout(
    teacher: str,
    one_rank: list[dict[str, Any]],
    world_size: int,
    parallel: dict[str, Any],
    more: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "reports.jsonl"
    run_on_ranks(world_size, train, student(teacher, path, parallel=parallel, **more))
    for name in NAMES:
        expected = [report[name] for report in one_rank]
        assert series(path, name) == pytest.approx(expected, rel=2e-4), name


def test_only_the_student_may_go_round(teacher: str, tmp_path: Path) -> None:
    """Layers of one cyclic group on both stages: the student's way is another one than its teacher's."""
    paths = [tmp_path / f"{ranks}.jsonl" for ranks in (1, 2)]
    for ranks, path in enumerate(paths, 1):
        layout = {"pipeline_model_parallel_size": ranks}
        run = student(
            teacher, path, compression={"layer_types": "0_3_3_3"}, parallel=layout, train={"train_iters": 3}
        )
        run_on_ranks(ranks, train, run)
    for name in NAMES:
        assert series(paths[1], name) == pytest.approx(series(paths[0], name), rel=2e-4), name


def test_a_hugging_face_model_teaches(exported: str, one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    run_on_ranks(1, train, student(exported, path))
    for name in NAMES:
        assert series(path, name) == [report[name] for report in one_rank], name


@pytest.mark.parametrize(("divergence", "top_k"), [("student_teacher", None), ("teacher_student", 7)])
def test_it_is_the_divergence_of_the_two_models(
    teacher: str, divergence: str, top_k: int | None, tmp_path: Path
) -> None:
    """Of a student that does not move, against logits of both that are computed as evaluation does it."""
    path = tmp_path / "reports.jsonl"
    run = student(teacher, path, train={"train_iters": 1}, checkpoint={"save": str(tmp_path / "run")})
    still = replace(run.optimizer, lr=1e-30, lr_warmup_iters=0)
    settings = replace(run.train.distillation, divergence=divergence, top_k=top_k)
    run = replace(run, optimizer=still, train=replace(run.train, distillation=settings))
    run_on_ranks(1, train, run)
    (expected,) = run_on_ranks(1, plain_divergence, run, str(tmp_path / "run"))
    assert series(path, "distillation_loss") == [pytest.approx(expected, rel=1e-5)]


def plain_divergence(run: RunConfig, of_student: str) -> float:
    """Over the first global batch."""
    from megatron_ext.data.datasets import build_datasets
    from megatron_ext.evaluation.logits import compute_logits
    from megatron_ext.parallel.process_groups import initialize
    from megatron_ext.restoring.model import restore

    initialize(run.parallel, run.train.seed)
    datasets = build_datasets(
        run.data, seq_length=24, num_samples=(4, 0, 0), seed=run.train.seed, vocab_size=97, eod=None
    )
    tokens = torch.stack([torch.as_tensor(datasets.train[index]["tokens"]) for index in range(4)]).long()
    settings = run.train.distillation
    one, other = (
        compute_logits(restore(Path(path), ParallelConfig()).stage, tokens)[..., :97].double().log_softmax(-1)
        for path in (of_student, str(settings.teacher))
    )
    if settings.top_k is not None:
        likely = other.flatten(0, 1).argsort(1, descending=True)[:, : settings.top_k]
        one, other = (coarser(it.flatten(0, 1), likely) for it in (one, other))
    if settings.divergence == "teacher_student":
        one, other = other, one
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_a_student_that_is_its_teacher_learns_nothing(teacher: str, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    loading = {"load": teacher, "finetune": True}
    once = {"train": {"train_iters": 1}, "optimizer": {"lr_warmup_iters": 0}}
    run = student(teacher, path, compression=TEACHER, checkpoint=loading, **once)
    settings = replace(run.train.distillation, lm_loss_weight=0.0)
    run_on_ranks(1, train, replace(run, train=replace(run.train, distillation=settings)))
    assert series(path, "distillation_loss") == [pytest.approx(0, abs=1e-6)]
    assert series(path, "grad_norm") == [pytest.approx(0, abs=1e-5)]


def test_it_resumes_exactly(teacher: str, one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "run"), "save_interval": 3}
    run_on_ranks(1, train, student(teacher, tmp_path / "first.jsonl", checkpoint=saving))
    loading = {"load": str(tmp_path / "run" / "iter_0000003")}
    run_on_ranks(1, train, student(teacher, tmp_path / "second.jsonl", checkpoint=loading))
    for name in NAMES:
        expected = [report[name] for report in one_rank[3:]]
        assert series(tmp_path / "second.jsonl", name) == expected, name


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("teacher", {"model": {"vocab_size": 98}}, "vocabulary of 97 tokens, the model one of 98; take a"),
        ("exported", {"model": {"vocab_size": 98}}, "vocabulary of 97 tokens, the model one of 98; take a"),
        (
            "teacher",
            {"model": {"make_vocab_size_divisible_by": 7}},
            "pads its vocabulary to 128, the model its own to 98; set model.",
        ),
        ("exported", {"train": {"seq_length": 26}}, "has a context of 24 tokens; lower train.seq_length, 26"),
    ],
)
def test_teachers_of_other_tokens_are_refused(
    kind: str, sections: dict[str, Any], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = student(request.getfixturevalue(kind), tmp_path / "reports.jsonl", **sections)
    with pytest.raises(ConfigError, match=message):
        run_on_ranks(1, train, run)
    with pytest.raises(ConfigError, match=message):  # nothing but the settings is read
        find_teacher(run, 1, run.model.vocab_size)


@pytest.mark.parametrize("kind", ["teacher", "exported"])
def test_a_teacher_that_does_not_fit_the_stages_is_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stages = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|ttL"}
    run = student(
        request.getfixturevalue(kind),
        tmp_path / "reports.jsonl",
        model={"num_layers": 3},
        compression={"layer_types": "0_0_2"},
        parallel=stages,
    )
    message = r"distillation.teacher .*: parallel.pipeline_model_parallel_layout is .* it needs one E .* 4 t"
    with pytest.raises(ConfigError, match=message):
        run_on_ranks(2, train, run)
    with pytest.raises(ConfigError, match=message):
        find_teacher(run, 2, 97)


@pytest.mark.parametrize("kind", ["teacher", "exported"])
def test_what_a_teacher_costs_is_in_the_plan(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = student(request.getfixturevalue(kind), tmp_path / "reports.jsonl")
    described = find_teacher(run, 1, 97)
    assert described is not None
    plan = Plan(run, 1, 97, utilisation=1.0, teacher=described)
    alone = replace(plan, teacher=None)
    teacher = plan.sizes.teacher
    assert teacher is not None
    (weights,) = run_on_ranks(1, weights_of_teacher, run)
    assert (teacher.parameters, teacher.precision) == (weights, "fp32")
    assert teacher_memory(plan, 0).weights == 4 * weights
    assert rank_memory(plan, 0).state == rank_memory(alone, 0).state + 4 * weights
    # a plain forward of the same sizes is a third of a plain step
    third = alone.sizes.cost.plain_flops / 3
    assert teacher.flops == pytest.approx(third)
    assert plan.sizes.cost == alone.sizes.cost.plus(teacher.flops)


def weights_of_teacher(run: RunConfig) -> int:
    initialize(run.parallel, 1)
    student = cast(Any, SimpleNamespace(vocab_size=97, padded_vocab_size=128))
    teacher = build_teacher(run, student, open_for_training)
    assert teacher is not None
    return sum(weight.numel() for weight in teacher._stage.parameters())


@pytest.mark.parametrize(
    ("sections", "settings", "message"),
    [
        ({}, {"weight": 2.0}, "distillation.weight is 2.0, but there is no teacher; set train.distillation"),
        ({}, {"teacher": ""}, "distillation.teacher is empty; give the folder of a model, or null."),
        ({}, {"teacher": "nowhere"}, "teacher is nowhere, which is no directory; give a checkpoint"),
        ({}, {"teacher": "EMPTY"}, "which holds no model; give a checkpoint, a directory of checkpoints, or"),
        ({}, {"teacher": "OLD"}, "is a checkpoint in Megatron's older layout, not a folder of this"),
        ({}, {"teacher": "MODEL", "weight": -1.0}, "distillation.weight is -1.0; it must be at least 0"),
        ({}, {"teacher": "MODEL", "weight": 0.0}, "weight is 0, so nothing would be learned"),
        ({}, {"teacher": "MODEL", "top_k": 0}, "distillation.top_k is 0; it must be at least 1, or left out"),
        (
            {},
            {"teacher": "MODEL", "top_k": 98},
            "top_k is 98 and the vocabulary has 97 tokens; set the former to at most that, or leave it out",
        ),
        (
            {"checkpoint": {"save": "MODEL/../MODEL"}},
            {"teacher": "MODEL"},
            "and so is checkpoint.save: the run would learn from its own newest checkpoint",
        ),
        (
            {"model": {"cross_entropy_backend": "liger"}},
            {"teacher": "MODEL"},
            "model.cross_entropy_backend is liger; the loss of distillation",
        ),
        (
            {"model": {"cross_entropy_z_loss": 0.1}},
            {"teacher": "MODEL"},
            "the loss of distillation has no z-loss",
        ),
    ],
)
def test_what_cannot_work_is_said_first(
    sections: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name in ("MODEL/config.json", "OLD/mp_rank_00/model_optim_rng.pt", "EMPTY/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    if settings.get("teacher") not in (None, "", "nowhere"):
        settings = {**settings, "teacher": str(tmp_path / settings["teacher"])}
    if "checkpoint" in sections:
        sections = {"checkpoint": {"save": str(tmp_path / sections["checkpoint"]["save"])}}
    run = tiny_run(**sections)
    run = replace(run, train=replace(run.train, distillation=DistillationConfig(**settings)))
    (problem,) = distillation_problems(run)
    assert message in problem


@pytest.mark.parametrize(("loss", "named"), [(4.0, True), (float("nan"), False)])
def test_a_teacher_that_is_not_finite_is_named(loss: float, named: bool, tmp_path: Path) -> None:
    run = student("OLD", tmp_path / "reports.jsonl")
    result = StepResult(loss, float("nan"), 96, float("nan"), 1e-3, (), None)
    with pytest.raises(NonFiniteLossError) as raised:
        require_finite(result, 3, run.train, str)
    said = "The loss with what is learned from the teacher is nan: where that alone is not finite, look at"
    assert (f"{said} train.distillation.teacher, OLD." in str(raised.value)) == named


def test_what_shows_later_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    run, model = student(str(tmp_path), tmp_path / "reports.jsonl"), cast(Any, SimpleNamespace(vocab_size=97))
    with pytest.raises(
        ConfigError, match="is a model in Hugging Face's format, not a folder of this project"
    ):
        build_teacher(run, model, None)
    settings = replace(run.train.distillation, top_k=98)
    run = replace(run, train=replace(run.train, distillation=settings))
    with pytest.raises(ConfigError, match="top_k is 98 and the vocabulary has 97 tokens"):
        build_teacher(run, model, None)
