"""Distances of counts: by hand, by their laws, and against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial import distance
from scipy.stats import ks_2samp

from cloud.drift import statistics
from cloud.drift.bins import Bins
from edge_agent.contract import drift_measure
from edge_agent.contract.bundle import DriftReference, DriftReferenceVariable
from edge_agent.contract.messages import DriftVariable
from edge_agent.pipeline.drift import count

COUNTS = arrays.arrays(np.int64, st.integers(2, 12), elements=st.integers(0, 10_000)).filter(lambda c: c.sum() > 0)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    first = draw(COUNTS)
    second = draw(arrays.arrays(np.int64, first.shape, elements=st.integers(0, 10_000)).filter(lambda c: c.sum() > 0))
    return first, second


def test_the_stability_index_is_the_one_computed_by_hand() -> None:
    # (10.5, 30.5) / 41 against (20.5, 20.5) / 41
    p, q = (10.5 / 41, 30.5 / 41), (0.5, 0.5)
    expected = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert float(statistics.psi([10, 30], [20, 20])) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.26007, abs=1e-4)


def test_jensen_shannon_and_ks_are_the_ones_computed_by_hand() -> None:
    assert float(statistics.jensen_shannon([1, 0], [0, 1])) == 1.0
    # half of one side lies where the other has nothing: JSD = (1·log2(1/.75) + .5·log2(.5/.75) + .5·log2(.5/.25)) / 2
    divergence = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5) / 2
    assert float(statistics.jensen_shannon([2, 0], [1, 1])) == pytest.approx(math.sqrt(divergence))
    assert float(statistics.ks([1, 1, 2], [2, 1, 1])) == pytest.approx(0.25)
    assert float(statistics.ks([10, 10, 0], [8, 8, 4])) == pytest.approx(0.2)  # a fifth is missing


@given(pairs())
def test_every_distance_is_symmetric_and_within_its_range(both: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = both
    for measure, most in ((statistics.psi, np.inf), (statistics.jensen_shannon, 1.0), (statistics.ks, 1.0)):
        there, back = float(measure(first, second)), float(measure(second, first))
        assert there == pytest.approx(back, abs=1e-12)
        assert 0 <= there <= most


@given(COUNTS, st.integers(1, 1000))
def test_every_distance_is_zero_at_equality_and_knows_shares_not_amounts(counts: np.ndarray, times: int) -> None:
    assert float(statistics.psi(counts, counts)) == 0
    for measure in (statistics.jensen_shannon, statistics.ks):
        assert float(measure(counts, times * counts)) == pytest.approx(0, abs=1e-6)


@given(pairs())
def test_jensen_shannon_is_scipys(both: tuple[np.ndarray, np.ndarray]) -> None:
    expected = distance.jensenshannon(*both, base=2)
    assert float(statistics.jensen_shannon(*both)) == pytest.approx(float(expected), abs=1e-7)


def test_ks_is_never_above_that_of_the_raw_values_and_equal_to_it_in_the_limit_of_fine_bins() -> None:
    random = np.random.default_rng(3)
    first, second = random.normal(0, 1, 800), random.normal(0.4, 1.2, 500)
    raw = float(ks_2samp(first, second).statistic)
    found = []
    for edges in (9, 99, 100_000):
        inner = np.linspace(-5, 6, edges)
        found.append(float(statistics.ks(count(inner, first), count(inner, second))))
    assert found[0] < raw  # ten bins do not see all of it
    assert found[0] <= found[1] <= found[2] + 1e-12
    assert found[2] == pytest.approx(raw, abs=1e-9)


def test_one_side_without_counts_has_no_distance() -> None:
    assert math.isnan(float(statistics.jensen_shannon([0, 0], [1, 2])))
    assert math.isnan(float(statistics.ks([1, 2], [0, 0])))


def test_an_empty_bin_is_finite_and_weighs_less_the_less_was_counted() -> None:
    few, many = float(statistics.psi([100, 100], [10, 0])), float(statistics.psi([100, 100], [1000, 0]))
    assert 0 < few < many < np.inf


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_shares_add_up_to_one_and_none_is_above_the_cap(windows: list[int], cap: float) -> None:
    share = drift_measure.shares(windows, cap)
    assert share.sum() == pytest.approx(1.0)
    assert share.max() <= max(cap, 1 / len(windows)) + 1e-9
    order = np.argsort(windows)
    assert (np.diff(share[order]) >= -1e-12).all()  # who has more never weighs less


def test_the_cap_gives_what_it_cuts_to_the_others_in_proportion() -> None:
    share = drift_measure.shares([700, 200, 100], 0.5)
    assert share.tolist() == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert drift_measure.shares([700, 200, 100], 1 / 3).tolist() == pytest.approx([1 / 3] * 3)  # no other way
    assert drift_measure.shares([700, 200, 100], 0.05).tolist() == pytest.approx([1 / 3] * 3)  # too few for the cap
    assert drift_measure.shares([70, 20, 10], 1.0).tolist() == pytest.approx([0.7, 0.2, 0.1])


def test_effective_sizes_are_the_true_ones_of_an_equal_merge_and_less_of_an_uneven_one() -> None:
    assert drift_measure.effective(np.full(8, 1 / 8), [300.0] * 8) == pytest.approx((8, 300))
    vehicles, each = drift_measure.effective(np.array([0.5, 0.25, 0.25]), [100, 100, 100])
    assert vehicles == pytest.approx(1 / 0.375)
    assert each == pytest.approx(100)
    _, uneven = drift_measure.effective(np.full(2, 0.5), [10, 1000])
    assert uneven == pytest.approx(2 / (1 / 10 + 1 / 1000))  # the poorer one decides


REFERENCE = DriftReference(
    variables=(
        DriftReferenceVariable(name="b", kind="signal", edges=(0.0, 1.0), counts={"driving": (5, 6, 7, 8)}),
        DriftReferenceVariable(name="a", kind="feature", edges=(0.0,), counts={"driving": (1, 2, 3)}),
        DriftReferenceVariable(name="c", kind="score", edges=(0.5,), counts={}),
    )
)


def test_a_row_holds_every_variable_once_and_distances_are_those_of_the_variable_alone() -> None:
    bins = Bins(REFERENCE)
    told = (
        DriftVariable(name="a", stratum="driving", counts=(3, 2, 1)),
        DriftVariable(name="b", stratum="driving", counts=(9, 0, 0, 1)),
    )
    row = bins.flatten(told)
    assert row.tolist() == [3, 2, 1, 9, 0, 0, 1, 0, 0, 0]
    assert bins.flatten(told[::-1]).tolist() == row.tolist()  # whatever the order
    reference = bins.reference_row("driving")
    assert reference.tolist() == [1, 2, 3, 5, 6, 7, 8, 0, 0, 0]
    a, b, c = bins.distances(reference, row)
    assert a is not None
    assert b is not None
    assert c is None  # the reference knows nothing of it
    assert a.psi == pytest.approx(float(statistics.psi([1, 2, 3], [3, 2, 1])))
    assert b.ks == pytest.approx(float(statistics.ks([5, 6, 7, 8], [9, 0, 0, 1])))
    assert b.jensen_shannon == pytest.approx(float(statistics.jensen_shannon([5, 6, 7, 8], [9, 0, 0, 1])))
