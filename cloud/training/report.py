"""The evaluation as files: `evaluation_report.json`, and one self-contained HTML page that a person can read.

No script, no external resource; plots are inline SVG. What is written here is only layout: every number and note comes
from `evaluate.py`, and a number that the data could not give shows as a dash.
"""

import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cloud.training.dataset import make_folder
from cloud.training.failure import FAILURE

JSON_FILE = "evaluation_report.json"
HTML_FILE = "evaluation_report.html"
COLOURS = {"model": "#1f6f8b", "baseline": "#c07a2c", "random": "#8a8a8a", "runbook": "#7a5195"}
SEVERITY_COLOURS = ("#fdf3d8", "#fbdfae", "#f6b98a", "#e98a7a")
VARIANTS = {
    "natural": "as recorded",
    "fresh": "every session with an empty model state",
    "sudden": "a healthy stretch, then a serious failure at once",
}
UNKNOWN = "&ndash;"
MAX_TRACES = 12  # a fleet of hundreds must still give a page that opens
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2329; max-width: 1240px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.sub { color: #5b6670; } .tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #d8dee3; border-radius: 8px; padding: .6rem 1rem; min-width: 130px; }
.tile b { display: block; font-size: 1.35rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { padding: .32rem .4rem; border-bottom: 1px solid #e4e8eb; text-align: right; white-space: nowrap; }
th { background: #f4f6f8; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tr.group td { background: #eef3f5; font-weight: 600; text-align: left; }
tr.random td, tr.runbook td { color: #6b757d; } tr.model td:first-child { font-weight: 600; }
td small { color: #7b858d; display: block; font-size: 11.5px; line-height: 1.1; }
li { margin: .25rem 0; } svg { max-width: 100%; height: auto; }
.note { background: #fff8e6; border-left: 4px solid #e0b43c; padding: .4rem 1rem; }
 .legend span { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em;
vertical-align: -0.1em; border: 1px solid #ccc; }
"""


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write both files into `folder`; returns the page's path."""
    make_folder(folder)
    (folder / JSON_FILE).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    page = folder / HTML_FILE
    page.write_text(render(report), encoding="utf-8")
    return page


def summary(report: dict[str, Any]) -> list[str]:
    """Return a few lines for the terminal: what each of our heads found on the test vehicles."""
    lines = []
    for row in report["rows"]:
        events = row.get("events_natural")
        if row["kind"] != "model" or not events:
            continue
        what = "any failure" if row["target"] == FAILURE else row["target"]
        if report["data"]["labelled"]:
            lines.append(
                f"{what:<22} {row['method']:<28} found {events['found']}/{events['episodes']}, false alarms "
                f"{_number(events['false_alarms_per_vehicle_month']['value'])}/vehicle-month, "
                f"ROC AUC {_number(row['roc_auc']['value'])}"
            )
        else:
            rate = _number(events["false_alarms_per_vehicle_month"]["value"])
            lines.append(f"{row['method']:<28} alerts {rate}/vehicle-month on unseen data")
    if report["severity"]:
        lines += [_severity_line(report["severity"]), _majority_line(report["severity"])]
    return lines


def _severity_line(graded: dict[str, Any], who: str = "severity, our classifier") -> str:
    return (
        f"{who:<37} {graded['accuracy']:.0%} exact, {graded['within_one']:.0%} within one level, "
        f"{graded['mean_steps']:.2f} levels off, macro F1 {graded['macro_f1']:.2f}"
    )


def _majority_line(severity: dict[str, Any]) -> str:
    constant = severity["majority"]
    verdict = "" if severity["beats_majority"] else "; ours does not beat it in both"
    return _severity_line(constant, f"severity, always {constant['level']}") + verdict


def render(report: dict[str, Any]) -> str:
    """Return the page."""
    data = report["data"]
    about = (
        f"{report['created']} · schema {data['schema_name']} · data {data['data_sha256'][:12]} · seed {data['seed']} · "
        f"thresholds: {report['policy']} ({report['policy_description']})"
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Voltwatch: evaluation</title><style>{STYLE}</style></head><body>",
        "<h1>Evaluation on vehicles never seen before</h1>",
        f"<p class='sub'>{_text(about)}</p>",
        _tiles(report),
        "<div class='note'><ul>" + "".join(f"<li>{_text(n)}</li>" for n in report["notes"]) + "</ul></div>",
    ]
    if report["rows"]:
        parts += ["<h2>Everything in one table</h2>", _table(report), _explain(data)]
    if data["labelled"]:
        parts += ["<h2>The same thresholds under harder conditions</h2>", _variants(report)]
    if report["traces"]:
        parts += ["<h2>What the vehicle would have seen</h2>", _legend(), _traces(report["traces"])]
    parts += ["<h2>Ranking, calibration, severity</h2>", _severity_text(report["severity"]), _curves(report)]
    parts.append("</body></html>")
    return "\n".join(parts)


def _tiles(report: dict[str, Any]) -> str:
    data = report["data"]
    types = [r for r in report["rows"] if r["kind"] == "model" and r["target"] != FAILURE and r["events_natural"]]
    tiles = [
        (f"{data['test_vehicles']}", "test vehicles"),
        (f"{data['test_vehicles_with_failure']}", "of them with a failure"),
        (f"{data['test_windows']:,}", "windows of five minutes"),
        (_number(data["healthy_vehicle_months"]), "healthy vehicle-months"),
    ]
    if types:
        found = sum(r["events_natural"]["found"] for r in types)
        total = sum(r["events_natural"]["episodes"] for r in types)
        alarms = sum(r["events_natural"]["false_alarms"] for r in types)
        tiles += [(f"{found} of {total}", "failures found, right type"), (f"{alarms}", "false alarms, all types")]
    return "<div class='tiles'>" + "".join(f"<div class='tile'><b>{b}</b>{t}</div>" for b, t in tiles) + "</div>"


def _table(report: dict[str, Any]) -> str:
    head = (
        "Method", "Events found", "Median lead, h", "Lead &gt; 24 h", "Lead &gt; 7 d", "False alarms per vehicle-month",
        "Wrong type", "PR-AUC", "Preva&shy;lence", "ROC AUC", "F1", "Window precision",
        f"Precision @{report['data']['inspection_budget']}", "Brier",
    )  # fmt: skip
    rows = []
    targets = list(dict.fromkeys(r["target"] for r in report["rows"]))
    for target in targets:
        label = "any failure" if target == FAILURE else target.replace("_", " ")
        rows.append(f"<tr class='group'><td colspan='{len(head)}'>{_text(label)}</td></tr>")
        rows += [_table_row(r) for r in report["rows"] if r["target"] == target]
    header = "".join(f"<th>{h}</th>" for h in head)
    return f"<div class='scroll'><table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _table_row(row: dict[str, Any]) -> str:
    events = row.get("events_natural") or {}
    recall = events.get("recall")
    found = f"{events['found']} / {events['episodes']}{_range(recall)}" if events and events["episodes"] else UNKNOWN
    cells = [
        found,
        _number(events.get("median_lead_h"), 1),
        _share(events.get("lead_above_24h")),
        _share(events.get("lead_above_7d")),
        _with_range(events.get("false_alarms_per_vehicle_month")),
        UNKNOWN if events.get("wrong_type_alerts") is None else str(events["wrong_type_alerts"]),
        _with_range(row.get("pr_auc")),
        _number(row.get("prevalence"), 3),
        _with_range(row.get("roc_auc")),
        _number(row.get("f1")),
        _number(row.get("window_precision")),
        _number(row.get("precision_at_budget")),
        _number(row.get("brier"), 3),
    ]
    return f"<tr class='{row['kind']}'><td>{_text(row['method'])}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _explain(data: dict[str, Any]) -> str:
    return (
        "<p class='sub'>Small figures are 90 % intervals: bootstrap over vehicles "
        f"({data['bootstrap_samples']} resamples) for window metrics, Wilson for events found, exact Poisson for false "
        "alarms. An alert is one event however many windows it spans. Baselines and the autoencoder get their "
        "threshold by the same false-alarm budget, but from validation vehicles alone and without the cap that a "
        "probability has (half of the unseen failures reach it): a row may find more, or less, for that alone. PR-AUC "
        "means nothing without the prevalence beside it: a coin scores the prevalence. The runbook's rows are its own "
        "claims, not measured here.</p>"
    )


def _severity_text(severity: dict[str, Any] | None) -> str:
    if severity is None:
        return ""
    lines = (_severity_line(severity), _majority_line(severity))
    return "<p class='sub'>" + "<br>".join(_text(line) for line in lines) + "</p>"


def _variants(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        if row["kind"] != "model" or row["target"] == FAILURE:
            continue
        cells = []
        for variant in VARIANTS:
            events = row.get(f"events_{variant}")
            if not events:
                cells += [UNKNOWN, UNKNOWN]
                continue
            rate = events["false_alarms_per_vehicle_month"]
            cells += [f"{events['found']} / {events['episodes']}" if events["episodes"] else UNKNOWN, _with_range(rate)]
        rows.append(f"<tr><td>{_text(row['target'])}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    top = "".join(f"<th colspan='2'>{_text(text)}</th>" for text in VARIANTS.values())
    second = "<th>found</th><th>false alarms per vehicle-month</th>" * len(VARIANTS)
    return (
        f"<div class='scroll'><table><thead><tr><th rowspan='2'>Failure type</th>{top}</tr><tr>{second}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _legend() -> str:
    spans = "".join(
        f"<span style='background:{colour}'></span>{name}"
        for name, colour in zip(("low", "medium", "high", "critical"), SEVERITY_COLOURS, strict=True)
    )
    return (
        f"<p class='legend sub'>Calibrated probability of the failure's own type along each failing test vehicle; "
        f"shaded: true severity {spans}. Dashed: threshold. Red line: the vehicle fails.</p>"
    )


def _figure(width: float, height: float) -> Figure:
    mpl.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
        "svg.hashsalt": "voltwatch", "font.family": "sans-serif", "axes.titlesize": 10,
    })  # fmt: skip
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _traces(traces: list[dict[str, Any]]) -> str:
    shown = sorted(traces, key=lambda t: (t["failure_type"], t["vehicle_id"]))[:MAX_TRACES]
    columns = 2
    lines = -(-len(shown) // columns)
    figure = _figure(11.5, 2.1 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, trace in zip(axes.flat, shown, strict=False):
        _trace(axis, trace)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    return _svg(figure)


def _trace(axis: Axes, trace: dict[str, Any]) -> None:
    # vehicles sleep most of the day: the recording's own windows are the axis, so that nights take no room
    hours = trace["hours"]
    index = range(len(hours))

    def position(hour: float | None) -> float | None:
        return None if hour is None else float(sum(h < hour for h in hours))

    stops = [position(h) for h in trace["level_hours"]]
    end = position(trace["end_hours"]) or len(hours)
    for k, (start, colour) in enumerate(zip(stops, SEVERITY_COLOURS, strict=True)):
        if start is not None:
            following = next((s for s in stops[k + 1 :] if s is not None), end)
            axis.axvspan(start, max(start, min(following, end)), color=colour, lw=0)
    axis.plot(index, trace["probability"], color=COLOURS["model"], lw=0.9)
    if trace["threshold"] is not None:
        axis.axhline(trace["threshold"], color="#444", lw=0.8, ls="--")
    failure = position(trace["failure_hours"])
    if failure is not None:
        axis.axvline(failure, color="#c0392b", lw=1.2)
    for i in range(1, len(hours)):
        if hours[i] - hours[i - 1] > 1.0:
            axis.axvline(i - 0.5, color="#c9d0d5", lw=0.5)
    title = trace["failure_type"].replace("_", " ")
    axis.set_title(
        f"{trace['vehicle_id']}: {title}{'' if trace['predictable'] else ' (without precursor)'}", loc="left"
    )
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(0, max(1, len(hours) - 1))
    axis.set_xlabel("minutes awake (thin lines: nights)", fontsize=8)


def _curves(report: dict[str, Any]) -> str:
    figure = _figure(11.5, 7.2)
    axes = figure.subplots(2, 2)
    rows = [r for r in report["rows"] if r["kind"] == "model"]
    _precision_recall(axes[0, 0], rows)
    _calibration(axes[0, 1], rows)
    _severity(axes[1, 0], report["severity"])
    _anomaly(axes[1, 1], report["anomaly"])
    return _svg(figure)


def _precision_recall(axis: Axes, rows: list[dict[str, Any]]) -> None:
    axis.set_title("Precision over recall, windows (dots: prevalence)", loc="left")
    for number, row in enumerate(r for r in rows if r.get("pr_curve")):
        colour = f"C{number}"
        axis.plot(*zip(*row["pr_curve"], strict=True), lw=1.1, color=colour, label=_short(row))
        axis.plot([1.0], [row["prevalence"]], "o", ms=4, color=colour)
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_ylim(0, 1.03)
    if axis.lines:
        axis.legend(fontsize=7, frameon=False, loc="lower left")
    else:
        _nothing(axis, "no failure labels")


def _calibration(axis: Axes, rows: list[dict[str, Any]]) -> None:
    axis.set_title("Reliability: what was said against what was so", loc="left")
    for number, row in enumerate(r for r in rows if r.get("reliability")):
        points = [(b["mean_probability"], b["observed"]) for b in row["reliability"]]
        axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=0.9, color=f"C{number}", label=_short(row))
    if not axis.lines:
        _nothing(axis, "no calibrated head")
        return
    axis.plot([0, 1], [0, 1], color="#999", lw=0.8, ls=":")
    axis.set_xlabel("calibrated probability")
    axis.set_ylabel("share that failed")
    axis.legend(fontsize=7, frameon=False, loc="upper left")


def _severity(axis: Axes, severity: dict[str, Any] | None) -> None:
    if severity is None:
        _nothing(axis, "no severity classifier")
        return
    axis.set_title(
        f"Severity: {severity['accuracy']:.0%} exact, {severity['within_one']:.0%} within one level", loc="left"
    )
    table = severity["confusion"]
    shares = [[n / max(1, sum(row)) for n in row] for row in table]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(table):
        for j, n in enumerate(row):
            axis.text(j, i, str(n), ha="center", va="center", color="white" if shares[i][j] > 0.6 else "#222")
    axis.set_xticks(range(len(table)), severity["levels"])
    axis.set_yticks(range(len(table)), severity["levels"])
    axis.set_xlabel("said")
    axis.set_ylabel("true")


def _anomaly(axis: Axes, anomaly: dict[str, Any] | None) -> None:
    if anomaly is None:
        _nothing(axis, "no anomaly detector")
        return
    axis.set_title("Anomaly score: share of windows below it", loc="left")
    for name, colour in (("healthy", "#2a7f62"), ("failing", "#c0392b")):
        if anomaly[name]:
            axis.plot(anomaly[name], anomaly["quantiles"], color=colour, label=name)
    if anomaly["threshold"]:
        axis.axvline(anomaly["threshold"], color="#444", lw=0.8, ls="--", label="threshold")
    axis.set_xscale("log")
    axis.set_xlabel("anomaly score")
    axis.legend(fontsize=8, frameon=False)


def _nothing(axis: Axes, why: str) -> None:
    axis.axis("off")
    axis.text(0.5, 0.5, why, ha="center", va="center", color="#888", transform=axis.transAxes)


def _short(row: dict[str, Any]) -> str:
    return str(row["method"] if row["target"] == FAILURE else row["target"].replace("_", " "))


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def _with_range(value: dict[str, float | None] | float | None) -> str:
    """Format an interval, or a bare number of the runbook's."""
    if not isinstance(value, dict):
        return _number(value)
    return UNKNOWN if value["value"] is None else f"{_number(value['value'])}{_range(value)}"


def _range(value: dict[str, float | None] | None) -> str:
    if not value or value["low"] is None or value["high"] is None:
        return ""
    return f"<small>{_number(value['low'])} to {_number(value['high'])}</small>"
