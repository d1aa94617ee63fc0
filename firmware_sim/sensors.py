"""What the vehicle's sensors and its BMS report of what really happens: noise, resolution, and the ways they fail.

`STEP` is the resolution of every signal, the same as on the CAN bus (`ev.dbc`), so that a frame is the same number
whether it went over the bus or into a file. Failing sensors are hard negatives, never a fault of the vehicle: single
wrong values, frozen values, one signal or all of them missing. Names and signs are the catalogue's: the current is
positive INTO the battery.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_agent.contract.signals import Catalogue, FloatArray, default_catalogue
from firmware_sim import powertrain, runaway
from firmware_sim.battery import cell_deviation
from firmware_sim.driver import AC, DC
from firmware_sim.plant import Truth
from firmware_sim.vehicle import Vehicle

Float32Array = npt.NDArray[np.float32]

CATALOGUE: Catalogue = default_catalogue()
VECTOR_EVERY_S = 10
_BATTERY = "Vehicle.Powertrain.TractionBattery."
_MOTOR = "Vehicle.Powertrain.ElectricMotor."

# signal: (resolution, standard deviation of the noise, low and high of a wrong value)
_SENSORS: dict[str, tuple[float, float, float, float]] = {
    "Vehicle.Speed": (0.1, 0.05, 0.0, 200.0),
    "Vehicle.TraveledDistance": (1.0, 0.0, 0.0, 300_000.0),
    "Vehicle.Exterior.AirTemperature": (0.5, 0.15, -40.0, 60.0),
    _BATTERY + "CurrentVoltage": (0.1, 0.08, 200.0, 450.0),
    _BATTERY + "CurrentCurrent": (0.1, 0.15, -300.0, 300.0),
    _BATTERY + "StateOfCharge.Displayed": (0.5, 0.0, 0.0, 100.0),
    _BATTERY + "StateOfHealth": (0.5, 0.0, 50.0, 100.0),
    _BATTERY + "Temperature.Max": (1.0, 0.12, -40.0, 100.0),
    _BATTERY + "Temperature.Min": (1.0, 0.12, -40.0, 100.0),
    _BATTERY + "CellVoltage.Max": (0.001, 0.0006, 3.0, 4.4),
    _BATTERY + "CellVoltage.Min": (0.001, 0.0006, 2.5, 4.2),
    _BATTERY + "InsulationResistance": (1.0, 0.0, 100.0, 60_000.0),
    _BATTERY + "Charging.IsChargingCableConnected": (1.0, 0.0, 0.0, 1.0),
    _BATTERY + "Charging.IsCharging": (1.0, 0.0, 0.0, 1.0),
    _BATTERY + "Charging.RequestedPower": (0.1, 0.0, 0.0, 100.0),
    _BATTERY + "Charging.InletTemperature": (1.0, 0.2, -40.0, 120.0),
    _MOTOR + "Speed": (1.0, 2.0, 0.0, 15_000.0),
    _MOTOR + "Torque": (0.5, 0.4, -200.0, 300.0),
    _MOTOR + "Temperature": (0.5, 0.2, -40.0, 180.0),
    _MOTOR + "CoolantTemperature": (0.5, 0.2, -40.0, 110.0),
    "Vehicle.Powertrain.Inverter.Temperature": (0.5, 0.3, -40.0, 150.0),
    _MOTOR + "Vibration.RMS": (0.001, 0.0, 0.0, 5.0),
    _MOTOR + "Vibration.Kurtosis": (0.1, 0.0, 1.0, 40.0),
}
STEP: dict[str, float] = {name: row[0] for name, row in _SENSORS.items()}
CELL_VOLTAGE_STEP, CELL_TEMPERATURE_STEP = 0.001, 1.0
_TABLE = np.array([_SENSORS[name] for name in CATALOGUE.scalar_names])
# 0.1 is no binary number: counting in whole steps and multiplying gives the value nearest to what a decoder gives.
_PER_UNIT = np.round(1.0 / _TABLE[:, 0])

HOT_SPOT_K_PER_W = 3.0  # of one cell above the pack, at the cell
Kind = Literal["wrong", "frozen", "missing", "silent"]


@dataclass(frozen=True, slots=True)
class Artefact:
    """One misbehaviour of a sensor between two times; `column` -1 stands for all signals (a silent bus)."""

    kind: Kind
    column: int
    start_s: float
    end_s: float
    value: float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What was reported: time [T] s, scalars [T, S] in the catalogue's order, NaN = no value.

    cell_voltage [K, C] and cell_temperature [K, P] stand for the rows `vector_rows` [K].
    """

    time_s: FloatArray
    scalars: Float32Array
    vector_rows: npt.NDArray[np.intp]
    cell_voltage: Float32Array
    cell_temperature: Float32Array


