"""Drift messages of a made-up fleet against a small reference: whole messages, as they come over MQTT."""

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from cloud.collector import ingest
from cloud.store.items import Item
from edge_agent.contract import bundle as contract
from edge_agent.contract import messages, topics
from edge_agent.contract.bundle import DriftCalibration, DriftReference, DriftReferenceVariable, DriftSize, Manifest
from edge_agent.contract.messages import DriftCounts, DriftVariable, Stratum
from tests.bundles import rewrite_manifest

SPEED, HEAT = "Vehicle.Speed", "heat"
REFERENCE = DriftReference(
    variables=(
        DriftReferenceVariable(
            name=SPEED, kind="signal", edges=(20.0, 60.0),
            counts={"driving": (30_000, 20_000, 10_000, 0), "parked": (60, 0, 0, 0)},
            limits={"driving": (5.0, 0.5)},
        ),
        DriftReferenceVariable(
            name=HEAT, kind="feature", edges=(0.5,), counts={"driving": (800, 200, 0), "parked": (1, 0, 0)},
            limits={"driving": (5.0, 0.5)},
        ),
    ),
    calibration=DriftCalibration(
        false_alarm_rate=0.01, draws=100,
        sizes=(DriftSize(vehicles=1, windows=60), DriftSize(vehicles=10, windows=60)),
    ),
)  # fmt: skip


def with_reference(bundle: Path, reference: DriftReference = REFERENCE) -> Path:
    """Put a reference into a bundle, with its hash; return the bundle."""
    data = msgspec.json.encode(reference)
    (bundle / contract.DRIFT_REFERENCE).write_bytes(data)
    files = json.loads((bundle / contract.MANIFEST).read_bytes())["files"]
    files[contract.DRIFT_REFERENCE] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(bundle, files=files)
    return bundle


def manifest(bundle: Path) -> Manifest:
    return contract.parse_manifest((bundle / contract.MANIFEST).read_bytes(), str(bundle))


def sha256(bundle: Path) -> str:
    return manifest(bundle).files[contract.DRIFT_REFERENCE].sha256


def iso(at_s: float) -> str:
    return datetime.fromtimestamp(math.floor(at_s), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def told(
    vehicle_id: str, seq: int, at_s: float, reference: str, *, windows: int = 60, shift: float = 0.0,
    stratum: Stratum = "driving", trusted: bool = True, release: int = 1, counts: DriftCounts | None = None,
) -> Item:  # fmt: skip
    """Say what a vehicle counted in an hour; `shift` is the share of frames and windows that went to the last bin."""
    moved = round(60 * windows * shift)
    body = counts or DriftCounts(
        model_release=release, reference=reference, first_time=iso(at_s - 3600), last_time=iso(at_s), windows=windows,
        variables=(
            DriftVariable(name=SPEED, stratum=stratum, counts=_moved(60 * windows, (3, 2, 1, 0), moved)),
            DriftVariable(name=HEAT, stratum=stratum, counts=_moved(windows, (4, 1, 0), round(windows * shift))),
        ),
    )  # fmt: skip
    envelope = messages.event(
        body, event_id=f"{vehicle_id}/{seq}", vehicle_id=vehicle_id, time=iso(at_s), stream_id="drift", seq=seq,
        boot_id="b", clock_trusted=trusted,
    )  # fmt: skip
    return ingest.decide(topics.drift(vehicle_id), messages.encode(envelope))


def _moved(total: int, parts: tuple[int, ...], moved: int) -> tuple[int, ...]:
    kept = np.floor(np.array(parts) / sum(parts) * (total - moved)).astype(int)
    kept[0] += total - moved - kept.sum()
    kept[len(parts) - 2] += moved
    return tuple(int(n) for n in kept)


def status(vehicle_id: str, make: str) -> Item:
    body = messages.encode(messages.Status(state="online", make=make))
    return ingest.decide(topics.status(vehicle_id), body)
