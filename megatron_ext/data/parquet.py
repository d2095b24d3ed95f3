"""Texts in the columns of Parquet files, a few rows at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ext.errors import ConfigError

_BATCH_BYTES = 1 << 22
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")

Row = tuple[bytes | None, ...]
"""UTF-8 texts of one row, one for each column; None where there is none."""


class ParquetTexts:
    """The texts of a Parquet file.

    Raises ConfigError if pyarrow is not installed, the file is damaged, or a column is missing or holds no
    texts.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = list(columns)
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
        self._check_columns()

    def _damaged(self, error: Exception) -> ConfigError:
        reason = str(error).split("\n", 1)[0]
        return ConfigError(f"{self._path}: truncated or damaged ({reason}); make or copy the file again.")

    def _check_columns(self) -> None:
        types = {field.name: field.type for field in self._file.schema_arrow}
        for name in self._columns:
            if name not in types:
                raise ConfigError(
                    f"{self._path}: no column {name!r}; the columns are {', '.join(map(repr, types))}."
                )
            if not _holds_text(types[name]):
                raise ConfigError(f"{self._path}: column {name!r} holds no texts but {types[name]}.")

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
        import pyarrow as pa

        batches = self._file.iter_batches(
            batch_rows, row_groups=[group], columns=self._columns, use_threads=False
        )
        try:
            for batch in batches:
                kept = batch.slice(first)
                first = max(0, first - batch.num_rows)
                columns = [_decoded(kept.column(name)).cast(pa.large_binary()) for name in self._columns]
                yield from zip(*(column.to_pylist() for column in columns), strict=True)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def text_bytes(self) -> int:
        """Bytes of all texts. The columns are read through for it."""
        return sum(len(text) for row in self.rows() for text in row if text is not None)


def _holds_text(kind: Any) -> bool:
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXT_TYPES


def _decoded(column: Any) -> Any:
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
