"""Arrivals of a quiet, healthy vehicle, to which a test adds what it is about."""

import itertools

import numpy as np

from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.signals import Catalogue, FloatArray, default_catalogue, parse_schema

CATALOGUE = default_catalogue()
QUIET = {
    "speed": 50.0, "odometer": 1000.0, "ambient_temperature": 20.0, "pack_voltage": 360.0, "pack_current": -20.0,
    "state_of_charge": 60.0, "state_of_health": 95.0, "battery_temperature_max": 26.0, "battery_temperature_min": 24.0,
    "cell_voltage_max": 3.72, "cell_voltage_min": 3.70, "insulation_resistance": 5000.0, "cable_connected": 0.0,
    "is_charging": 0.0, "charge_power_requested": 0.0, "inlet_temperature": 25.0, "motor_speed": 4000.0,
    "motor_torque": 60.0, "motor_temperature": 60.0, "coolant_temperature": 40.0, "inverter_temperature": 55.0,
    "vibration_rms": 0.07, "vibration_kurtosis": 2.8,
}  # fmt: skip


def quiet(
    times: "FloatArray | list[float] | range", *, cells: int = 8, probes: int = 4, catalogue: Catalogue = CATALOGUE
) -> ArrivalBlock:
    """A row of every signal at each time."""
    time_s = np.array(times, np.float64)
    n = time_s.shape[0]
    scalars = np.tile([QUIET.get(s.role, np.nan) for s in catalogue.scalars], (n, 1)).astype(np.float64)
    return ArrivalBlock(
        time_s,
        scalars,
        np.tile(3.71 + 0.001 * np.arange(cells), (n, 1)),
        np.tile(25.0 + 0.5 * (np.arange(probes) % 2), (n, 1)),
    )


def column(role: str) -> int:
    """Column of the scalar that plays `role`."""
    index = CATALOGUE.column(role)
    assert index is not None, role
    return index


def cut(block: ArrivalBlock, at: list[int]) -> list[ArrivalBlock]:
    """Cut a block before each of the given rows."""
    edges = [0, *sorted(at), len(block)]
    return [block.take(slice(a, b)) for a, b in itertools.pairwise(edges)]


PUMP = parse_schema(
    """{"schema_name": "pump", "signals": [
        {"name": "Pump.Flow", "unit": "l/s", "min": 0, "max": 50, "max_age_s": 5},
        {"name": "Pump.Pressure", "unit": "bar", "min": 0, "max": 20, "max_age_s": 5}]}""",
    "pump.json",
)
