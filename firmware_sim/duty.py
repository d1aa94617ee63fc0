"""What one vehicle is asked to do in one waking period: traces of speed, slope, air, charging offers, fault parameters.

A duty is complete before the physics answers it, so it can be cut into blocks of any length (`Duty.part`) and gives the
same: `generate` runs it whole, `drive` ten seconds at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.signals import FloatArray
from firmware_sim import charger, driver, faults
from firmware_sim.driver import AC, DC, DRIVING, Activity, IntArray
from firmware_sim.vehicle import Vehicle

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """Traces [T] of one vehicle at 1 s; `parameters` has every name of `faults.HEALTHY`."""

    time_s: FloatArray
    mode: IntArray
    allowed: IntArray  # charging current may flow
    speed_kmh: FloatArray
    acceleration_m_per_s2: FloatArray
    slope: FloatArray
    mass_factor: FloatArray
    ambient_c: FloatArray
    auxiliary_w: FloatArray
    offered_w: FloatArray
    parameters: dict[str, FloatArray]
    since_runaway_s: FloatArray

    def __len__(self) -> int:
        return int(self.time_s.size)

    def part(self, start: int, end: int) -> "Duty":
        """Return the seconds from `start` to before `end`."""
        cut = slice(start, end)
        return Duty(
            time_s=self.time_s[cut],
            mode=self.mode[cut],
            allowed=self.allowed[cut],
            speed_kmh=self.speed_kmh[cut],
            acceleration_m_per_s2=self.acceleration_m_per_s2[cut],
            slope=self.slope[cut],
            mass_factor=self.mass_factor[cut],
            ambient_c=self.ambient_c[cut],
            auxiliary_w=self.auxiliary_w[cut],
            offered_w=self.offered_w[cut],
            parameters={name: values[cut] for name, values in self.parameters.items()},
            since_runaway_s=self.since_runaway_s[cut],
        )


def km_range(vehicle: Vehicle) -> float:
    """Kilometres that a full pack is good for, by the driver's own estimate."""
    return vehicle.make.cells * 3.7 * vehicle.make.capacity_ah * vehicle.soh / 210.0


def ambient_c(vehicle: Vehicle, time_s: FloatArray, day: int, rng: np.random.Generator) -> FloatArray:
    """Air temperature over a waking period of one day."""
    climate = vehicle.climate
    first, last, extra = climate.heat_wave
    base = climate.mean_c + float(rng.normal(0.0, 1.5)) + (extra if first <= day < last else 0.0)
    return np.asarray(base - climate.swing_k * np.cos(2 * np.pi * (time_s / DAY_S - 0.17)), dtype=np.float64)


def build(
    vehicle: Vehicle, rng: np.random.Generator, activities: Sequence[Activity], *, start_s: float, day: int
) -> Duty:
    """Turn activities into traces; they need not fit together in length, the duty is as long as their sum."""
    n = sum(activity.seconds for activity in activities)
    time_s = start_s + np.arange(n, dtype=np.float64)
    mode = np.zeros(n, np.int8)
    speed, acceleration, slope, share = (np.zeros(n) for _ in range(4))
    mass = np.ones(n)
    at = 0
    for activity in activities:
        span = slice(at, at + activity.seconds)
        mode[span] = activity.mode
        share[span] = activity.share
        if activity.mode == DRIVING:
            trip = driver.drive(rng, activity.seconds, vehicle.style)
            speed[span], acceleration[span], slope[span] = trip.speed_kmh, trip.acceleration_m_per_s2, trip.slope
            mass[span] = trip.mass_factor
        at += activity.seconds
    air = ambient_c(vehicle, time_s, day, rng)
    parameters = {name: np.full(n, value) for name, value in faults.HEALTHY.items()}
    since = np.full(n, -np.inf)
    episode = vehicle.episode
    if episode is not None:
        parameters.update(episode.parameters(time_s))
        if episode.failure_type == "thermal_runaway_risk" and np.isfinite(episode.failure_s):
            since = time_s - episode.failure_s
            stopping = np.clip(1.0 - since / 15.0, 0.0, 1.0)  # the vehicle shuts down and rolls to a halt
            speed, acceleration = speed * stopping, acceleration * stopping
            mode[since > 15.0] = driver.PARKED
    cabin = np.minimum(60.0 * np.abs(air - 21.0), 2500.0) * np.where((mode == AC) | (mode == DC), 0.1, 1.0)
    return Duty(
        time_s=time_s,
        mode=mode,
        allowed=charger.sessions(rng, mode, parameters["charge_aborts_per_h"]),
        speed_kmh=speed,
        acceleration_m_per_s2=acceleration,
        slope=slope,
        mass_factor=mass,
        ambient_c=air,
        auxiliary_w=280.0 + 0.5 * cabin * (1.0 + 0.2 * driver.smooth_noise(rng, n, 30)),
        offered_w=charger.offered_w(mode, share, vehicle.make.ac_power_w, vehicle.make.dc_power_w),
        parameters=parameters,
        since_runaway_s=since,
    )
