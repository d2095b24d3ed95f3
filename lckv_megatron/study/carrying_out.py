"""Carries a study out: trains what is not trained, measures what is not measured, writes what is known."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from lckv_megatron.study.description import Study
from lckv_megatron.study.jobs import Failure, Job, JobRunner, Slots
from lckv_megatron.study.measuring import Task
from lckv_megatron.study.rows import Row, front_of, points_of, read_rows, table_of, write_rows
from lckv_megatron.study.speed import SpeedTask
from lckv_megatron.study.trainings import Subject, Training, trainings_of
from megatron_ext.atomic import write_file
from megatron_ext.checkpointing.folders import checkpoint_name, read_pointer
from megatron_ext.command_line import save_config
from megatron_ext.errors import ConfigError

ROWS, TABLE, PICTURE = "rows.csv", "table.md", "front.png"


class CarryingOut:
    """A study whose runs lie in a folder."""

    def __init__(
        self,
        study: Study,
        subjects: Sequence[Subject],
        folder: Path,
        *,
        processes: int = 1,
        others: Sequence[Subject] = (),
    ) -> None:
        """`processes`: of each run. `others`: of the study, too, which are left alone now; where they have
        been measured, speeds are compared with theirs. Raises ConfigError for a folder with other rows."""
        self._study, self._subjects, self._folder, self._processes = study, subjects, folder, processes
        self._everyone = (*subjects, *others)
        self._rows: dict[str, Row] = read_rows(folder / ROWS)

    @property
    def unmeasured(self) -> list[Subject]:
        """Those that have no row."""
        return [subject for subject in self._subjects if subject.key not in self._rows]

    @property
    def untrained(self) -> list[Training]:
        """The runs that are still needed."""
        return [run for run in trainings_of(self.unmeasured) if not self._is_trained(run)]

    def run(self, slots: Slots, report: Callable[[str], object]) -> list[Failure]:
        """Train, measure, compare speeds; what failed. The answer's files are written after each model."""
        jobs = [
            *map(self._measuring_job, self.unmeasured),
            *map(self._training_job, self.untrained),
        ]
        failures = JobRunner(slots, report).run(jobs)
        if speed := self._speed_job():
            alone = replace(slots, at_once=1)
            failures += JobRunner(alone, report).run([speed])
        self.write()
        return failures

    def write(self) -> None:
        """The rows, the table and the picture, of what is measured. Raises ConfigError."""
        rows = [
            self._rows[subject.key] | {"model": subject.entry.name, "seed": str(subject.seed)}
            for subject in self._subjects
            if subject.key in self._rows
        ]
        if not rows:
            return
        mine = {subject.key for subject in self._subjects}
        others = [row for key, row in self._rows.items() if key not in mine]
        write_rows(self._folder / ROWS, [*rows, *others])
        points = points_of(rows)
        lines = [*table_of(points, self._study.budget.model)]
        write_file(self._folder / TABLE, ("\n".join(lines) + "\n").encode())
        from lckv_megatron.pictures.files import write_picture
        from lckv_megatron.pictures.front import LOOK, Mark, draw_front

        front = {point.model for point in front_of(points)}
        drawn = [point for point in points if math.isfinite(point.loss)]
        marks = [
            Mark(point.model, point.kv_bytes, point.loss, point.spread, point.model in front)
            for point in drawn
        ]
        bars = any(len(point.losses) > 1 for point in drawn)
        seeds = "Bars: the range over seeds." if bars else "One seed."
        if lost := len(points) - len(drawn):
            seeds += f" Not drawn: {lost}, whose loss is not finite."
        write_picture(partial(draw_front, marks, seeds=seeds), LOOK, self._folder / PICTURE)

    def _place(self, run: Training) -> Path:
        return self._folder / "runs" / run.key

    def _is_trained(self, run: Training) -> bool:
        return (self._place(run) / "trained.json").exists()

    def _training_job(self, run: Training) -> Job:
        place, parent = self._place(run), run.parent
        place.mkdir(parents=True, exist_ok=True)
        checkpoint = replace(
            run.run.checkpoint,
            save=str(place / "checkpoints"),
            load=None if parent is None else str(self._place(parent) / "checkpoints"),
            finetune=parent is not None,
            resume="auto",
        )
        metrics = str(place / "metrics.jsonl")
        logging = replace(run.run.logging, metrics_file=metrics, progress_bar=False)
        save_config(replace(run.run, checkpoint=checkpoint, logging=logging), place / "run.yaml")
        launcher = [sys.executable, "-m", "pretrain_lckv"]
        if self._processes > 1:
            torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {self._processes}"
            launcher[1:1] = torchrun.split()
        waits = parent is not None and not self._is_trained(parent)
        return Job(
            run.key,
            [*launcher, "--config", str(place / "run.yaml")],
            place / "log.txt",
            (parent.key,) if parent is not None and waits else (),
            lambda seconds: self._note_training(run, seconds),
            self._title(run),
        )

    def _note_training(self, run: Training, seconds: float) -> str | None:
        """A run may end well before its last step: by a limit of its time, or a signal."""
        place, last = self._place(run), checkpoint_name(run.run.train.train_iters)
        newest = read_pointer(place / "checkpoints")
        if newest != last:
            return f"it ended at {newest} instead of {last}; give the same command to go on"
        write_file(place / "trained.json", json.dumps({"seconds": seconds}).encode())
        return None

    def _title(self, run: Training) -> str:
        users = [
            subject.entry.name
            for subject in self._subjects
            if subject.training is not None and run.key in {stage.key for stage in subject.training.chain}
        ]
        names = ", ".join(dict.fromkeys(users))
        train = run.run.train
        return f"training {names}, stage {len(run.chain)}, seed {train.seed}, {train.train_iters:,} steps"

    def _measured_place(self, subject: Subject) -> Path:
        return self._folder / "models" / subject.key

    def _measuring_job(self, subject: Subject) -> Job:
        place, training = self._measured_place(subject), subject.training
        place.mkdir(parents=True, exist_ok=True)
        source = self._place(training) / "checkpoints" if training is not None else subject.checkpoint
        is_huggingface = source is not None and (source / "config.json").is_file()
        task = Task(
            str(source),
            str(source if is_huggingface else place / "huggingface"),
            subject.entry.export,
            asdict(self._study.measure),
            str(place / "measured.json"),
        )
        write_file(place / "task.json", json.dumps(asdict(task)).encode())
        waits = training is not None and not self._is_trained(training)
        return Job(
            f"measuring {subject.key}",
            [sys.executable, "-m", "lckv_megatron.study.measuring", str(place / "task.json")],
            place / "log.txt",
            (training.key,) if training is not None and waits else (),
            lambda seconds: self._take_in(subject),
            f"measuring {subject.entry.name}, seed {subject.seed}",
        )

    def _take_in(self, subject: Subject) -> None:
        numbers = json.loads((self._measured_place(subject) / "measured.json").read_bytes())
        row = {"model": subject.entry.name, "seed": subject.seed, "key": subject.key, **numbers}
        if subject.training is not None:
            chain = subject.training.chain
            row["training_flops"] = f"{subject.training.all_flops:.6g}"
            row["training_tokens"] = subject.training.all_tokens
            row["training_seconds"] = round(sum(map(self._seconds, chain)), 1)
        self._rows[subject.key] = {name: str(value) for name, value in row.items()}
        self.write()

    def _seconds(self, run: Training) -> float:
        return float(json.loads((self._place(run) / "trained.json").read_bytes())["seconds"])

    def _speed_job(self) -> Job | None:
        """Of the models with the first seed that have rows, the one that they are compared with among them;
        None where those that are asked for are not all here, or these very models have been compared so."""
        first = [*self._of_first_seed()]
        asked = [subject for subject in self._subjects if subject.seed == self._study.seeds[0]]
        folders = {subject.key: self._huggingface_of(subject) for subject in first}
        if (
            not first
            or first[0].entry.name != self._study.budget.model
            or any(subject.key not in folders for subject in asked)
            or not all((folder / "config.json").is_file() for folder in folders.values())
        ):
            return None
        output, place = self._folder / "speed.json", self._folder / "speed_task.json"
        task = SpeedTask(
            {key: str(path) for key, path in folders.items()}, asdict(self._study.measure), str(output)
        )
        have_speeds = all(self._rows[key].get("tokens_per_second") for key in folders)
        if have_speeds and output.exists() and _compares_the_same(place, task):
            return None
        output.unlink(missing_ok=True)
        write_file(place, json.dumps(asdict(task)).encode())
        command = [sys.executable, "-m", "lckv_megatron.study.speed", str(place)]
        return Job(
            "speed", command, self._folder / "speed_log.txt", (), lambda _: self._take_in_speeds(output)
        )

    def _of_first_seed(self) -> Iterator[Subject]:
        """The model that others are compared with comes first."""
        of_seed = [
            subject
            for subject in self._everyone
            if subject.seed == self._study.seeds[0] and subject.key in self._rows
        ]
        yield from (subject for subject in of_seed if subject.entry.name == self._study.budget.model)
        yield from (subject for subject in of_seed if subject.entry.name != self._study.budget.model)

    def _huggingface_of(self, subject: Subject) -> Path:
        task = self._measured_place(subject) / "task.json"
        return Path(json.loads(task.read_bytes())["folder"]) if task.exists() else task

    def _take_in_speeds(self, output: Path) -> None:
        for key, columns in json.loads(output.read_bytes()).items():
            self._rows[key] |= {name: f"{value:.6g}" for name, value in columns.items()}


def _compares_the_same(place: Path, task: SpeedTask) -> bool:
    """Whether the task in the file `place` is of the same models, measured in the same way."""
    try:
        before = SpeedTask(**json.loads(place.read_bytes()))
    except (OSError, ValueError, TypeError):
        return False
    mine = json.loads(json.dumps(task.measure))  # a tuple becomes a list
    return before.folders.keys() == task.folders.keys() and before.measure == mine


def check_rows_are_here(folder: Path) -> None:
    """Raises ConfigError where nothing has been measured."""
    if not (folder / ROWS).exists():
        raise ConfigError(f"{folder} has no {ROWS}: nothing has been measured there.")
