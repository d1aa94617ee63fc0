"""Raw frames of vehicles without an agent: windowed and scored here by the very pipeline that runs on a vehicle.

This process is the one owner of each such vehicle's pipeline. Frames of one vehicle take effect one request after the
other; the work runs in a thread. What the pipeline says (alerts, drift counts, samples) is stored together with the
state it said it from, so a restart continues, nothing is counted twice, and what could not be stored is stored with the
next frames. Frames since the newest window are in memory only: a kill costs at most one stride of them. Counts of a
vehicle that fell silent leave by `rest`.
"""

import asyncio
import contextlib
import difflib
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import sqlalchemy as sa

from cloud.api.carry_over import carry_over
from cloud.api.models import (
    AlertOut,
    Frame,
    NoScoreOut,
    Prediction,
    Telemetry,
    TelemetryReply,
    TypePrediction,
    WindowProgress,
)
from cloud.api.models import Evidence as EvidenceOut
from cloud.api.problems import MAX_ERRORS, FieldProblem, ProblemError, field_path
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.items import ServerEvent, TelemetryCommit
from edge_agent.contract import messages, topics
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.errors import MessageError
from edge_agent.contract.signals import SEVERITIES, Catalogue, FloatArray
from edge_agent.pipeline.alerts import iso
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import NoScore, Outcome, Scored
from edge_agent.pipeline.reports import Report, reports

log = logging.getLogger(__name__)
T = TypeVar("T")
BOOT_ID = "server"  # these events are numbered by the store, across restarts of this process
TOUCH_S = 10.0  # a vehicle's row is brought up to date at least so often, not with every single frame
SET_BACK_S = 3_600.0  # a request wholly so far behind the newest frame is no retry: the vehicle's clock was set back
SILENT_S = 300.0  # without frames, and a vehicle's counts leave: it may not come back
# kept while the store is away; guards and cooldown make a handful an hour, counts three at most, samples a few a day
MAX_PENDING = {"alert": 1_000, "drift": 100, "sample": 20}


@dataclass(slots=True)
class _Vehicle:
    """One vehicle's pipeline and what surrounds it."""

    pipeline: Pipeline
    make: str
    period_s: float
    cells: int
    probes: int
    recent: list[ArrivalBlock] | None = None  # all of it, until the first window: replayed if cells turn up
    pending: list[ServerEvent] = field(default_factory=list)
    frames_at_s: float = -np.inf  # when the newest came, by the server's clock
    scores: dict[str, float | None] | None = None
    committed_at_s: float = -np.inf
    dirty: bool = False


