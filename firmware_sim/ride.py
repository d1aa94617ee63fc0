"""One vehicle's life, ten seconds at a time: what `drive` sends. No clock and no output of its own.

The physics, the sensors and the driver are `generate`'s, so models trained on its files know what they see here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from edge_agent.contract.signals import SEVERITIES, FloatArray
from firmware_sim import driver, duty, faults, vehicle
from firmware_sim.driver import AC, DC, DRIVING, PARKED, Activity
from firmware_sim.plant import Plant
from firmware_sim.sensors import VECTOR_EVERY_S, Float32Array, Sensors, plan_artefacts
from firmware_sim.vehicle import Vehicle

BLOCK_S = VECTOR_EVERY_S
STRETCH_S = 1800  # how far ahead the driver plans
RAMP_S = 120.0  # a demonstration cannot wait for weeks: the parameters grow to their severity within two minutes
LOW_SOC = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class RideSpec:
    """Which vehicle, and what becomes of it. `fault` "" stays healthy; times are simulated seconds from the start."""

    vehicle_id: str
    seed: int
    start_s: float
    fault: str = ""
    variant: str = ""
    severity: str = SEVERITIES[-1]
    fault_after_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Ten reported seconds: time [10], scalars [10, S], one row of cells [C] and probes [P]; fault level 0 to 4."""

    time_s: FloatArray
    scalars: Float32Array
    cell_voltage: Float32Array
    cell_temperature: Float32Array
    mode: int
    level: float


def build_vehicle(spec: RideSpec) -> Vehicle:
    """Draw the vehicle, with the failure that the spec asks for."""
    number = vehicle.vehicle_number(spec.vehicle_id)
    made = vehicle.build(spec.seed, number, spec.vehicle_id)
    if not spec.fault:
        return made
    cell = int(vehicle.generator(spec.seed, number, vehicle.EPISODE).integers(made.make.cells))
    episode = faults.sudden(
        spec.fault,
        spec.severity,
        after_s=spec.start_s + spec.fault_after_s,
        ramp_s=RAMP_S,
        cell=cell,
        variant=spec.variant,
    )
    return replace(made, episode=episode)


def blocks(spec: RideSpec) -> Iterator[Block]:
    """Yield the vehicle's reports, ten seconds each, without end; the same spec gives the same."""
    made = build_vehicle(spec)
    rng = vehicle.generator(spec.seed, made.number, vehicle.DUTY)
    sense = vehicle.generator(spec.seed, made.number, vehicle.SENSE)
    sensors = Sensors(made)
    soc = np.array([rng.uniform(0.55, 0.9)])
    at, plant = spec.start_s, None
    while True:
        todo = _activities(rng, spec, made, float(soc[0]), first=plant is None)
        whole = duty.build(made, rng, todo, start_s=at, day=0)
        if plant is None:
            plant = Plant([made], soc, whole.ambient_c[:1])
        artefacts = plan_artefacts(rng, at, len(whole))
        for start in range(0, len(whole), BLOCK_S):
            part = whole.part(start, start + BLOCK_S)
            (truth,) = plant.run([part])
            frames = sensors.read(truth, part.time_s, artefacts, sense)
            yield Block(
                time_s=part.time_s,
                scalars=frames.scalars,
                cell_voltage=frames.cell_voltage[0],
                cell_temperature=frames.cell_temperature[0],
                mode=int(part.mode[-1]),
                level=float(made.episode.level(part.time_s)[-1]) if made.episode else 0.0,
            )
        at += len(whole)
        soc = plant.soc


def _activities(rng: np.random.Generator, spec: RideSpec, made: Vehicle, soc: float, *, first: bool) -> list[Activity]:
    """Choose what the driver does next, a multiple of ten seconds in all.

    A failing vehicle drives all the time, but for an empty pack; with a charging fault it stands at a charger instead.
    """
    if spec.fault == "charging_fault":
        if soc > 0.85:
            return [Activity(DRIVING, STRETCH_S)]
        mode = DC if rng.random() < made.style.fast_charging else AC
        return [Activity(PARKED, 30), Activity(mode, 900, float(rng.uniform(0.85, 1.0))), Activity(DRIVING, 300)]
    if spec.fault:
        if soc < LOW_SOC:
            return [Activity(PARKED, 60), Activity(DC, STRETCH_S)]
        return [Activity(DRIVING, STRETCH_S)]
    if first:
        return [Activity(DRIVING, STRETCH_S)]  # who starts a vehicle to watch it wants to see it move
    return driver.plan(rng, STRETCH_S, made.style, soc=soc, km_range=duty.km_range(made))
