"""A fleet over days, written as training data: who has which failure when, and the Parquet files with their labels.

Vehicles are simulated in batches of a fixed size, a batch is the unit of work, and every random number is keyed by
(seed, vehicle, purpose, day): the files are the same whatever the number of workers. Memory holds one waking period
of one batch at a time; each vehicle's file grows by a row group a period.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, FloatArray
from firmware_sim import driver, duty, faults, vehicle
from firmware_sim.faults import NEVER, Episode
from firmware_sim.makes import MAKES
from firmware_sim.plant import Plant
from firmware_sim.sensors import CATALOGUE, Frames, Sensors, plan_artefacts
from firmware_sim.vehicle import Vehicle
from firmware_sim.workers import worker_pool

START_S = 1_767_571_200.0  # 2026-01-05T00:00:00Z, a Monday
PERIODS = 2  # waking periods a day
BATCH = 15
GENERATOR_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """What to generate. `faulty` is the share of vehicles that have a failure; hours are awake hours a day."""

    vehicles: int
    days: int
    hours: float
    seed: int
    faulty: float = 0.5

    @property
    def period_s(self) -> int:
        """Length of one waking period in seconds, a multiple of ten."""
        return max(int(self.hours * 3600 / PERIODS) // 10 * 10, 10)

    @property
    def end_s(self) -> float:
        """Where the simulated time ends."""
        return START_S + self.days * duty.DAY_S

    @property
    def frames(self) -> int:
        """Number of frames at most (a vehicle that burnt down sends no more)."""
        return self.vehicles * self.days * PERIODS * self.period_s


def vehicle_id(number: int) -> str:
    """Return the id of the fleet's vehicle of that number (from 1)."""
    return f"EV_{number:04d}"


def schedule(spec: FleetSpec, number: int) -> FloatArray:
    """Start of each waking period, [days · PERIODS] Unix seconds: a morning and an afternoon of each day."""
    rng = vehicle.generator(spec.seed, number, vehicle.SCHEDULE)
    share = duty.DAY_S / PERIODS
    room = max(share - spec.period_s - 600.0, 0.0)
    at = np.arange(spec.days * PERIODS) * share + np.floor(rng.random(spec.days * PERIODS) * room)
    return np.asarray(START_S + at, dtype=np.float64)


