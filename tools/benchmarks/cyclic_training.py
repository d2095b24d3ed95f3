"""Trains small models with iterated maps in cheaper ways, and measures what of their quality is lost.

    python tools/benchmarks/cyclic_training.py --text wiki.test.txt wiki.valid.txt \
        --output tools/benchmarks/results/cyclic_training.csv

Each cell of the grid is a model that is trained on the bytes of the texts, all in the same order for one
seed, and measured on their end. Its row is appended to the file as soon as it is done; a cell whose row is
there is skipped, so that the command can be given again. A loss is a mean over bytes, in nats. `exact` runs
passes until the shared keys and values settle, which is what decoding token by token gives.

    python tools/benchmarks/cyclic_training.py --table tools/benchmarks/results/cyclic_training.csv

prints the rows as a table, cells with several seeds as their means.
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from lckv.config import CompressionConfig
from lckv.cost import ModelShape, training_cost
from lckv.generation.prefill import Settling
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from lckv.sharing.pass_schedule import PassSchedule, forward_passes_at
from lckv_megatron.measuring.timing import setting

MAPS = {
    "plain": None,
    "lckv w=2": "0_6_6_6_6_6_6_7",
    "lckv w=4": "0_1_5_5_5_5_6_7",
    "sandwich-middle": "0_3_3_3_3_3_3_7",
    "two groups": "0_3_3_3_6_6_6_7",
}
SEEDS = (1, 2)
_MAP = "lckv w=2"
_LAYERS, _MOST_PASSES, _TOLERANCE = 8, 32, 1e-3
_PLAIN_EVERY = 25
"""Steps between two of the plain model, whose time is the unit."""


@dataclass(frozen=True)
class Cell:
    """One model of the grid."""

    map: str
    m: int
    b: int
    first_guess: bool = False
    agreement: float = 0.0
    """Coefficient of the loss."""

    schedule: PassSchedule = "constant"
    least: int = 0
    """Of m, which is the most, unless the schedule is constant."""

    share: float = 1.0
    """Of the grid's steps."""

    fp8: bool = False
    """Weights and inputs of the linear maps are rounded to FP8 in passes without gradient."""

    seed: int = 1

    @property
    def compression(self) -> CompressionConfig:
        """What the model is made of."""
        return CompressionConfig(
            layer_types=MAPS[self.map],
            forward_passes=self.m,
            backward_passes=self.b,
            first_guess=self.first_guess,
            agreement_loss_coefficient=self.agreement,
        )

    def plan(self, number: int, steps: int) -> CompressionConfig:
        """With the passes of step `number` of `steps`."""
        passes = forward_passes_at(
            self.schedule, self.least, self.m, iteration=number, iterations=steps, seed=self.seed
        )
        return replace(self.compression, forward_passes=passes)


@dataclass(frozen=True)
class Sizes:
    """What all models have in common."""

    steps: int
    hidden_size: int
    rows: int
    length: int
    learning_rate: float = 3e-3

    def shape(self) -> ModelShape:
        """For `lckv.cost`."""
        heads = 4
        return ModelShape(
            num_layers=_LAYERS,
            hidden_size=self.hidden_size,
            ffn_size=self.hidden_size * 8 // 3,
            query_heads=heads,
            kv_heads=heads // 2,
            head_dim=self.hidden_size // heads,
            vocab_size=256,
            seq_length=self.length,
        )


def grid(sizes: Sizes) -> Iterator[Cell]:
    """All cells, those first that answer most; each of them with two seeds."""
    for part in (_equal_tokens(), _equal_operations(sizes), _more_settings()):
        cells = list(part)
        for seed in SEEDS:
            yield from (replace(cell, seed=seed) for cell in cells)


