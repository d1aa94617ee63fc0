"""A mapping carries a user's columns, or a DBC's CAN signals, onto the catalogue. Converted once, at ingest.

The file is TOML; see docs/your-own-data.md. A source column becomes `value * scale + offset` in the catalogue's unit,
and what is no value becomes NaN, counted by reason. Nothing after this knows where a value came from.

    [source]
    period_s = 10.0                  # how often the source reports; coverage counts against it
    [source.time]
    column = "tboxTime"              # absent for a live bus: the host's clock stands in
    utc_offset_h = 8.0               # for time stamps without a zone
    [signals."Vehicle.Speed"]
    column = "vehSpeed"
    [signals."Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages"]
    columns = "V_*"                  # a vector: a pattern, in the order of the numbers in the names
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.signals import Catalogue, FloatArray, Signal

Column = npt.NDArray[np.generic]


class TimeColumn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a row's time stands. `unit` is for numbers; text and time stamps are read as ISO 8601."""

    column: str
    unit: Literal["s", "ms", "us", "ns"] = "s"
    utc_offset_h: float = 0.0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for the whole source."""

    period_s: float = 1.0
    time: TimeColumn | None = None
    vehicle_id: str = ""
    make: str = ""


class SignalRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one signal is filled. `invalid` are raw codes, before scaling; `min`/`max` narrow the catalogue's range.

    `codes` is for a status word: raw code → value; a code it does not list is no value. Scaling does not apply.
    """

    column: str | None = None
    columns: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    invalid: tuple[float, ...] = ()
    codes: dict[str, float] = {}
    min: float | None = None
    max: float | None = None


class Mapping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping file as written."""

    signals: dict[str, SignalRule]
    source: Source = msgspec.field(default_factory=Source)


@dataclass(slots=True)
class Masked:
    """How many values of each signal became NaN, by reason: invalid_code, out_of_range, not_finite."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, signal: str, reason: str, count: int) -> None:
        """Count `count` more masked values."""
        if count:
            self.counts[signal, reason] += count

    def total(self) -> int:
        """Return the number of masked values."""
        return self.counts.total()


def parse_mapping(text: bytes | str, origin: str) -> Mapping:
    """Read a mapping file's text. Raises `ConfigError` naming `origin` and the place."""
    try:
        table = tomllib.loads(text.decode() if isinstance(text, bytes) else text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"mapping {origin}: not valid TOML: {error}") from error
    for name, rule in table.get("signals", {}).items() if isinstance(table.get("signals"), dict) else ():
        for key in rule if isinstance(rule, dict) else ():
            if key not in SignalRule.__struct_fields__:
                near = _nearest(key, SignalRule.__struct_fields__)
                raise ConfigError(f"mapping {origin}: unknown key {key!r} in [signals.{name!r}]{near}")
    try:
        mapping = msgspec.convert(table, Mapping)
    except msgspec.ValidationError as error:
        raise ConfigError(f"mapping {origin}: {error}") from error
    if not mapping.source.period_s > 0:
        raise ConfigError(f"mapping {origin}: source.period_s is {mapping.source.period_s}; it must be above 0")
    for name, rule in mapping.signals.items():
        if (rule.column is None) == (rule.columns is None):
            raise ConfigError(f"mapping {origin}: [signals.{name!r}] needs exactly one of `column` and `columns`")
        for code in rule.codes:
            try:
                float(code)
            except ValueError:
                raise ConfigError(f"mapping {origin}: [signals.{name!r}] code {code!r} is not a number") from None
    return mapping


@dataclass(frozen=True, slots=True)
class _Bound:
    signal: Signal
    rule: SignalRule
    columns: tuple[str, ...]