def assign(spec: FleetSpec) -> dict[int, tuple[str, int]]:
    """Which vehicle numbers have which failure type, with a running count within the type: the types take turns."""
    rng = vehicle.generator(spec.seed, 0, vehicle.EPISODE)
    chosen = rng.permutation(np.arange(1, spec.vehicles + 1))[: round(spec.faulty * spec.vehicles)]
    kinds = len(FAILURE_TYPES)
    return {int(number): (FAILURE_TYPES[i % kinds], i // kinds) for i, number in enumerate(chosen)}


def build_vehicle(spec: FleetSpec, number: int, assigned: tuple[str, int] | None) -> Vehicle:
    """Draw the fleet's vehicle of a number; makes take turns, so that no failure type belongs to one make."""
    made = vehicle.build(spec.seed, number, vehicle_id(number), make=MAKES[number % len(MAKES)])
    if assigned is None:
        return made
    return replace(made, episode=_episode(spec, made, *assigned))


def _episode(spec: FleetSpec, made: Vehicle, failure_type: str, count: int) -> Episode:
    """Draw a failure's life within the simulated span; growth is compressed into it (docs/adr/0012)."""
    rng = vehicle.generator(spec.seed, made.number, vehicle.EPISODE)
    span = spec.days * duty.DAY_S
    names = faults.variants(failure_type)
    variant = names[count % len(names)]
    cell = int(rng.integers(made.make.cells))
    onset = START_S + span * float(rng.uniform(0.05, 0.40))
    grows = span * float(rng.uniform(0.25, 0.75))
    shares = np.sort(rng.uniform([0.08, 0.35, 0.60, 0.85], [0.25, 0.55, 0.80, 1.0]))
    failure = onset + grows * float(rng.uniform(1.05, 1.3))
    regime, rate = "", 8.0
    if failure_type == "thermal_runaway_risk":
        regime = ("days", "minutes", "none")[count % 3]
        rate = float(rng.choice([1.5, 4.0, 10.0, 500.0]))
        failure = _awake_moment(spec, made.number, float(rng.uniform(0.45, 0.98)), rng)
        if regime == "none":
            onset, grows = failure, 0.0
        elif regime == "minutes":
            grows = float(rng.uniform(300.0, 1500.0))
            onset = failure - grows
        else:
            grows = failure - onset
    reached = [float(onset + grows * share) for share in shares]
    seen = [t if t < spec.end_s else NEVER for t in reached]
    end = spec.end_s
    if failure < spec.end_s and not regime and rng.random() < 0.5:
        end = min(failure + 0.05 * span, spec.end_s)  # repaired: what follows is healthy again
    return Episode(
        failure_type=failure_type,
        variant=variant,
        onset_s=onset,
        reached_s=(seen[0], seen[1], seen[2], seen[3]),
        failure_s=failure if failure < spec.end_s else NEVER,
        end_s=end,
        regime=regime,
        event_rate_k_per_s=rate,
        cell=cell,
    )


def _awake_moment(spec: FleetSpec, number: int, share: float, rng: np.random.Generator) -> float:
    """Return a moment in the middle of the waking period nearest to `share` of the span."""
    starts = schedule(spec, number)
    start = starts[min(int(share * starts.size), starts.size - 1)]
    return float(np.floor(start + spec.period_s * rng.uniform(0.5, 0.9)))


def simulate(spec: FleetSpec, vehicles: list[Vehicle]) -> Iterator[list[Frames | None]]:
    """Yield each waking period's frames, one entry a vehicle; None once a vehicle is lost to a thermal runaway."""
    starts = [schedule(spec, v.number) for v in vehicles]
    first = np.array([vehicle.generator(spec.seed, v.number, vehicle.DUTY).uniform(0.5, 0.95) for v in vehicles])
    plant: Plant | None = None
    slept_from = [start[0] for start in starts]
    sensors = [Sensors(v) for v in vehicles]
    for period in range(spec.days * PERIODS):
        day = period // PERIODS
        rngs = [vehicle.generator(spec.seed, v.number, vehicle.DUTY, 1 + period) for v in vehicles]
        begin = [float(start[period]) for start in starts]
        soc = np.array([rng.uniform(0.5, 0.95) if rng.random() < 0.6 else 0.0 for rng in rngs])
        soc = np.maximum(soc, first if plant is None else plant.soc)
        duties = []
        for v, rng, start, charge in zip(vehicles, rngs, begin, soc, strict=True):
            todo = driver.plan(rng, spec.period_s, v.style, soc=float(charge), km_range=duty.km_range(v))
            duties.append(duty.build(v, rng, todo, start_s=start, day=day))
        air = np.array([d.ambient_c[0] for d in duties])
        if plant is None:
            plant = Plant(vehicles, soc, air)
        else:
            hours = (np.array(begin) - np.array(slept_from)) / 3600.0
            plant.rest(hours, air, soc)
        truths = plant.run(duties)
        slept_from = [start + spec.period_s for start in begin]
        frames: list[Frames | None] = []
        for i, (v, d, truth) in enumerate(zip(vehicles, duties, truths, strict=True)):
            if d.since_runaway_s[0] > 0:
                frames.append(None)
                continue
            rng = vehicle.generator(spec.seed, v.number, vehicle.SENSE, period)
            artefacts = plan_artefacts(rng, begin[i], spec.period_s)
            frames.append(sensors[i].read(truth, d.time_s, artefacts, rng))
        yield frames


def frame_schema() -> pa.Schema:
    """Columns of a raw frame file: `time`, every scalar, the two vectors (null but every ten seconds)."""
    return pa.schema(
        [pa.field("time", pa.float64())]
        + [pa.field(s.name, pa.float32()) for s in CATALOGUE.scalars]
        + [pa.field(s.name, pa.list_(pa.float32())) for s in CATALOGUE.vectors]
    )


def frame_table(frames: Frames) -> pa.Table:
    """Return one block of frames as a table of `frame_schema`."""
    n = frames.time_s.size
    columns: list[pa.Array] = [pa.array(frames.time_s)]
    columns += [pa.array(np.ascontiguousarray(frames.scalars[:, i])) for i in range(frames.scalars.shape[1])]
    by_role = {"cell_voltage": frames.cell_voltage, "cell_temperature": frames.cell_temperature}
    for signal in CATALOGUE.vectors:
        columns.append(_sparse_lists(by_role[signal.role], frames.vector_rows, n))
    return pa.table(columns, schema=frame_schema())


def _sparse_lists(values: np.ndarray, rows: np.ndarray, n: int) -> pa.Array:
    width = values.shape[1]
    present = np.zeros(n, bool)
    present[rows] = True
    offsets = np.concatenate([[0], np.cumsum(present * width)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.ascontiguousarray(values).ravel()), mask=pa.array(~present)
    )


def write_batch(spec: FleetSpec, output: Path, numbers: list[int]) -> int:
    """Simulate one batch of vehicles and write their files; returns the number of frames written."""
    assigned = assign(spec)
    vehicles = [build_vehicle(spec, number, assigned.get(number)) for number in numbers]
    writers = []
    written = 0
    try:
        for v in vehicles:
            folder = output / "raw_frames" / f"vehicle_id={v.vehicle_id}"
            folder.mkdir(parents=True, exist_ok=True)
            writers.append(pq.ParquetWriter(folder / "part-0.parquet", frame_schema(), compression="snappy"))
        for period in simulate(spec, vehicles):
            for writer, frames in zip(writers, period, strict=True):
                if frames is not None:
                    writer.write_table(frame_table(frames))
                    written += frames.time_s.size
    finally:
        for writer in writers:
            writer.close()
    return written


def write_labels(spec: FleetSpec, output: Path) -> None:
    """Write `labels.parquet` (a row an episode), `vehicles.parquet` and `generation.json`."""
    assigned = assign(spec)
    vehicles = [build_vehicle(spec, number, assigned.get(number)) for number in range(1, spec.vehicles + 1)]
    ill = [(v, v.episode) for v in vehicles if v.episode is not None]
    seconds = [
        ("onset_s", [e.onset_s for _, e in ill]),
        *((f"{s}_s", [e.reached_s[i] for _, e in ill]) for i, s in enumerate(SEVERITIES)),
        ("failure_s", [e.failure_s for _, e in ill]),
        ("end_s", [e.end_s for _, e in ill]),
    ]
    labels = {
        "vehicle_id": pa.array([v.vehicle_id for v, _ in ill], pa.string()),
        "make": pa.array([v.make.name for v, _ in ill], pa.string()),
        "failure_type": pa.array([e.failure_type for _, e in ill], pa.string()),
        "variant": pa.array([e.variant for _, e in ill], pa.string()),
        "regime": pa.array([e.regime for _, e in ill], pa.string()),
    }
    for name, values in seconds:
        labels[name] = pa.array([t if np.isfinite(t) else None for t in values], pa.float64())
    labels["predictable"] = pa.array([e.predictable for _, e in ill], pa.bool_())
    pq.write_table(pa.table(labels), output / "labels.parquet")
    pq.write_table(
        pa.table(
            {
                "vehicle_id": pa.array([v.vehicle_id for v in vehicles], pa.string()),
                "make": pa.array([v.make.name for v in vehicles], pa.string()),
                "cells": pa.array([v.make.cells for v in vehicles], pa.int32()),
                "probes": pa.array([v.make.probes for v in vehicles], pa.int32()),
                "state_of_health": pa.array([v.soh for v in vehicles], pa.float64()),
            }
        ),
        output / "vehicles.parquet",
    )
    about = {
        "generator_version": GENERATOR_VERSION,
        "vehicles": spec.vehicles,
        "days": spec.days,
        "hours": spec.hours,
        "seed": spec.seed,
        "faulty": spec.faulty,
        "start_s": START_S,
        "period_s": spec.period_s,
        "severity_levels": {
            kind: {variant: {name: list(values) for name, values in table.items()} for variant, table in of.items()}
            for kind, of in faults.TABLE.items()
        },
    }
    (output / "generation.json").write_text(json.dumps(about, indent=1) + "\n")


def batches(spec: FleetSpec) -> list[list[int]]:
    """Vehicle numbers of each unit of work."""
    numbers = list(range(1, spec.vehicles + 1))
    return [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]


def generate(spec: FleetSpec, output: Path, *, workers: int, on_progress: Callable[[int, int], None]) -> int:
    """Write a whole fleet under `output`; calls `on_progress(vehicles, frames)` for each finished batch.

    Returns the number of frames. Raises `UnavailableError` when the output cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        _clear(output)
        work = batches(spec)
        total = 0
        if workers <= 1 or len(work) == 1:
            total = sum(_one(spec, output, numbers, on_progress) for numbers in work)
        else:
            with worker_pool(min(workers, len(work))) as pool:
                running = {pool.submit(write_batch, spec, output, numbers): len(numbers) for numbers in work}
                for done in as_completed(running):
                    total += done.result()
                    on_progress(running[done], done.result())
        write_labels(spec, output)  # last: generation.json stands for a complete fleet
    except BrokenProcessPool as error:
        raise UnavailableError("a worker process died (out of memory?); try again with --workers 1") from error
    except OSError as error:
        raise UnavailableError(
            f"cannot write to {output}: {error.strerror or error}; choose a folder with room that you may write to"
        ) from error
    return total


def _clear(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else: a smaller fleet must not inherit vehicles."""
    (output / "generation.json").unlink(missing_ok=True)
    for part in (output / "raw_frames").glob("vehicle_id=*/part-0.parquet"):
        part.unlink()
        if not any(part.parent.iterdir()):
            part.parent.rmdir()


def _one(spec: FleetSpec, output: Path, numbers: list[int], on_progress: Callable[[int, int], None]) -> int:
    frames = write_batch(spec, output, numbers)
    on_progress(len(numbers), frames)
    return frames
