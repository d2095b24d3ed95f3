"""Texts in the columns of Parquet files, a few rows at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import ConfigError

_BATCH_BYTES = 1 << 22
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class JsonColumn:
    """A column of lists and objects, of which JSON is made. Texts are taken for JSON as they are."""

    name: str
    optional: bool = False
    """A file without it is taken for one with nulls."""


Column = str | JsonColumn
"""A column of texts by its name, or one of JSON."""

Row = tuple[bytes | None, ...]
"""UTF-8 texts of one row, one for each column; None where there is none."""


class ParquetTexts:
    """The texts of a Parquet file.

    Raises ConfigError if pyarrow is not installed, the file is damaged, or a column is missing or holds no
    texts.
    """

    def __init__(self, path: str, columns: Sequence[Column]) -> None:
        self._path = path
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ConfigError(
                f"{path}: reading Parquet files needs pyarrow; install it with pip install "
                "'lckv-megatron[parquet]'."
            ) from error
        try:
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        self.num_rows: int = self._file.metadata.num_rows
        self._names = self._checked_names(columns)

    def _damaged(self, error: Exception) -> ConfigError:
        reason = str(error).split("\n", 1)[0]
        return ConfigError(f"{self._path}: truncated or damaged ({reason}); make or copy the file again.")

    def _checked_names(self, columns: Sequence[Column]) -> list[str | None]:
        """Name of each column; None for one that may be missing and is."""
        types = {field.name: field.type for field in self._file.schema_arrow}
        names: list[str | None] = []
        for column in columns:
            name = column if isinstance(column, str) else column.name
            missing = name not in types
            if missing and not _may_miss(column):
                raise ConfigError(
                    f"{self._path}: no column {name!r}; the columns are {', '.join(map(repr, types))}."
                )
            if isinstance(column, str) and not _holds_text(types[name]):
                raise ConfigError(f"{self._path}: column {name!r} holds no texts but {types[name]}.")
            names.append(None if missing else name)
        return names

    def rows(self, first: int = 0) -> Iterator[Row]:
        """The rows from number `first` (of 0, 1, ...) on. Memory is bounded by a few thousand rows."""
        for group in range(self._file.metadata.num_row_groups):
            about = self._file.metadata.row_group(group)
            if first >= about.num_rows:
                first -= about.num_rows
                continue
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            yield from self._rows_of(group, rows, first)
            first = 0

    def _rows_of(self, group: int, batch_rows: int, first: int) -> Iterator[Row]:
        present = [name for name in self._names if name is not None]
        batches = self._file.iter_batches(batch_rows, row_groups=[group], columns=present, use_threads=False)
        try:
            for batch in batches:
                kept = batch.slice(first)
                first = max(0, first - batch.num_rows)
                texts = {name: _texts(_decoded(kept.column(name))) for name in present}
                absent = [None] * kept.num_rows
                yield from zip(*(texts.get(name or "", absent) for name in self._names), strict=True)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def text_bytes(self) -> int:
        """Bytes of all texts. The columns are read through for it."""
        return sum(len(text) for row in self.rows() for text in row if text is not None)


def _holds_text(kind: Any) -> bool:
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXT_TYPES


def _may_miss(column: Column) -> bool:
    return isinstance(column, JsonColumn) and column.optional


def _texts(column: Any) -> list[bytes | None]:
    """The values of a column: UTF-8 of texts, else of their JSON."""
    import pyarrow as pa

    if str(column.type) in _TEXT_TYPES:
        return column.cast(pa.large_binary()).to_pylist()
    values = (value if value is None else json.dumps(value, default=str) for value in column.to_pylist())
    return [value if value is None else value.encode() for value in values]


def _decoded(column: Any) -> Any:
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
