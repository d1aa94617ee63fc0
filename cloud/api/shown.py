"""Rows of the store as the API shows them: times as text, what is not known as null, no NaN. Pure."""

from typing import Any

import msgspec

from cloud.alert_work.life_cycle import Work, allowed
from cloud.api import models
from cloud.store.reading import Row
from edge_agent.contract.messages import finite
from edge_agent.pipeline.alerts import iso

HTTP_SILENCE_S = 120.0  # a vehicle over HTTP has no last will: silent for longer it counts as offline


def vehicle(row: Row, open_alerts: list[models.OpenAlert], now: float) -> models.Vehicle:
    """Show a vehicle as it was last heard of; `now` is the server's clock, Unix seconds."""
    status: dict[str, Any] = msgspec.json.decode(row["status"])
    scores: dict[str, Any] = msgspec.json.decode(row["scores"])
    state = row["state"]
    if row["channel"] == "http":
        state = "online" if now - row["last_seen_at_s"] <= HTTP_SILENCE_S else "offline"
    return models.Vehicle(
        vehicle_id=row["vehicle_id"], state=state, channel=row["channel"], make=row["make"], source=row["source"],
        first_seen=iso(row["first_seen_at_s"]), last_seen=iso(row["last_seen_at_s"]), last_arrival=row["last_arrival"],
        clock_trusted=row["clock_trusted"],
        model=models.Model(release=row["model_release"], name=row["model_name"], sha256=row["model_sha256"]),
        scores={name: finite(value) for name, value in scores.items()},
        state_of_charge_percent=finite(status.get("state_of_charge_percent")),
        problems=status.get("problems", []), counters=status.get("counters", {}), outbox=status.get("outbox", {}),
        open_alerts=open_alerts,
    )  # fmt: skip


def open_alert(row: Row) -> models.OpenAlert:
    """Show a row of `reading.open_alerts`."""
    return models.OpenAlert(**{name: row[name] for name in models.OpenAlert.model_fields})


def alert(row: Row) -> models.Alert:
    """Show a row of `reading.alerts`."""
    body: dict[str, Any] = msgspec.json.decode(row["body"])
    columns = (
        "alert_id", "vehicle_id", "failure_type", "severity", "state", "origin", "rule", "since", "time", "ingest_id",
        "transitions", "clock_trusted", "replayed", "model_release", "model_name",
    )  # fmt: skip
    shown = ("failure_probability", "type_probability", "anomaly_score", "worst_cell", "worst_cell_deviation_v")
    fields: dict[str, Any] = {name: row[name] for name in columns} | {name: body.get(name) for name in shown}
    evidence = [
        models.Evidence(**{name: reason[name] for name in models.Evidence.model_fields if name in reason})
        for reason in body.get("evidence", [])
    ]
    return models.Alert(
        **fields, cleared=row["cleared_time"], received=iso(row["received_at_s"]), updated=iso(row["updated_at_s"]),
        severity_probability=body.get("severity_probability", {}), evidence=evidence,
        work=work(of_row(row)),
    )  # fmt: skip


def of_row(row: Row) -> Work:
    """Return the work that stands beside an alert in a row of `reading.alerts`."""
    return Work(
        state=row["work_state"] or "new", verdict=row["verdict"], failure_type=row["work_failure_type"],
        severity=row["work_severity"], updated_at_s=row["work_updated_at_s"],
    )  # fmt: skip


def work(stands: Work) -> models.Work:
    """Show where an alert's work stands, and what may be done about it now."""
    return models.Work(
        state=stands.state, verdict=stands.verdict, failure_type=stands.failure_type, severity=stands.severity,
        updated=None if stands.updated_at_s is None else iso(stands.updated_at_s),
        possible=list(allowed(stands.state)),
    )  # fmt: skip
