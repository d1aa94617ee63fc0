"""One vehicle: its make, age, climate, driver, cells, and the failure it will have, drawn from (seed, number).

The same seed, number and make give the same vehicle, whatever else is simulated beside it. `generate` deals the makes
out in turn and `drive` draws one, so the two need not show the same vehicle for a number; each repeats its own.
"""

import re
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.signals import FloatArray
from firmware_sim.battery import CellSpread
from firmware_sim.driver import Style
from firmware_sim.faults import Episode
from firmware_sim.makes import MAKES, Make

# What a stream of random numbers is for: part of its key, so that no two uses share one.
BUILD, EPISODE, SCHEDULE, DUTY, SENSE = range(5)


def generator(seed: int, number: int, purpose: int, day: int = 0) -> np.random.Generator:
    """Return the random numbers of one purpose of one vehicle: independent of workers, batches and of each other."""
    return np.random.Generator(np.random.SFC64([seed, number, purpose, day]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Climate:
    """Air where the vehicle lives: mean of the season, daily swing (half), and a heat wave's days (first, last, K)."""

    mean_c: float
    swing_k: float
    heat_wave: tuple[int, int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vehicle:
    """Everything about a vehicle that does not change while it is simulated.

    soh is the share of capacity that is left by age, `resistance_factor` what age did to the resistance: an old
    healthy pack is one of the hard negatives. probe_offset_k is [P].
    """

    number: int
    vehicle_id: str
    make: Make
    style: Style
    climate: Climate
    soh: float
    resistance_factor: float
    odometer_km: float
    isolation_kohm: float
    vibration_g: float
    inverter_factor: float  # of the thermal resistance, by assembly
    cells: CellSpread
    probe_offset_k: FloatArray
    episode: Episode | None = None

    def probe_distance(self, cell: int) -> FloatArray:
        """Distance of each probe from a cell, in probes, [P]."""
        at = cell / self.make.cells * self.make.probes - 0.5
        return np.asarray(np.abs(np.arange(self.make.probes) - at), dtype=np.float64)


def vehicle_number(vehicle_id: str) -> int:
    """Return the number in a vehicle's id ("EV_001" → 1); an id without one gets a stable number of its letters."""
    digits = re.findall(r"\d+", vehicle_id)
    return int(digits[-1][-9:]) if digits else int.from_bytes(vehicle_id.encode()[:7], "big")


def build(seed: int, number: int, vehicle_id: str, *, make: Make | None = None) -> Vehicle:
    """Draw a vehicle; `make` None draws that too."""
    rng = generator(seed, number, BUILD)
    drawn = MAKES[int(rng.integers(len(MAKES)))]
    make = make or drawn
    age_years = float(rng.uniform(0.0, 9.0))
    soh = 1.0 - age_years * float(np.clip(rng.normal(0.021, 0.006), 0.008, 0.032))  # 1.8 to 2.9 points a year
    shares = rng.dirichlet((4.0, 3.0, 2.0))
    first = int(rng.integers(0, 60))
    return Vehicle(
        number=number,
        vehicle_id=vehicle_id,
        make=make,
        style=Style(
            vigour=float(rng.uniform(0.7, 1.4)),
            road_shares=(float(shares[0]), float(shares[1]), float(shares[2])),
            hilliness=float(rng.choice([1.0, 1.0, 1.6, 3.0])),
            towing=float(rng.choice([0.0, 0.0, 0.0, 0.35])),
            fast_charging=float(rng.uniform(0.1, 0.6)),
        ),
        climate=Climate(
            mean_c=float(rng.uniform(-6.0, 30.0)),
            swing_k=float(rng.uniform(3.0, 7.0)),
            heat_wave=(first, first + 4, 10.0) if rng.random() < 0.5 else (0, 0, 0.0),
        ),
        soh=soh,
        resistance_factor=1.0 + 1.6 * (1.0 - soh) * float(rng.uniform(0.7, 1.3)),
        odometer_km=age_years * 13_000 + float(rng.uniform(50, 4000)),
        isolation_kohm=float(rng.lognormal(8.1, 0.35)),  # 2 to 6 MΩ
        vibration_g=0.073 * float(rng.lognormal(0.0, 0.12)),
        inverter_factor=float(rng.normal(1.0, 0.04)),
        cells=_cells(rng, make.cells),
        probe_offset_k=rng.normal(0.0, 0.5, make.probes),
    )


def _cells(rng: np.random.Generator, cells: int) -> CellSpread:
    resistance = rng.normal(0.0, 0.045, cells)
    offset = rng.normal(0.0, 0.0009, cells)
    if rng.random() < 0.25:  # a module that stands apart, mostly high: seen on real packs, and no fault
        module = int(rng.integers(0, cells // 12)) * 12
        offset[module : module + 12] += rng.uniform(0.006, 0.016) * (1.0 if rng.random() < 0.8 else -0.5)
    return CellSpread(
        charge=rng.normal(0.0, 0.0026, cells),
        capacity=rng.normal(0.0, 0.004, cells),
        resistance=resistance - resistance.mean(),
        offset_v=offset,
    )
