"""What an engineer would compute: quantities that belong to one part of the vehicle, found by the signals' roles.

Each is a `Quotient`: a numerator and a denominator a frame. Summed over the window they give the window's feature; the
same two, summed over the newest stride and decayed, give the slow state (`trend.py`), so a regression over a week costs
two numbers. A quantity whose roles a schema lacks simply does not exist; nothing here is needed for a schema to work.

Reasons, from measurements on real vehicles: pack resistance is the regression of first differences (dV on dI), and
falls by a factor 2.5 from 0 to 30 °C, which is no fault; an inverter's or a motor's fault is its temperature rise
against load, never the level; vibration counts against speed, inlet temperature against current squared.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import Catalogue
from export.masked import ONE, ZERO, Values, at_index, filled, previous_index

LOW_CURRENT_A = 5.0  # below it real packs show 13 mV between cells, above 100 A 40 mV: compare at rest
CURRENT_STEP_A = 2.0  # smaller steps are sensor noise, and say nothing about resistance
LOAD_MEMORY_S = 60.0  # a power module's sensor follows its losses with about this delay
REACH_S = 60.0  # arrivals further apart than this are not compared
COLD_SLOPE_PER_C = 0.034  # measured: 177 mΩ below 5 °C, 123 at 5 to 12, 92 at 12 to 20, 72 at 20 to 35 °C
OHM = {"Ohm": 1.0, "kOhm": 1e3, "MOhm": 1e6}


class Quotient(NamedTuple):
    """A quantity Σ numerator / Σ denominator; unknown while Σ denominator ≤ `least`.

    `slow` ones also live in the slow state.
    """

    name: str
    roles: tuple[str, ...]
    least: float
    slow: bool
    compute: "Callable[[Frames], tuple[Tensor, Tensor]]"


class Frames:
    """The fast grid by role, for one window: values [1, N] with presence, and what several quantities share."""

    def __init__(self, catalogue: Catalogue, spec: WindowSpec, values: Tensor, present: Tensor, memory: Tensor) -> None:
        self._catalogue = catalogue
        self._values = torch.split(values, 1)  # S of [1, N]: one node of the graph for all of them
        self._present = torch.split(present, 1)
        self._memory = memory  # [M] see `load_memory`
        self.reach = max(1, min(spec.frames - 1, round(REACH_S / spec.period_s)))
        self.warm = (torch.arange(spec.frames) >= min(spec.frames // 4, LOAD_MEMORY_S / spec.period_s)).to(
            torch.float32
        )
        self.period_s = spec.period_s

    def __call__(self, role: str) -> Values:
        """Return the signal that plays `role`."""
        column = self._catalogue.column(role)
        if column is None:
            raise ValueError(f"no signal plays {role!r}; ask `has` first")
        return Values(self._values[column], self._present[column])

    def column(self, index: int) -> tuple[Tensor, Tensor]:
        """Values and presence of one signal by its column."""
        return self._values[index], self._present[index]

    def has(self, role: str) -> bool:
        """Say whether the schema has a scalar with this role."""
        return self._catalogue.column(role) is not None

    def unit(self, role: str) -> str:
        """Return the unit of the signal that plays `role`."""
        signal = self._catalogue.role(role)
        return "" if signal is None else signal.unit

    def load(self, role: str, gate: Tensor | None = None) -> Values:
        """Square of a current or torque in (100 units)², with the memory of the part it heats."""
        x = self(role)
        square = x.value * x.value * 1e-4
        if gate is not None:
            square = square * gate
        past = torch.zeros(2, self._memory.shape[0] - 1)
        padded = torch.cat([past, torch.cat([square, x.present])], dim=1).unsqueeze(1)  # [2, 1, M-1+N]
        total, weight = torch.split(F.conv1d(padded, self._memory.reshape(1, 1, -1)).squeeze(1), 1)
        known = weight > 0.01
        mean = torch.where(known, total / torch.where(known, weight, ONE), ZERO)
        return Values(mean, known.to(mean.dtype) * self.warm)

    def charging(self) -> Tensor:
        """1 where the vehicle says that it charges, by whichever of its signals exists; [1, N]."""
        for role, above in (("is_charging", 0.5), ("charge_power_requested", 0.5), ("cable_connected", 0.5)):
            if self.has(role):
                x = self(role)
                return (x.value > above).to(x.value.dtype)
        raise ValueError("no signal says whether the vehicle charges")


def load_memory(spec: WindowSpec) -> Tensor:
    """Weights of an exponential memory, oldest first, [M ≤ N]."""
    length = max(1, min(spec.frames, round(5 * LOAD_MEMORY_S / spec.period_s)))
    age = torch.arange(length - 1, -1, -1, dtype=torch.float64) * spec.period_s / LOAD_MEMORY_S
    return torch.exp(-age).to(torch.float32)


def low_current(x: Values) -> Tensor:
    """1 where the pack is known to be almost at rest; same shape."""
    return (x.value.abs() < LOW_CURRENT_A).to(x.value.dtype) * x.present


def _differences(f: Frames) -> tuple[Tensor, Tensor, Tensor]:
    """First differences of current and voltage between arrivals that have both, and which of them count."""
    current, voltage = f("pack_current"), f("pack_voltage")
    both = current.present * voltage.present
    previous = previous_index(both, f.reach)
    d_current = current.value - at_index(current.value, previous)
    d_voltage = voltage.value - at_index(voltage.value, previous)
    counts = both * (previous >= 0).to(both.dtype) * (d_current.abs() > CURRENT_STEP_A).to(both.dtype)
    return d_current * counts, d_voltage * counts, counts


def _pack_resistance(f: Frames) -> tuple[Tensor, Tensor]:
    d_current, d_voltage, _ = _differences(f)
    return d_current * d_voltage, d_current * d_current


def _pack_resistance_25c(f: Frames) -> tuple[Tensor, Tensor]:
    d_current, d_voltage, _ = _differences(f)
    warmest = f("battery_temperature_max")
    celsius = filled(warmest, 25.0).clamp(-20.0, 35.0)
    return d_current * d_voltage, d_current * d_current * torch.exp((25.0 - celsius) * COLD_SLOPE_PER_C)


def _rise(hot: str, cold: str) -> "Callable[[Frames], tuple[Tensor, Tensor]]":
    def compute(f: Frames) -> tuple[Tensor, Tensor]:
        both = f(hot).present * f(cold).present
        return (f(hot).value - f(cold).value) * both, both

    return compute


def _rise_per_load(hot: str, cold: str, load_role: str) -> "Callable[[Frames], tuple[Tensor, Tensor]]":
    """Least squares through the origin of a temperature rise on the remembered load."""

    def compute(f: Frames) -> tuple[Tensor, Tensor]:
        load = f.load(load_role)
        counts = f(hot).present * f(cold).present * load.present
        return (f(hot).value - f(cold).value) * load.value * counts, load.value * load.value * counts

    return compute


def _inlet_rise_per_load(f: Frames) -> tuple[Tensor, Tensor]:
    hot, ambient, gate = f("inlet_temperature"), f("ambient_temperature"), f.charging()
    load = f.load("pack_current", gate)
    counts = hot.present * ambient.present * load.present * gate
    return (hot.value - ambient.value) * load.value * counts, load.value * load.value * counts


def _vibration_per_krpm(f: Frames) -> tuple[Tensor, Tensor]:
    vibration, speed = f("vibration_rms"), f("motor_speed")
    krpm = speed.value.abs() * 1e-3
    counts = vibration.present * speed.present * (krpm > 0.3).to(krpm.dtype)
    return vibration.value * counts, krpm * counts


def _charge(f: Frames) -> tuple[Tensor, Tensor, Tensor]:
    """Actual kW into the battery, requested kW, and which frames count."""
    current, voltage, requested = f("pack_current"), f("pack_voltage"), f("charge_power_requested")
    counts = current.present * voltage.present * f.charging() * (requested.value > 0.5).to(requested.value.dtype)
    return current.value * voltage.value * 1e-3, requested.value, counts


def _charge_power_ratio(f: Frames) -> tuple[Tensor, Tensor]:
    actual, requested, counts = _charge(f)
    return actual * counts, requested * counts


def _charge_deficit(f: Frames) -> tuple[Tensor, Tensor]:
    actual, requested, counts = _charge(f)
    return (requested - actual) * counts, counts


def _plugged_idle(f: Frames) -> tuple[Tensor, Tensor]:
    cable, current = f("cable_connected"), f("pack_current")
    plugged = (cable.value > 0.5).to(cable.value.dtype) * current.present
    idle = plugged * (current.value.abs() < 1.0).to(plugged.dtype)
    if f.has("state_of_charge"):  # a full battery draws nothing and that is right
        idle = idle * (f("state_of_charge").value < 95.0).to(plugged.dtype)
    return idle, plugged


def _isolation(f: Frames) -> tuple[Tensor, Tensor]:
    resistance, voltage = f("insulation_resistance"), f("pack_voltage")
    counts = resistance.present * voltage.present
    ohm = resistance.value * OHM.get(f.unit("insulation_resistance"), 1.0)
    return ohm * counts, voltage.value * counts


def _battery_heating(f: Frames) -> tuple[Tensor, Tensor]:
    """°C per (100 A)²·s: increments between arrivals add up to the rise."""
    hottest, current = f("battery_temperature_max"), f("pack_current")
    previous = previous_index(hottest.present, f.reach)
    counts = hottest.present * (previous >= 0).to(hottest.present.dtype)
    increment = hottest.value - at_index(hottest.value, previous)
    # a source that reports every 10 s leaves nine frames of ten empty: weigh by what was there
    share = current.present.mean().clamp(min=1e-3)
    return increment * counts, current.value * current.value * current.present * (1e-4 * f.period_s) / share


def _cell_spread_at_rest(f: Frames) -> tuple[Tensor, Tensor]:
    high, low = f("cell_voltage_max"), f("cell_voltage_min")
    counts = high.present * low.present * low_current(f("pack_current"))
    return (high.value - low.value) * counts, counts


def quotients(catalogue: Catalogue) -> tuple[Quotient, ...]:
    """Return the quantities this schema has the roles for, in a fixed order."""
    load = "motor_torque" if catalogue.column("motor_torque") is not None else "pack_current"
    inverter, motor, coolant = "inverter_temperature", "motor_temperature", "coolant_temperature"
    battery = ("battery_temperature_max", "battery_temperature_min")
    electric = ("pack_current", "pack_voltage")
    charge = (*electric, "charge_power_requested")
    inlet = ("inlet_temperature", "ambient_temperature")
    known = (
        Quotient("pack_resistance_ohm", electric, 100.0, False, _pack_resistance),
        Quotient("pack_resistance_25c_ohm", (*electric, battery[0]), 100.0, True, _pack_resistance_25c),
        Quotient("inverter_rise_c", (inverter, coolant), 1.0, False, _rise(inverter, coolant)),
        Quotient(
            "inverter_rise_per_load_c", (inverter, coolant, load), 0.3, True, _rise_per_load(inverter, coolant, load)
        ),
        Quotient("motor_rise_c", (motor, coolant), 1.0, False, _rise(motor, coolant)),
        Quotient("motor_rise_per_load_c", (motor, coolant, load), 0.3, True, _rise_per_load(motor, coolant, load)),
        Quotient("vibration_per_krpm_g", ("vibration_rms", "motor_speed"), 3.0, True, _vibration_per_krpm),
        Quotient("charge_power_ratio", charge, 5.0, True, _charge_power_ratio),
        Quotient("charge_deficit_kw", charge, 1.0, False, _charge_deficit),
        Quotient("plugged_idle_share", ("cable_connected", "pack_current"), 1.0, False, _plugged_idle),
        Quotient("inlet_rise_c", inlet, 1.0, False, _rise(*inlet)),
        Quotient("inlet_rise_per_load_c", (*inlet, "pack_current", "is_charging"), 1e-4, True, _inlet_rise_per_load),
        Quotient("isolation_ohm_per_v", ("insulation_resistance", "pack_voltage"), 100.0, True, _isolation),
        Quotient("battery_heating_c_per_load_s", (battery[0], "pack_current"), 3.0, True, _battery_heating),
        Quotient("battery_temperature_spread_c", battery, 0.5, True, _rise(*battery)),
        Quotient(
            "cell_spread_at_rest_v",
            ("cell_voltage_max", "cell_voltage_min", "pack_current"),
            0.5,
            True,
            _cell_spread_at_rest,
        ),
    )
    return tuple(q for q in known if all(catalogue.column(role) is not None for role in q.roles))


def signal_means(catalogue: Catalogue, most: int = 16) -> tuple[Quotient, ...]:
    """For a schema without any known role: the first signals' own means, so that it too has a slow state."""

    def compute(column: int) -> "Callable[[Frames], tuple[Tensor, Tensor]]":
        return lambda f: f.column(column)

    return tuple(
        Quotient(f"{signal.name}.slow_mean", (), 0.5, True, compute(i))
        for i, signal in enumerate(catalogue.scalars[:most])
    )
