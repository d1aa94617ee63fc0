"""The traction battery: an equivalent circuit with one RC pair, lumped heat, and every cell's share in it.

`Battery.run` steps V packs through T seconds at 1 s; `cell_deviation` says how far each cell stands from the pack's
mean, from the cell's own capacity, charge and resistance. The convention in here is the physicist's: current and power
are positive OUT of the pack; `sensors.py` turns the sign to VSS's. Resistance against temperature and the cells' spread
against load follow measurements of real packs (docs/adr/0010-physics-of-the-simulator.md).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.contract.signals import FloatArray

Float32Array = npt.NDArray[np.float32]

# Open-circuit voltage of an NMC cell over state of charge: 341 V at 1 % and 392 V at 99 % on 96 cells.
SOC_POINTS = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
OCV_V = np.array([3.40, 3.50, 3.545, 3.60, 3.635, 3.665, 3.70, 3.765, 3.845, 3.925, 4.01, 4.11])
_SLOPE = np.gradient(OCV_V, SOC_POINTS)

# Resistance relative to 25 °C. Measured dV/dI at 1 s: 177 mΩ below 5 °C, 123 at 5 to 12, 92 at 12 to 20, 72 above.
_R_AT_C = np.array([-25.0, -10.0, 2.0, 8.5, 16.0, 27.0, 40.0, 60.0])
_R_LOG = np.log(np.array([6.2, 3.9, 2.46, 1.71, 1.28, 1.0, 0.86, 0.75]))

RC_SHARE = 0.30  # the RC pair's resistance over the 1 s resistance
RC_TAU_S = 28.0
HOLD_STEPS = 10  # charge and temperature move so slowly that what depends on them is looked up every 10 s
EMPTY_SOC, FULL_SOC = 0.01, 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConstants:
    """What does not change while a pack is simulated; each array is [V]."""

    cells: FloatArray
    capacity_ah: FloatArray
    resistance_ohm: FloatArray
    heat_capacity_j_per_k: FloatArray
    liquid_cooled: FloatArray  # 1 or 0
    charge_power_w: FloatArray


@dataclass(frozen=True, slots=True)
class PackTrace:
    """What a pack did, [T, V] each: terminal volts, amperes OUT, charge (0 to 1), °C, and the inner drop in volts.

    `inner_drop_v` is I·R plus the RC pair's voltage: what cell resistances share. `request_w` is the charging power
    that the pack would take.
    """

    voltage_v: FloatArray
    current_a: FloatArray
    soc: FloatArray
    temperature_c: FloatArray
    inner_drop_v: FloatArray
    request_w: FloatArray


class Battery:
    """V packs with their state: charge, RC voltage and temperature, [V] each."""

    def __init__(self, constants: PackConstants, soc: FloatArray, temperature_c: FloatArray) -> None:
        self.constants = constants
        self.soc = soc.copy()
        self.temperature_c = temperature_c.copy()
        self._rc_v = np.zeros_like(soc)

    def rest(self, hours: FloatArray, ambient_c: FloatArray, soc: FloatArray) -> None:
        """Sleep for `hours` [V]: relax towards `ambient_c` (time constant 7 h) and wake with charge `soc`."""
        self._rc_v[:] = 0.0
        self.temperature_c += (ambient_c - self.temperature_c) * (1.0 - np.exp(-hours / 7.0))
        self.soc[:] = soc

    def run(
        self,
        power_w: FloatArray,
        *,
        ambient_c: FloatArray,
        resistance_factor: FloatArray,
        capacity_factor: FloatArray,
        extra_heat_w: FloatArray,
    ) -> PackTrace:
        """Step through T seconds under `power_w` [T, V] (positive out); the pack limits what flows in and when empty.

        ambient_c, resistance_factor, capacity_factor, extra_heat_w: [T, V].
        """
        c = self.constants
        steps = power_w.shape[0]
        voltage, current, soc, temperature, drop, request = (np.empty_like(power_w) for _ in range(6))
        decay = np.exp(-1.0 / RC_TAU_S)
        for start in range(0, steps, HOLD_STEPS):
            end = min(start + HOLD_STEPS, steps)
            r = c.resistance_ohm * resistance_factor[start] * resistance_at(self.temperature_c)
            per_charge = 1.0 / (3600.0 * c.capacity_ah * capacity_factor[start])
            ocv = c.cells * np.interp(self.soc, SOC_POINTS, OCV_V)
            slope = c.cells * np.interp(self.soc, SOC_POINTS, _SLOPE)
            soc0 = self.soc.copy()
            accepts = charge_acceptance_w(c.charge_power_w, self.soc, self.temperature_c)
            request[start:end] = accepts
            most_in = -accepts
            # The most that can leave: nothing from an empty pack; never past half of the matched-load power.
            most_out = np.where(self.soc > EMPTY_SOC, 0.22 * ocv * ocv / r, 0.0)
            r2, r4, rc_gain = 2.0 * r, 4.0 * r, (1.0 - decay) * RC_SHARE * r
            sink_c, conductance = self._sink(ambient_c[start])
            heat_gain = 1.0 / c.heat_capacity_j_per_k
            for t in range(start, end):
                power = np.minimum(np.maximum(power_w[t], most_in), most_out)
                inner = ocv + slope * (self.soc - soc0) - self._rc_v
                i = (inner - np.sqrt(np.maximum(inner * inner - r4 * power, 0.0))) / r2
                ir = i * r
                dropped = ir + self._rc_v
                self._rc_v = self._rc_v * decay + rc_gain * i
                self.soc = self.soc - i * per_charge
                heat = i * dropped + extra_heat_w[t] + conductance * (sink_c - self.temperature_c)
                self.temperature_c = self.temperature_c + heat * heat_gain
                voltage[t], current[t], soc[t] = inner - ir, i, self.soc
                temperature[t], drop[t] = self.temperature_c, dropped
            np.clip(self.soc, 0.0, 1.0, out=self.soc)
        return PackTrace(voltage, current, soc, temperature, drop, request)

    def _sink(self, ambient_c: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Where the pack's heat goes, °C and W/K: the air, or the chiller above 30 °C and the heater below 5 °C."""
        hot = self.constants.liquid_cooled * (self.temperature_c > 30.0)
        cold = self.constants.liquid_cooled * (self.temperature_c < 5.0)
        sink = np.where(hot > 0, 18.0, np.where(cold > 0, 22.0, ambient_c))
        return sink, np.where(hot > 0, 65.0, np.where(cold > 0, 28.0, 12.0))


