"""A retraining as files and lines: `retraining_report.json`, one HTML page without scripts, and a table to print.

Only layout: every figure and reason comes from `retrain.py`; what could not be computed shows as a dash.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from cloud.training.compare import Figure
from cloud.training.dataset import make_folder
from cloud.training.report import STYLE
from cloud.training.verdict import describe

JSON_FILE = "retraining_report.json"
HTML_FILE = "retraining_report.html"
UNKNOWN = "-"
HEADS = ("figure", "vehicles", "champion", "challenger", "difference", "90 % interval")


def write_report(report: dict[str, Any], figures: tuple[Figure, ...], folder: Path) -> Path:
    """Write both files into `folder`; returns the page's path."""
    make_folder(folder)
    (folder / JSON_FILE).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    page = folder / HTML_FILE
    page.write_text(render(report, figures), encoding="utf-8")
    return page


def row(figure: Figure) -> tuple[str, ...]:
    """Return a figure's cells, in the order of `HEADS`."""
    difference = figure.difference
    known = math.isfinite(difference.low)
    interval = f"{_signed(difference.low)} to {_signed(difference.high)}" if known else UNKNOWN
    unit = f" ({figure.unit})" if figure.unit and figure.unit not in describe(figure) else ""
    return (
        f"{describe(figure)}{unit}", str(figure.vehicles), _number(figure.champion), _number(figure.challenger),
        _signed(difference.value), interval,
    )  # fmt: skip


def table(figures: tuple[Figure, ...]) -> Table:
    """Return the figures for a terminal; better ones are green, worse ones red."""
    out = Table(box=None, pad_edge=False)
    for i, head in enumerate(HEADS):
        out.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for figure in figures:
        cells = row(figure)
        colour = "green" if figure.gain > 0 else "red" if figure.gain < 0 else "dim"
        out.add_row(*cells[:4], f"[{colour}]{cells[4]}[/]", cells[5])
    return out


def next_steps(report: dict[str, Any]) -> list[str]:
    """Say what a person may do now."""
    challenger = report["challenger"]
    if report["verdict"] != "challenger":
        return ["the champion stays; nothing is to be published, and its folder was not touched"]
    return [
        f"model-export build --models {challenger['models']} --datasets {challenger['dataset']} --output NEW_BUNDLE",
        "read the report, then publish the bundle: that takes a person; nothing here reaches a vehicle by itself",
    ]


def sources(report: dict[str, Any]) -> list[str]:
    """Return lines on what the lake gave."""
    samples, frozen = report["samples"], report["frozen"]
    learned = (
        f"{samples['read']} samples: learned from {samples['learned_from']} of {samples['learned_vehicles']} vehicles "
        f"({samples['learned_alerts']} judged alerts), held out {samples['held_out']} of "
        f"{samples['held_out_vehicles']} vehicles"
    )
    lines = [
        learned,
        f"frozen set {frozen['sha256'][:12]}: {frozen['vehicles']} vehicles, {frozen['windows']} windows",
    ]
    lines += [f"not used: {why}: {count}" for why, count in samples["unused"].items()]
    if samples["fresh_states"]:
        lines.append(f"{samples['fresh_states']} samples with an empty model state: theirs has another meaning here")
    return [*lines, *samples["lines"]]


def render(report: dict[str, Any], figures: tuple[Figure, ...]) -> str:
    """Return the page."""
    winner = "The challenger is better" if report["verdict"] == "challenger" else "The champion stays"
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row(figure))}</tr>" for figure in figures)
    about = (
        f"{report['created']} · champion {report['champion']['models']} · challenger {report['challenger']['models']} "
        f"· frozen set {report['frozen']['sha256'][:12]}"
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Voltwatch: retraining</title><style>{STYLE}</style></head><body>",
        f"<h1>{winner}</h1><p class='sub'>{_text(about)}</p>",
        _list("Why", report["reasons"]),
        "<h2>Both on the same frozen vehicles</h2><div class='scroll'><table><tr>",
        *(f"<th>{_text(head)}</th>" for head in HEADS),
        f"</tr>{rows}</table></div>",
        _list("What it was made of", sources(report)),
        "<div class='note'>" + _list("How to read this", report["notes"]) + "</div>",
        _list("What to do next", next_steps(report)),
        "</body></html>",
    ]
    return "\n".join(parts)


def _list(title: str, lines: list[str]) -> str:
    return f"<h2>{_text(title)}</h2><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _text(text: str) -> str:
    return html.escape(text)


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else UNKNOWN


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else UNKNOWN
