import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.pipeline.ingest import STEP_BACK_ROWS, Ingest
from tests.telemetry import CATALOGUE, column, cut, quiet


def through(ingest: Ingest, blocks: list[ArrivalBlock]) -> ArrivalBlock:
    return ArrivalBlock.concatenate([b for b in [*(ingest.push(b) for b in blocks), ingest.flush()] if len(b)])


def distinct(times: list[float]) -> ArrivalBlock:
    block = quiet(times)
    block.scalars[:, column("speed")] = np.arange(len(block)) % 200
    return block


def same(a: ArrivalBlock, b: ArrivalBlock) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True)
        for name in ("time_s", "scalars", "cell_voltage", "cell_temperature")
    )


@given(st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_any_order_within_the_horizon_gives_the_same_rows(lateness: list[float], cuts: list[int]) -> None:
    block = distinct([float(i) for i in range(len(lateness))])
    order = np.argsort(np.arange(len(lateness)) + np.array(lateness), kind="stable")
    shuffled = cut(block.take(order), [min(c, len(lateness)) for c in cuts])
    ingest = Ingest(horizon_s=2.0)
    assert same(through(ingest, shuffled), block)
    assert ingest.counters["rows_late"] == 0


def test_rows_are_held_for_the_horizon_and_no_longer() -> None:
    ingest = Ingest(horizon_s=2.0)
    assert len(ingest.push(quiet([10.0, 11.0, 12.0]))) == 0
    assert ingest.push(quiet([13.5])).time_s.tolist() == [10.0, 11.0]
    assert ingest.pending_rows == 2


def test_a_live_row_passes_through_at_once() -> None:
    ingest = Ingest(horizon_s=0.0)
    assert ingest.push(quiet([10.0])).time_s.tolist() == [10.0]
    assert ingest.push(quiet([10.0])).time_s.tolist() == [10.0], "another CAN frame of the same instant"


def test_a_flood_of_rows_is_held_no_longer_than_the_horizon() -> None:
    ingest = Ingest(horizon_s=2.0)
    for start in range(0, 100, 1):
        ingest.push(quiet(start + np.arange(0, 1, 0.001), cells=0, probes=0))
        assert ingest.pending_rows <= 3001


def test_a_late_row_is_refused_and_counted() -> None:
    ingest = Ingest(horizon_s=2.0)
    out = through(ingest, [distinct([0.0, 1.0, 2.0, 9.0, 3.0, 10.0])])
    assert out.time_s.tolist() == [0.0, 1.0, 2.0, 9.0, 10.0]
    assert ingest.counters["rows_late"] == 1


def test_a_time_that_is_none_is_refused_and_counted() -> None:
    ingest = Ingest()
    out = through(ingest, [quiet([1.0, np.nan, np.inf, -np.inf, 1.7e15, 2.0])])
    assert out.time_s.tolist() == [1.0, 2.0]
    assert ingest.counters["rows_bad_time"] == 4


def test_a_duplicate_row_counts_once_in_whatever_order() -> None:
    rows = distinct([5.0, 5.0, 6.0, 9.0])
    rows.scalars[0, column("pack_current")] = np.nan
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        ingest = Ingest()
        out = through(ingest, [rows.take(np.array(order))])
        assert out.time_s.tolist() == [5.0, 6.0, 9.0]
        assert out.scalars[0, column("pack_current")] == rows.scalars[1, column("pack_current")]
        assert ingest.counters["rows_merged"] == 1


def test_a_clock_set_back_is_followed_after_a_while() -> None:
    ingest = Ingest(horizon_s=2.0)
    before = ingest.push(quiet([1000.0 + i for i in range(10)]))
    rest = [ingest.push(quiet([float(i)])) for i in range(STEP_BACK_ROWS + 10)]
    times = np.concatenate([before.time_s, *(b.time_s for b in rest)])
    assert ingest.counters["clock_set_back"] == 1
    assert ingest.counters["rows_late"] == STEP_BACK_ROWS - 1
    assert times[:10].tolist() == [1000.0 + i for i in range(10)], "what was held comes out first"
    assert (times[10:] < 100).all()
    assert times.shape[0] > 15


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=23, max_size=23))
def test_every_value_is_finite_in_range_or_masked(values: list[float]) -> None:
    block = quiet([0.0, 10.0])
    block.scalars[0] = values
    block.cell_voltage[0, :] = values[:8]
    ingest = Ingest(catalogue=CATALOGUE)
    out = through(ingest, [block])
    kept = out.scalars[0]
    inside = (kept >= CATALOGUE.scalar_min) & (kept <= CATALOGUE.scalar_max)
    assert (inside | np.isnan(kept)).all()
    good = np.isfinite(values) & (values >= CATALOGUE.scalar_min) & (values <= CATALOGUE.scalar_max)
    assert np.array_equal(np.isfinite(kept), good), "a good value is kept, any other is masked"
    masked = int((~good & ~np.isnan(values)).sum())
    cells = np.array(values[:8])
    masked += int(((~np.isnan(cells)) & ~((cells >= 0) & (cells <= 4.8))).sum())
    assert ingest.counters["values_not_finite"] + ingest.counters["values_out_of_range"] == masked
