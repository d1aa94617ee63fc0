import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud.training.labels import Episode, label_windows, read_episodes
from edge_agent.contract.errors import SourceError
from edge_agent.contract.signals import FAILURE_TYPES

NAN = float("nan")
BEARING = FAILURE_TYPES.index("motor_bearing_wear")


def episode(**changes: object) -> Episode:
    values: dict[str, object] = {
        "vehicle_id": "V", "failure_type": "motor_bearing_wear", "onset_s": 1000.0,
        "level_s": (2000.0, 3000.0, 4000.0, NAN), "failure_s": NAN, "end_s": 5000.0, "predictable": True,
    }  # fmt: skip
    return Episode(**(values | changes))  # type: ignore[arg-type]


def labels(end_s: list[float], *episodes: Episode, horizon_s: float = 1e9):
    return label_windows(np.array(end_s), list(episodes), horizon_s=horizon_s, window_length_s=300.0)


def test_severity_follows_the_levels_reached_and_one_never_reached_is_not_given():
    got = labels([1999.0, 2000.0, 3500.0, 4999.0], episode())
    assert got.severity_index.tolist() == [-1, 0, 1, 2]
    assert got.type_index.tolist() == [-1, BEARING, BEARING, BEARING]


def test_the_gray_zone_is_neither_healthy_nor_a_failure():
    got = labels([999.0, 1500.0, 5200.0, 5300.0], episode())
    assert got.healthy.tolist() == [True, False, False, True]  # 5200: the window still holds frames before the repair
    assert not got.failure.any()
    assert got.at_work.tolist() == [0, 1 << BEARING, 1 << BEARING, 0]


def test_the_failure_label_begins_at_the_horizon():
    got = labels([2500.0, 4100.0], episode(failure_s=4600.0), horizon_s=1000.0)
    assert got.failure.tolist() == [False, True]
    assert got.type_index.tolist() == [BEARING, BEARING]


def test_an_unpredictable_failure_is_not_visible_before_it_happens():
    got = labels([3500.0, 4600.0], episode(failure_s=4600.0, predictable=False))
    assert got.type_index.tolist() == [-1, BEARING]
    assert got.failure.tolist() == [False, True]
    assert not got.healthy.any()


def test_of_two_failures_at_a_time_the_worse_one_is_the_label_and_both_are_at_work():
    other = episode(failure_type="charging_fault", level_s=(1000.0, 1000.0, 1000.0, 1000.0))
    for order in ((episode(), other), (other, episode())):
        got = labels([2500.0], *order)
        assert got.type_index.tolist() == [FAILURE_TYPES.index("charging_fault")]
        assert got.at_work.tolist() == [1 << BEARING | 1 << FAILURE_TYPES.index("charging_fault")]


def write(path, **columns):
    full = {
        "vehicle_id": ["V"], "failure_type": ["motor_bearing_wear"], "onset_s": [1.0], "low_s": [2.0],
        "medium_s": [3.0], "high_s": [None], "critical_s": [None], "failure_s": [None], "end_s": [9.0],
    } | columns  # fmt: skip
    pq.write_table(pa.table({k: v for k, v in full.items() if v is not None}), path)


def test_null_times_mean_never_reached(tmp_path):
    write(tmp_path / "labels.parquet")
    (got,) = read_episodes(tmp_path / "labels.parquet")["V"]
    assert got.level_s[:2] == (2.0, 3.0)
    assert np.isnan(got.level_s[2])
    assert got.predictable


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"failure_type": ["rust"]}, "unknown failure_type 'rust'"),
        ({"end_s": None}, "lacks column end_s"),
        ({"end_s": [0.5]}, "ends before its onset"),
    ],
)
def test_a_bad_labels_file_is_one_clear_line(tmp_path, change, says):
    write(tmp_path / "labels.parquet", **change)
    with pytest.raises(SourceError, match=says) as error:
        read_episodes(tmp_path / "labels.parquet")
    assert "\n" not in str(error.value)


def test_a_truncated_labels_file_is_refused(tmp_path):
    write(tmp_path / "whole.parquet")
    (tmp_path / "labels.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    with pytest.raises(SourceError, match="not readable as Parquet"):
        read_episodes(tmp_path / "labels.parquet")
