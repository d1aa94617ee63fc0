"""The agent: source → pipeline → outbox → link, wired together and kept alive.

Promises: an alert is on the disk before anything else is done with it; a missing or bad bundle, a broker that is away,
a bus that is silent and a full disk each leave a running agent that says so; SIGTERM ends it in less than five seconds
with its state saved. Decides nothing itself.
"""

import logging
import math
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_agent import health
from edge_agent.clock import Clock, ScaledClock, SystemClock, TimeFloor, from_iso
from edge_agent.config import Config, read_text
from edge_agent.contract import messages, topics
from edge_agent.contract.arrivals import ArrivalBlock
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.mapping import BoundMapping
from edge_agent.contract.messages import Event
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox, OutboxError
from edge_agent.delivery.uplink import Uplink
from edge_agent.logs import event
from edge_agent.mappings import read_mapping
from edge_agent.models import Models
from edge_agent.pipeline.alerts import iso
from edge_agent.pipeline.bundle_dir import LoadedBundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import NoScore, Outcome, Scored
from edge_agent.pipeline.reports import Report, drift_event_id
from edge_agent.reporting import Reporter, retained_current

if TYPE_CHECKING:
    from edge_agent.sources.can import CanSource

GATHER_S = 0.05  # arrivals of so long are one block: a guard's alert leaves within 0.1 s
SNAPSHOT_S = 600.0  # of the source's time: what a crash may cost of the trend state
STATUS_S = 30.0  # of real time, when nothing changes
STATUS_SOONEST_S = 1.0

log = logging.getLogger("voltwatch.agent")