class BoundMapping:
    """A mapping held against a catalogue and the columns a source really has; converts its columns to arrivals.

    Raises `ConfigError` at once for an unknown signal (with the nearest known name), a column the source lacks, a
    scalar given a pattern, or a pattern that matches nothing.
    """

    def __init__(self, mapping: Mapping, catalogue: Catalogue, available: Sequence[str], origin: str) -> None:
        self.mapping = mapping
        self.catalogue = catalogue
        self._origin = origin
        self._scalars: list[tuple[int, _Bound]] = []
        self._vectors: dict[str, _Bound] = {}
        known = [s.name for s in catalogue]
        for name, rule in mapping.signals.items():
            if name not in catalogue:
                raise ConfigError(
                    f"mapping {origin}: unknown signal {name!r}{_nearest(name, known)} (schema {catalogue.name!r})"
                )
            signal = catalogue[name]
            bound = _Bound(signal, rule, self._resolve(signal, rule, available))
            if signal.kind == "scalar":
                self._scalars.append((catalogue.scalar_index[name], bound))
            else:
                self._vectors[signal.role] = bound
        time = mapping.source.time
        if time is not None and time.column not in available:
            raise ConfigError(
                f"mapping {origin}: time column {time.column!r} is not in the source{_nearest(time.column, available)}"
            )

    def _resolve(self, signal: Signal, rule: SignalRule, available: Sequence[str]) -> tuple[str, ...]:
        if rule.column is not None:
            if rule.column not in available:
                raise ConfigError(
                    f"mapping {self._origin}: column {rule.column!r} (for {signal.name}) is not in the source"
                    f"{_nearest(rule.column, available)}"
                )
            return (rule.column,)
        pattern = rule.columns or ""
        if signal.kind == "scalar":
            raise ConfigError(f"mapping {self._origin}: {signal.name} is a scalar; give it `column`, not `columns`")
        # a list column "cells" is there as "cells[0]", "cells[1]", …; its own name means all of them
        found = sorted(
            (c for c in available if fnmatchcase(c, pattern) or (c.startswith(pattern + "[") and c.endswith("]"))),
            key=_natural,
        )
        if not found:
            raise ConfigError(f"mapping {self._origin}: no column matches {pattern!r} (for {signal.name})")
        return tuple(found)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every source column that is read, the time column first where there is one."""
        time = self.mapping.source.time
        names = [time.column] if time is not None else []
        for _, bound in self._scalars:
            names.extend(bound.columns)
        for bound in self._vectors.values():
            names.extend(bound.columns)
        return tuple(dict.fromkeys(names))

    def cells(self) -> int:
        """Return the number of cell voltages, C; 0 where none is mapped."""
        return len(self._vectors["cell_voltage"].columns) if "cell_voltage" in self._vectors else 0

    def probes(self) -> int:
        """Return the number of cell temperatures, P; 0 where none is mapped."""
        return len(self._vectors["cell_temperature"].columns) if "cell_temperature" in self._vectors else 0

    def missing(self) -> tuple[str, ...]:
        """Names of catalogue signals this source does not carry."""
        return tuple(s.name for s in self.catalogue if s.name not in self.mapping.signals)

    def times(self, column: Column) -> FloatArray:
        """Convert the time column, [n] numbers, time stamps or ISO 8601 text, to Unix seconds.

        A time that cannot be read becomes NaN; `ingest` rejects and counts it. Raises `SourceError` for a column of
        another kind.
        """
        time = self.mapping.source.time
        if time is None:
            raise ValueError("this mapping names no time column")
        shift = time.utc_offset_h * 3600.0
        if column.dtype.kind in "OUS":
            try:
                column = column.astype("datetime64[ns]")
            except ValueError as error:
                raise SourceError(f"{self._origin}: time column {time.column!r}: {error}") from error
        if column.dtype.kind == "M":
            nanoseconds = column.astype("datetime64[ns]").astype(np.int64)
            seconds = nanoseconds.astype(np.float64) / 1e9
            seconds[np.isnat(column)] = np.nan
            return seconds - shift
        if column.dtype.kind not in "iuf":
            raise SourceError(f"{self._origin}: time column {time.column!r} holds {column.dtype}, not times")
        return column.astype(np.float64) * {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[time.unit] - shift

    def convert(self, columns: MappingABC[str, Column], time_s: FloatArray, masked: Masked) -> ArrivalBlock:
        """Convert n rows of source columns to an `ArrivalBlock`; a column that is absent here is "nothing arrived".

        `columns` maps a name to [n] numbers (NaN = nothing arrived). What is masked is counted into `masked`.
        Raises `SourceError` when a column holds something other than numbers.
        """
        rows = time_s.shape[0]
        scalars = np.full((rows, len(self.catalogue.scalars)), np.nan)
        for index, bound in self._scalars:
            if bound.columns[0] in columns:
                raw = self._numbers(columns[bound.columns[0]], bound)
                scalars[:, index] = _convert(raw, bound, masked)
        return ArrivalBlock(
            time_s,
            scalars,
            self._vector("cell_voltage", columns, rows, masked),
            self._vector("cell_temperature", columns, rows, masked),
        )

    def _vector(self, role: str, columns: MappingABC[str, Column], rows: int, masked: Masked) -> FloatArray:
        bound = self._vectors.get(role)
        if bound is None:
            return np.empty((rows, 0))
        raw = np.full((rows, len(bound.columns)), np.nan)
        for i, name in enumerate(bound.columns):
            if name in columns:
                raw[:, i] = self._numbers(columns[name], bound)
        return _convert(raw, bound, masked)

    def _numbers(self, column: Column, bound: _Bound) -> FloatArray:
        if column.dtype.kind not in "biuf":
            try:
                return column.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise SourceError(
                    f"{self._origin}: column {bound.columns[0]!r} (for {bound.signal.name}) holds {column.dtype}, "
                    f"not numbers"
                ) from error
        return column.astype(np.float64)


def _convert(raw: FloatArray, bound: _Bound, masked: Masked) -> FloatArray:
    """Scale raw values of any shape to the catalogue's unit; mask and count what is no value."""
    signal, rule = bound.signal, bound.rule
    infinite = np.isinf(raw)
    bad_code = _is_code(raw, rule.invalid)
    if rule.codes:
        value = np.full(raw.shape, np.nan)
        for raw_code, meaning in rule.codes.items():
            value[raw == float(raw_code)] = meaning
        bad_code |= np.isnan(value) & ~np.isnan(raw) & ~infinite
    else:
        value = np.where(infinite | bad_code, np.nan, raw) * rule.scale + rule.offset
    if signal.invalid:
        code = _is_code(value, signal.invalid)
        bad_code |= code
        value[code] = np.nan
    low = signal.min if rule.min is None else max(signal.min, rule.min)
    high = signal.max if rule.max is None else min(signal.max, rule.max)
    outside = (value < low) | (value > high)  # NaN compares false: not counted twice
    value[outside] = np.nan
    masked.add(signal.name, "not_finite", int(infinite.sum()))
    masked.add(signal.name, "invalid_code", int(bad_code.sum()))
    masked.add(signal.name, "out_of_range", int(outside.sum()))
    return value


def _is_code(values: FloatArray, codes: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    """Whether each value is one of the codes; 66.535 is also what a float32 column makes of it, 66.53500366."""
    if not codes:
        return np.zeros(values.shape, bool)
    with np.errstate(over="ignore"):
        return np.isin(values, codes) | np.isin(values.astype(np.float32), np.array(codes, np.float32))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which V_2 stands before V_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