def resistance_at(temperature_c: FloatArray) -> FloatArray:
    """Resistance relative to 27 °C."""
    return np.asarray(np.exp(np.interp(temperature_c, _R_AT_C, _R_LOG)), dtype=np.float64)


def charge_acceptance_w(rated_w: FloatArray, soc: FloatArray, temperature_c: FloatArray) -> FloatArray:
    """Power that a pack takes in: rated, less when cold, tapering from 65 % of charge as a constant voltage does."""
    taper = np.interp(soc, [0.0, 0.65, 0.8, 0.92, FULL_SOC], [1.0, 1.0, 0.62, 0.22, 0.0])
    cold = np.interp(temperature_c, [-20.0, -5.0, 10.0, 22.0, 45.0, 55.0], [0.06, 0.15, 0.5, 1.0, 1.0, 0.3])
    return np.asarray(rated_w * taper * cold, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSpread:
    """How the cells of one pack differ, [C] each; drawn once for a vehicle's life.

    charge      deviation of the state of charge at 80 % (0 to 1)
    capacity    relative deviation
    resistance  relative deviation, zero mean
    offset_v    of the measurement, and of groups of cells that stand apart together (no fault: mostly high)
    """

    charge: FloatArray
    capacity: FloatArray
    resistance: FloatArray
    offset_v: FloatArray


def cell_deviation(
    spread: CellSpread,
    soc: FloatArray,
    inner_drop_v: FloatArray,
    *,
    weak_cell: int,
    soc_deficit: FloatArray,
    resistance_factor: FloatArray,
) -> Float32Array:
    """Return [C, T] float32: each cell's voltage less the pack's mean cell voltage, for traces [T] of one vehicle.

    The spread at rest comes from charge and offset, and grows with load by the resistances (measured: 13 mV between the
    extremes below 5 A, 22 at 40 to 100 A, 40 above). The weak cell's deviation is added on top.
    """
    cells = spread.charge.size
    slope = np.interp(soc, SOC_POINTS, _SLOPE).astype(np.float32)
    drop = (inner_drop_v / cells).astype(np.float32)
    charge = spread.charge.astype(np.float32)
    capacity = spread.capacity.astype(np.float32)
    deviation = np.multiply.outer(charge, slope)
    deviation += np.multiply.outer(capacity, slope * (soc - 0.8).astype(np.float32))
    deviation -= np.multiply.outer(spread.resistance.astype(np.float32), drop)
    deviation += spread.offset_v.astype(np.float32)[:, None]
    if np.any(soc_deficit > 0) or np.any(resistance_factor != 1):
        lower = np.interp(np.maximum(soc - soc_deficit, 0.0), SOC_POINTS, OCV_V) - np.interp(soc, SOC_POINTS, OCV_V)
        deviation[weak_cell] += (lower - (resistance_factor - 1.0) * drop).astype(np.float32)
    return np.asarray(deviation, dtype=np.float32)
