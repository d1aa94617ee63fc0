"""How the demo looks: a live line per vehicle, and an alert in full. From the API's bodies to what rich shows."""

import re
import textwrap
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

COLOURS = {"low": "yellow", "medium": "dark_orange", "high": "red", "critical": "bold red"}
_HOT = 0.5  # of a probability, from which a line is shown in colour
_STEPS, _STEP_CHARS = 3, 120
_OF_CELLS = ("battery_degradation", "thermal_runaway_risk")
_LEFT_OUT = ("anomaly_score", "worst_cell", "worst_cell_deviation_v", "failure_probability")


def lines(vehicles: list[dict[str, Any]], expected: list[str]) -> RenderableType:
    """One line a vehicle, at most 80 columns: its time, state of charge, newest scores, ▲ while an alert is open."""
    known = {vehicle["vehicle_id"]: vehicle for vehicle in vehicles}
    return Group(*(_line(name, known.get(name)) for name in expected))


def _line(name: str, vehicle: dict[str, Any] | None) -> Text:
    line = Text(f"{name:<8}", style="bold", no_wrap=True, overflow="ellipsis")
    if vehicle is None:
        return line.append("starting", style="not bold")
    state = str(vehicle["state"])
    line.append(f"{state:<9}", style="not bold green" if state == "online" else "not bold red")
    line.append(f"{(vehicle.get('last_arrival') or '')[11:19]:<10}", style="not bold")
    charge = vehicle.get("state_of_charge_percent")
    line.append(f"SOC {charge:3.0f} %  " if charge is not None else " " * 11, style="not bold")
    scores = vehicle.get("scores") or {}
    failure = scores.get("failure_probability")
    if failure is None:
        return line.append("filling the first window of 300 s", style="not bold")
    line.append(f"failure {failure:.2f}  ", style="not bold red" if failure >= _HOT else "not bold green")
    types = {k: v for k, v in scores.items() if k not in _LEFT_OUT and v is not None}
    worst = max(types, key=lambda k: types[k], default=None)
    if worst is not None and types[worst] >= _HOT:
        line.append(f"{worst} {types[worst]:.2f} ", style="not bold red")
    if vehicle.get("open_alerts"):
        line.append("▲", style="bold red")
    return line


def alert(body: dict[str, Any], address: str) -> RenderableType:
    """Show one alert: what, how severe, why, which model, since when."""
    colour = COLOURS.get(body["severity"], "red")
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("severity", Text(body["severity"], style=colour))
    if body.get("type_probability") is not None:
        facts.add_row("probability", f"{body['type_probability']:.2f}")
    facts.add_row("since", f"{body['since']} (the vehicle's clock)")
    facts.add_row("model", f"release {body['model_release']}, {body['model_name']}")
    if body.get("worst_cell") is not None and body["failure_type"] in _OF_CELLS:
        facts.add_row(
            "worst cell",
            f"{body['worst_cell']}, counted from 0 ({(body.get('worst_cell_deviation_v') or 0) * 1e3:+.0f} mV)",
        )
    for number, item in enumerate(body.get("evidence") or []):
        facts.add_row("evidence" if number == 0 else "", _evidence(item))
    facts.add_row("read back", f"{address}/alerts?vehicle_id={body['vehicle_id']}")
    title = f"{body['vehicle_id']}: {body['failure_type']} {body['state']}"
    return Panel(Group(facts), title=Text(title, style=colour), expand=False)


def advice(body: dict[str, Any], where: str) -> RenderableType:
    """Show advice in short lines: safety first, what fits best with its first steps, and where the rest is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, sections, with_steps in (
        ("safety first", body["safety"], body["severity"] == "critical"),
        ("then", body["sections"], True),
    ):
        for number, section in enumerate(sections):
            table.add_row(heading if number == 0 else "", Text(section["id"], style="bold"), section["title"])
            if number == 0 and with_steps:
                for place, step in enumerate(section["steps"][:_STEPS], 1):
                    table.add_row("", "", Text(f"{place}. {_short(step)}", style="dim"))
    if body["outcome"] == "no_source":
        table.add_row("no source", "", body["summary"].removeprefix("No source: "))
    table.add_row(
        "found", "", f"by {'words and meaning' if body['retrieval']['method'] == 'hybrid' else 'words alone'}"
    )
    table.add_row("all steps", "", where)
    title = f"advice: {body['failure_type']}, {body['severity']}; the maker's manual goes first"
    return Panel(table, title=Text(title, style="cyan"), expand=False)


def _short(step: str) -> str:
    """Return the first sentence of a step, cut where it is still long."""
    return textwrap.shorten(re.split(r"(?<=[a-z)])\. ", step, maxsplit=1)[0], _STEP_CHARS, placeholder=" …")


def _evidence(item: dict[str, Any]) -> str:
    value = "unknown" if item["value"] is None else f"{item['value']:.4g}"
    unit = f" {item['unit']}" if item["unit"] else ""
    deviation = f"  ({item['deviation']:+.1f} robust standard deviations)" if item["deviation"] is not None else ""
    return f"{item['name']} = {value}{unit}{deviation}"
