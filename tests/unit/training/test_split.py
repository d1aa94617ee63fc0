from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cloud.training.split import SPLITS, TEST, TRAIN, VALIDATION, split_vehicles
from edge_agent.contract.signals import FAILURE_TYPES

SHARES = (0.6, 0.2, 0.2)
FLEETS = st.dictionaries(
    st.from_regex(r"[A-Z]{1,3}[0-9]{1,3}", fullmatch=True),
    st.sampled_from(((), *((t,) for t in FAILURE_TYPES))),
    min_size=1,
    max_size=80,
)


@given(FLEETS, st.integers(0, 1000))
def test_every_vehicle_is_in_exactly_one_split_and_the_split_is_repeatable(fleet, seed):
    split = split_vehicles(fleet, SHARES, seed)
    assert set(split) == set(fleet)
    assert set(split.values()) <= set(SPLITS)
    assert split == split_vehicles(dict(reversed(fleet.items())), SHARES, seed)


@given(FLEETS, st.integers(0, 1000))
def test_each_failure_type_with_three_vehicles_is_in_every_split(fleet, seed):
    split = split_vehicles(fleet, SHARES, seed)
    for types, count in Counter(fleet.values()).items():
        seen = {split[v] for v in fleet if fleet[v] == types}
        assert TRAIN in seen
        if count >= 3:
            assert seen == set(SPLITS)


def test_shares_are_met_within_one_vehicle():
    fleet = {f"V{i}": () for i in range(100)}
    count = Counter(split_vehicles(fleet, SHARES, 7).values())
    assert (count[TRAIN], count[VALIDATION], count[TEST]) == (60, 20, 20)