def _equal_tokens() -> Iterator[Cell]:
    yield Cell("plain", 0, 1)
    yield from (Cell(_MAP, m, b) for m, b in ((7, 2), (1, 1), (1, 2), (2, 1), (3, 1), (5, 1)))
    yield from (Cell(_MAP, m, b, first_guess=True) for m, b in ((1, 1), (0, 1), (1, 2)))


def _equal_operations(sizes: Sizes) -> Iterator[Cell]:
    """Fewer steps, so that they cost what 1, 1 does in all steps."""
    cheap = _operations(Cell(_MAP, 1, 1), sizes)
    for m, b in ((7, 2), (1, 2), (2, 1), (3, 1), (5, 1)):
        cell = Cell(_MAP, m, b)
        yield replace(cell, share=round(cheap / _operations(cell, sizes), 3))


def _operations(cell: Cell, sizes: Sizes) -> float:
    """Of a step, in plain steps."""
    return training_cost(sizes.shape(), cell.compression).ratio


def _more_settings() -> Iterator[Cell]:
    yield Cell(_MAP, 3, 1, schedule="random", least=1)
    yield Cell(_MAP, 1, 1, agreement=0.1)
    yield Cell(_MAP, 5, 1, schedule="falling", least=1)
    yield Cell(_MAP, 5, 1, schedule="rising", least=1)
    yield Cell(_MAP, 7, 2, fp8=True)
    yield from (Cell(name, 1, 1) for name in ("sandwich-middle", "lckv w=4", "two groups"))
    yield from (Cell(_MAP, m, b, first_guess=True) for m, b in ((7, 2), (2, 1), (3, 1), (5, 1)))


HEAD = (
    "map", "m, b", "settings", "seeds", "FLOPs", "CPU", "exact", "to 7, 2", "1 pass", "2 passes",
    "twice as long", "passes",
)  # fmt: skip