def plan_artefacts(rng: np.random.Generator, start_s: float, seconds: int) -> list[Artefact]:
    """Draw the misbehaviour of a stretch: per hour 1.5 single wrong values, 0.1 frozen, 0.5 missing, 0.3 silences."""
    hours = seconds / 3600.0
    columns = _TABLE.shape[0]
    kinds: Sequence[tuple[Kind, float, float, float]] = (
        ("wrong", 1.5, 1.0, 1.0),
        ("frozen", 0.1, 60.0, 400.0),
        ("missing", 0.5, 5.0, 90.0),
        ("silent", 0.3, 3.0, 40.0),
    )
    planned = []
    for kind, per_hour, shortest, longest in kinds:
        for _ in range(int(rng.poisson(per_hour * hours))):
            at = start_s + float(np.floor(rng.random() * seconds))
            column = int(rng.integers(columns))
            value = float(rng.uniform(_TABLE[column, 2], _TABLE[column, 3]))
            lasts = float(np.floor(rng.uniform(shortest, longest + 1)))
            planned.append(Artefact(kind, -1 if kind == "silent" else column, at, at + lasts, value))
    return planned


class Sensors:
    """The sensors of one vehicle; keeps the last reported values, for a frozen one repeats them."""

    def __init__(self, vehicle: Vehicle) -> None:
        self._vehicle = vehicle
        self._last = np.full(_TABLE.shape[0], np.nan)
        self._distance = vehicle.probe_distance(vehicle.episode.cell if vehicle.episode else 0)

    def read(self, truth: Truth, time_s: FloatArray, artefacts: Sequence[Artefact], rng: np.random.Generator) -> Frames:
        """Report T seconds of `truth`; vectors on rows 0, 10 and so on."""
        n = time_s.size
        rows = np.arange(0, n, VECTOR_EVERY_S)
        deviation, mean_v = self._cells(truth)
        probes = self._probes(truth)
        scalars = self._scalars(truth, deviation, mean_v, probes, rng)
        scalars += rng.standard_normal(scalars.shape, dtype=np.float32) * _TABLE[:, 1]
        scalars = np.rint(scalars * _PER_UNIT) / _PER_UNIT + 0.0  # no minus zero
        np.clip(scalars, CATALOGUE.scalar_min, CATALOGUE.scalar_max, out=scalars)
        self._misbehave(scalars, time_s, artefacts)
        volts = np.maximum(mean_v[rows, None] + deviation[:, rows].T, 0.0)
        volts = volts + 0.0006 * rng.standard_normal(volts.shape, dtype=np.float32)
        celsius = probes[rows] + 0.12 * rng.standard_normal((rows.size, probes.shape[1]), dtype=np.float32)
        silent = np.isnan(scalars[rows]).all(axis=1)
        volts[silent], celsius[silent] = np.nan, np.nan
        _spoil(volts, celsius, rng)
        return Frames(
            time_s=time_s,
            scalars=scalars.astype(np.float32),
            vector_rows=rows,
            cell_voltage=(np.rint(np.clip(volts, 0.0, 4.8) * 1000.0) / 1000.0).astype(np.float32),
            cell_temperature=np.rint(np.clip(celsius, -45.0, 200.0)).astype(np.float32),
        )

    def _cells(self, truth: Truth) -> tuple[Float32Array, FloatArray]:
        """Deviation of each cell [C, T] and the mean of the living [T], volts."""
        make, episode = self._vehicle.make, self._vehicle.episode
        weak = episode.cell if episode else 0
        deviation = cell_deviation(
            self._vehicle.cells,
            truth.soc,
            truth.inner_drop_v,
            weak_cell=weak,
            soc_deficit=truth.parameters["cell_soc_deficit"],
            resistance_factor=truth.parameters["cell_resistance_factor"],
        )
        lost = runaway.dead_cells(truth.since_runaway_s, make.cells)
        mean = truth.pack_v / (make.cells - lost)
        if lost.any():
            order = np.abs(np.arange(make.cells) - weak).argsort(kind="stable").argsort(kind="stable")
            dead = order[:, None] < lost[None, :]
            deviation = np.where(dead, (0.02 - mean)[None, :], deviation).astype(np.float32)
        return deviation, mean

    def _probes(self, truth: Truth) -> FloatArray:
        """Temperature at each probe, [T, P] °C."""
        heat = truth.parameters["cell_short_w"]
        celsius = truth.pack_c[:, None] + self._vehicle.probe_offset_k[None, :]
        if heat.any():
            celsius = celsius + np.multiply.outer(heat * HOT_SPOT_K_PER_W, np.exp(-0.7 * self._distance))
        episode = self._vehicle.episode
        if episode and (truth.since_runaway_s >= 0).any():
            celsius = celsius + runaway.probe_rise_k(truth.since_runaway_s, self._distance, episode.event_rate_k_per_s)
        return np.asarray(np.minimum(celsius, 199.0), dtype=np.float64)

    def _scalars(
        self,
        truth: Truth,
        deviation: Float32Array,
        mean_v: FloatArray,
        probes: FloatArray,
        rng: np.random.Generator,
    ) -> FloatArray:
        vehicle = self._vehicle
        rms, kurtosis = powertrain.vibration(
            rng,
            truth.rotor_rpm,
            truth.torque_nm / vehicle.make.torque_max_nm,
            healthy_g=vehicle.vibration_g,
            rms_factor=truth.parameters["bearing_rms_factor"],
            fault_kurtosis=truth.parameters["bearing_kurtosis"],
        )
        isolation = 1.0 / (1.0 / vehicle.isolation_kohm + 1.0 / truth.parameters["isolation_leak_kohm"])
        # The BMS learns of lost capacity late: its own estimate shows half of a fault's loss.
        health = 100.0 * vehicle.soh * (0.5 + 0.5 * truth.parameters["pack_capacity_factor"])
        plugged = (truth.mode == AC) | (truth.mode == DC)
        by_name = {
            "Vehicle.Speed": truth.speed_kmh,
            "Vehicle.TraveledDistance": np.floor(truth.odometer_km),
            "Vehicle.Exterior.AirTemperature": truth.ambient_c,
            _BATTERY + "CurrentVoltage": truth.pack_v,
            _BATTERY + "CurrentCurrent": -truth.pack_a,
            _BATTERY + "StateOfCharge.Displayed": 100.0 * truth.soc,
            _BATTERY + "StateOfHealth": health,
            _BATTERY + "Temperature.Max": probes.max(axis=1),
            _BATTERY + "Temperature.Min": probes.min(axis=1),
            _BATTERY + "CellVoltage.Max": mean_v + deviation.max(axis=0),
            _BATTERY + "CellVoltage.Min": mean_v + deviation.min(axis=0),
            _BATTERY + "InsulationResistance": isolation * rng.normal(1.0, 0.02, isolation.size),
            _BATTERY + "Charging.IsChargingCableConnected": plugged,
            _BATTERY + "Charging.IsCharging": truth.charging,
            _BATTERY + "Charging.RequestedPower": truth.request_w / 1000.0,
            _BATTERY + "Charging.InletTemperature": truth.inlet_c,
            _MOTOR + "Speed": truth.rotor_rpm,
            _MOTOR + "Torque": truth.torque_nm,
            _MOTOR + "Temperature": truth.motor_c,
            _MOTOR + "CoolantTemperature": truth.coolant_c,
            "Vehicle.Powertrain.Inverter.Temperature": truth.module_sensor_c,
            _MOTOR + "Vibration.RMS": rms,
            _MOTOR + "Vibration.Kurtosis": kurtosis,
        }
        return np.stack([by_name[name] for name in CATALOGUE.scalar_names], axis=1).astype(np.float64, copy=False)

    def _misbehave(self, scalars: FloatArray, time_s: FloatArray, artefacts: Sequence[Artefact]) -> None:
        before = self._last
        for artefact in artefacts:
            hit = np.flatnonzero((time_s >= artefact.start_s) & (time_s < artefact.end_s))
            if not hit.size:
                continue
            if artefact.kind == "wrong":
                unit = _PER_UNIT[artefact.column]
                scalars[hit, artefact.column] = np.rint(artefact.value * unit) / unit
            elif artefact.kind == "frozen":
                held = scalars[hit[0] - 1, artefact.column] if hit[0] else before[artefact.column]
                scalars[hit, artefact.column] = held
            elif artefact.kind == "missing":
                scalars[hit, artefact.column] = np.nan
            else:
                scalars[hit] = np.nan
        if scalars.shape[0]:
            self._last = scalars[-1].copy()


def _spoil(volts: FloatArray, celsius: FloatArray, rng: np.random.Generator) -> None:
    """Make a few vector values wrong, in place: "not available", or a probe that jumps for one report."""
    per_row = 0.5 / 360.0  # one every two hours at 0.1 Hz
    for values, wrong in ((volts, 5.0), (celsius, 40.0)):
        for row in np.flatnonzero(rng.random(values.shape[0]) < per_row):
            column = int(rng.integers(values.shape[1]))
            if rng.random() < 0.6:
                values[row, column] = np.nan
            else:
                values[row, column] += wrong - 4.9 if wrong == 5.0 else wrong
