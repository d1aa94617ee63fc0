"""How often drift is raised on healthy fleets, and how often a shift is found: the table of docs/adr/0072.

Simulates fleets with other seeds than the training's, runs every vehicle through the vehicle's own pipeline, and judges
disjoint fleets of so many vehicles as the cloud does. A shift is put into the arrivals before the pipeline.

    python tests/bench/drift.py BUNDLE [--vehicles 45] [--seeds 9001,9002]
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from cloud.drift import merge
from cloud.drift.bins import Bins, IntArray
from cloud.drift.decide import Judged, Scope, judge
from cloud.drift.limits import Drift, load_limits
from cloud.drift.merge import Merge, Size
from cloud.training.config import DEFAULT_CONFIG, load_config, load_mapping
from cloud.training.recording import RawVehicle, blocks, find_vehicles, read_columns
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.mapping import Masked
from edge_agent.contract.signals import default_catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import Counted
from firmware_sim import duty
from firmware_sim.fleet import FleetSpec, generate

Counts = dict[str, tuple[int, IntArray]]  # of one vehicle, by stratum: windows, row
Shift = Callable[[ArrivalBlock], ArrivalBlock]
WINTER_C = -15.0
CATALOGUE = default_catalogue()


def _column(role: str) -> int:
    found = CATALOGUE.column(role)
    assert found is not None
    return found


def scaled(block: ArrivalBlock, role: str, factor: float, offset: float) -> ArrivalBlock:
    """Put a gain and an offset on one sensor."""
    values = block.scalars.copy()
    values[:, _column(role)] = values[:, _column(role)] * factor + offset
    return replace(block, scalars=values)


def lost(block: ArrivalBlock, role: str, share: float) -> ArrivalBlock:
    """Take away a share of one signal's arrivals."""
    values = block.scalars.copy()
    gone = np.random.default_rng(len(block)).random(len(block)) < share
    values[gone, _column(role)] = np.nan
    return replace(block, scalars=values)


SHIFTS: dict[str, Shift] = {
    "current sensor reads 10 % more": partial(scaled, role="pack_current", factor=1.1, offset=0.0),
    "inverter temperature reads 10 K more": partial(scaled, role="inverter_temperature", factor=1.0, offset=10.0),
    "speed in miles an hour": partial(scaled, role="speed", factor=0.621371, offset=0.0),
    "coolant temperature comes every 10 s": partial(lost, role="coolant_temperature", share=0.9),
    "pack voltage never comes": partial(lost, role="pack_voltage", share=1.0),
}


def count_vehicle(vehicle: RawVehicle, bundle_path: Path, shift: str) -> Counts:
    """Run one vehicle's recording through the pipeline, and add its drift counts up."""
    bundle = load_bundle(bundle_path, CATALOGUE)
    mapping, _ = load_mapping(load_config(DEFAULT_CONFIG), DEFAULT_CONFIG)
    bins = Bins(bundle.drift_reference)
    arrivals = list(
        blocks(read_columns(vehicle.files, vehicle.vehicle_id), mapping, CATALOGUE, vehicle.vehicle_id, Masked())
    )
    pipeline = Pipeline(
        CATALOGUE, vehicle_id=vehicle.vehicle_id, bundle=bundle,
        cells=arrivals[0].cell_voltage.shape[1], probes=arrivals[0].cell_temperature.shape[1],
    )  # fmt: skip
    found: dict[str, tuple[int, IntArray]] = {}
    change = SHIFTS.get(shift, lambda block: block)
    outcomes = [o for block in arrivals for o in pipeline.push(change(block))] + pipeline.flush()
    for counted in (o for o in outcomes if isinstance(o, Counted)):
        windows, row = found.get(counted.stratum, (0, np.zeros(bins.width, np.int64)))
        found[counted.stratum] = (windows + counted.windows, row + bins.flatten(counted.variables))
    return found


