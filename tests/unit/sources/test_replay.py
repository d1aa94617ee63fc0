"""Recordings as a source: what is read, what is refused, and each fault as one clear line."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError, SourceError, VoltwatchError
from edge_agent.contract.mapping import Mapping, parse_mapping
from edge_agent.mappings import packaged, read_mapping
from edge_agent.sources.replay import Recording, open_recording
from tests.telemetry import CATALOGUE, column

CELLS = "Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages"
MAPPING = f"""
[source.time]
column = "t"
[signals."Vehicle.Speed"]
column = "speed"
[signals."Vehicle.Powertrain.TractionBattery.CurrentCurrent"]
column = "amps"
scale = -1.0
[signals."Vehicle.Powertrain.TractionBattery.Charging.IsCharging"]
column = "status"
codes = {{ "1" = 1, "3" = 0 }}
[signals."{CELLS}"]
columns = "V_*"
invalid = [66.535]
"""


def mapping(text: str = MAPPING) -> Mapping:
    return parse_mapping(text, "map.toml")


def columns(n: int = 20) -> dict[str, np.ndarray]:
    return {
        "t": 1.6e9 + np.arange(n, dtype=np.float64),
        "speed": np.linspace(0, 100, n),
        "amps": np.full(n, 12.5),
        "status": np.where(np.arange(n) < 10, 1, 3).astype(np.int64),
        "V_1": np.full(n, 3.7, np.float32),
        "V_10": np.full(n, 3.9, np.float32),
        "V_2": np.where(np.arange(n) == 5, 66.535, 3.8).astype(np.float32),
        "note": np.full(n, "text"),
    }


def write_csv(path: Path, table: dict[str, np.ndarray], delimiter: str = ",") -> Path:
    lines = [delimiter.join(table)] + [delimiter.join(str(v) for v in row) for row in zip(*table.values(), strict=True)]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def everything(recording: Recording, rows: int = 7) -> ArrivalBlock:
    return ArrivalBlock.concatenate(list(recording.blocks(rows)))


def fault(path: Path, kind: type[VoltwatchError], *words: str, text: str = MAPPING) -> None:
    with pytest.raises(kind) as caught:
        everything(open_recording(path, mapping(text), CATALOGUE, origin="map.toml"))
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


@pytest.fixture(params=["r.parquet", "r.csv", "r.csv.gz", "semicolon.csv", "tab.csv"])
def recording_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns()), path)
        return path
    return write_csv(path, columns(), {"semicolon.csv": ";", "tab.csv": "\t"}.get(request.param, ","))


def test_every_kind_of_file_gives_the_same_arrivals(recording_file: Path) -> None:
    recording = open_recording(recording_file, mapping(), CATALOGUE)
    block = everything(recording)
    assert block.time_s.tolist() == columns()["t"].tolist()
    assert block.scalars[:, column("pack_current")].tolist() == [-12.5] * 20
    assert block.scalars[:, column("is_charging")].tolist() == [1.0] * 10 + [0.0] * 10
    assert recording.bound.cells() == 3
    assert np.allclose(block.cell_voltage[0], [3.7, 3.8, 3.9]), "V_2 stands before V_10"
    assert np.isnan(block.cell_voltage[5, 1])
    assert recording.masked.counts == {(CELLS, "invalid_code"): 1}
    assert len(recording.content_hash) == 64


def test_a_missing_file_a_directory_and_an_empty_file_are_said_plainly(tmp_path: Path) -> None:
    fault(tmp_path / "absent.parquet", SourceError, "absent.parquet", "no such file")
    fault(tmp_path, SourceError, "directory")
    (tmp_path / "empty.csv").touch()
    fault(tmp_path / "empty.csv", SourceError, "empty")


def test_a_parquet_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table(columns(2000)), whole)
    data = whole.read_bytes()
    for length in range(1, len(data), 1499):
        cut = tmp_path / "cut.parquet"
        cut.write_bytes(data[:length])
        fault(cut, SourceError, "cut.parquet")


def test_a_parquet_file_damaged_inside_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table(columns(20_000)), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(bytes(data))
    fault(path, SourceError, "damaged.parquet")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.parquet"
    path.write_bytes(b"\x89PNG" + bytes(100))
    fault(path, SourceError, "not a Parquet file")
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    fault(path, SourceError, "neither Parquet nor CSV")


def test_a_csv_file_cut_in_a_line_names_the_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", columns())
    text = path.read_text()
    path.write_text(text[: text.rstrip().rindex(",") - 6])
    fault(path, SourceError, "line 21", "cut")


def test_a_csv_gz_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv.gz", columns(5000))
    path.write_bytes(path.read_bytes()[:-200])
    fault(path, SourceError, "r.csv.gz")


def test_text_in_a_column_of_numbers_names_column_and_line(tmp_path: Path) -> None:
    table = columns()
    table["speed"] = np.array(["fast" if i == 4 else str(i) for i in range(20)])
    fault(write_csv(tmp_path / "r.csv", table), SourceError, "speed", "fast", "line 6")
    pq.write_table(pa.table(table), tmp_path / "r.parquet")
    fault(tmp_path / "r.parquet", SourceError, "speed", "not numbers")


def test_empty_fields_and_nulls_are_nothing_arrived(tmp_path: Path) -> None:
    table = columns()
    table["speed"] = np.array(["" if i % 2 else "NULL" if i % 4 else "5" for i in range(20)])
    block = everything(open_recording(write_csv(tmp_path / "r.csv", table), mapping(), CATALOGUE))
    assert np.isfinite(block.scalars[:, 0]).tolist() == [i % 4 == 0 for i in range(20)]
    nulls = pa.table({**columns(), "speed": pa.array([None if i % 4 else 5 for i in range(20)], pa.int32())})
    pq.write_table(nulls, tmp_path / "r.parquet")
    again = everything(open_recording(tmp_path / "r.parquet", mapping(), CATALOGUE))
    assert np.array_equal(again.scalars, block.scalars, equal_nan=True)


@pytest.mark.parametrize(
    ("stamps", "kind"),
    [
        (["2020-09-13 20:26:40", "2020-09-13 20:26:41.500"], "csv"),
        (["2020-09-13T20:26:40Z", "2020-09-13T20:26:41.500Z"], "csv"),
        (["2020-09-14T04:26:40+08:00", "2020-09-14T04:26:41.500+08:00"], "csv"),
        (["2020-09-13 20:26:40", "2020-09-13 20:26:41.500"], "parquet"),
    ],
)
def test_time_stamps_without_a_zone_are_shifted_by_the_mapping(tmp_path: Path, stamps: list[str], kind: str) -> None:
    table = {k: v[:2] for k, v in columns().items()} | {"t": np.array(stamps)}
    path = tmp_path / f"r.{kind}"
    if kind == "csv":
        write_csv(path, table)
    else:
        pq.write_table(pa.table(table | {"t": np.array(stamps, "datetime64[us]")}), path)
    text = MAPPING.replace('column = "t"', 'column = "t"\nutc_offset_h = 8.0')
    assert everything(open_recording(path, mapping(text), CATALOGUE)).time_s.tolist() == [1.6e9, 1.6e9 + 1.5]


def test_a_spreadsheets_time_stamps_are_read_and_nonsense_names_the_line(tmp_path: Path) -> None:
    table = {k: v[:2] for k, v in columns().items()} | {"t": np.array(["2020/9/13 12:26:40", "2020/9/13 12:26:41"])}
    path = write_csv(tmp_path / "r.csv", table)
    assert everything(open_recording(path, mapping(), CATALOGUE)).time_s.tolist() == [1.6e9, 1.6e9 + 1]
    path.write_text(path.read_text().replace("2020/9/13 12:26:41", "yesterday"))
    fault(path, SourceError, "line 3", "yesterday", "2024-05-06T07:08:09")


@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_list_columns_of_parquet_are_vectors(tmp_path: Path, kind: str) -> None:
    lists = [None, [3.5, 3.6, 3.7], None, [3.51, None, 3.71], None]
    if kind == "list":
        lists[4] = [3.9, 3.8, 3.7, 3.6]  # longer than the first: what is over is left
    type_ = pa.list_(pa.float32()) if kind == "list" else pa.list_(pa.float32(), 3)
    pq.write_table(pa.table({"t": np.arange(5.0), "cells": pa.array(lists, type_)}), tmp_path / "r.parquet")
    text = f'[source.time]\ncolumn = "t"\n[signals."{CELLS}"]\ncolumns = "cells"\n'
    recording = open_recording(tmp_path / "r.parquet", mapping(text), CATALOGUE)
    for rows in (5, 2):
        block = everything(recording, rows)
        expected = np.full((5, 3), np.nan)
        expected[1], expected[3] = [3.5, 3.6, 3.7], [3.51, np.nan, 3.71]
        if kind == "list":
            expected[4] = [3.9, 3.8, 3.7]
        assert np.allclose(block.cell_voltage, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MAPPING.replace("Vehicle.Speed", "Vehicle.Sped"), ("unknown signal", "Vehicle.Speed")),
        (MAPPING.replace('"speed"', '"sped"'), ("sped", "did you mean 'speed'")),
        (MAPPING.replace('"V_*"', '"W_*"'), ("W_*",)),
        (MAPPING.replace('column = "t"', 'column = "tt"'), ("tt",)),
        (MAPPING.replace('[source.time]\ncolumn = "t"', ""), ("no time column",)),
        (MAPPING.replace('"1" = 1', '"one" = 1'), ("one", "not a number")),
        (MAPPING.replace("scale", "scael"), ("scael",)),
    ],
)
def test_a_mapping_that_does_not_fit_says_what_and_where(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    fault(write_csv(tmp_path / "r.csv", columns()), ConfigError, "map.toml", *words, text=text)


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table(columns()), tmp_path / "r.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what the import system itself does for "not there"
    fault(tmp_path / "r.parquet", ConfigError, "pip install 'voltwatch[parquet]'")
    assert len(everything(open_recording(write_csv(tmp_path / "r.csv", columns()), mapping(), CATALOGUE))) == 20


def test_packaged_mappings_are_found_by_name_and_read_by_path(tmp_path: Path) -> None:
    assert packaged() == ("ev_catalogue", "vehicle_a", "vehicle_b")
    found = read_mapping("vehicle_a")
    path = tmp_path / "mine.toml"
    path.write_bytes(found.text)
    assert read_mapping(path).mapping == found.mapping
    assert read_mapping("vehicle_a.toml") == found
    with pytest.raises(ConfigError, match="did you mean the packaged 'vehicle_a'"):
        read_mapping("vehicle_aa.toml")
    with pytest.raises(ConfigError, match="no such file"):
        read_mapping(tmp_path / "vehicle_a.toml")


def test_the_packaged_catalogue_mapping_carries_every_signal() -> None:
    carried = read_mapping("ev_catalogue").mapping
    assert set(carried.signals) == {s.name for s in CATALOGUE}
