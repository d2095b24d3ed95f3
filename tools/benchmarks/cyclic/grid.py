"""Which models the benchmark of cyclic training trains."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lckv.config import CompressionConfig
from lckv.cost import ModelShape, training_cost
from lckv.sharing.pass_schedule import PassSchedule, forward_passes_at

MAPS = {
    "plain": None,
    "lckv w=2": "0_6_6_6_6_6_6_7",
    "lckv w=4": "0_1_5_5_5_5_6_7",
    "sandwich-middle": "0_3_3_3_3_3_3_7",
    "two groups": "0_3_3_3_6_6_6_7",
}
SEEDS = (1, 2)
PUBLISHED_MAP = "lckv w=2"
LAYERS = 8


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
    learning_rate: float = 1e-3

    def shape(self) -> ModelShape:
        """For `lckv.cost`."""
        heads = 4
        return ModelShape(
            num_layers=LAYERS,
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
    yield from (Cell(PUBLISHED_MAP, m, b) for m, b in ((7, 2), (1, 1), (1, 2), (2, 1), (3, 1), (5, 1)))
    yield from (Cell(PUBLISHED_MAP, m, b, first_guess=True) for m, b in ((1, 1), (0, 1), (1, 2)))
    # As many layers are cached, and half as many run several times.
    yield from (Cell("sandwich-middle", 1, 2, first_guess=guess) for guess in (False, True))


def _equal_operations(sizes: Sizes) -> Iterator[Cell]:
    """Fewer steps, so that they cost what 1, 1 does in all steps."""
    cheap = _operations(Cell(PUBLISHED_MAP, 1, 1), sizes)
    for m, b in ((7, 2), (1, 2), (2, 1), (3, 1), (5, 1)):
        cell = Cell(PUBLISHED_MAP, m, b)
        yield replace(cell, share=round(cheap / _operations(cell, sizes), 3))


def _operations(cell: Cell, sizes: Sizes) -> float:
    """Of a step, in plain steps."""
    return training_cost(sizes.shape(), cell.compression).ratio


def _more_settings() -> Iterator[Cell]:
    yield Cell(PUBLISHED_MAP, 3, 1, schedule="random", least=1)
    yield Cell(PUBLISHED_MAP, 1, 1, agreement=0.1)
    yield Cell(PUBLISHED_MAP, 5, 1, schedule="falling", least=1)
    yield Cell(PUBLISHED_MAP, 5, 1, schedule="rising", least=1)
    yield Cell(PUBLISHED_MAP, 7, 2, fp8=True)
    yield Cell("sandwich-middle", 7, 2)
    yield from (Cell(name, 1, 1) for name in ("sandwich-middle", "lckv w=4", "two groups"))
    yield from (Cell(PUBLISHED_MAP, m, b, first_guess=True) for m, b in ((7, 2), (2, 1), (3, 1), (5, 1)))
