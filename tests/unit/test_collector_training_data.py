"""Counts and samples at the collector: what one message alone shows to be wrong is refused, with the reason."""

from typing import Any

import pytest

from cloud.collector import ingest
from cloud.store.items import EventItem, RefusedItem
from edge_agent.contract import topics
from edge_agent.contract.messages import DriftCounts, DriftVariable, EventData, Sample
from tests.windows import drift_counts, event_bytes, sample_data


def variable(name: str, *counts: int, stratum: str = "driving") -> DriftVariable:
    return DriftVariable(name=name, stratum=stratum, counts=counts)  # type: ignore[arg-type]


def decided(data: EventData) -> object:
    topic = topics.drift("EV_1") if isinstance(data, DriftCounts) else topics.sample("EV_1")
    return ingest.decide(topic, event_bytes(data, 1))


def test_counts_that_add_up_and_samples_are_stored() -> None:
    (sample,) = sample_data("s")
    empty = drift_counts(windows=0, variables=(variable("Vehicle.Speed", 0, 0),))
    for data in (drift_counts(), empty, sample):
        item = decided(data)
        assert isinstance(item, EventItem)
        assert item.data == data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variables": ()}, "of no variable"),
        ({"variables": (variable("a", 2, 0), variable("a", 2, 0))}, "'a' twice"),
        ({"variables": (variable("a", 2), variable("b", 2, stratum="parked"))}, "driving and parked in one message"),
        ({"variables": (variable("a", 1, 0),)}, "add up to 1, which is no multiple of the 2 windows"),
        ({"variables": (variable("a", 0, 0),)}, "add up to 0"),
        ({"variables": (variable("a", 120, 1),)}, "add up to 121"),
        ({"windows": 0, "variables": (variable("a", 60, 0),)}, "number 60 is outside 0 to 0"),
        ({"variables": (variable("a", 120), variable("b", 2), variable("c", 60))}, "over 60 frames and over 120"),
    ],
)  # fmt: skip
def test_counts_that_do_not_add_up_in_themselves_are_refused(changes: dict[str, Any], said: str) -> None:
    reason = "malformed" if "outside" in said else "counts"
    item = decided(drift_counts(**changes))
    assert isinstance(item, RefusedItem)
    assert (item.reason, item.topic) == (reason, topics.drift("EV_1"))
    assert said in item.detail


def test_a_message_of_counts_that_do_not_add_up_holds_up_no_other() -> None:
    bad = drift_counts(variables=(variable("a", 1),))
    items = [decided(data) for data in (bad, drift_counts(), *sample_data("s", parts=2))]
    assert [isinstance(item, EventItem) for item in items] == [False, True, True, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"part": 3}, {"part": 0}, {"parts": 65}, {"payload": b""}, {"sample_id": "a\x00b"}, {"alert_id": "\u202e"},
        {"end_time": "yesterday, at noon sharp"}, {"model_release": 10**30}, {"state_id": "a\nb"}, {"sha256": "ABC"},
        {"coverage": 2.0},
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_a_part_is_refused(changes: dict[str, Any]) -> None:
    first = sample_data("s", parts=2)[0]
    said = {name: getattr(first, name) for name in first.__struct_fields__}
    item = decided(Sample(**{**said, **changes}))
    assert isinstance(item, RefusedItem)
    assert (item.reason, item.topic) == ("malformed", topics.sample("EV_1"))
    assert item.detail


def test_a_payload_that_is_no_base64_is_refused() -> None:
    body = event_bytes(sample_data("s")[0], 1).replace(b'"payload":"', b'"payload":"!')
    item = ingest.decide(topics.sample("EV_1"), body)
    assert isinstance(item, RefusedItem)
    assert item.reason == "malformed"


def test_counts_and_samples_do_not_belong_on_each_others_topics() -> None:
    for topic, data in ((topics.sample("EV_1"), drift_counts()), (topics.drift("EV_1"), sample_data("s")[0])):
        item = ingest.decide(topic, event_bytes(data, 1))
        assert isinstance(item, RefusedItem)
        assert item.reason == "mismatch"
