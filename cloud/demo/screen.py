"""How the demo looks: a live line per vehicle, and an alert in full. From the API's bodies to what rich shows."""

from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

COLOURS = {"low": "yellow", "medium": "dark_orange", "high": "red", "critical": "bold red"}
_HOT = 0.5  # of a probability, from which a line is shown in colour
_LEFT_OUT = ("anomaly_score", "worst_cell", "worst_cell_deviation_v", "failure_probability")


def lines(vehicles: list[dict[str, Any]], expected: list[str]) -> RenderableType:
    """One line a vehicle: time on its own clock, state of charge, scores of the newest window, open alerts."""
    table = Table.grid(padding=(0, 2))
    known = {vehicle["vehicle_id"]: vehicle for vehicle in vehicles}
    for name in expected:
        table.add_row(*_line(name, known.get(name)))
    return table


def plain_lines(vehicles: list[dict[str, Any]], expected: list[str]) -> list[str]:
    """Return the same as text, for a log."""
    known = {vehicle["vehicle_id"]: vehicle for vehicle in vehicles}
    return ["  ".join(cell.plain for cell in _line(name, known.get(name))) for name in expected]


def _line(name: str, vehicle: dict[str, Any] | None) -> list[Text]:
    if vehicle is None:
        return [Text(name, style="bold"), Text("starting")]
    cells = [Text(name, style="bold"), Text(vehicle["state"], style="green" if vehicle["state"] == "online" else "red")]
    cells.append(Text((vehicle.get("last_arrival") or "no data yet")[11:19] or "no data yet"))
    charge = vehicle.get("state_of_charge_percent")
    cells.append(Text(f"SOC {charge:.0f} %" if charge is not None else ""))
    scores = vehicle.get("scores") or {}
    failure = scores.get("failure_probability")
    if failure is None:
        seconds = (vehicle.get("counters") or {}).get("window_filled_s")
        cells.append(Text("filling the first window of 300 s" if seconds is None else f"window {seconds} s of 300 s"))
        return cells
    cells.append(Text(f"failure {failure:.2f}", style="red" if failure >= _HOT else "green"))
    types = {k: v for k, v in scores.items() if k not in _LEFT_OUT and v is not None}
    worst = max(types, key=lambda k: types[k], default=None)
    hot = worst is not None and types[worst] >= _HOT
    cells.append(Text(f"{worst} {types[worst]:.2f}" if worst is not None and hot else "", style="red"))
    cells.append(Text(f"anomaly {scores['anomaly_score']:.2f}" if scores.get("anomaly_score") is not None else ""))
    opened = vehicle.get("open_alerts") or []
    cells.append(
        Text(f"▲ {', '.join(sorted({a['failure_type'] for a in opened}))}" if opened else "", style="bold red")
    )
    return cells


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
    if body.get("worst_cell") is not None:
        facts.add_row("worst cell", f"{body['worst_cell']} ({(body.get('worst_cell_deviation_v') or 0) * 1e3:+.0f} mV)")
    for number, item in enumerate(body.get("evidence") or []):
        facts.add_row("evidence" if number == 0 else "", _evidence(item))
    facts.add_row("read back", f"{address}/alerts?vehicle_id={body['vehicle_id']}")
    title = f"{body['vehicle_id']}: {body['failure_type']} {body['state']}"
    return Panel(Group(facts), title=Text(title, style=colour), expand=False)


def _evidence(item: dict[str, Any]) -> str:
    value = "unknown" if item["value"] is None else f"{item['value']:.4g}"
    unit = f" {item['unit']}" if item["unit"] else ""
    deviation = f"  ({item['deviation']:+.1f} robust standard deviations)" if item["deviation"] is not None else ""
    return f"{item['name']} = {value}{unit}{deviation}"
