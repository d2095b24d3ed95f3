"""Tables and sizes as text."""

from collections.abc import Iterable, Iterator


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """One line per row, columns left-justified."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown_table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table, a line per row, the first one its head; columns are as wide as their longest cell."""
    rows = [tuple(cell.replace("|", r"\|") for cell in row) for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def size(number: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.2f} {unit}"
    return f"{number} bytes"


def gib(number: float) -> str:
    """Bytes in GiB, whatever their size, so that numbers of a page can be compared."""
    value = number / 2**30
    return f"{value:,.2f} GiB" if value >= 0.1 or not value else f"{value:.2g} GiB"
