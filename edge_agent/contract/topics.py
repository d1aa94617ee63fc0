"""The MQTT topics: one grammar, built and parsed here and nowhere else (docs/asyncapi.yaml describes them).

    voltwatch/v1/{vehicle_id}/alert/{failure_type}     events, in the alert stream
    voltwatch/v1/{vehicle_id}/current/{failure_type}   retained state of it
    voltwatch/v1/{vehicle_id}/notice                   loss records and replay summaries, in the alert stream
    voltwatch/v1/{vehicle_id}/drift | sample | status | ack | model/desired | model/state

A vehicle id is one topic level, safe in a path, a URL and a log line.
"""

import re
from typing import NamedTuple

from edge_agent.contract.errors import MessageError
from edge_agent.contract.signals import FAILURE_TYPES

ROOT = "voltwatch/v1"
VEHICLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
ANOMALY = "anomaly"  # the alert of a bundle without failure heads
ALERT_TYPES = (*FAILURE_TYPES, ANOMALY)
_SINGLE = ("notice", "drift", "sample", "status", "ack")
_TYPED = ("alert", "current")
_MODEL = ("desired", "state")


class Topic(NamedTuple):
    """A parsed topic: `kind` is the level after the vehicle, `leaf` the one after that, or empty."""

    vehicle_id: str
    kind: str
    leaf: str = ""


def check_vehicle_id(vehicle_id: str) -> str:
    """Return `vehicle_id` if it fits the grammar, else raise `MessageError`."""
    if not VEHICLE_ID.fullmatch(vehicle_id):
        raise MessageError(
            f"vehicle id {vehicle_id[:80]!a} is not allowed: "
            f"1 to 64 of A-Z a-z 0-9 _ . - beginning with a letter or digit"
        )
    return vehicle_id


def alert(vehicle_id: str, failure_type: str) -> str:
    """Topic of one type's alert events."""
    return _build(vehicle_id, "alert", failure_type)


def current(vehicle_id: str, failure_type: str) -> str:
    """Topic of the retained present state of one failure type."""
    return _build(vehicle_id, "current", failure_type)


def notice(vehicle_id: str) -> str:
    """Topic of loss records and replay summaries."""
    return _build(vehicle_id, "notice")


def drift(vehicle_id: str) -> str:
    """Topic of drift counts."""
    return _build(vehicle_id, "drift")


def sample(vehicle_id: str) -> str:
    """Topic of raw windows for training."""
    return _build(vehicle_id, "sample")


def status(vehicle_id: str) -> str:
    """Topic of the retained status; the last will says offline here."""
    return _build(vehicle_id, "status")


def ack(vehicle_id: str) -> str:
    """Topic on which the collector tells a vehicle what it has committed."""
    return _build(vehicle_id, "ack")


def model_desired(vehicle_id: str) -> str:
    """Topic on which the cloud says, retained, which release a vehicle is to install."""
    return _build(vehicle_id, "model", "desired")


def model_state(vehicle_id: str) -> str:
    """Topic on which a vehicle says, retained, which release really runs."""
    return _build(vehicle_id, "model", "state")


def _build(vehicle_id: str, *rest: str) -> str:
    return "/".join((ROOT, check_vehicle_id(vehicle_id), *rest))


def subscription(kind: str) -> str:
    """Return the collector's filter for one kind over all vehicles."""
    return f"{ROOT}/+/{kind}/+" if kind in (*_TYPED, "model") else f"{ROOT}/+/{kind}"


def parse(topic: str) -> Topic:
    """Take a topic apart. Raises `MessageError` for anything the grammar does not describe."""
    if topic.startswith(ROOT + "/"):
        levels = topic[len(ROOT) + 1 :].split("/")
        if len(levels) == 2 and levels[1] in _SINGLE:
            return Topic(check_vehicle_id(levels[0]), levels[1])
        if len(levels) == 3 and (
            (levels[1] in _TYPED and levels[2] in ALERT_TYPES) or (levels[1] == "model" and levels[2] in _MODEL)
        ):
            return Topic(check_vehicle_id(levels[0]), levels[1], levels[2])
    raise MessageError(f"topic {topic[:200]!a} is not one of {ROOT}'s")
