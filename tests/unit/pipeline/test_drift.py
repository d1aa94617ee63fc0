from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.bundle import DriftReference, DriftReferenceVariable
from edge_agent.pipeline.drift import Counted, DriftCounter, count, stratum
from edge_agent.pipeline.outcomes import Scored, Scores, Window
from tests.telemetry import CATALOGUE, PUMP, column, quiet

SPEED = "Vehicle.Speed"
REFERENCE = DriftReference(
    variables=(
        DriftReferenceVariable(name=SPEED, kind="signal", edges=(0.0, 100.0), counts={}),
        DriftReferenceVariable(name="f1", kind="feature", edges=(1.0,), counts={}),
        DriftReferenceVariable(name="type_probability.b", kind="score", edges=(0.5,), counts={}),
    )
)


def window(**roles: float) -> Window:
    block = quiet(range(300))
    for role, value in roles.items():
        block.scalars[:, column(role)] = value
    return Window(
        299.0, block.scalars.astype(np.float32), np.zeros((30, 1), np.float32), np.zeros((30, 1), np.float32), 60.0, 1.0
    )


def scored(end_s: float, speed: float, feature: float, probability: float, group: str = "driving") -> Scored:
    w = window(speed=speed)
    w = Window(end_s, w.values, w.cell_voltage, w.cell_temperature, 60.0, 1.0)
    features = np.array([0.0, feature], np.float32)
    scores = Scores(features, features, type_probability=np.array([0.1, probability], np.float32))
    return Scored(w, scores, group)  # type: ignore[arg-type]


def counter(**more: Any) -> DriftCounter:
    return DriftCounter(REFERENCE, CATALOGUE, features=("f0", "f1"), failure_types=("a", "b"), **more)


def table(taken: tuple[Counted, ...]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(v.name, v.stratum): v.counts for counted in taken for v in counted.variables}


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True)), st.lists(st.floats(-1e6, 1e6), min_size=1, unique=True)
)
def test_every_value_lands_in_exactly_one_bin(values: list[float], edges: list[float]) -> None:
    counts = count(sorted(edges), values)
    assert counts.shape == (len(edges) + 2,)
    assert counts.sum() == len(values)
    assert counts[-1] == np.isnan(values).sum()


def test_a_value_on_an_edge_belongs_above_it() -> None:
    assert count([1.0, 2.0], [0.9, 1.0, 1.9, 2.0, np.nan]).tolist() == [1, 2, 1, 1]


def test_signals_are_counted_over_the_newest_stride_and_features_once_a_window() -> None:
    drift = counter()
    drift.add(scored(299.0, 50.0, 2.0, 0.7))
    drift.add(scored(359.0, np.nan, np.nan, 0.2))
    taken = drift.take()
    assert table(taken) == {
        (SPEED, "driving"): (0, 60, 0, 60),
        ("f1", "driving"): (0, 1, 1),
        ("type_probability.b", "driving"): (1, 1, 0),
    }
    assert [(c.first_s, c.last_s, c.windows) for c in taken] == [(299.0, 359.0, 2)]
    assert drift.take() == (), "taking begins anew"


def test_counts_of_two_spans_add_up_to_the_counts_of_both() -> None:
    items = [scored(60.0 * i, 40.0 * i, float(i), i / 5, "driving" if i % 2 else "parked") for i in range(5)]
    whole, parts = counter(), counter()
    for item in items:
        whole.add(item)
    totals: dict[tuple[str, str], np.ndarray] = {}
    for item in items:
        parts.add(item)
        for key, counts in table(parts.take()).items():
            totals[key] = totals.get(key, 0) + np.array(counts)
    assert {k: tuple(v) for k, v in totals.items()} == table(whole.take())


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"speed": 40.0}, "driving"),
        ({"speed": 0.0, "is_charging": 1.0}, "charging"),
        ({"speed": 0.0, "is_charging": 0.0, "pack_current": 30.0}, "parked"),
        ({"speed": 0.0, "is_charging": np.nan, "pack_current": 30.0}, "charging"),
        ({"speed": 0.0, "is_charging": np.nan, "pack_current": -1.0}, "parked"),
        ({"speed": np.nan, "is_charging": np.nan, "pack_current": np.nan}, "all"),
    ],
)
def test_the_stratum_is_what_the_vehicle_did(roles: dict[str, float], expected: str) -> None:
    assert stratum(window(**roles), CATALOGUE) == expected