def table(path: Path) -> list[str]:
    """Lines of Markdown: a cell each, in the order of the rows; means over seeds. How far the exact loss is
    from that of the published passes is given for each seed. ValueError for rows of several sizes."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = {tuple(row[name] for name in ("hidden_size", "rows", "length", "learning_rate")) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"{path} has rows of {len(sizes)} sizes or learning rates; give each its own file")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        settings = ("map", "m", "b", "first_guess", "agreement", "schedule", "least", "share", "fp8")
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    published = {row["seed"]: float(row["loss_exact"]) for row in rows if _is_published(row)}
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return [*lines, *(f"| {' | '.join(_cells(group, published))} |" for group in groups.values())]


def _is_published(row: dict[str, str]) -> bool:
    """Whether it was trained as LCKV was published."""
    cell = Cell(_MAP, 7, 2, seed=int(row["seed"]))
    return all(row[name] == str(value) for name, value in asdict(cell).items())


def _cells(group: list[dict[str, str]], published: dict[str, float]) -> Iterator[str]:
    """Of a line. `published`: exact loss for each seed."""
    first = group[0]
    settings = []
    if first["first_guess"] == "True":
        settings.append("first guess")
    if float(first["agreement"]):
        settings.append(f"agreement {first['agreement']}")
    if first["schedule"] != "constant":
        settings.append(f"m {first['schedule']} from {first['least']}")
    if float(first["share"]) != 1:
        settings.append(f"{float(first['share']):.0%} of the steps")
    if first["fp8"] == "True":
        settings.append("FP8")
    is_plain = first["map"] == "plain"
    yield first["map"]
    yield "-" if is_plain else f"{first['m']}, {first['b']}"
    yield ", ".join(settings) or "-"
    yield ", ".join(sorted(row["seed"] for row in group))
    start = "guess" if first["first_guess"] == "True" else "zeros"
    columns = {
        "flops_of_plain_step": ".2f", "cpu_seconds_of_plain_step": ".2f", "loss_exact": ".4f",
        f"loss_{start}_1": ".4f", f"loss_{start}_2": ".4f",
        "loss_exact_twice_the_length": ".4f", "passes_until_exact": ".1f",
    }  # fmt: skip
    iterated = {f"loss_{start}_1", f"loss_{start}_2", "passes_until_exact"}
    for name, form in columns.items():
        value = statistics.mean(float(row[name]) for row in group)
        yield "-" if is_plain and name in iterated else format(value, form)
        if name == "loss_exact":
            yield ", ".join(
                f"{float(row[name]) - published[row['seed']]:+.3f}" if row["seed"] in published else "?"
                for row in sorted(group, key=lambda row: row["seed"])
            )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="print the rows of a file, and train nothing"
    )
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on")
    parser.add_argument("--output", type=Path, help="CSV file, which rows are appended to")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=2, help="texts of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes of each (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-3, help="the highest (default: %(default)s)"
    )
    parser.add_argument("--cells", type=int, help="train at most so many now (default: all that are left)")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="train cells of this seed alone")
    parser.add_argument("--held-out", type=int, default=24, help="texts to measure (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.table is not None:
        print("\n".join(table(options.table)))
        return
    if options.text is None or options.output is None:
        parser.error("--text and --output are needed, or --table")
    sizes = Sizes(options.steps, options.hidden_size, options.rows, options.length, options.learning_rate)
    everything = b"".join(path.read_bytes() for path in options.text)
    tokens = torch.frombuffer(bytearray(everything), dtype=torch.uint8).long()
    held_out = options.held_out * options.length
    wanted = (
        cell
        for cell in grid(sizes)
        if options.seed in (None, cell.seed) and not _is_there(options.output, _key(cell, sizes))
    )
    for cell in islice(wanted, options.cells):
        measured = trained(cell, sizes, tokens[:-held_out], tokens[-held_out:])
        row = _key(cell, sizes) | measured | setting("cpu")
        _append(options.output, row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _key(cell: Cell, sizes: Sizes) -> dict[str, str]:
    """The columns by which the row of a cell is known."""
    fields = asdict(cell) | asdict(sizes) | {"steps": round(cell.share * sizes.steps)}
    return {name: str(value) for name, value in fields.items()}


def _is_there(path: Path, key: dict[str, str]) -> bool:
    if not path.exists():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        return any(key.items() <= row.items() for row in csv.DictReader(file))


def _append(path: Path, row: dict[str, object]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def trained(cell: Cell, sizes: Sizes, training: Tensor, held_out: Tensor) -> dict[str, object]:
    """Train the model of a cell; what it cost and what it can."""
    plain, model = (new_model(it, sizes) for it in (Cell("plain", 0, 1, seed=cell.seed), cell))
    if cell.fp8:
        round_passes_without_gradient(model)
    steps = round(cell.share * sizes.steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=sizes.learning_rate, total_steps=steps, pct_start=0.1
    )
    batches = batches_of(training, sizes, cell.seed)
    seconds: list[float] = []
    plain_seconds: list[float] = []
    flops, of_plain = 0.0, training_cost(sizes.shape(), CompressionConfig()).model_flops
    for number in range(steps):
        batch = next(batches)
        plan = cell.plan(number, steps)
        model.model.steps = plan.plan(_LAYERS)
        flops += training_cost(sizes.shape(), plan).ratio / steps
        start = time.process_time()
        _backward(model, batch)
        seconds.append(time.process_time() - start)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number % _PLAIN_EVERY == 0:
            start = time.process_time()
            _backward(plain, batch)
            plain_seconds.append(time.process_time() - start)
            plain.zero_grad()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * sizes.rows * sizes.length,
        "training_flops": f"{flops * steps * sizes.rows * sizes.length * of_plain:.4g}",
        "flops_of_plain_step": f"{flops:.4f}",
        "cpu_seconds_of_plain_step": round(statistics.mean(seconds) / statistics.mean(plain_seconds), 3),
        **measure(model, cell, held_out, sizes.length),
    }


def new_model(cell: Cell, sizes: Sizes) -> LCKVLlamaForCausalLM:
    """With the initial weights of the cell's seed."""
    torch.manual_seed(cell.seed)
    shape = sizes.shape()
    config = LCKVLlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        compression=asdict(cell.compression),
    )
    model = LCKVLlamaForCausalLM(config).train()
    if not cell.first_guess:
        return model
    same = new_model(replace(cell, first_guess=False), sizes)
    model.load_state_dict(same.state_dict(), strict=False)  # the first guess begins at zero
    return model


