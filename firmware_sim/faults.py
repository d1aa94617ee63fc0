"""The five failures as physical parameters that change: what each is worth at each severity, and how it grows.

A fault never adds an offset to a signal. It moves a parameter of the physics (a resistance, a heat path, a short), and
the signals follow. `TABLE` is the documentation: each parameter's value at severity level 0 (new), 1 (low), 2 (medium),
3 (high) and 4 (critical); between levels it is interpolated. Why these sizes: docs/adr/0011-faults-are-parameters.md.

Nothing here knows a signal or a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, FloatArray

LEVELS = np.arange(5.0)
NEVER = float("inf")

# The healthy value of every parameter that a fault may move.
HEALTHY: Mapping[str, float] = {
    "pack_resistance_factor": 1.0,
    "pack_capacity_factor": 1.0,
    "cell_soc_deficit": 0.0,  # how far the weakest cell's charge lies below the pack's, 0 to 1
    "cell_resistance_factor": 1.0,
    "cell_short_w": 0.0,  # heat of an internal short in one cell
    "bearing_rms_factor": 1.0,
    "bearing_kurtosis": 2.9,
    "bearing_friction_w": 0.0,
    "inverter_resistance_factor": 1.0,  # thermal resistance module → coolant
    "coolant_flow_factor": 1.0,
    "contact_resistance_factor": 1.0,  # charging inlet
    "charge_power_factor": 1.0,  # delivered / requested
    "charge_aborts_per_h": 0.0,
    "isolation_leak_kohm": 1e6,  # in parallel to the vehicle's own isolation
}

TABLE: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float, float, float]]]] = {
    "battery_degradation": {
        # One cell leaves the pack on the low side: 15 to 30 mV at low, 100 mV and more at critical.
        "cell": {
            "cell_soc_deficit": (0.0, 0.04, 0.09, 0.16, 0.26),
            "cell_resistance_factor": (1.0, 1.3, 1.8, 2.6, 4.0),
        },
        # The whole pack: capacity far below its age (ageing is 2 to 3 points a year), resistance up.
        "pack": {
            "pack_capacity_factor": (1.0, 0.93, 0.86, 0.78, 0.68),
            "pack_resistance_factor": (1.0, 1.25, 1.55, 2.0, 2.7),
        },
    },
    "motor_bearing_wear": {
        # CWRU: inner race RMS 4 to 6 times, kurtosis 5; outer race 4.7 times, 18; a ball is nearly invisible.
        "inner_race": {
            "bearing_rms_factor": (1.0, 1.8, 2.8, 4.2, 6.0),
            "bearing_kurtosis": (2.9, 4.0, 5.0, 5.4, 4.6),
            "bearing_friction_w": (0.0, 20.0, 60.0, 160.0, 420.0),
        },
        "outer_race": {
            "bearing_rms_factor": (1.0, 1.7, 2.6, 3.9, 5.2),
            "bearing_kurtosis": (2.9, 6.5, 13.0, 18.0, 11.0),
            "bearing_friction_w": (0.0, 20.0, 60.0, 160.0, 420.0),
        },
        "ball": {
            "bearing_rms_factor": (1.0, 1.15, 1.4, 1.7, 2.0),
            "bearing_kurtosis": (2.9, 2.95, 3.0, 3.1, 3.3),
            "bearing_friction_w": (0.0, 15.0, 50.0, 140.0, 400.0),
        },
    },
    "inverter_overheating": {
        # +20 % thermal resistance is the module's end of life (IEC 60749-34 power cycling criterion).
        "solder": {"inverter_resistance_factor": (1.0, 1.25, 1.65, 2.3, 3.3)},
        "coolant_loss": {"coolant_flow_factor": (1.0, 0.62, 0.40, 0.22, 0.10)},
    },
    "thermal_runaway_risk": {
        "short": {
            "cell_short_w": (0.0, 0.2, 0.7, 2.2, 8.0),
            "cell_soc_deficit": (0.0, 0.008, 0.02, 0.045, 0.09),
        },
    },
    "charging_fault": {
        "contact": {
            "contact_resistance_factor": (1.0, 1.8, 3.0, 4.8, 7.5),
            "charge_power_factor": (1.0, 0.93, 0.80, 0.60, 0.40),
            "charge_aborts_per_h": (0.0, 1.0, 3.0, 6.0, 12.0),
        },
        # Limits are 100 Ω/V DC and 500 Ω/V combined: 38 and 190 kΩ on a pack of 380 V.
        "isolation": {
            "isolation_leak_kohm": (1e6, 600.0, 260.0, 120.0, 34.0),
            "charge_aborts_per_h": (0.0, 0.5, 2.0, 5.0, 12.0),
        },
        "no_current": {
            "charge_power_factor": (1.0, 0.85, 0.60, 0.30, 0.05),
            "charge_aborts_per_h": (0.0, 2.0, 5.0, 9.0, 15.0),
        },
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One failure's life in one vehicle; times in Unix seconds, `inf` = not reached.

    reached_s  when the level of each of `SEVERITIES` is reached, non-decreasing
    failure_s  when the part fails: for a thermal runaway the event itself
    end_s      repair, or the end of what is simulated; the parameters are healthy again from there on
    regime     of a thermal runaway: "none" (no precursor), "minutes" or "days"; else ""
    """

    failure_type: str
    variant: str
    onset_s: float
    reached_s: tuple[float, float, float, float]
    failure_s: float
    end_s: float
    regime: str = ""
    event_rate_k_per_s: float = 8.0  # of a runaway; above 100 the whole jump lies between two frames
    cell: int = 0

    @property
    def predictable(self) -> bool:
        """Whether anything could be seen before the failure."""
        return self.regime != "none"

    def level(self, time_s: FloatArray) -> FloatArray:
        """Severity level at each time, 0 (none) to 4 (critical), linear between the times it is reached."""
        known = [t for t in self.reached_s if np.isfinite(t)]
        at = np.maximum.accumulate([self.onset_s, *known])
        level = np.interp(time_s, at, np.arange(at.size, dtype=np.float64))
        return np.where((time_s < self.onset_s) | (time_s >= self.end_s), 0.0, level)

    def parameters(self, time_s: FloatArray) -> dict[str, FloatArray]:
        """Values of the parameters that this fault moves, each like `time_s`."""
        level = self.level(time_s)
        table = TABLE[self.failure_type][self.variant]
        return {name: np.interp(level, LEVELS, values) for name, values in table.items()}


def variants(failure_type: str) -> tuple[str, ...]:
    """Names of a failure type's variants."""
    return tuple(TABLE[failure_type])


def sudden(failure_type: str, severity: str, *, after_s: float, ramp_s: float, cell: int, variant: str = "") -> Episode:
    """Return a fault that grows from nothing at `after_s` to `severity` within `ramp_s` seconds, and stays there.

    At critical severity a thermal runaway has its event ten minutes after the level is reached.
    """
    level = SEVERITIES.index(severity) + 1
    reached = tuple(after_s + ramp_s * (i + 1) / level if i < level else NEVER for i in range(4))
    runaway = failure_type == "thermal_runaway_risk"
    return Episode(
        failure_type=failure_type,
        variant=variant or variants(failure_type)[0],
        onset_s=after_s,
        reached_s=(reached[0], reached[1], reached[2], reached[3]),
        failure_s=reached[3] + 600 if runaway else NEVER,
        end_s=NEVER,
        regime="minutes" if runaway else "",
        cell=cell,
    )


if set(TABLE) != set(FAILURE_TYPES):  # the catalogue's list is the authority
    raise RuntimeError("faults.TABLE and the contract's FAILURE_TYPES differ")