def test_a_schema_without_such_roles_is_one_stratum() -> None:
    none = np.zeros((30, 1), np.float32)
    assert stratum(Window(0.0, np.ones((300, 2), np.float32), none, none, 60.0, 1.0), PUMP) == "all"


def spans(drift: DriftCounter, items: list[Scored]) -> list[Counted]:
    """What leaves while windows come, as the pipeline asks for it, and at the end."""
    taken: list[Counted] = []
    for item in items:
        if drift.due(item.window.end_s):
            taken += drift.take()
        drift.add(item)
    return taken + list(drift.take())


def test_a_span_is_over_when_its_time_has_passed_or_was_set_back() -> None:
    drift = counter(publish_s=600.0)
    assert not drift.due(1e9)
    drift.add(scored(1000.0, 1.0, 1.0, 0.5))
    assert [drift.due(t) for t in (999.0, 1000.0, 1599.9, 1600.0)] == [True, False, False, True]


@given(
    st.lists(st.tuples(st.floats(1.0, 2000.0), st.sampled_from(["driving", "parked"])), max_size=30),
    st.integers(0, 30),
    st.floats(60.0, 5000.0),
)
def test_every_window_is_in_exactly_one_span_and_stratum_also_over_a_restart(
    steps: list[tuple[float, str]], at: int, publish_s: float
) -> None:
    now_s, items = 0.0, []
    for step_s, group in steps:
        now_s += step_s
        items.append(scored(now_s, 40.0, 1.0, 0.5, group))
    whole = spans(counter(publish_s=publish_s), items)
    assert sum(c.windows for c in whole) == len(items)
    assert len({(c.key, c.stratum) for c in whole}) == len(whole)
    assert all(c.last_s - c.first_s < publish_s for c in whole)
    for c in whole:
        assert all(sum(v.counts) == c.windows * (60 if v.name == SPEED else 1) for v in c.variables)
    first, second = counter(publish_s=publish_s), counter(publish_s=publish_s)
    before = []
    for item in items[:at]:
        before += first.take() if first.due(item.window.end_s) else ()
        first.add(item)
    assert second.restore(first.state()) == 0
    assert second.state() == first.state()
    assert before + spans(second, items[at:]) == whole


def test_a_restart_on_another_timeline_keeps_the_spans_key() -> None:
    first, second = counter(timeline="boot-1"), counter(timeline="boot-2")
    first.add(scored(500.0, 1.0, 1.0, 0.5))
    second.restore(first.state(), shift_s=-400.0)
    second.add(scored(160.0, 1.0, 1.0, 0.5))
    (taken,) = second.take()
    assert (taken.key, taken.first_s, taken.last_s, taken.windows) == ("boot-1/0/500000", 100.0, 160.0, 2)
    second.add(scored(500.0, 1.0, 1.0, 0.5))
    assert second.open[0].key == "boot-2/1/500000"


def test_counts_of_other_bins_are_refused_and_no_key_comes_twice() -> None:
    first, second = counter(reference_id="old"), counter(reference_id="new")
    for end_s in (500.0, 560.0):
        first.add(scored(end_s, 1.0, 1.0, 0.5))
    assert second.restore(first.state()) == 2
    assert second.open == ()
    second.add(scored(500.0, 1.0, 1.0, 0.5))
    assert second.open[0].key == "/1/500000"
