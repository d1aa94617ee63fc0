import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud.training.recording import find_vehicles, read_columns
from cloud.training.vehicle import decimate
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import SourceError


def test_list_columns_are_expanded_and_null_rows_are_missing(tmp_path):
    path = tmp_path / "a.parquet"
    cells = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"time": [0.0, 1.0, 2.0], "cells": cells}), path)
    columns = read_columns((path,), "a")
    np.testing.assert_array_equal(columns["cells[1]"], [2.0, np.nan, 4.0])


@pytest.mark.parametrize("keep", [0, 3, 100])
def test_a_truncated_recording_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"time": np.arange(1000.0)}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="recording EV_1: not readable as Parquet") as error:
        read_columns((path,), "EV_1")
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        find_vehicles(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no recording"):
        find_vehicles(tmp_path)


def test_both_layouts_are_found_and_labels_are_no_vehicle(tmp_path):
    table = pa.table({"time": [0.0]})
    (tmp_path / "raw_frames" / "vehicle_id=EV_2").mkdir(parents=True)
    pq.write_table(table, tmp_path / "raw_frames" / "vehicle_id=EV_2" / "part-0.parquet")
    pq.write_table(table, tmp_path / "raw_frames" / "EV_1.parquet")
    pq.write_table(table, tmp_path / "labels.parquet")
    assert [v.vehicle_id for v in find_vehicles(tmp_path)] == ["EV_1", "EV_2"]


def test_decimation_keeps_the_newest_value_of_each_span_and_reaches_into_no_other():
    time = np.arange(20.0)
    scalars = np.column_stack([time, np.where(time == 3, 7.0, np.nan)])
    cells = np.where(time[:, None] == 12, 3.7, np.nan)
    slow = decimate(ArrivalBlock(time, scalars, cells, np.empty((20, 0))), 10.0)
    np.testing.assert_array_equal(slow.time_s, [9.0, 19.0])
    np.testing.assert_array_equal(slow.scalars, [[9.0, 7.0], [19.0, np.nan]])
    np.testing.assert_array_equal(slow.cell_voltage, [[np.nan], [3.7]])
