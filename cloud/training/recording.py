"""A vehicle's raw Parquet as blocks of arrivals, through the same mapping machinery as on the vehicle.

Reads what `firmware-sim generate` writes and what the lake holds: `INPUT/raw_frames/vehicle_id=ID/*.parquet`, or one
`ID.parquet` a vehicle in `INPUT/raw_frames` or in `INPUT` itself. A list column NAME appears as NAME[0], NAME[1], ….
Raises `SourceError` for what is missing, truncated or not Parquet.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError, SourceError
from edge_agent.contract.mapping import BoundMapping, Column, Mapping, Masked
from edge_agent.contract.signals import Catalogue
from edge_agent.contract.topics import check_vehicle_id

NOT_RECORDINGS = frozenset({"labels.parquet", "vehicles.parquet"})


@dataclass(frozen=True, slots=True)
class RawVehicle:
    """One vehicle's files, in order of name."""

    vehicle_id: str
    make: str
    files: tuple[Path, ...]


def find_vehicles(folder: Path) -> list[RawVehicle]:
    """List the vehicles of an input folder, sorted by id."""
    if not folder.is_dir():
        raise SourceError(f"input {folder}: no such folder; `firmware-sim generate --output {folder}` makes one")
    root = folder / "raw_frames" if (folder / "raw_frames").is_dir() else folder
    files: dict[str, tuple[Path, ...]] = {
        path.name.partition("=")[2]: tuple(sorted(path.glob("*.parquet"))) for path in root.glob("vehicle_id=*")
    }
    files.update({p.stem: (p,) for p in root.glob("*.parquet") if p.name not in NOT_RECORDINGS})
    found = {vehicle: paths for vehicle, paths in files.items() if paths}
    if not found:
        raise SourceError(
            f"input {folder}: holds no recording; expected raw_frames/vehicle_id=ID/*.parquet or ID.parquet"
        )
    makes = _makes(folder / "vehicles.parquet")
    return [RawVehicle(check_vehicle_id(v), makes.get(v, ""), found[v]) for v in sorted(found)]


def _makes(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path, columns=["vehicle_id", "make"])
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not readable as Parquet with vehicle_id and make: {_first_line(error)}") from error
    return {row["vehicle_id"]: row["make"] or "" for row in table.to_pylist()}


def fingerprint(vehicles: list[RawVehicle], labels: Path) -> str:
    """SHA-256 over names and bytes of the files, labels included: which data this was."""
    digest = hashlib.sha256()
    for path in [*(p for v in vehicles for p in v.files), *([labels] if labels.exists() else [])]:
        digest.update(f"{path.parent.name}/{path.name}\n".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_columns(files: tuple[Path, ...], origin: str) -> dict[str, Column]:
    """Read the files one after another into columns of n numbers or times, list columns expanded."""
    try:
        # one file at a time: a dataset reader would turn `vehicle_id=` in the path into a column
        table = pa.concat_tables([pq.ParquetFile(path).read() for path in files], promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise SourceError(
            f"recording {origin}: not readable as Parquet (truncated, or another kind of file?): {_first_line(error)}"
        ) from error
    columns: dict[str, Column] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            columns.update(_expand(name, column))
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def _expand(name: str, column: pa.ListArray) -> dict[str, Column]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    width = int(lengths.max(initial=0))
    values = np.full((len(column), width), np.nan, np.float32)
    present = np.arange(width)[None, :] < lengths[:, None]
    values[present] = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    return {f"{name}[{i}]": values[:, i] for i in range(width)}


def blocks(
    columns: dict[str, Column], mapping: Mapping, catalogue: Catalogue, origin: str, masked: Masked, *, rows: int = 8192
) -> Iterator[ArrivalBlock]:
    """Convert a recording's columns to blocks of arrivals. What is masked is counted into `masked`."""
    bound = BoundMapping(mapping, catalogue, list(columns), origin)
    if mapping.source.time is None:
        raise ConfigError(f"mapping {origin}: names no time column; a recording needs [source.time]")
    time_s = bound.times(columns[mapping.source.time.column])
    for start in range(0, len(time_s), rows):
        part = slice(start, start + rows)
        yield bound.convert({name: values[part] for name, values in columns.items()}, time_s[part], masked)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
