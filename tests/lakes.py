"""A fleet in the field: driven by the simulator, sampled into a real lake, its alerts judged by people in a real store.

What is sampled is what the agent samples: the window at an alert and some around it, and windows at random, with the
model's state from before each. Alerts stand where the simulator says that a fault could be seen, or where a test puts
them; verdicts are given through the same functions as over the API.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from cloud.alert_work.life_cycle import Action, ActionName
from cloud.collector import ingest
from cloud.lake.lake import Lake, LakeSample, new_path
from cloud.store import work_rows
from cloud.store.fleet_store import FleetStore
from cloud.store.items import StatusItem
from cloud.training.config import DEFAULT_CONFIG, load_catalogue, load_config, load_mapping
from cloud.training.recording import blocks, read_columns
from cloud.training.vehicle import feature_runner
from edge_agent.contract import messages, topics
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.mapping import Masked
from edge_agent.contract.messages import Severity
from edge_agent.contract.samples import SampleWindow, pack
from edge_agent.contract.signals import SEVERITIES
from edge_agent.pipeline import drift
from edge_agent.pipeline.ingest import Ingest
from edge_agent.pipeline.outcomes import Sampled, Window
from edge_agent.pipeline.window import Windower
from export.features import State
from firmware_sim import fleet
from firmware_sim.vehicle import Vehicle

CONFIG = load_config(DEFAULT_CONFIG)
CATALOGUE = load_catalogue(CONFIG, DEFAULT_CONFIG)
MAPPING, _ = load_mapping(CONFIG, DEFAULT_CONFIG)
RUNNER = feature_runner(CATALOGUE, CONFIG.window)
NOW = 1_772_000_000.0
AROUND = (-10, -5, 0, 5)  # windows, a minute each, of which five make one length: as the agent samples an alert


@dataclass(frozen=True, slots=True)
class Driven:
    """One vehicle's days: its windows, and the model's state from before each."""

    vehicle: Vehicle
    windows: list[Window]
    states: list[State]

    @property
    def vehicle_id(self) -> str:
        return self.vehicle.vehicle_id

    def level(self) -> np.ndarray:
        """Severity level of the fault at each window's end, 0 = none."""
        episode = self.vehicle.episode
        at = np.array([w.end_s for w in self.windows])
        return np.zeros(len(at)) if episode is None else np.floor(episode.level(at))


