"""A recording as a source: Parquet or CSV, read in blocks, converted by a mapping.

Promises: memory is bounded by a block; what the mapping masks is counted; a file that is missing, truncated, of another
kind or cut in a line ends in one `SourceError`, at the latest when its end is reached, never in a wrong number. Rows
come in the file's order; `pipeline.ingest` sorts them. A list column of Parquet appears as columns `NAME[0]`,
`NAME[1]`, … Parquet needs pyarrow, which the edge base does not install.
"""

import csv
import datetime as dt
import gzip
import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.mapping import BoundMapping, Column, Mapping, Masked
from edge_agent.contract.signals import Catalogue

PARQUET_MAGIC = b"PAR1"
_EMPTY = frozenset(("", "nan", "null", "none", "na", "n/a", "-"))
_HASH_CHUNK_BYTES = 1 << 20
_OTHER_STAMPS = ("%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M:%S")  # spreadsheets': no leading zeros


class _Table(Protocol):
    """A file of named columns. `names` has list columns taken apart."""

    names: tuple[str, ...]
    rows: int | None

    def read(self, columns: tuple[str, ...], rows: int) -> Iterator[dict[str, Column]]: ...


@dataclass(slots=True)
class Recording:
    """An open recording. `masked` grows as blocks are read; `rows` is None where the file does not say."""

    path: Path
    bound: BoundMapping
    rows: int | None
    _table: _Table
    masked: Masked = field(default_factory=Masked)

    def blocks(self, rows: int = 8192) -> Iterator[ArrivalBlock]:
        """Yield the recording's rows, `rows` at a time, in the file's order. Raises `SourceError`."""
        time = self.bound.mapping.source.time
        if time is None:
            raise RuntimeError("open_recording lets no mapping through that has no time column")
        for columns in self._table.read(self.bound.columns, rows):
            yield self.bound.convert(columns, self.bound.times(columns[time.column]), self.masked)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the file's bytes, hex: the recording's identity whatever its name."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as stream:
                while chunk := stream.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()


