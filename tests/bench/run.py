"""`make bench`: speed as ratios against an alternative in the same run, so that a slow machine changes nothing.

Uses the demo's models and bundle (made first where they are not valid). Each pair is run in turn, A B A B …, and the
median of the ratios is what to quote.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cloud.demo.build import ROOT, build
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import default_catalogue
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.inference import Scorer
from edge_agent.pipeline.outcomes import Window
from export.features import FeatureGraph
from export.graph import read_dataset_facts, read_models
from firmware_sim.fleet import FleetSpec, generate

PAIRS = 7


def pairs(ours: Callable[[], object], other: Callable[[], object], *, runs: int) -> tuple[float, float, float]:
    """Median seconds of one call of each, and the median ratio other/ours."""
    times: list[tuple[float, float]] = []
    for _ in range(PAIRS + 1):
        pair = []
        for call in (ours, other):
            began = time.perf_counter()
            for _ in range(runs):
                call()
            pair.append((time.perf_counter() - began) / runs)
        times.append((pair[0], pair[1]))
    times = times[1:]  # the first pair warms up
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    )


def a_window(cells: int = 96, probes: int = 24) -> Window:
    """Return a window of plausible numbers, some of them missing."""
    random = np.random.default_rng(1)
    catalogue = default_catalogue()
    spread = catalogue.scalar_max - catalogue.scalar_min
    values = catalogue.scalar_min + spread * (0.4 + 0.02 * random.standard_normal((300, len(spread))))
    values[random.random(values.shape) < 0.02] = np.nan
    return Window(
        300.0, values.astype(np.float32), (3.8 + 0.004 * random.standard_normal((30, cells))).astype(np.float32),
        (25 + random.standard_normal((30, probes))).astype(np.float32), 60.0, 0.98,
    )  # fmt: skip


def one_window(work: Path) -> tuple[float, float, float]:
    """The bundle's graph against what trained it: torch eager features and autoencoder, LightGBM's own predict."""
    catalogue = default_catalogue()
    scorer = Scorer(load_bundle(work / "bundle", catalogue), catalogue)
    window, state = a_window(), scorer.initial_state(96, 24)
    facts = read_dataset_facts(work / "datasets")
    graph = FeatureGraph(catalogue, facts.window).eval()
    models = read_models(work / "models", work / "datasets", graph.feature_names, len(catalogue.scalars))
    inputs = [torch.from_numpy(a[None]) for a in (window.values, window.cell_voltage, window.cell_temperature)]
    states = [torch.from_numpy(state[s.name]) for s in graph.state_specs]
    boosters = [b for b in (models.failure, *models.types.values()) if b is not None]
    torch.set_num_threads(1)

    def separately() -> None:
        with torch.no_grad():
            features, pooled, *_ = graph(*inputs, torch.tensor([60.0]), *states)
            if models.autoencoder is not None:
                models.autoencoder(pooled)
        row = features.numpy().astype(np.float64)
        for booster in boosters:
            booster.predict(row, num_threads=1)
        for index in range(len(models.types)):
            models.severity.predict(np.column_stack([row, [[index]]]), num_threads=1)

    return pairs(lambda: scorer.score(window, state), separately, runs=30)


def gridding() -> tuple[float, float, float]:
    """Ingest, guards and windows of an hour, as blocks of a recording, against the same arrivals one by one."""
    random = np.random.default_rng(2)
    catalogue = default_catalogue()
    rows = 3600
    middle = (catalogue.scalar_min + catalogue.scalar_max) / 2
    block = ArrivalBlock(
        1.7e9 + np.arange(rows, dtype=np.float64), np.tile(middle, (rows, 1)),
        3.8 + 0.004 * random.standard_normal((rows, 96)), 25 + 0.1 * random.standard_normal((rows, 24)),
    )  # fmt: skip

    def run(size: int) -> None:
        pipeline = Pipeline(catalogue, vehicle_id="bench", period_s=1.0, cells=96, probes=24)
        for at in range(0, rows, size):
            pipeline.push(block.take(slice(at, at + size)))

    return pairs(lambda: run(rows), lambda: run(1), runs=1)


def simulated() -> tuple[float, float, float]:
    """A fleet side by side against one vehicle after the other; seconds per million frames."""

    def fleet(vehicles: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            spec = FleetSpec(vehicles=vehicles, days=1, hours=1.0, seed=1, faulty=0.0)
            generate(spec, Path(folder) / "fleet", workers=1, on_progress=lambda *_: None)

    many, one, _ = pairs(lambda: fleet(24), lambda: fleet(1), runs=1)
    return many / (24 * 3600) * 1e6, one / 3600 * 1e6, (one / 3600) / (many / (24 * 3600))


def main() -> None:
    """Run everything and print one table."""
    console = Console()
    work = ROOT / "var" / "demo"
    work.mkdir(parents=True, exist_ok=True)
    build(work, console.print)
    table = Table("what", "ours", "the alternative", "ratio")
    for name, (ours, other, ratio), alternative in (
        ("one window, batch 1, one thread", one_window(work), "torch eager + LightGBM predict"),
        ("an hour of 96 cells to windows and guards", gridding(), "one arrival at a time (the live path)"),
        ("a million simulated frames", simulated(), "one vehicle at a time"),
    ):
        table.add_row(name, _time(ours), f"{_time(other)}  {alternative}", f"{ratio:.1f} times")
    console.print(table)
    length_s = WindowSpec().length_s
    console.print(f"a window is {length_s:.0f} s; medians of {PAIRS} pairs; Python {sys.version.split()[0]}")


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


if __name__ == "__main__":
    main()