def judged(vehicles: list[Counts], bins: Bins, limits: Drift, scope: Scope) -> Iterator[Judged]:
    """Judge some vehicles as the cloud does."""
    for stratum in sorted({s for v in vehicles for s in v}):
        rows = {str(i): v[stratum] for i, v in enumerate(vehicles) if stratum in v}
        if scope == "vehicle":
            windows, row = rows["0"]
            size, merged = Size(windows, 1, 1.0, float(windows)), row.astype(np.float64)
        else:
            group = Merge(merge.plan({name: windows for name, (windows, _) in rows.items()}, limits), bins.width)
            for name, (_, row) in rows.items():
                group.add(name, row)
            size, merged = group.plan.size, group.row
        reference = bins.reference_row(stratum)
        for variable, distances in zip(bins.variables, bins.distances(reference, merged), strict=True):
            yield judge(
                variable, stratum, distances, size=size, scope=scope, limits=limits,
                calibration=bins.reference.calibration,
                reference_windows=int(reference[bins.slices[variable.name]].sum()),
            )  # fmt: skip


def fleets(vehicles: list[Counts], size: int) -> list[list[Counts]]:
    """Cut vehicles into disjoint fleets."""
    return [vehicles[a:b] for a, b in pairwise(range(0, len(vehicles) + 1, size))]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vehicles", type=int, default=30)
    parser.add_argument("--seeds", default="9001,9002,9003")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    limits = load_limits(None).drift
    bins = Bins(load_bundle(given.bundle, CATALOGUE).drift_reference)
    counted: dict[str, list[Counts]] = {}
    pool = ProcessPoolExecutor(given.workers, get_context("spawn"))  # before the climate below is changed
    with tempfile.TemporaryDirectory() as folder, pool:
        for place, seed in enumerate(given.seeds.split(",")):
            shifts = ["healthy"] if place else ["healthy", *SHIFTS]
            recordings(Path(folder) / seed, int(seed), given.vehicles)
            run(pool, Path(folder) / seed, given.bundle, shifts, counted)
        usual = duty.ambient_c
        duty.ambient_c = lambda *args: usual(*args) + WINTER_C  # type: ignore[assignment]
        recordings(Path(folder) / "winter", int(given.seeds.split(",")[0]), given.vehicles)
        duty.ambient_c = usual
        run(pool, Path(folder) / "winter", given.bundle, ["healthy"], counted, name="15 K colder")
    table = Table("fleets", "vehicles", "n", "with an alert", "variables (median)", "farthest")
    for name, vehicles in counted.items():
        for size in (1, 10, 30):
            report(table, name, size, vehicles, bins, limits)
    Console(width=160).print(table)


def recordings(folder: Path, seed: int, vehicles: int) -> None:
    """Simulate a healthy fleet; in this process, so that what was changed in the simulator holds."""
    spec = FleetSpec(vehicles=vehicles, days=5, hours=1.5, seed=seed, faulty=0.0)
    generate(spec, folder, workers=1, on_progress=lambda *_: None)


def run(
    pool: ProcessPoolExecutor, folder: Path, bundle: Path, shifts: list[str], counted: dict[str, list[Counts]], *,
    name: str = "",
) -> None:  # fmt: skip
    """Count a fleet's vehicles with each shift."""
    for shift in shifts:
        work = partial(count_vehicle, bundle_path=bundle, shift=shift)
        counted.setdefault(name or shift, []).extend(pool.map(work, find_vehicles(folder)))


def report(table: Table, name: str, size: int, vehicles: list[Counts], bins: Bins, limits: Drift) -> None:
    """Add the row of one kind of fleet in one size.

    A vehicle is judged by the 330 windows that it drove; the cloud would wait for 500.
    """
    raised: list[list[Judged]] = []
    for fleet in fleets(vehicles, size):
        scope: Scope = "vehicle" if size == 1 else "fleet"
        verdicts = judged(fleet, bins, limits if size > 1 else msgspec.structs.replace(limits, min_windows=240), scope)
        raised.append([one for one in verdicts if one.verdict == "drift"])
    if not raised:
        return
    found = [len(alerts) for alerts in raised]
    worst = sorted(
        (one for alerts in raised for one in alerts), key=lambda one: -one.distances.psi / (one.threshold or 1)  # type: ignore[union-attr]
    )[:1]  # fmt: skip
    farthest = "".join(f"{one.variable} ({one.stratum})" for one in worst)
    hit = sum(n > 0 for n in found)
    table.add_row(
        name, str(size), str(len(found)), f"{hit} ({hit / len(found):.0%})", f"{np.median(found):g}", farthest
    )


if __name__ == "__main__":
    main()