def batches_of(tokens: Tensor, sizes: Sizes, seed: int) -> Iterator[Tensor]:
    """int64 [rows, length], the same for all models of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        starts = torch.randint(len(tokens) - sizes.length, (sizes.rows,), generator=generator).tolist()
        yield torch.stack([tokens[start : start + sizes.length] for start in starts])


def round_passes_without_gradient(model: LCKVLlamaForCausalLM) -> None:
    """From now on linear maps of the layers compute in such passes, while the model is in training mode, with
    weights and inputs as FP8 (e4m3) represents them, each tensor with a scale of its own."""

    def rounded(module: nn.Linear, states: Tensor) -> Tensor:
        weight = module.weight
        if module.training and not torch.is_grad_enabled():
            states, weight = _to_fp8(states), _to_fp8(weight)
        return nn.functional.linear(states, weight, module.bias)

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(rounded, module)  # type: ignore[method-assign]


def _to_fp8(tensor: Tensor) -> Tensor:
    kind = torch.float8_e4m3fn
    scale = tensor.abs().amax().clamp(min=1e-12) / torch.finfo(kind).max
    return (tensor / scale).to(kind).to(tensor.dtype) * scale


def _backward(model: LCKVLlamaForCausalLM, batch: Tensor) -> None:
    model(batch, labels=batch).loss.backward()


@torch.inference_mode()
def measure(model: LCKVLlamaForCausalLM, cell: Cell, held_out: Tensor, length: int) -> dict[str, object]:
    """Losses of the trained model."""
    model.eval()
    rows, longer = held_out.view(-1, length), held_out.view(-1, 2 * length)
    exact, passes = exact_loss(model, rows)
    twice, _ = exact_loss(model, longer)
    own = loss_after(model, rows, cell.m + cell.b, cell.first_guess)
    losses = {"loss_exact": exact, "loss_own_passes": own}
    losses |= {f"loss_zeros_{number}": loss_after(model, rows, number) for number in (1, 2, 3)}
    if cell.first_guess:
        losses |= {f"loss_guess_{number}": loss_after(model, rows, number, True) for number in (1, 2, 3)}
    else:
        losses |= {f"loss_guess_{number}": math.nan for number in (1, 2, 3)}
    losses |= {"loss_exact_twice_the_length": twice}
    return {name: f"{value:.4f}" for name, value in losses.items()} | {"passes_until_exact": passes}


def exact_loss(model: LCKVLlamaForCausalLM, rows: Tensor) -> tuple[float, float]:
    """The loss with settled keys and values, and how many passes that took."""
    settling = Settling(_TOLERANCE, _MOST_PASSES, len(rows), None, key_bias=None, device=rows.device)
    loss = _loss(model, rows, Iteration(_MOST_PASSES, settling, first_guess=False))
    return loss, float(settling.passes.double().mean())


def loss_after(model: LCKVLlamaForCausalLM, rows: Tensor, passes: int, first_guess: bool = False) -> float:
    """The loss after so many passes, from the learned first guess or from zeros."""
    return _loss(model, rows, Iteration(passes, first_guess=first_guess))


def _loss(model: LCKVLlamaForCausalLM, rows: Tensor, iteration: Iteration) -> float:
    states = model.model.run(model.model.embed_tokens(rows), iteration=iteration).last_hidden_state
    assert states is not None
    logits = model.lm_head(states)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


if __name__ == "__main__":
    main()
