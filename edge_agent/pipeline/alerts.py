"""An alert's change becomes a message: its identity, its evidence, its words for the wire.

Promises: the same change gives the same ids and the same bytes whenever it is made again, so that an append repeated
after a crash is one message. Pure; sending is `delivery`'s.
"""

import datetime as dt
import uuid

import numpy as np

from edge_agent.contract.bundle import Manifest
from edge_agent.contract.messages import Alert, Evidence, finite
from edge_agent.contract.signals import SEVERITIES
from edge_agent.pipeline.outcomes import AlertChange, Reason, Scores

NAMESPACE = uuid.UUID("5d6f2c1e-3d0a-5b6e-9a57-8f0f5f0f5c11")  # ours alone; never change it: ids would change
MAX_FEATURES = 6
MAX_SIGNALS = 3
NOTABLE_DEVIATION = 3.0  # robust z: below it a feature is no evidence of anything


def iso(unix_s: float) -> str:
    """Write Unix seconds as `YYYY-MM-DDTHH:MM:SS.mmmZ`; times outside the years 1 to 9999 are clipped to them."""
    clipped = min(max(unix_s, -62_135_596_800.0), 253_402_300_799.0)
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=round(clipped * 1000))
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def alert_id(change: AlertChange, vehicle_id: str) -> str:
    """Return the alert's id, the same from raised to cleared."""
    key = change.key or f"/{round(change.since_s * 1000)}"
    return str(uuid.uuid5(NAMESPACE, f"{vehicle_id}|{change.failure_type}|{change.origin}|{key}"))


def alert_message(
    change: AlertChange, *, vehicle_id: str, manifest: Manifest | None = None, offset_s: float = 0.0
) -> tuple[str, str, Alert]:
    """Return (alert_id, event_id, message) for one change.

    `offset_s` is added to the source's times to make wall time: 0 for recordings and for telemetry with its own time.
    Raises nothing for finite scores; `messages.encode` refuses anything else.
    """
    identity = alert_id(change, vehicle_id)
    moment = round(change.time_s * 1000)
    event_id = str(uuid.uuid5(NAMESPACE, f"{identity}|{change.transition}|{change.severity}|{moment}"))
    scores = change.scores
    index = change.type_index
    severity: dict[str, float] = {}
    if scores is not None and scores.severity is not None and index is not None:
        severity = {s: _probability(float(p)) for s, p in zip(SEVERITIES, scores.severity[index], strict=False)}
    types = None if scores is None or index is None else scores.type_probability
    return identity, event_id, Alert(
        alert_id=identity,
        transition=change.transition,
        failure_type=change.failure_type,
        severity=change.severity,
        origin=change.origin,
        since=iso(change.since_s + offset_s),
        rule=change.rule,
        model_release=None if manifest is None or change.origin == "guard" else manifest.release,
        model_name="" if manifest is None or change.origin == "guard" else manifest.name,
        failure_probability=None
        if scores is None or scores.failure_probability is None
        else _probability(scores.failure_probability),
        type_probability=None if types is None or index is None else _probability(float(types[index])),
        severity_probability=severity,
        anomaly_score=None if scores is None else finite(scores.anomaly_score),
        worst_cell=None if scores is None else scores.worst_cell,
        worst_cell_deviation_v=None if scores is None else finite(scores.worst_cell_deviation_v),
        windows_over_threshold=change.windows_over_threshold,
        windows_considered=change.windows_considered,
        evidence=tuple(
            Evidence(name=r.name[:512], value=finite(r.value), deviation=finite(r.deviation), unit=r.unit)
            for r in change.evidence[:16]
        ),
    )  # fmt: skip


def _probability(value: float) -> float:
    """Calibration in float32 may answer 1.0000001."""
    return min(1.0, max(0.0, value))


def model_evidence(scores: Scores, manifest: Manifest) -> tuple[Reason, ...]:
    """Return what weighs most: the features and reconstructed signals furthest from normal, then the worst cell."""
    found: list[Reason] = []
    deviation = np.abs(scores.feature_deviation[: len(manifest.features)])
    for i in np.argsort(-deviation, kind="stable")[:MAX_FEATURES].tolist():
        if deviation[i] >= NOTABLE_DEVIATION:
            value = float(scores.features[i])
            found.append(Reason(manifest.features[i], value, float(scores.feature_deviation[i])))
    if scores.reconstruction_error is not None:
        error = scores.reconstruction_error[: len(manifest.signals)]
        found += [
            Reason(f"reconstruction_error.{manifest.signals[i].name}", float(error[i]))
            for i in np.argsort(-error, kind="stable")[:MAX_SIGNALS].tolist()
            if error[i] > 0
        ]
    if scores.worst_cell is not None and scores.worst_cell_deviation_v is not None:
        vector = manifest.vectors.get("cell_voltage")
        name = "cell_voltage" if vector is None else vector.name
        found.append(Reason(f"{name}[{scores.worst_cell}] against the pack's median", scores.worst_cell_deviation_v,
                            unit="V"))  # fmt: skip
    return tuple(found)
