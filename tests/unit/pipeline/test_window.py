import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.pipeline.ingest import Ingest
from edge_agent.pipeline.outcomes import NoScore, Window
from edge_agent.pipeline.window import Windower
from tests.telemetry import CATALOGUE, PUMP, column, cut, quiet

SPEED = column("speed")


def windower(period_s: float = 1.0, spec: WindowSpec | None = None, **more: object) -> Windower:
    return Windower(CATALOGUE, spec or WindowSpec(), period_s, 8, 4, **more)  # type: ignore[arg-type]


def run(target: Windower, blocks: list[ArrivalBlock]) -> list[Window | NoScore]:
    ended: list[Window | NoScore] = []
    for block in blocks:
        ended += target.push(block)
    return ended + target.flush()


def same(a: list[Window | NoScore], b: list[Window | NoScore]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if isinstance(x, NoScore) or isinstance(y, NoScore):
            if x != y:
                return False
            continue
        if (x.end_s, x.elapsed_s, x.coverage) != (y.end_s, y.elapsed_s, y.coverage):
            return False
        for name in ("values", "cell_voltage", "cell_temperature"):
            if not np.array_equal(getattr(x, name), getattr(y, name), equal_nan=True):
                return False
    return True


def ramp(times: np.ndarray) -> ArrivalBlock:
    block = quiet(times)
    block.scalars[:, SPEED] = np.arange(len(block)) % 250
    block.cell_voltage[:] += (np.arange(len(block)) % 100)[:, None] / 1000
    return block


def test_three_hundred_frames_then_one_window_a_minute() -> None:
    ended = run(windower(), [quiet(1000.0 + np.arange(600))])
    assert [w.end_s for w in ended] == [1299.0, 1359.0, 1419.0, 1479.0, 1539.0, 1599.0]
    first = ended[0]
    assert isinstance(first, Window)
    assert first.values.shape == (300, len(CATALOGUE.scalars))
    assert first.cell_voltage.shape == (30, 8)
    assert first.cell_temperature.shape == (30, 4)
    assert first.values.dtype == first.cell_voltage.dtype == np.float32
    assert first.coverage == 1.0
    assert [w.elapsed_s for w in ended if isinstance(w, Window)] == [300.0, 60.0, 60.0, 60.0, 60.0, 60.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 1500), max_size=12))
