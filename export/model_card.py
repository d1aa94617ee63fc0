"""`model_card.md`: what a bundle was trained on, how well it did, and what it cannot do, in plain words."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.contract.bundle import Manifest, Thresholds
from edge_agent.contract.errors import BundleError
from export.graph import DatasetFacts
from export.parity import Check

MOST_METRICS = 60

LIMITS = """\
- It warns of the five failure types it was trained on, and of windows unlike anything it has seen. It proves nothing:
  every alert is a reason to look.
- Simulated vehicles taught it unless the data line above says otherwise. Its figures on real vehicles are not known
  until they were measured there.
- A thermal runaway may come without any precursor. The deterministic guards of the agent, not this model, are what
  watches for one.
- Bearing wear is judged from a vibration value computed on the sensor at 10 kHz or more; without it the model sees heat
  and current only, which come late.
- Slow states count the time a vehicle was observed, not the calendar. A vehicle seen for less than a few hours has no
  baseline of its own yet, and its slow features say little.
- A healthy fleet's false alarms depend on its make and climate; the drift counts show when both have left what is
  described here.
"""


def read_json(path: Path) -> dict[str, Any]:
    """Read an optional JSON document: {} when it is absent. Raises `BundleError` when it is malformed."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: is not JSON ({error})") from error
    return document if isinstance(document, dict) else {}


def model_card(
    manifest: Manifest,
    facts: DatasetFacts,
    thresholds: Thresholds,
    checks: Sequence[Check],
    *,
    training: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:
    """Write the card. `training` and `report` are training's own documents, {} where there is none."""
    vehicles = {s: sum(1 for v in facts.split.values() if v == s) for s in sorted(set(facts.split.values()))}
    rule = thresholds.decision
    lines = [
        f"# {manifest.name}, release {manifest.release}",
        "",
        (
            f"Made {manifest.created} for schema `{manifest.schema_name}`: {len(manifest.signals)} signals, "
            f"{len(manifest.features)} features, windows of {manifest.window.length_s:g} s every "
            f"{manifest.window.stride_s:g} s. Heads: {', '.join(manifest.heads)}."
        ),
        "",
        "## Data",
        "",
        (
            f"- data hash: `{facts.data_sha256 or 'not recorded'}`; "
            f"training commit: `{training.get('commit', 'not recorded')}`; seed: {training.get('seed', 'not recorded')}"
        ),
        *(f"- {split}: {count} vehicles {_counts(facts.counts.get(split, {}))}" for split, count in vehicles.items()),
        "- split by vehicle, never by window: overlapping windows of one vehicle never stand on both sides",
        "",
        "## Thresholds",
        "",
        f"In force: **{thresholds.active}**: {thresholds.policy.description}.",
        (f"An alert needs {rule.k} of {rule.n} windows; the same alert not again within {rule.cooldown_s / 60:g} min."),
        "",
        "| failure type | raise at | clear below | false-alarm budget |",
        "|---|---|---|---|",
        *(
            f"| {name} | {t.raise_at:.3f} | {t.clear_below:.3f} | {_budget(thresholds, name)} |"
            if t.raise_at <= 1.0
            else f"| {name} | never: training saw no such vehicle | | |"
            for name, t in thresholds.policy.types.items()
        ),
        *(
            f"| {n} | {v:.3f} | | {_budget(thresholds, n)} |"
            for n in ("failure", "anomaly")
            if (v := getattr(thresholds.policy, n)) is not None
        ),
        "",
        (
            "Measured for it on vehicles the head in question has not seen: validation vehicles, for boosters also "
            "training vehicles scored by a booster trained without them. The thresholds were chosen on the same "
            "vehicles, so new ones will do worse:"
        ),
        "",
        *(f"- {name}: {_number(value)}" for name, value in thresholds.policy.measured.items()),
        "",
        "## Evaluation",
        "",
        *_severity(report),
        *(_metrics(report) or ["Not evaluated yet: run `fleet-cloud evaluate` before this release is rolled out."]),
        "",
        "## Agreement with the trained models",
        "",
        *(f"- {check}" for check in checks),
        "",
        "## Limits",
        "",
        LIMITS,
    ]
    return "\n".join(lines)


def _counts(counts: Mapping[str, Any]) -> str:
    inner = ", ".join(f"{name} {value}" for name, value in counts.items())
    return f"({inner})" if inner else ""


def _budget(thresholds: Thresholds, head: str) -> str:
    kept = thresholds.policy.measured.get(f"{head}.budget_kept")
    return "not measured" if kept is None else "kept" if kept == 1.0 else "**exceeded**"


def _severity(report: Mapping[str, Any]) -> list[str]:
    """Say whether the severity is worth more than a constant, where the report has held one against it."""
    severity = report.get("severity")
    constant = severity.get("majority") if isinstance(severity, Mapping) else None
    if not isinstance(severity, Mapping) or not isinstance(constant, Mapping):
        return []
    beaten = "beats" if severity.get("beats_majority") else "does **not** beat"
    line = (
        f"The severity {beaten} always saying {constant.get('level')!r} in both: "
        f"{_number(severity.get('accuracy'))} against {_number(constant.get('accuracy'))} exact, "
        f"{_number(severity.get('mean_steps'))} against {_number(constant.get('mean_steps'))} levels off on average."
    )
    return [line, ""]


def _number(value: object) -> str:
    if value is None:
        return "not measurable on this data"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """Flatten the report's numbers to lines `path: value`; curves and long lists are left to the report itself."""
    lines: list[str] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append(f"- {prefix}: {_number(value)}")

    walk("", report)
    if len(lines) > MOST_METRICS:
        lines = [*lines[:MOST_METRICS], f"- and {len(lines) - MOST_METRICS} more in `evaluation_report.json`"]
    return lines
