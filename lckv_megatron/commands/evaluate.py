"""Runs common benchmarks (lm-eval) on models, with their compressed caches in use.

    lckv-megatron evaluate --model out/model --tasks hellaswag,arc_easy
    lckv-megatron evaluate --model out/plain out/lckv --tasks hellaswag
    lckv-megatron evaluate --model out/model --tasks my_task --include-path my_tasks/ --limit 100 \\
        --output scores.json

Scores and answers come from the generation engine: what is merged or left out of the cache is missing for the
model here too. Needs lm-eval, EleutherAI's evaluation harness (pip install 'lckv-megatron[eval]'). Its tasks
download their data sets when they are used first. Several models are run one after the other, one of
them in memory, and shown in one table.
"""

import argparse
import difflib
import gc
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lckv_megatron.engine_options import (
    add_engine_options,
    add_model_options,
    build_engine,
    check_folders,
    check_models,
    engine_config,
    load,
    served_context,
)
from lckv_megatron.scoring.score_table import column_names, describe
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.files import check_output

_LEFT_OUT = ("samples", "pretty_env_info", "git_hash", "upper_git_hash")
"""Of lm-eval's results: the requests themselves, and what describes the machine."""


def _share_or_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a whole number of at least 1 nor a share between 0 and 1"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("evaluate", __doc__)
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="tasks of lm-eval, or groups or patterns of them"
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="folder with YAML files of more tasks"
    )
    parser.add_argument(
        "--limit",
        type=_share_or_number,
        metavar="N",
        help="documents per task: the first N, or a share below 1",
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the tokenizer's chat format"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="longest text in tokens (default: the model's context)"
    )
    parser.add_argument(
        "--token-by-token", action="store_true", help="score texts as if they were generated; slow"
    )
    parser.add_argument("--seed", type=int, default=0, help="of tasks that sample (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_model_options(parser, several=True)
    add_engine_options(parser, batch_size=16)
    return parser


def check_include_path(path: Path | None) -> None:
    """Raises ConfigError where --include-path is given and is no folder."""
    if path is not None and not path.is_dir():
        raise ConfigError(f"--include-path {path} is no folder.")


def task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, which takes long to make and is left out where all tasks are in
    `include_path`. Raises ConfigError for a name that stands for nothing."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ConfigError(f"--tasks: {name!r} is no task, group or pattern that lm-eval knows.{hint}")
    return manager


def evaluate(options: argparse.Namespace) -> None:
    """Run the tasks on each model and show the results, also where a later model fails."""
    check_output("--output", options.output)
    check_include_path(options.include_path)
    check_folders(options.model)
    try:
        import lm_eval  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}): pip install 'lm-eval>=0.4.9'.") from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = task_manager(names, options.include_path)
    check_models(options.model)
    scores: dict[str, dict[str, Any]] = {}
    try:
        for name, folder in zip(column_names(options.model), options.model, strict=True):
            scores[name] = _run(folder, names, manager, options)
            if options.output is not None:
                write_file(options.output, f"{_as_json(scores, options)}\n".encode())
    finally:
        if scores:
            print(_as_json(scores, options) if options.json else "\n".join(describe(scores)))


def _run(folder: Path, tasks: list[str], manager: Any, options: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's results of one model, and `cache`, what its cache cost. The model's memory is free again."""
    from lm_eval import simple_evaluate

    from lckv_megatron.scoring.lm_eval_adapter import adapter

    model, tokenizer = load(options, folder)
    # The engine's texts have one token more, which is only predicted.
    longest = served_context(options, model.config) - 1
    lm = adapter(
        build_engine(engine_config(options), model, tokenizer),
        tokenizer,
        max_length=min(options.context or longest, longest),
        batch_size=options.max_batch_size,
        token_by_token=options.token_by_token,
        seed=options.seed,
    )
    del model
    try:
        results = simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"lm-eval: {error}") from error
    kept = {name: value for name, value in dict(results).items() if name not in _LEFT_OUT}
    of_run = {"model": str(folder), "dtype": options.dtype, "token_by_token": options.token_by_token}
    kept["config"] = {**kept["config"], **of_run}
    kept["cache"] = lm.cache_facts.as_dict()
    del lm, results
    free_memory()
    return kept


def free_memory() -> None:
    """Gives the memory of models that nobody names any more back, before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _as_json(scores: Mapping[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Of one model its results, of several those of each under its name."""
    from lm_eval.utils import handle_non_serializable

    (first, *_), alone = scores.values(), len(options.model) == 1
    return json.dumps(first if alone else {"models": scores}, indent=2, default=handle_non_serializable)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    return exit_status(lambda: evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