def test_a_block_cut_anywhere_gives_the_same_windows(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    block = ramp(
        np.cumsum(rng.choice([0.0, 0.3, 1.0, 1.0, 1.0, 4.0, 130.0], 1500, p=[0.1, 0.2, 0.2, 0.2, 0.2, 0.09, 0.01]))
    )
    block.scalars[rng.random(block.scalars.shape) < 0.3] = np.nan
    block.cell_voltage[rng.random(block.cell_voltage.shape) < 0.5] = np.nan
    assert same(run(windower(), [block]), run(windower(), cut(block, cuts)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_shuffling_within_the_horizon_gives_the_same_windows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = ramp(np.arange(700.0))
    order = np.argsort(block.time_s + rng.uniform(-0.99, 0.99, 700), kind="stable")
    ingest = Ingest(horizon_s=2.0)
    pieces = [ingest.push(b) for b in cut(block.take(order), [100, 350, 351])]
    assert same(run(windower(), [block]), run(windower(), [b for b in [*pieces, ingest.flush()] if len(b)]))


def test_row_by_row_is_the_same_as_a_block() -> None:
    block = ramp(np.arange(500.0) + 0.25)
    assert same(run(windower(), [block]), run(windower(), cut(block, list(range(500)))))


def test_a_value_is_held_as_long_as_its_max_age_and_no_longer() -> None:
    block = quiet(np.arange(300.0))
    block.scalars[100:150, SPEED] = np.nan  # max_age_s is 5
    window = run(windower(), [block])[0]
    assert isinstance(window, Window)
    present = np.isfinite(window.values[:, SPEED])
    assert present[:105].all(), "the value of frame 99 stands to 104"
    assert not present[105:150].any()
    assert present[150:].all()


def test_a_value_from_before_the_window_is_held_into_it() -> None:
    block = quiet(np.arange(400.0))
    odometer = column("odometer")  # max_age_s 60
    block.scalars[:, odometer] = np.nan
    block.scalars[50, odometer] = 1234.0
    second = run(windower(), [block])[1]  # frames 60 to 359
    assert isinstance(second, Window)
    assert (second.values[:51, odometer] == 1234.0).all()
    assert np.isnan(second.values[51:, odometer]).all()


def test_the_newest_arrival_of_a_frame_stands() -> None:
    block = quiet(np.repeat(np.arange(300.0), 3) + np.tile([-0.8, -0.5, 0.0], 300))
    block.scalars[:, SPEED] = np.tile([1.0, 2.0, np.nan], 300)
    window = run(windower(), [block])[0]
    assert isinstance(window, Window)
    assert (window.values[:, SPEED] == 2.0).all()


@pytest.mark.parametrize("period_s", [10.0, 30.0])
def test_a_sparse_source_has_nan_between_arrivals_and_full_coverage(period_s: float) -> None:
    ended = run(windower(period_s), [quiet(np.arange(0.0, 1200.0, period_s))])
    assert [b.end_s - a.end_s for a, b in itertools.pairwise(ended)] == [60.0] * (len(ended) - 1)
    window = ended[0]
    assert isinstance(window, Window)
    assert window.coverage == 1.0
    assert np.isfinite(window.values[:, SPEED]).sum() == 300 / period_s
    slow_rows = np.isfinite(window.cell_voltage).all(axis=1).sum()
    assert slow_rows == 300 / max(period_s, 10.0)


def test_coverage_counts_against_the_period_of_the_source() -> None:
    every_ten = quiet(np.arange(0.0, 600.0, 10.0))
    at_one = run(windower(1.0), [every_ten])[0]
    at_ten = run(windower(10.0), [every_ten])[0]
    assert isinstance(at_ten, Window)
    assert at_ten.coverage == 1.0
    coverage = at_one.coverage if isinstance(at_one, Window) else 0.0
    assert coverage < at_ten.coverage, "held for some seconds, silent for others"


def test_too_little_coverage_is_no_score_and_names_what_is_stale() -> None:
    block = quiet(np.arange(600.0))
    block.scalars[20:] = np.where(np.arange(len(CATALOGUE.scalars)) == SPEED, block.scalars[20:], np.nan)
    block.cell_voltage[20:] = np.nan
    block.cell_temperature[20:] = np.nan
    last = run(windower(), [block])[-1]
    assert isinstance(last, NoScore)
    assert last.reason == "low_coverage"
    assert "Vehicle.TraveledDistance" in last.detail
    assert "more" in last.detail


@pytest.mark.parametrize("name", CATALOGUE.scalar_names)
def test_one_signal_that_dies_is_named_and_does_not_block(name: str) -> None:
    block = quiet(np.arange(1500.0))
    block.scalars[10:, CATALOGUE.scalar_index[name]] = np.nan
    target = windower()
    last = run(target, [block])[-1]
    assert isinstance(last, Window)
    assert target.stale == (name,)
    assert last.coverage < 1.0


def test_a_signal_the_source_never_had_lowers_nothing() -> None:
    block = quiet(np.arange(300.0))
    block.scalars[:, [i for i in range(len(CATALOGUE.scalars)) if i != SPEED]] = np.nan
    block.cell_voltage[:] = np.nan
    block.cell_temperature[:] = np.nan
    window = run(windower(), [block])[0]
    assert isinstance(window, Window)
    assert window.coverage == 1.0
    named = run(windower(expected=CATALOGUE.scalar_names), [block])[0]
    assert isinstance(named, NoScore), "the mapping promised them all"


def test_a_gap_over_the_limit_starts_a_new_window() -> None:
    target = windower()
    ended = run(target, [quiet(np.concatenate((np.arange(310.0), 1000.0 + np.arange(400))))])
    assert [w.end_s for w in ended] == [299.0, 1299.0, 1359.0]
    assert target.starts == 2
    assert isinstance(ended[1], Window)
    assert np.isfinite(ended[1].values).all()
    assert ended[1].elapsed_s == 300.0, "never more than a window's length"


def test_a_gap_below_the_limit_is_left_open() -> None:
    target = windower()
    ended = run(target, [quiet(np.concatenate((np.arange(200.0), 300.0 + np.arange(200))))])
    window = ended[0]
    assert isinstance(window, Window)
    assert target.starts == 1
    assert np.isnan(window.values[210:299, SPEED]).all()


def test_a_suspend_is_a_gap_and_not_interpolated() -> None:
    times = np.concatenate((np.arange(299.0), 7500.0 + np.arange(299)))
    assert run(windower(), [quiet(times)]) == []


def test_time_running_backwards_starts_a_new_window() -> None:
    target = windower()
    ended = run(target, [quiet(5000.0 + np.arange(350)), quiet(100.0 + np.arange(350))])
    assert [w.end_s for w in ended] == [5299.0, 399.0]
    assert target.starts == 2
    second = ended[1]
    assert isinstance(second, Window)
    assert 0 < second.elapsed_s <= 300.0


def test_another_schema_without_vectors_has_one_column_of_nan() -> None:
    spec = WindowSpec(frames=60, period_s=0.5, stride_s=10, vector_period_s=5, gap_limit_s=10)
    target = Windower(PUMP, spec, 0.5, 0, 0)
    block = ArrivalBlock(np.arange(0, 60, 0.5), np.full((120, 2), 7.0), np.empty((120, 0)), np.empty((120, 0)))
    ended = run(target, [block])
    assert [w.end_s for w in ended] == [29.5, 39.5, 49.5, 59.5]
    window = ended[0]
    assert isinstance(window, Window)
    assert window.values.shape == (60, 2)
    assert window.cell_voltage.shape == window.cell_temperature.shape == (6, 1)
    assert np.isnan(window.cell_voltage).all()


def test_a_stride_longer_than_the_window_skips_frames() -> None:
    spec = WindowSpec(frames=30, stride_s=100, gap_limit_s=50)
    block = ramp(np.arange(400.0))
    ended = run(windower(spec=spec), [block])
    assert [w.end_s for w in ended] == [29.0, 129.0, 229.0, 329.0]
    assert same(ended, run(windower(spec=spec), cut(block, list(range(400)))))
    assert isinstance(ended[1], Window)
    assert ended[1].values[:, SPEED].tolist() == [float(i) for i in range(100, 130)]


def test_state_restored_in_another_windower_goes_on_exactly() -> None:
    block = ramp(np.arange(900.0))
    whole = run(windower(), [block])
    first, second = windower(), windower()
    ended = first.push(block.take(slice(0, 433)))
    second.restore(first.state())
    assert same(whole, ended + run(second, [block.take(slice(433, None))]))


@pytest.mark.parametrize(
    ("spec", "period_s"),
    [
        (WindowSpec(period_s=2.0, stride_s=120.0), 2.0),
        (WindowSpec(stride_s=30.0), 1.0),
        (WindowSpec(), 2.0),
    ],
)
def test_a_state_of_another_window_or_period_is_refused_and_changes_nothing(spec: WindowSpec, period_s: float) -> None:
    first, second = windower(), windower(spec=spec, period_s=period_s)
    first.push(ramp(np.arange(433.0)))
    with pytest.raises(ValueError, match="another window or period"):
        second.restore(first.state())
    assert second.state().first is None
    assert second.warming_s == spec.length_s