def drive(spec: fleet.FleetSpec, vehicles: list[Vehicle], folder: Path) -> Iterator[Driven]:
    """Simulate, record, and read back as the agent reads: mapping, ingest, windows, features along the time."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = [pq.ParquetWriter(folder / f"{v.vehicle_id}.parquet", fleet.frame_schema()) for v in vehicles]
    for period in fleet.simulate(spec, vehicles):
        for writer, frames in zip(writers, period, strict=True):
            if frames is not None:
                writer.write_table(fleet.frame_table(frames))
    for writer, vehicle in zip(writers, vehicles, strict=True):
        writer.close()
        windows = list(windows_of(folder / f"{vehicle.vehicle_id}.parquet"))
        states: list[State] = []
        state = None
        for window in windows:
            state = state or RUNNER.initial_state(window.cell_voltage.shape[1], window.cell_temperature.shape[1])
            states.append(state)
            _, _, state = RUNNER.run(window, state)
        yield Driven(vehicle, windows, states)


def arrivals_of(recording: Path) -> list[ArrivalBlock]:
    return list(blocks(read_columns((recording,), "test"), MAPPING, CATALOGUE, "test", Masked()))


def windows_of(recording: Path) -> Iterator[Window]:
    arrivals = arrivals_of(recording)
    cells, probes = arrivals[0].cell_voltage.shape[1], arrivals[0].cell_temperature.shape[1]
    take, windower = Ingest(), Windower(CATALOGUE, CONFIG.window, MAPPING.source.period_s, cells, probes)
    for block in arrivals:
        yield from (o for o in windower.push(take.push(block)) if isinstance(o, Window))
    yield from (o for o in (*windower.push(take.flush()), *windower.flush()) if isinstance(o, Window))


def vehicles(spec: fleet.FleetSpec, prefix: str, kinds: Iterable[str | None]) -> list[Vehicle]:
    """Vehicles with the given failures, one of each, in ids of their own."""
    made = []
    for number, kind in enumerate(kinds, start=1):
        built = fleet.build_vehicle(spec, number, None if kind is None else (kind, number))
        made.append(replace(built, vehicle_id=f"{prefix}_{number:03d}"))
    return made


def sample(driven: Driven, row: int, *, alert: "TestAlert | None" = None, state_id: str | None = None) -> LakeSample:
    """One window as the agent would send it, as it lies in the lake."""
    window = driven.windows[row]
    raw = SampleWindow(
        CATALOGUE.scalar_names, window.values, window.cell_voltage, window.cell_temperature, driven.states[row]
    )
    packed = pack(raw)
    return LakeSample(
        vehicle_id=driven.vehicle_id,
        sample_id=f"{driven.vehicle_id}-{row}-{alert.alert_id if alert else 'random'}",
        reason="alert" if alert else "random",
        alert_id=alert.alert_id if alert else "",
        failure_type=alert.failure_type if alert else "",
        stratum=drift.stratum(window, CATALOGUE),
        end_s=window.end_s,
        received_at_s=NOW,
        model_release=1,
        state_id=RUNNER.state_id if state_id is None else state_id,
        coverage=window.coverage,
        elapsed_s=window.elapsed_s,
        sha256=hashlib.sha256(packed).hexdigest(),
        packed=packed,
        clock_trusted=True,
    )


def from_vehicle(vehicle_id: str, told: Sampled) -> LakeSample:
    """A sample that a vehicle's own pipeline chose, as it lies in the lake."""
    return LakeSample(
        vehicle_id=vehicle_id, sample_id=f"{vehicle_id}-{told.key}", reason=told.reason, alert_id=told.alert_id,
        failure_type=told.failure_type, stratum=told.stratum, end_s=told.end_s, received_at_s=NOW,
        model_release=told.model_release, state_id=told.state_id, coverage=told.coverage, elapsed_s=told.elapsed_s,
        sha256=hashlib.sha256(told.packed).hexdigest(), packed=told.packed, clock_trusted=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TestAlert:
    """An alert at one of a vehicle's windows, as the vehicle told it, and what a person said of it."""

    __test__ = False
    vehicle_id: str
    alert_id: str
    failure_type: str
    since_s: float
    until_s: float
    action: ActionName | None = None
    label_type: str | None = None
    label_severity: str | None = None
    origin: Literal["model", "guard"] = "model"


def alert_at(driven: Driven, row: int, failure_type: str, action: ActionName | None, **label: str) -> TestAlert:
    end_s = driven.windows[row].end_s
    return TestAlert(
        driven.vehicle_id, f"{driven.vehicle_id}-{row}", failure_type, end_s, end_s + 1800.0, action,
        label.get("label_type"), label.get("label_severity"),
        label.get("origin", "model"),  # type: ignore[arg-type]
    )  # fmt: skip


def around(driven: Driven, row: int, alert: TestAlert) -> list[LakeSample]:
    """The samples of one alert: the window at it and some before and after it, of the same drive."""
    rows = [row + step for step in AROUND if 0 <= row + step < len(driven.windows)]
    near = [r for r in rows if abs(driven.windows[r].end_s - driven.windows[row].end_s) < 1800.0]
    return [sample(driven, r, alert=alert) for r in near]


def write_lake(url: str, samples: list[LakeSample], *, files: int = 3) -> list[str]:
    """Put the samples into the lake, in some files; returns their paths."""
    paths = []
    for part in range(files):
        paths.append(new_path(NOW))
        Lake(url).write(samples[part::files], paths[-1])
    return paths


async def write_store(url: str, alerts: list[TestAlert], seen: Iterable[str] = ()) -> None:
    """Let the vehicles tell their alerts, and people judge them; `seen` are on line at `NOW`, weeks later."""
    store = FleetStore.over(url)
    await store.prepare()
    online = [StatusItem(vehicle, messages.Status(state="online"), retained=False) for vehicle in seen]
    await store.commit(online, received_at_s=NOW)
    for number, told in enumerate(alerts):
        items = [
            _told(told, 2 * number + 1, "raised", told.since_s),
            _told(told, 2 * number + 2, "cleared", told.until_s),
        ]
        await store.commit(items, received_at_s=NOW)
        if told.action is None:
            continue
        async with store.writing() as connection:
            (target,) = await work_rows.found(connection, told.alert_id, told.vehicle_id, lock=True)
            action = Action(
                action=told.action, actor="anna", reason="workshop", at_s=NOW + 1, failure_type=told.label_type,
                severity=told.label_severity,
            )  # fmt: skip
            assert isinstance(await work_rows.act(connection, target, action), work_rows.Done)
    await store.close()


def _told(alert: TestAlert, seq: int, transition: messages.Transition, at_s: float):
    severity: Severity = SEVERITIES[2]  # type: ignore[assignment]
    body = messages.Alert(
        alert_id=alert.alert_id, transition=transition, failure_type=alert.failure_type, severity=severity,
        origin=alert.origin, since=iso(alert.since_s),
    )  # fmt: skip
    envelope = messages.event(
        body, event_id=f"s/{seq}", vehicle_id=alert.vehicle_id, time=iso(at_s), stream_id="s", seq=seq, boot_id="b",
        clock_trusted=True,
    )  # fmt: skip
    return ingest.decide(topics.alert(alert.vehicle_id, alert.failure_type), messages.encode(envelope))


def iso(at_s: float) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