def open_recording(path: Path | str, mapping: Mapping, catalogue: Catalogue, *, origin: str = "") -> Recording:
    """Open a Parquet or CSV file (also .csv.gz) under `mapping`; `origin` names the mapping in messages.

    Raises `SourceError` when the file cannot be read as such, `ConfigError` when the mapping does not fit it (an
    unknown signal, a column it lacks, no time column) or pyarrow is not installed.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        what = "is a directory" if path.is_dir() else "no such file"
        raise SourceError(f"{path}: {what}; give a recording as a .parquet or .csv file")
    if mapping.source.time is None:
        raise ConfigError(
            f"mapping {origin or 'given'}: names no time column; a recording needs [source.time] column = …"
        )
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not magic:
        raise SourceError(f"{path}: is empty; give a recording as a .parquet or .csv file")
    table: _Table
    if magic == PARQUET_MAGIC:
        table = _Parquet(path)
    elif path.suffix.lower() in (".parquet", ".pq"):
        raise SourceError(f"{path}: is not a Parquet file (it does not begin with PAR1); convert or fetch it again")
    else:
        table = _Csv(path)
    bound = BoundMapping(mapping, catalogue, table.names, origin or str(path))
    return Recording(path, bound, table.rows, table)


class _Parquet:
    """A Parquet file by pyarrow, one batch at a time."""

    def __init__(self, path: Path) -> None:
        try:
            # Not in the edge base: asked for only when a Parquet file is read.
            import pyarrow  # noqa: ICN001, PLC0415
            import pyarrow.parquet  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"{path}: reading Parquet needs pyarrow; install it with: pip install 'voltwatch[parquet]' "
                f"(or give the recording as CSV)"
            ) from error
        self._arrow = pyarrow
        self._path = path
        self._faults = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except self._faults as error:
            raise self._fault(error) from error
        schema = self._file.schema_arrow
        if len(set(schema.names)) != len(schema.names):
            raise SourceError(f"{path}: has two columns of one name; rename one")
        self.rows: int | None = int(self._file.metadata.num_rows)
        self._widths: dict[str, int] = {}
        names: list[str] = []
        for column in schema:
            if _is_list(pyarrow, column.type):
                self._widths[column.name] = self._width(column)
                names += [f"{column.name}[{i}]" for i in range(self._widths[column.name])]
            else:
                names.append(column.name)
        self.names = tuple(names)

    def _fault(self, error: Exception) -> SourceError:
        line = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        return SourceError(f"{self._path}: is truncated or not a Parquet file ({line}); fetch it again")

    def _width(self, column: Any) -> int:
        """Length of a list column: that of the first list which is there."""
        if hasattr(column.type, "list_size"):
            return int(column.type.list_size)
        try:
            for batch in self._file.iter_batches(batch_size=1024, columns=[column.name]):
                lists = batch.column(0).drop_null()
                if len(lists):
                    return len(lists[0])
        except self._faults as error:
            raise self._fault(error) from error
        return 0

    def read(self, columns: tuple[str, ...], rows: int) -> Iterator[dict[str, Column]]:
        """Yield the asked columns, `rows` at a time."""
        element = {f"{name}[{i}]": name for name, width in self._widths.items() for i in range(width)}
        wanted = list(dict.fromkeys(element.get(c, c) for c in columns))
        try:
            for batch in self._file.iter_batches(batch_size=rows, columns=wanted):
                yield self._columns(batch, wanted)
        except self._faults as error:
            raise self._fault(error) from error

    def _columns(self, batch: Any, wanted: list[str]) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for name in wanted:
            column = batch.column(batch.schema.get_field_index(name))
            if name in self._widths:
                for i, values in enumerate(self._lists(column, self._widths[name])):
                    found[f"{name}[{i}]"] = values
            else:
                found[name] = self._numbers(column)
        return found

    def _numbers(self, column: Any) -> Column:
        types = self._arrow.types
        if types.is_timestamp(column.type) or types.is_date(column.type):
            column = column.cast(self._arrow.timestamp("ns"))
        elif types.is_boolean(column.type) or types.is_decimal(column.type) or types.is_null(column.type):
            column = column.cast(self._arrow.float64())
        values: Column = column.to_numpy(zero_copy_only=False)
        return values

    def _lists(self, column: Any, width: int) -> npt.NDArray[np.float64]:
        """[width, n] of a list column; NaN where a list is absent or shorter."""
        table = np.full((width, len(column)), np.nan)
        parent = column.value_parent_indices() if hasattr(column, "value_parent_indices") else None
        if parent is None:  # a fixed-size list
            values = column.values.slice(column.offset * width, len(column) * width).cast(self._arrow.float64())
            table[:] = values.to_numpy(zero_copy_only=False).reshape(-1, width).T
            table[:, column.is_null().to_numpy(zero_copy_only=False)] = np.nan
            return table
        row = parent.to_numpy(zero_copy_only=False)
        values = column.flatten().cast(self._arrow.float64()).to_numpy(zero_copy_only=False)
        first = np.searchsorted(row, row, side="left")
        place = np.arange(row.shape[0]) - first
        fits = place < width
        table[place[fits], row[fits]] = values[fits]
        return table


def _is_list(arrow: Any, kind: Any) -> bool:
    return bool(arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind))


class _Csv:
    """A CSV file with a header, by the standard library; the delimiter is the header's most frequent of , ; tab."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: int | None = None
        with self._open() as stream:
            try:
                head = stream.readline()
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise self._unreadable(error) from error
        self._delimiter = max(",;\t", key=head.count)
        self.names = tuple(name.strip() for name in next(csv.reader([head], delimiter=self._delimiter), []))
        if len(self.names) < 2:
            raise SourceError(f"{path}: is neither Parquet nor CSV (its first line names fewer than two columns)")
        if len(set(self.names)) != len(self.names):
            raise SourceError(f"{path}: has two columns of one name; rename one")

    def _open(self) -> io.TextIOBase:
        if self._path.suffix.lower() == ".gz":
            return io.TextIOWrapper(gzip.open(self._path, "rb"), encoding="utf-8-sig", newline="")
        return self._path.open(encoding="utf-8-sig", newline="")

    def _unreadable(self, error: Exception) -> SourceError:
        return SourceError(f"{self._path}: is neither Parquet nor CSV text, or cut short ({error}); fetch it again")

    def read(self, columns: tuple[str, ...], rows: int) -> Iterator[dict[str, Column]]:
        """Yield the asked columns, `rows` at a time."""
        place = {name: self.names.index(name) for name in columns}
        with self._open() as stream:
            reader = csv.reader(stream, delimiter=self._delimiter)
            held: list[list[str]] = []
            try:
                next(reader)
                for row in reader:
                    if not row:
                        continue
                    if len(row) != len(self.names):
                        raise SourceError(
                            f"{self._path} line {reader.line_num}: has {len(row)} fields, the header names "
                            f"{len(self.names)}; the file seems cut or damaged"
                        )
                    held.append(row)
                    if len(held) == rows:
                        yield self._columns(held, place, reader.line_num)
                        held = []
            except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
                raise self._unreadable(error) from error
            if held:
                yield self._columns(held, place, reader.line_num)

    def _columns(self, rows: list[list[str]], place: dict[str, int], last_line: int) -> dict[str, Column]:
        return {
            name: self._column(name, [row[i].strip() for row in rows], last_line - len(rows) + 1, is_first=k == 0)
            for k, (name, i) in enumerate(place.items())
        }

    def _column(self, name: str, texts: list[str], first_line: int, *, is_first: bool) -> Column:
        """Numbers; the time column (the first asked for) may also be ISO 8601 text."""
        texts = ["nan" if text.lower() in _EMPTY else text for text in texts]
        try:
            return np.array(texts, dtype=np.float64)
        except ValueError:
            if is_first:
                return self._times(name, texts, first_line)
        for i, text in enumerate(texts):
            try:
                float(text)
            except ValueError:
                raise SourceError(
                    f"{self._path} near line {first_line + i}: column {name!r} holds {text[:40]!a}, not a number"
                ) from None
        raise RuntimeError("numpy refused what float takes")

    def _times(self, name: str, texts: list[str], first_line: int) -> Column:
        stamps = np.empty(len(texts), "datetime64[ns]")
        for i, text in enumerate(texts):
            stamp = _stamp(text)
            if stamp is None:
                raise SourceError(
                    f"{self._path} near line {first_line + i}: time column {name!r} holds {text[:40]!a}; write "
                    f"times as 2024-05-06T07:08:09 or as numbers"
                )
            stamps[i] = stamp
        return stamps


def _stamp(text: str) -> np.datetime64 | None:
    """Read one time stamp; None for what is none."""
    try:
        with warnings.catch_warnings():  # numpy warns of zones, and converts them to UTC: as we want it
            warnings.simplefilter("ignore")
            return np.datetime64("NaT" if text == "nan" else text.removesuffix("Z"), "ns")
    except ValueError:
        for form in _OTHER_STAMPS:
            try:
                return np.datetime64(dt.datetime.strptime(text, form), "ns")  # noqa: DTZ007  # the mapping has the zone
            except ValueError:
                continue
    return None
