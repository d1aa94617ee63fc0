"""One grammar of topics: what is built parses back, and nothing else does."""

import pytest

from edge_agent.contract import topics
from edge_agent.contract.errors import MessageError


@pytest.mark.parametrize("failure_type", topics.ALERT_TYPES)
def test_alert_and_current_topics_parse_back(failure_type: str) -> None:
    assert topics.parse(topics.alert("EV_001", failure_type)) == ("EV_001", "alert", failure_type)
    assert topics.parse(topics.current("EV_001", failure_type)) == ("EV_001", "current", failure_type)


@pytest.mark.parametrize("kind", ["notice", "drift", "sample", "status", "ack"])
def test_single_topics_parse_back(kind: str) -> None:
    topic = getattr(topics, kind)("EV-1.x")
    assert topics.parse(topic) == ("EV-1.x", kind, "")
    assert len(topic.split("/")) <= 7


@pytest.mark.parametrize(
    "vehicle_id", ["", "#", "+", "a/b", "-x", "é", "a" * 65, "a b", "a\n", "../etc", "EV\u202e1", "a;drop", "٣"]
)
def test_a_vehicle_id_outside_the_grammar_is_refused(vehicle_id: str) -> None:
    with pytest.raises(MessageError):
        topics.status(vehicle_id)
    with pytest.raises(MessageError):
        topics.parse(f"voltwatch/v1/{vehicle_id}/status")


@pytest.mark.parametrize(
    "topic",
    ["", "voltwatch", "voltwatch/v1", "voltwatch/v2/EV_1/status", "voltwatch/v1/EV_1", "voltwatch/v1/EV_1/alert",
     "voltwatch/v1/EV_1/alert/unheard_of", "voltwatch/v1/EV_1/status/x", "voltwatch/v1/EV_1/model/other",
     "voltwatch/v1/EV_1/alert/motor_bearing_wear/x"],
)  # fmt: skip
def test_a_topic_outside_the_grammar_is_refused(topic: str) -> None:
    with pytest.raises(MessageError):
        topics.parse(topic)
