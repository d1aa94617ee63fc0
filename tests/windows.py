"""Samples and drift counts as a vehicle sends them, made by the contract's own packer and encoder."""

import hashlib
from typing import Any

import numpy as np

from cloud.collector import ingest
from cloud.store.items import Item
from edge_agent.contract import messages, topics
from edge_agent.contract.samples import SampleWindow, pack

TIME = "2026-03-01T00:00:00.000Z"


def window(seed: int = 0) -> SampleWindow:
    """A small raw window; each seed another one."""
    numbers = np.random.default_rng(seed)
    return SampleWindow(
        ("Vehicle.Speed", "Vehicle.Odometer"),
        numbers.normal(50, 5, (60, 2)).astype(np.float32),
        numbers.normal(3.7, 0.01, (6, 8)).astype(np.float32),
        numbers.normal(25, 1, (6, 2)).astype(np.float32),
        {"slow": numbers.normal(0, 1, (1, 4)).astype(np.float32)},
    )


def sample_data(
    sample_id: str, *, parts: int = 1, seed: int = 0, packed: bytes | None = None, **header: Any
) -> list[messages.Sample]:
    """The parts of one sample; `header` overrides what they announce."""
    data = pack(window(seed)) if packed is None else packed
    size = -(-len(data) // parts)
    said: dict[str, Any] = {
        "sample_id": sample_id, "reason": "random", "parts": parts, "sha256": hashlib.sha256(data).hexdigest(),
        "length": len(data), "end_time": TIME, "elapsed_s": 60.0, "coverage": 1.0, "stratum": "driving",
        "state_id": "st1", "model_release": 7, **header,
    }  # fmt: skip
    return [
        messages.Sample(**{"part": n + 1, "payload": data[n * size : (n + 1) * size], **said}) for n in range(parts)
    ]


def sample_events(
    sample_id: str, *, first_seq: int = 1, vehicle_id: str = "EV_1", stream_id: str = "s-sample", **more: Any
) -> list[bytes]:
    """The encoded events of one sample, part after part; `more` as in `sample_data`."""
    return [
        event_bytes(part, first_seq + n, vehicle_id=vehicle_id, stream_id=stream_id)
        for n, part in enumerate(sample_data(sample_id, seed=first_seq, **more))
    ]


def event_bytes(
    data: messages.EventData, seq: int, *, vehicle_id: str = "EV_1", stream_id: str = "s-sample", **envelope: Any
) -> bytes:
    """One encoded event."""
    return messages.encode(
        messages.event(
            data, event_id=f"{stream_id}/{seq}", vehicle_id=vehicle_id, time=TIME, stream_id=stream_id, seq=seq,
            boot_id="b", **{"clock_trusted": True, **envelope},
        )
    )  # fmt: skip


def sample_items(sample_id: str, *, vehicle_id: str = "EV_1", **more: Any) -> list[Item]:
    """The parts of a sample as the collector decides about them."""
    events = sample_events(sample_id, vehicle_id=vehicle_id, **more)
    return [ingest.decide(topics.sample(vehicle_id), body) for body in events]


def drift_counts(**changes: Any) -> messages.DriftCounts:
    """Counts of two windows of 60 frames each that add up."""
    signal, feature = (10, 100, 10), (1, 1, 0)
    said: dict[str, Any] = {
        "model_release": 7, "reference": "ab" * 32, "first_time": TIME, "last_time": TIME, "windows": 2,
        "variables": (
            messages.DriftVariable(name="Vehicle.Speed", stratum="driving", counts=signal),
            messages.DriftVariable(name="speed_mean", stratum="driving", counts=feature),
        ),
        **changes,
    }  # fmt: skip
    return messages.DriftCounts(**said)