class TelemetryService:
    """Scores raw frames. `wall` is the server's clock in Unix seconds."""

    def __init__(
        self,
        catalogue: Catalogue,
        bundle: LoadedBundle | None,
        store: FleetStore,
        *,
        wall: Callable[[], float],
        max_vehicles_in_memory: int = 2_000,
        threads: int = 2,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._catalogue = catalogue
        self._bundle = bundle
        self._spec = bundle.manifest.window if bundle else WindowSpec()
        self._store = store
        self._wall = wall
        self._limit = max_vehicles_in_memory
        self._vehicles: OrderedDict[str, _Vehicle] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pipeline")

    async def accept(self, telemetry: Telemetry) -> TelemetryReply:
        """Take the frames of one request. Raises `ProblemError` 422 for a signal or width that does not fit.

        Raises `StoreAwayError` when what came of them could not be stored yet: sending the same frames again is safe.
        """
        vehicle_id = telemetry.vehicle_id
        self._check_signals(telemetry)
        async with self._alone(vehicle_id):
            return await self._accept(telemetry)

    @contextlib.asynccontextmanager
    async def _alone(self, vehicle_id: str) -> AsyncIterator[None]:
        """Hold the vehicle's lock, which exists as long as somebody wants it."""
        lock = self._locks.setdefault(vehicle_id, asyncio.Lock())
        self._waiting[vehicle_id] += 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[vehicle_id] -= 1
            if not self._waiting[vehicle_id]:
                del self._waiting[vehicle_id], self._locks[vehicle_id]

    async def _accept(self, telemetry: Telemetry) -> TelemetryReply:
        vehicle_id = telemetry.vehicle_id
        vehicle = await self._vehicle(telemetry)
        before = vehicle.pipeline.counters
        frames = self._new(telemetry.frames, vehicle)
        repeated = len(telemetry.frames) - len(frames)
        outcomes = await self._run(lambda: self._push(vehicle, frames))
        self.counters["frames"] += len(telemetry.frames)
        self.counters["frames_repeated"] += repeated
        alerts = self._say(vehicle_id, vehicle, outcomes)
        predictions = [self._prediction(o) for o in outcomes if isinstance(o, Scored)]
        if predictions:
            vehicle.scores = _newest_scores(predictions[-1])
        vehicle.dirty = True
        vehicle.frames_at_s = now = self._wall()
        if outcomes or vehicle.pending or now - vehicle.committed_at_s >= TOUCH_S or now < vehicle.committed_at_s:
            # with an older state, a kill would have it said again, under the same name, and what came since dropped
            await self._save(vehicle_id, vehicle, snapshot=bool(outcomes or vehicle.pending))
        self.counters["windows_scored"] += len(predictions)
        self.counters["alerts"] += len(alerts)
        return TelemetryReply(
            vehicle_id=vehicle_id,
            frames_accepted=len(frames) - _more("rows_late", vehicle.pipeline.counters, before),
            window=self._progress(vehicle),
            prediction=predictions[-1] if predictions else None,
            predictions=len(predictions),
            no_scores=[
                NoScoreOut(time=iso(o.end_s), reason=o.reason, detail=o.detail)
                for o in outcomes
                if isinstance(o, NoScore)
            ][-MAX_ERRORS:],
            alerts=alerts,
            notes=self._notes(vehicle.pipeline.counters, before, repeated),
        )

    async def rest(self) -> None:
        """Let the drift counts of vehicles leave that have sent nothing for `SILENT_S`. Raises `StoreAwayError`."""
        for vehicle_id in list(self._vehicles):
            if self._waiting[vehicle_id]:
                continue
            async with self._alone(vehicle_id):
                vehicle = self._vehicles.get(vehicle_id)
                if vehicle is None or not (vehicle.pipeline.open_counts or vehicle.pending):
                    continue
                if self._wall() - vehicle.frames_at_s >= SILENT_S:
                    self._say(vehicle_id, vehicle, vehicle.pipeline.take_counts())
                    await self._put_aside(vehicle_id, vehicle)

    async def close(self) -> None:
        """Save every vehicle's state, so that a restart continues where this process ends."""
        try:
            for vehicle_id, vehicle in list(self._vehicles.items()):
                async with self._alone(vehicle_id):
                    if vehicle.dirty or vehicle.pending:
                        await self._put_aside(vehicle_id, vehicle)
        except StoreAwayError as error:
            log.warning("telemetry: states not saved: %s", error)
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    # --- one vehicle's pipeline ---

    async def _vehicle(self, telemetry: Telemetry) -> _Vehicle:
        """Return the vehicle with a pipeline as wide as these frames, restored or new."""
        vehicle_id = telemetry.vehicle_id
        vehicle = self._vehicles.get(vehicle_id)
        if vehicle is None:
            vehicle = await self._restore(vehicle_id, telemetry)
            self._vehicles[vehicle_id] = vehicle
            await self._evict(vehicle_id)
        self._vehicles.move_to_end(vehicle_id)
        cells = self._width(telemetry.frames, "cell_voltage", vehicle.cells)
        probes = self._width(telemetry.frames, "cell_temperature", vehicle.probes)
        period_s = telemetry.period_s or vehicle.period_s
        if (cells, probes, period_s) != (vehicle.cells, vehicle.probes, vehicle.period_s):
            await self._rebuild(vehicle_id, vehicle, cells, probes, period_s)
        if telemetry.make is not None:
            vehicle.make = telemetry.make
        return vehicle

    async def _restore(self, vehicle_id: str, telemetry: Telemetry) -> _Vehicle:
        state = await self._store.pipeline_state(vehicle_id)
        if state is None:
            cells = self._width(telemetry.frames, "cell_voltage", 0)
            probes = self._width(telemetry.frames, "cell_temperature", 0)
            period_s = telemetry.period_s or 1.0
            pipeline = await self._make(vehicle_id, period_s, cells, probes)
            return _Vehicle(pipeline, telemetry.make or "", period_s, cells, probes, recent=[])
        pipeline = await self._make(vehicle_id, state.period_s, state.cells, state.probes)
        restored = await self._run(lambda: pipeline.restore(state.snapshot))
        self.counters["states_restored" if restored else "states_discarded"] += 1
        if not restored:
            log.warning("telemetry: saved state of %s cannot be used; its windows and trend begin anew", vehicle_id)
        return _Vehicle(pipeline, state.make, state.period_s, state.cells, state.probes)

    async def _rebuild(self, vehicle_id: str, vehicle: _Vehicle, cells: int, probes: int, period_s: float) -> None:
        """Make the pipeline anew for another width or period; what came before the first window is not lost.

        Later the window begins anew, and everything else goes on: standing alerts, so that each finds its end, the
        trend, the newest time.
        """
        before, pipeline = vehicle.pipeline, await self._make(vehicle_id, period_s, cells, probes)
        if vehicle.recent:
            recent = [
                ArrivalBlock(b.time_s, b.scalars, _widen(b.cell_voltage, cells), _widen(b.cell_temperature, probes))
                for b in vehicle.recent
            ]
            again = ArrivalBlock.concatenate(recent)
            outcomes = await self._run(lambda: pipeline.push(again))
            vehicle.recent = recent
            self._say(vehicle_id, vehicle, outcomes)  # decided before: the store knows them by their ids
        elif not await self._run(lambda: carry_over(before, pipeline)):
            raise RuntimeError(f"the pipeline of {vehicle_id} does not take its own state")
        vehicle.pipeline, vehicle.cells, vehicle.probes, vehicle.period_s = pipeline, cells, probes, period_s

    async def _make(self, vehicle_id: str, period_s: float, cells: int, probes: int) -> Pipeline:
        """Make a pipeline; in a thread, as it loads the model.

        Its horizon is 0: frames come in order, so a guard's alert and a prediction are in the reply to the very frame
        that caused them, also where frames come every 30 s. What comes twice is left out before (`_block`).
        """
        return await self._run(
            lambda: Pipeline(
                self._catalogue, vehicle_id=vehicle_id, period_s=period_s, cells=cells, probes=probes,
                bundle=self._bundle, horizon_s=0.0,
            )
        )  # fmt: skip

    async def _evict(self, keep: str) -> None:
        """Let go of the vehicles that were silent longest; their state waits in the store.

        Each under its own lock, and one that is busy stays: so no two lock orders can meet.
        """
        try:
            for vehicle_id in list(self._vehicles)[: max(0, len(self._vehicles) - self._limit)]:
                if vehicle_id == keep or self._waiting[vehicle_id] or vehicle_id not in self._vehicles:
                    continue
                async with self._alone(vehicle_id):
                    if await self._put_aside(vehicle_id, self._vehicles[vehicle_id]):
                        del self._vehicles[vehicle_id]
        except StoreAwayError as error:
            log.warning("telemetry: vehicles stay in memory: %s", error)

    async def _put_aside(self, vehicle_id: str, vehicle: _Vehicle) -> bool:
        """Save; False, logged, for a state that the store can never hold: the other vehicles are not to suffer."""
        try:
            await self._save(vehicle_id, vehicle, snapshot=True)
        except (sa.exc.SQLAlchemyError, MessageError, OverflowError, ValueError):
            log.exception("telemetry: state of %s cannot be stored", vehicle_id)
            self.counters["states_refused"] += 1
            return False
        return True

    def _push(self, vehicle: _Vehicle, frames: list[Frame]) -> list[Outcome]:
        block = self._block(frames, vehicle)
        if not len(block):
            return []
        outcomes = vehicle.pipeline.push(block)
        if vehicle.pipeline.warming_s < vehicle.period_s:
            # a frame is whole, unlike a value from a bus: nothing more can come for the window's last grid point
            outcomes += vehicle.pipeline.complete()
        if vehicle.recent is not None:
            vehicle.recent.append(block)
            if any(isinstance(o, Scored | NoScore) for o in outcomes) or len(vehicle.recent) > self._spec.frames:
                vehicle.recent = None
        return outcomes

    def _new(self, frames: list[Frame], vehicle: _Vehicle) -> list[Frame]:
        """Leave out what was sent before: requests come one after the other, so that is all up to the newest time.

        A repeated frame must not count as a second arrival, as guards ask for two, and a repeated request must not look
        like a clock set back. One that lies further behind than any retry does: `Ingest` then follows the clock.
        """
        newest_s = vehicle.pipeline.last_arrival_s
        if newest_s is None or max(frame.time for frame in frames) < newest_s - SET_BACK_S:
            return frames
        return [frame for frame in frames if frame.time > newest_s]

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # --- frames in ---

    def _check_signals(self, telemetry: Telemetry) -> None:
        known = self._catalogue.scalar_index
        problems: dict[str, FieldProblem] = {}
        for i, frame in enumerate(telemetry.frames):
            for name in sorted(frame.signals.keys() - known.keys()):
                where = field_path(("signals", name) if telemetry.inline else ("frames", i, "signals", name))
                problems.setdefault(name, FieldProblem(field=where, problem=self._unknown(name)))
                if len(problems) >= MAX_ERRORS:
                    break
        if problems:
            errors = list(problems.values())
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise ProblemError(422, f"{errors[0].field}: {errors[0].problem}{more}", errors=errors)

    def _unknown(self, name: str) -> str:
        if name in self._catalogue:
            role = self._catalogue[name].role
            return f"is a list of values: put it into {role} of the frame"
        near = difflib.get_close_matches(name[:256], self._catalogue.scalar_names, n=1, cutoff=0.3)
        nearest = near[0] if near else self._catalogue.scalar_names[0]
        return f"is not a signal of {self._catalogue.name}; the nearest is {nearest}"

    def _width(self, frames: list[Frame], name: str, present: int) -> int:
        """Return how many cells or probes there are; a vehicle's number may appear, but not change."""
        width = present
        for i, frame in enumerate(frames):
            found = len(getattr(frame, name))
            if found and width and found != width:
                problem = f"has {found} values, but {width} until now; a vehicle's number of them does not change"
                where = field_path(("frames", i, name))
                raise ProblemError(422, f"{where}: {problem}", errors=[FieldProblem(field=where, problem=problem)])
            width = found or width
        return width

    def _block(self, frames: list[Frame], vehicle: _Vehicle) -> ArrivalBlock:
        """Make rows of frames: in order of time, each time once."""
        index = self._catalogue.scalar_index
        first = {frame.time: frame for frame in reversed(frames)}
        self.counters["frames_repeated"] += len(frames) - len(first)
        ordered = [first[time_s] for time_s in sorted(first)]
        scalars = np.full((len(ordered), len(index)), np.nan)
        cell_voltage = np.full((len(ordered), vehicle.cells), np.nan)
        cell_temperature = np.full((len(ordered), vehicle.probes), np.nan)
        for row, frame in enumerate(ordered):
            for name, value in frame.signals.items():
                if value is not None:
                    scalars[row, index[name]] = value
            if frame.cell_voltage:
                cell_voltage[row] = [np.nan if v is None else v for v in frame.cell_voltage]
            if frame.cell_temperature:
                cell_temperature[row] = [np.nan if v is None else v for v in frame.cell_temperature]
        return ArrivalBlock(np.array(sorted(first)), scalars, cell_voltage, cell_temperature)

    # --- outcomes out ---

    def _say(self, vehicle_id: str, vehicle: _Vehicle, outcomes: list[Outcome]) -> list[AlertOut]:
        """Make events of what is said, kept until they are stored, and return the alerts as the reply shows them."""
        shown = []
        said = [r for o in outcomes for r in reports(o, vehicle_id=vehicle_id, bundle=self._bundle)]
        waiting = Counter(topics.parse(event.topic).kind for event in vehicle.pending)
        for report in said:
            if waiting[report.stream] < MAX_PENDING[report.stream]:
                waiting[report.stream] += 1
                vehicle.pending.append(ServerEvent(report.event_id, report.topic, _builder(vehicle_id, report)))
            else:
                self.counters[f"{report.stream}s_shed"] += 1
            alert = report.data
            if not isinstance(alert, messages.Alert):
                continue
            shown.append(
                AlertOut(
                    alert_id=alert.alert_id, transition=alert.transition, failure_type=alert.failure_type,
                    severity=alert.severity, origin=alert.origin, rule=alert.rule, since=alert.since, time=report.time,
                    model_release=alert.model_release,
                    evidence=[
                        EvidenceOut(name=e.name, value=e.value, deviation=e.deviation, unit=e.unit)
                        for e in alert.evidence
                    ],
                )
            )  # fmt: skip
        return shown

    async def _save(self, vehicle_id: str, vehicle: _Vehicle, *, snapshot: bool) -> None:
        saved = await self._run(vehicle.pipeline.snapshot) if snapshot else None
        newest_s = vehicle.pipeline.last_arrival_s
        manifest = self._bundle.manifest if self._bundle else None
        events = tuple(vehicle.pending)
        now = self._wall()
        await self._store.commit_telemetry(
            TelemetryCommit(
                vehicle_id=vehicle_id, make=vehicle.make, period_s=vehicle.period_s, cells=vehicle.cells,
                probes=vehicle.probes, snapshot=saved,
                last_arrival=None if newest_s is None else iso(newest_s), scores=vehicle.scores,
                model_release=manifest.release if manifest else None, model_name=manifest.name if manifest else "",
                model_sha256=self._bundle.sha256 if self._bundle else "", events=events,
            ),
            received_at_s=now,
        )  # fmt: skip
        stored = {id(event) for event in events}
        vehicle.pending = [event for event in vehicle.pending if id(event) not in stored]
        vehicle.committed_at_s = now
        vehicle.dirty = not snapshot

    def _progress(self, vehicle: _Vehicle) -> WindowProgress:
        length, remaining = self._spec.length_s, max(0.0, vehicle.pipeline.warming_s)
        return WindowProgress(
            length_s=length, filled_s=max(0.0, length - remaining), stride_s=self._spec.stride_s, remaining_s=remaining
        )

    def _prediction(self, scored: Scored) -> Prediction:
        scores = scored.scores
        manifest = self._bundle.manifest if self._bundle else None
        policy = self._bundle.thresholds.policy if self._bundle else None
        types = {}
        for i, name in enumerate(manifest.failure_types if manifest else ()):
            if scores.type_probability is not None:
                threshold = policy.types.get(name) if policy else None
                severity = scores.severity[i] if scores.severity is not None else ()
                types[name] = TypePrediction(
                    probability=messages.finite(float(scores.type_probability[i])),
                    raise_at=messages.finite(threshold.raise_at) if threshold else None,
                    severity={s: messages.finite(float(p)) for s, p in zip(SEVERITIES, severity, strict=False)},
                )
        return Prediction(
            time=iso(scored.window.end_s),
            failure_probability=messages.finite(scores.failure_probability),
            types=types,
            anomaly_score=messages.finite(scores.anomaly_score),
            worst_cell=scores.worst_cell,
            worst_cell_deviation_v=messages.finite(scores.worst_cell_deviation_v),
            stratum=scored.stratum,
            coverage=messages.finite(scored.window.coverage),
            model_release=manifest.release if manifest else None,
        )

    def _notes(self, now: dict[str, int], before: dict[str, int], repeated: int) -> list[str]:
        notes = [] if self._bundle else ["no bundle: guards only, nothing is predicted"]
        if repeated:
            notes.append(f"frames not newer than the newest one before, left out as sent again: {repeated}")
        words = {
            "rows_late": "frames that came too late to be put in their place, and were left out",
            "values_out_of_range": "values outside their signal's range, which count as missing",
            "values_not_finite": "values that were not usable, and count as missing",
        }
        for name, text in words.items():
            more = _more(name, now, before)
            if more > 0:
                notes.append(f"{text}: {more}")
        return notes


def _builder(vehicle_id: str, report: Report) -> Callable[[str, int], messages.Event]:
    def build(stream_id: str, seq: int) -> messages.Event:
        return messages.event(
            report.data, event_id=report.event_id, vehicle_id=vehicle_id, time=report.time, stream_id=stream_id,
            seq=seq, boot_id=BOOT_ID, clock_trusted=True, subject=report.subject,
        )  # fmt: skip

    return build


def _more(name: str, now: dict[str, int], before: dict[str, int]) -> int:
    return now.get(name, 0) - before.get(name, 0)


def _newest_scores(prediction: Prediction) -> dict[str, float | None]:
    """Return what GET /vehicles shows of a window."""
    return {
        "failure_probability": prediction.failure_probability,
        "anomaly_score": prediction.anomaly_score,
        **{name: scored.probability for name, scored in prediction.types.items()},
    }


def _widen(values: FloatArray, width: int) -> FloatArray:
    return values if values.shape[1] == width else np.full((values.shape[0], width), np.nan)