class Agent:
    """One vehicle's agent. Raises `ConfigError` or `UnavailableError` for what must be right before it can start."""

    def __init__(self, config: Config, clock: Clock, *, config_path: Path | None = None) -> None:
        self.config = config
        self.clock = clock
        self.counters: Counter[str] = Counter()
        self._timeline = clock.boot_id if clock.trusted_rate else f"{clock.boot_id}/{clock.monotonic():.3f}"
        self._folder = Path(config.data_dir)
        catalogue = load_catalogue(config.schema)
        self._source, mapping = open_can(config, catalogue, clock.monotonic)
        self._source_name = f"can {config.source.interface}:{config.source.channel}"
        self.outbox = Outbox(
            self._folder,
            notice_topic=topics.notice(config.vehicle_id),
            build_loss=self._loss_event,
            max_bytes=config.outbox.max_bytes,
        )
        self.models = Models(
            config, catalogue, self._builder(catalogue, mapping), clock, timeline=self._timeline,
            switched=self._switched, config_path=config_path,
        )  # fmt: skip
        self._soc_column = catalogue.column("state_of_charge")
        self._soc: float | None = None
        self._floor = TimeFloor()
        self._snapshot_at_s = clock.monotonic() + SNAPSHOT_S
        self._status_at_s = 0.0
        self._status_problems: tuple[str, ...] = ()
        self._status_wanted = True
        self._status_sent_s = -STATUS_S
        self._warming_said_s = clock.monotonic()
        self._save_wanted = False
        self._desired: deque[messages.Desired] = deque(maxlen=16)  # from the link's thread; the newest counts
        self._stopping = threading.Event()
        self.link = Link(
            config.mqtt,
            config.vehicle_id,
            self.outbox,
            Uplink(self.outbox.stream_ids, STREAMS, random.SystemRandom().random),
            client_id=f"voltwatch-{config.vehicle_id}",
            will=health.offline(clock.boot_id),
            on_ack=self._heard_ack,
            on_desired=self._desired.append,
        )
        self.reporter = Reporter(
            self.outbox, self.link, self._envelope, vehicle_id=config.vehicle_id, bundle=self._bundle
        )
        self._restore()

    def _builder(self, catalogue: Catalogue, mapping: BoundMapping) -> Callable[[LoadedBundle | None], Pipeline]:
        def build(bundle: LoadedBundle | None) -> Pipeline:
            return Pipeline(
                catalogue,
                vehicle_id=self.config.vehicle_id,
                period_s=mapping.mapping.source.period_s,
                cells=mapping.cells(),
                probes=mapping.probes(),
                bundle=bundle,
                horizon_s=0.0,  # rows are stamped at receipt
                timeline=self._timeline,
                expected=tuple(mapping.mapping.signals),
                publish_s=self.config.drift.publish_s,
                sampling=self.config.samples.limits,
            )

        return build

    @property
    def pipeline(self) -> Pipeline:
        """The one that decides."""
        return self.models.pipeline

    @property
    def _bundle(self) -> LoadedBundle | None:
        return self.models.bundle

    def _switched(self, last: list[Outcome], bundle: LoadedBundle | None) -> None:
        """Another release is about to decide: what the one before it has to say is said in its name."""
        offset_s = self._wall_offset_s()
        self.reporter.store(last, offset_s)
        self.reporter.retry(offset_s, now=True)
        self.reporter.use(bundle)
        self._save_wanted = True

    def run(self) -> None:
        """Run until `stop`."""
        event(
            log, "start", vehicle=self.config.vehicle_id, source=self._source_name,
            broker=f"{self.config.mqtt.host}:{self.config.mqtt.port}",
            release=None if self._bundle is None else self._bundle.manifest.release,
            model=None if self._bundle is None else self._bundle.manifest.name,
        )  # fmt: skip
        for problem in self.models.problems(clock_trusted=False):
            event(log, "problem", level=logging.WARNING, what=problem)
        self._publish_model_state()
        self.link.start()
        self._source.start()
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception:
                log.exception("step failed")
                self.counters["step_failures"] += 1
                time.sleep(0.1)
        self._shut_down()

    def stop(self) -> None:
        """Ask it to end; may be called from a signal handler or another thread."""
        self._stopping.set()

    def _step(self) -> None:
        block = self._source.read(GATHER_S)
        if block is not None:
            for outcome in self.take(block):
                self._say(outcome)
        now_s = self.clock.monotonic()
        self._store(self.pipeline.idle(now_s))
        self.reporter.retry(self._wall_offset_s())
        self._follow_models()
        if now_s >= self._snapshot_at_s or self._save_wanted:
            self._save()
        self._warm(now_s)
        self._publish_status()

    def take(self, block: ArrivalBlock) -> list[Outcome]:
        """Put one block through the pipeline and what it led to on the disk."""
        if self._soc_column is not None:
            known = block.scalars[:, self._soc_column]
            known = known[np.isfinite(known)]
            if known.size:
                self._soc = float(known[-1])
        outcomes = self.models.push(block)
        self._store(outcomes)
        self._status_wanted |= bool(outcomes)
        return outcomes

    def _store(self, outcomes: list[Outcome]) -> None:
        if self.reporter.store(outcomes, self._wall_offset_s()):
            self._save()

    def _follow_models(self) -> None:
        while self._desired:
            self.models.want(self._desired.popleft())
        if self.models.step():
            self._publish_model_state()
            self._status_wanted = True
        if self.models.fresh_s is not None:
            self._floor.floor_s = max(self._floor.floor_s, self.models.fresh_s)

    def _publish_model_state(self) -> None:
        topic = topics.model_state(self.config.vehicle_id)
        self.link.publish_retained(topic, messages.encode(self.models.state()))

    def _envelope(self, report: Report, stream_id: str, seq: int) -> Event:
        return messages.event(
            report.data, event_id=report.event_id, vehicle_id=self.config.vehicle_id, time=report.time,
            stream_id=stream_id, seq=seq, boot_id=self.clock.boot_id, clock_trusted=self._clock_trusted(),
            subject=report.subject,
        )  # fmt: skip

    def _loss_event(self, loss: messages.Loss, stream_id: str, seq: int) -> bytes:
        report = Report("alert", f"{stream_id}/{seq}", "", iso(self.clock.wall()), loss.stream, loss)
        return messages.encode(self._envelope(report, stream_id, seq))

    # Time -------------------------------------------------------------------------------------------------------

    def _wall_offset_s(self) -> float:
        return self.clock.wall() - self.clock.monotonic()

    def _clock_trusted(self) -> bool:
        return self.clock.trusted_rate and self._floor.trusts(self.clock.wall(), self.clock.monotonic())

    def _heard_ack(self, ack: messages.Ack) -> None:
        try:
            self._floor.heard(from_iso(ack.time), self.clock.monotonic())
        except ValueError:
            self.counters["acks_without_time"] += 1
        self._status_wanted = True

    # What is kept, and what is said -----------------------------------------------------------------------------

    def _restore(self) -> None:
        saved = health.load_state(self._folder)
        vehicle = self.config.vehicle_id
        if saved is not None:
            self._floor.floor_s = max(self._floor.floor_s, saved.floor_s)
            shift = health.shift_s(
                saved, timeline=self._timeline, now_s=self.clock.monotonic(), wall_offset_s=self._wall_offset_s()
            )
            if self.models.restore(saved.pipeline, shift):
                self.reporter.active = saved.active
                event(log, "restored", vehicle=vehicle, saved=iso(saved.saved_s + saved.wall_offset_s))
                self._settle_counts(saved, shift)
            self.reporter.restore_counts(saved.counted, shift)
        for topic in self.outbox.retained():  # what no state stands behind any more is over
            failure_type = topic.rsplit("/", 1)[-1]
            self.outbox.set_retained(topic, retained_current(self.reporter.active, failure_type))
        self._save()  # from now on a kill is known by a state that no orderly end wrote

    def _settle_counts(self, saved: health.SavedState, shift_s: float) -> None:
        """After a kill: end a span that the outbox has already, so that none of its windows is counted twice.

        What came after the saved state is lost, at most `SNAPSHOT_S` of it; how much is not known, the most is counted.
        After a boot no clock says how old the state is: the wall clock may begin in 1970 again.
        """
        bundle = self._bundle
        if saved.stopped or bundle is None:
            return
        age_s = min(SNAPSHOT_S, self.clock.monotonic() - saved.saved_s) if shift_s == 0.0 else SNAPSHOT_S
        self.counters["drift_windows_lost_at_most"] += math.ceil(age_s / bundle.manifest.window.stride_s)
        ids = [drift_event_id(c, self.config.vehicle_id) for c in self.pipeline.open_counts]
        if any(self.outbox.knows("drift", event_id) for event_id in ids):
            self._store(self.pipeline.take_counts())  # an append of what it knows adds nothing

    def _save(self, *, stopped: bool = False) -> None:
        self._save_wanted = False
        self.models.save()
        self._snapshot_at_s = self.clock.monotonic() + SNAPSHOT_S
        state = health.SavedState(
            timeline=self._timeline, saved_s=self.clock.monotonic(), wall_offset_s=self._wall_offset_s(),
            floor_s=self._floor.floor_s, active=self.reporter.active, pipeline=self.pipeline.snapshot(),
            counted=self.reporter.unstored_counts, stopped=stopped,
        )  # fmt: skip
        try:
            health.save_state(self._folder, state)
        except OSError as error:
            self.counters["state_not_saved"] += 1
            event(log, "problem", level=logging.ERROR, what=f"state not saved: {error}")

    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, in plain words."""
        found = self.models.problems(clock_trusted=self._clock_trusted())
        found += [self._source.problem, self.reporter.problem, self.link.problem]
        if not self._clock_trusted():
            found.append("clock not trusted: " + ("scaled" if not self.clock.trusted_rate else "before the known time"))
        stale = self.pipeline.stale
        if stale:
            names = ", ".join(stale[:5]) + (f" and {len(stale) - 5} more" if len(stale) > 5 else "")
            found.append(f"too few values of {names}")
        return tuple(problem[:300] for problem in found if problem)

    def status(self, *, state: str = "online") -> bytes:
        """Return the status as it stands."""
        last = self.pipeline.last_arrival_s
        counters = {**self.pipeline.counters, **self._source.counters, **self.reporter.counters, **self.counters}
        counters |= self.models.counters
        counters |= {f"link_{name}": n for name, n in self.link.all_counters().items()}
        counters |= {f"outbox_{name}": n for name, n in self.outbox.counters.items()}
        counters["values_masked"] = self._source.masked.total()
        try:
            waiting = self.outbox.rows_waiting()
        except OutboxError:
            waiting = {}
        return health.online(
            boot_id=self.clock.boot_id,
            time=iso(self.clock.wall()),
            clock_trusted=self._clock_trusted(),
            agent_version=metadata.version("voltwatch"),
            make=self.config.make,
            source=self._source_name,
            bundle=self._bundle,
            problems=self.problems(),
            last_arrival=None if last is None else iso(last + self._wall_offset_s()),
            counters={name: int(n) for name, n in sorted(counters.items())},
            outbox=waiting,
            scores=self.pipeline.last_scores,
            state_of_charge_percent=self._soc,
            state=state,
        )

    def _publish_status(self) -> None:
        """Publish when something is new, but at most once a second, and every half minute anyway."""
        now_s = time.monotonic()
        if now_s < self._status_sent_s + STATUS_SOONEST_S:
            return
        problems = self.problems()
        if self._status_wanted or problems != self._status_problems or now_s > self._status_sent_s + STATUS_S:
            for problem in set(problems) - set(self._status_problems) - {self.link.problem}:
                event(log, "problem", level=logging.WARNING, what=problem)
            self._status_wanted, self._status_problems, self._status_sent_s = False, problems, now_s
            self.link.publish_retained(topics.status(self.config.vehicle_id), self.status())

    def _warm(self, now_s: float) -> None:
        """Say once a simulated minute how long until the first window; afterwards windows speak for themselves."""
        if self.pipeline.last_scores is None and self._bundle is not None and now_s > self._warming_said_s + 60.0:
            self._warming_said_s = now_s
            event(log, "warming", vehicle=self.config.vehicle_id, seconds=round(self.pipeline.warming_s),
                  frames=self._source.counters.get("frames_received", 0))  # fmt: skip

    def _say(self, outcome: Outcome) -> None:
        if isinstance(outcome, Scored):
            manifest = None if self._bundle is None else self._bundle.manifest
            event(
                log, "window", vehicle=self.config.vehicle_id, end=iso(outcome.window.end_s + self._wall_offset_s()),
                stratum=outcome.stratum, coverage=outcome.window.coverage,
                **_rounded(health.score_table(outcome.scores, manifest)),
            )  # fmt: skip
        elif isinstance(outcome, NoScore):
            event(log, "no_score", vehicle=self.config.vehicle_id, end=iso(outcome.end_s + self._wall_offset_s()),
                  reason=outcome.reason, detail=outcome.detail)  # fmt: skip

    def _shut_down(self) -> None:
        event(log, "stopping", vehicle=self.config.vehicle_id)
        self._source.stop()
        offset_s = self._wall_offset_s()
        self.reporter.store(self.pipeline.take_counts(), offset_s)
        self.reporter.retry(offset_s, now=True)
        self.models.stop()
        self._save(stopped=True)
        ended = self.link.stop(self.status(state="offline"))
        try:
            waiting: int | str = sum(self.outbox.rows_waiting().values())
        except OutboxError:
            waiting = "unknown"
        if ended:
            self.outbox.close()
        event(log, "stopped", vehicle=self.config.vehicle_id, waiting=waiting, counters=msgspec.json.encode(
            {name: n for name, n in self.pipeline.counters.items() if n}).decode())  # fmt: skip


def run(config: Config, config_path: Path | None = None) -> None:
    """Run the agent until SIGTERM or SIGINT; without the file of its configuration there are no updates."""
    clock: Clock = SystemClock()
    if config.speed != 1.0:
        clock = ScaledClock(clock, config.speed)
    agent = Agent(config, clock, config_path=config_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


def load_catalogue(schema: str) -> Catalogue:
    """Return the catalogue of a schema file, or the default one for "". Raises `ConfigError`."""
    return parse_schema(read_text(Path(schema), "schema"), schema) if schema else default_catalogue()


def open_can(config: Config, catalogue: Catalogue, now: Callable[[], float]) -> "tuple[CanSource, BoundMapping]":
    """Prepare the CAN source of a configuration. Raises `ConfigError`."""
    try:
        # Not in the edge base: a vehicle without a bus of its own, or a replay, needs neither.
        from edge_agent.sources import can as can_source  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"source.kind 'can' needs {error.name}; run: pip install 'voltwatch[can]'") from error
    source = config.source
    mapping = read_mapping(source.mapping).mapping
    if mapping.source.time is not None:
        raise ConfigError(f"mapping {source.mapping}: a live bus has no time column; remove [source.time]")
    database = can_source.load_database(Path(source.dbc))
    bound = BoundMapping(mapping, catalogue, can_source.signal_names(database), source.mapping)
    open_bus = can_source.bus_opener(source.interface, source.channel, source.bitrate, source.options)
    return can_source.CanSource(open_bus, can_source.Decoder(database, bound.columns), bound, now), bound


def _rounded(table: dict[str, float | None]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in table.items() if value is not None}
