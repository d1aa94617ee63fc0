"""What a driver does: speed over time, hills, stops, and how a waking period divides into driving, charging, parking.

Everything is drawn from the generator handed in, a vehicle at a time; the physics that answers is elsewhere.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.contract.signals import FloatArray

PARKED, DRIVING, AC, DC = 0, 1, 2, 3
IntArray = npt.NDArray[np.int8]

# road: (share of legs in town, cruise km/h low, high, seconds held low, high, chance of a stop after it)
_ROADS = (
    ("town", 22.0, 56.0, 8.0, 55.0, 0.50),
    ("country", 55.0, 92.0, 25.0, 120.0, 0.18),
    ("highway", 86.0, 124.0, 60.0, 260.0, 0.03),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How one driver drives and where.

    vigour 0.6 (gentle) to 1.5; road_shares for town, country, highway; hilliness 1 = flat country's gentle slopes,
    3 = mountains; towing is the chance that a trip has a trailer (mass + 55 %).
    """

    vigour: float = 1.0
    road_shares: tuple[float, float, float] = (0.45, 0.35, 0.20)
    hilliness: float = 1.0
    towing: float = 0.0
    fast_charging: float = 0.35  # share of charging stops that are DC


@dataclass(frozen=True, slots=True)
class Activity:
    """One stretch of a waking period; `share` scales what a DC or AC station offers (hard negative: a weak station)."""

    mode: int
    seconds: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Drive:
    """Speed [T] km/h, acceleration [T] m/s², slope [T] (rise over run), mass factor (1 = no trailer)."""

    speed_kmh: FloatArray
    acceleration_m_per_s2: FloatArray
    slope: FloatArray
    mass_factor: float


def smooth_noise(rng: np.random.Generator, n: int, length: int) -> FloatArray:
    """Return [n] of unit-variance noise that varies over about `length` steps."""
    knots = rng.standard_normal(n // length + 3)
    at = np.arange(n) / length + rng.random()
    # Linear interpolation averages neighbours: variance 2/3, undone here.
    return np.asarray(np.interp(at, np.arange(knots.size), knots) * 1.2247, dtype=np.float64)


def drive(rng: np.random.Generator, seconds: int, style: Style) -> Drive:
    """Drive for `seconds` ≥ 1, from standstill to standstill."""
    at, speed = _breakpoints(rng, seconds, style)
    t = np.arange(seconds, dtype=np.float64)
    kmh = np.interp(t, at, speed)
    moving = kmh > 8
    kmh = kmh + moving * smooth_noise(rng, seconds, 12) * np.minimum(kmh * 0.03, 2.0)
    kernel = np.array([0.1, 0.2, 0.4, 0.2, 0.1])  # a foot cannot step: bounds the jerk
    kmh = np.convolve(np.pad(kmh, 2, mode="edge"), kernel, mode="valid")
    kmh = np.maximum(kmh, 0.0)
    kmh[kmh < 0.3] = 0.0
    acceleration = np.gradient(kmh / 3.6) if seconds > 1 else np.zeros(1)
    slope = (smooth_noise(rng, seconds, 45) * 0.010 + smooth_noise(rng, seconds, 240) * 0.006) * style.hilliness
    return Drive(kmh, acceleration, np.clip(slope, -0.10, 0.10), 1.55 if rng.random() < style.towing else 1.0)


def _breakpoints(rng: np.random.Generator, seconds: int, style: Style) -> tuple[list[float], list[float]]:
    """Corner points of a speed profile that begins and ends at rest, seconds and km/h."""
    first_stop = 3.0 + 12.0 * rng.random()
    at, speed = [0.0, first_stop], [0.0, 0.0]
    leg_end, road = 0.0, _ROADS[0]
    shares = np.cumsum(style.road_shares)
    while at[-1] < seconds:
        u = rng.random(6)
        if at[-1] >= leg_end:
            road = _ROADS[min(int(np.searchsorted(shares, u[0] * shares[-1])), 2)]
            leg_end = at[-1] + 150 + 450 * u[1]
        _, low, high, hold_low, hold_high, stop = road
        target = (low + (high - low) * u[2]) * (0.94 + 0.06 * style.vigour)
        change = target - speed[-1]
        rate = (0.7 + 0.9 * u[3]) * style.vigour if change > 0 else 0.8 + 0.8 * u[3]  # m/s²
        if change > 0 and target > 70:
            rate *= 0.65
        at.append(at[-1] + max(abs(change) / 3.6 / rate, 1.0))
        speed.append(target)
        at.append(at[-1] + hold_low + (hold_high - hold_low) * u[4] ** 2)
        speed.append(target)
        if u[5] < stop:
            at.append(at[-1] + target / 3.6 / (0.9 + 0.8 * u[3]))
            speed.append(0.0)
            at.append(at[-1] + 4 + 40 * u[1] ** 2)
            speed.append(0.0)
    return _ending_at_rest(at, speed, float(seconds))


def _ending_at_rest(at: list[float], speed: list[float], seconds: float) -> tuple[list[float], list[float]]:
    last = float(np.interp(seconds, at, speed))
    halt = last / 3.6 / 1.6
    kept = [(t, v) for t, v in zip(at, speed, strict=True) if t < seconds - halt]
    brake_from = float(np.interp(seconds - halt, at, speed))
    kept += [(max(seconds - halt, 0.0), brake_from), (seconds, 0.0)]
    return [t for t, _ in kept], [v for _, v in kept]


def plan(rng: np.random.Generator, seconds: int, style: Style, *, soc: float, km_range: float) -> list[Activity]:
    """Divide a waking period of `seconds`: first parked a little, then trips with charging stops between.

    soc (0 to 1) is what the pack holds at the start and km_range what it drives when full: the driver's own estimate
    keeps the plan within the pack. One public charging visit in seven goes wrong, mostly not by the vehicle's fault:
    a DC station that gives a fraction of its power, or ends early.
    """
    left, todo = seconds, [Activity(PARKED, min(seconds, int(rng.integers(20, 120))))]
    left -= todo[0].seconds
    while left > 0:
        if soc > 0.25:
            longest = int(max((soc - 0.15) * km_range / 55 * 3600, 300))
            length = min(left, longest, int(rng.integers(600, 2100)))
            todo.append(Activity(DRIVING, length))
            soc -= length / 3600 * 55 / km_range
            left -= length
        if left > 0:
            length = min(left, int(rng.integers(20, 150)))
            todo.append(Activity(PARKED, length))
            left -= length
        if left > 0 and (soc < 0.35 or rng.random() < 0.75):
            fast = rng.random() < (0.8 if soc < 0.3 else style.fast_charging)
            length = int(rng.integers(480, 1500)) if fast else int(rng.integers(600, 2700))
            unlucky = fast and rng.random() < 1 / 7
            length = min(left, int(length * (0.3 if unlucky and rng.random() < 0.5 else 1.0)))
            todo.append(Activity(DC if fast else AC, length, 0.45 if unlucky else float(rng.uniform(0.85, 1.0))))
            soc = min(soc + length / 3600 * (0.6 if fast else 0.1), 0.95)
            left -= length
    return todo
