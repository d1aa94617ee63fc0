"""GET /metrics: this process and the fleet's store as Prometheus reads them.

What the process counts itself is read as it stands. What lies in the store is computed at a scrape, at most once in
`CACHE_S` and within `TIMEOUT_S`, whoever scrapes how often. A store that is away, or too slow, leaves
`voltwatch_store_up 0` and no figure of it: an old number would look like a new one. No label's values come from a
vehicle alone: names that vehicles chose are ranked by how many use them, and the rest is summed as `other`.
"""

import asyncio
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics

from cloud.api.endpoint import WRONG, Running, only_known_parameters
from cloud.api.http_metrics import histogram
from cloud.api.service import Service
from cloud.api.shown import HTTP_SILENCE_S
from cloud.drift import due
from cloud.drift.due import Due
from cloud.drift.watch import Last
from cloud.store.figures import JUDGED, Figures, figures
from cloud.store.fleet_store import StoreAwayError

log = logging.getLogger(__name__)
CACHE_S = 10.0  # Prometheus asks every 15 s or more; two of them share one answer
TIMEOUT_S = 5.0  # a scrape is given up after 10 s
MAX_NAMES = 128  # of counters that agents report; ours have some 60
MAX_STREAMS = 16
MAX_RELEASES = 20
MAX_DRIFTED = 100  # variables of the fleet, those that stand farthest out
MAX_COUNT = 2**53  # of one vehicle's counter: more is no count, and a double holds no more
OTHER = "other"
OUTCOMES = ("stored", "duplicates", "refused", "parked")  # what the collector does with a message

router = APIRouter(tags=["service"], dependencies=[Depends(only_known_parameters)], responses=WRONG)


class _Said(msgspec.Struct):
    """What of an agent's status is summed."""

    counters: dict[str, int] = {}
    outbox: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Agents:
    """What agents say of themselves, summed; `of` how many."""

    of: int
    counters: dict[str, int]
    waiting: dict[str, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """The store's figures, whether training is due; when they were asked for (monotonic), and how long it took."""

    figures: Figures
    agents: Agents
    due: Due
    began_s: float
    took_s: float


class Metrics:
    """One application's metrics: a registry of its own, and the store's figures as last computed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = histogram(self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._asking: asyncio.Task[Asked | None] | None = None
        self._asked: Asked | None = None
        self._answered_s = -CACHE_S  # monotonic

    async def families(self, running: Service) -> list[Metric]:
        """Return everything but what the registry holds."""
        known = await self._store(running)
        found = [*_process(running), *_links(running)]
        found.append(_gauge("store_up", "Whether the store answers, and soon enough.", known is not None))
        if known is None:
            return found
        found.append(_gauge("store_figures_duration_seconds", "How long the store's figures took.", known.took_s))
        age_s = time.monotonic() - known.began_s
        found.append(_gauge("store_figures_age_seconds", "How old the store's figures are.", age_s))
        found += [*_fleet(known.figures), *_quality(known.figures), *_drift(known.figures, running.drift.last)]
        return [*found, *_samples(known.figures), *_training(known.figures, known.due), *_agents(known.agents)]

    async def _store(self, running: Service) -> "Asked | None":
        """Return the figures, or None where the store gives none within the time.

        A statement that hangs cannot be called back (SQLite's thread waits for its lock), so it is left to itself, and
        no second is begun meanwhile.
        """
        if self._asking is None:
            if time.monotonic() - self._answered_s < CACHE_S:
                return self._asked
            self._asking = asyncio.create_task(_ask(running), name="metrics")
        asking = self._asking
        await asyncio.wait({asking}, timeout=TIMEOUT_S)
        if not asking.done():
            log.warning("metrics: the store gave no figures within %g s", TIMEOUT_S)
            return None
        if self._asking is asking:  # the first of those that waited for it
            self._asking, self._asked, self._answered_s = None, None, time.monotonic()
            if (fault := asking.exception()) is None:
                self._asked = asking.result()
            else:  # of our own: said once, and the store counts as away rather than an old figure as a new one
                log.error("metrics: the store's figures cannot be computed", exc_info=fault)
        return self._asked

    async def stop(self) -> None:
        """Wait for what is still being asked, so that the store can be closed; begin anew with another service."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
        self._asking, self._asked, self._answered_s = None, None, -CACHE_S


async def _ask(running: Service) -> Asked | None:
    if not running.store_ready:
        return None
    began_s = time.monotonic()
    bundle = running.bundle
    champion = None if bundle is None else due.champion_of(bundle.manifest, bundle.thresholds)
    try:
        async with running.store.reading() as connection:
            found = await figures(
                connection, now_s=running.wall(), http_silence_s=HTTP_SILENCE_S, most_drifted=MAX_DRIFTED
            )
            training = await due.evaluate(connection, champion, running.limits.retraining, running.wall())
    except StoreAwayError as error:
        log.debug("metrics: %s", error)
        return None
    agents = await asyncio.to_thread(summed, found.statuses)
    return Asked(found, agents, training, began_s, time.monotonic() - began_s)


def summed(statuses: Iterable[str]) -> Agents:
    """Sum what agents say of themselves. A status that is not as ours are adds nothing."""
    of = 0
    counters: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    told: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for text in statuses:
        try:
            said = msgspec.json.decode(text, type=_Said)
        except (msgspec.DecodeError, UnicodeEncodeError):
            continue
        of += 1
        for values, total, users in ((said.counters, counters, told[0]), (said.outbox, waiting, told[1])):
            for name, value in values.items():
                total[name] += min(max(value, 0), MAX_COUNT)
                users[name] += 1
    return Agents(of, popular(counters, told[0], MAX_NAMES), popular(waiting, told[1], MAX_STREAMS))


def popular(totals: Mapping[str, int], users: Mapping[str, int], most: int) -> dict[str, int]:
    """Keep the names that most vehicles use, so that one vehicle with names of its own moves out no other's."""
    ranked = sorted(totals, key=lambda name: (-users[name], name))
    kept = {name: totals[name] for name in ranked[:most]}
    rest = sum(totals[name] for name in ranked[most:])
    return {**kept, OTHER: kept.get(OTHER, 0) + rest} if ranked[most:] else kept


# --- families ---


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"voltwatch_{name}", words, value=float(value))


def _gauges(name: str, words: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    """Make a gauge with one value for each key, a tuple with a text for each label."""
    family = GaugeMetricFamily(f"voltwatch_{name}", words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"voltwatch_{name}", words, value=float(value))


def _counters(name: str, words: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"voltwatch_{name}", words, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family


def _process(running: Service) -> Iterator[Metric]:
    told = {"version": version("voltwatch"), "python": platform.python_version()}
    yield InfoMetricFamily("voltwatch_build", "What runs here.", value=told)
    yield _gauge("websockets", "Open sockets of /ws/telemetry.", running.sockets)
    yield _gauge("bundle_loaded", "Whether a model scores the frames that come over HTTP.", running.bundle is not None)
    if running.bundle is not None:
        manifest = running.bundle.manifest
        told = {"release": str(manifest.release), "name": manifest.name, "sha256": running.bundle.sha256}
        yield InfoMetricFamily("voltwatch_bundle", "The bundle that scores here.", value=told)
    yield _counters("telemetry_steps", "What was done with frames over HTTP.", "step", running.telemetry.counters)
    yield _counters("background_steps", "Runs and failures of the steps beside the API.", "step", running.counters)


def _links(running: Service) -> Iterator[Metric]:
    collector = running.collector
    yield _gauge("broker_configured", "Whether this process collects from a broker.", collector is not None)
    connected = collector is not None and collector.link.connected
    yield _gauge("broker_connected", "Whether the collector is connected to its broker.", connected)
    if collector is not None:
        counted = Counter(collector.counters)
        yield _counter("collector_received", "Messages that came from the broker.", counted.pop("received", 0))
        outcomes = {name: counted.pop(name, 0) for name in OUTCOMES}
        words = "What became of the messages, by outcome; duplicates were stored before."
        yield _counters("collector_messages", words, "outcome", outcomes)
        yield _counters("collector_steps", "What else the collector did.", "step", counted)
    mover = running.mover
    yield _gauge("lake_up", "Whether the lake can be written.", not mover.detail)
    yield _counters("lake_steps", "What was moved into the lake, and what went wrong.", "step", mover.counters)
    if mover.usage is not None:
        yield _gauge("lake_bytes", "Size of the lake's files.", mover.usage.bytes)
        yield _gauge("lake_files", "Files in the lake.", mover.usage.files)


def _fleet(known: Figures) -> Iterator[Metric]:
    vehicles = {("online", "mqtt"): 0, ("offline", "mqtt"): 0, ("unknown", "mqtt"): 0} | known.vehicles
    yield _gauges("vehicles", "Vehicles by state and by how they report.", ("state", "channel"), vehicles)
    if known.newest_seen_at_s is not None:
        words = "When the server last heard of any vehicle."
        yield _gauge("newest_message_timestamp_seconds", words, known.newest_seen_at_s)
    yield _gauge("newest_ingest_id", "Of the newest event; grows with every one stored.", known.newest_ingest_id)
    yield _counters("messages_refused", "Messages refused, ever, by reason.", "reason", known.refused)
    yield _gauge("messages_parked", "Messages of a newer major version, kept.", known.parked)
    yield _counter("losses", "Records of vehicles that lost messages.", known.losses[0])
    yield _counter("messages_lost", "Messages that those records name.", known.losses[1])
    words = "Alerts that are not cleared, by type, severity and where people's work stands."
    yield _gauges("alerts_open", words, ("failure_type", "severity", "work"), known.open_alerts)
    work = {(state,): n for state, n in known.work.items()}
    yield _gauges("alerts_worked", "Alerts that people looked at, by state of the work.", ("state",), work)


def _quality(known: Figures) -> Iterator[Metric]:
    """How good a model's alerts were, by what people said; guards are rules and have no precision to lose."""
    labels: Counter[tuple[str, str, str]] = Counter()
    of_release: Counter[int | None] = Counter()
    for (_, release, _), n in known.judged.items():
        of_release[release] += n
    shown = {release for release, _ in of_release.most_common(MAX_RELEASES)}
    for (kind, release, said), n in known.judged.items():
        told = OTHER if release not in shown else "none" if release is None else str(release)
        labels[kind, told, said] += n
    groups = sorted({(kind, release) for kind, release, _ in labels})
    names = ("failure_type", "release")
    words = "Labelled alerts of models: right, other_type (confirmed as another type), false_alarm."
    counts = {(*g, said): labels[(*g, said)] for g in groups for said in JUDGED}
    yield _gauges("alert_labels", words, (*names, "said"), counts)
    ratio = {g: labels[(*g, "right")] / sum(labels[(*g, said)] for said in JUDGED) for g in groups}
    yield _gauges("alert_precision_ratio", "Share of labelled alerts that were right as told.", names, ratio)


def _drift(known: Figures, last: tuple[Last, ...]) -> Iterator[Metric]:
    """How far the fleet stands from its reference: by this process's newest look, or by the alerts that are open."""
    alerts = {(s, k): 0 for s in ("fleet", "make", "vehicle") for k in ("signal", "feature", "score")}
    words = "Drift alerts that are not cleared."
    yield _gauges("drift_alerts_open", words, ("scope", "kind"), alerts | known.drift_alerts)
    found = {
        (judged.variable, judged.kind, judged.stratum, str(look.known.model_release)):
        (judged.distances.psi, judged.threshold)
        for look in last for judged in look.fleet
        if judged.distances is not None and judged.threshold is not None and judged.verdict != "too_few"
    } or {
        (row["variable"], row["kind"], row["stratum"], str(row["model_release"])): (row["value"], row["threshold"])
        for row in known.fleet_drift
    }  # fmt: skip
    farthest = sorted(found, key=lambda key: (-found[key][0] / found[key][1], key))[:MAX_DRIFTED]
    names = ("variable", "kind", "stratum", "release")
    words = f"Stability index of the fleet's variables against their reference; the {MAX_DRIFTED} farthest."
    yield _gauges("drift_psi", words, names, {key: found[key][0] for key in farthest})
    yield _gauges("drift_psi_limit", "From where it is drift.", names, {key: found[key][1] for key in farthest})
    if last:
        newest = max(look.at_s for look in last)
        yield _gauge("drift_look_timestamp_seconds", "When this process last looked for drift.", newest)


def _samples(known: Figures) -> Iterator[Metric]:
    states = {"waiting": (0, 0), "whole": (0, 0), "lake": (0, 0), "broken": (0, 0)} | known.samples
    words = "Raw windows by state: waiting (for parts), whole, lake, broken."
    yield _gauges("samples", words, ("state",), {(state,): n for state, (n, _) in states.items()})
    words = "Size of the raw windows by state, as packed by the vehicles."
    yield _gauges("samples_bytes", words, ("state",), {(state,): size for state, (_, size) in states.items()})


def _training(known: Figures, training: Due) -> Iterator[Metric]:
    if known.trained_at_s is not None:
        yield _gauge("training_newest_timestamp_seconds", "End of the newest training run.", known.trained_at_s)
    yield _gauge("retraining_due", "Whether any trigger of a training run is due.", training.is_due)
    triggers = training.triggers
    words = "Whether this trigger of a training run is due."
    yield _gauges("retraining_trigger_due", words, ("trigger",), {(t.name,): t.due for t in triggers})
    words = "Where a trigger stands; absent where that cannot be known."
    values = {(t.name,): t.value for t in triggers if t.value is not None}
    yield _gauges("retraining_trigger_value", words, ("trigger",), values)
    yield _gauges(
        "retraining_trigger_limit", "Where it is due.", ("trigger",), {(t.name,): t.threshold for t in triggers}
    )
    told = training.performance
    words = "Share of the serving release's judged alerts that were right; compare with the stated one."
    if told.observed is not None:
        yield _gauge("release_observed_precision_ratio", words, told.observed)
    if told.stated is not None:
        yield _gauge("release_stated_precision_ratio", "What the serving release states of itself.", told.stated)


def _agents(agents: Agents) -> Iterator[Metric]:
    yield _gauge("agents_summed", "Agents whose own counters are in the sums.", agents.of)
    waiting = {(stream,): n for stream, n in sorted(agents.waiting.items())}
    yield _gauges("agents_waiting_messages", "Messages waiting in the vehicles, by stream.", ("stream",), waiting)
    counted = {(name,): n for name, n in sorted(agents.counters.items())}
    words = "Sums of the agents' own counters; a restarted agent begins at 0, so this may fall."
    yield _gauges("agents_reported", words, ("counter",), counted)


class _Page:
    """What one scrape reads: the registry, and what was just asked for."""

    def __init__(self, registry: CollectorRegistry, families: list[Metric]) -> None:
        self._registry, self._families = registry, families

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from self._families


@router.get(
    "/metrics", summary="Metrics for Prometheus", response_class=Response,
    responses={200: {"description": "Prometheus' text format, or OpenMetrics where it is asked for.", "content": {
        "text/plain": {"schema": {"type": "string"}, "example": "voltwatch_store_up 1.0\n"},
        "application/openmetrics-text": {"schema": {"type": "string"}},
    }}},
)  # fmt: skip
async def metrics(request: Request, running: Running) -> Response:
    """Counters and gauges of this process, and of the fleet as it lies in the store.

    Always 200 while the process runs: a store that is away is `voltwatch_store_up 0`.
    """
    told: Metrics = request.app.state.metrics
    page = _Page(told.registry, await told.families(running))
    if "application/openmetrics-text" in request.headers.get("accept", ""):
        text = openmetrics.generate_latest(page)  # type: ignore[no-untyped-call]
        return Response(text, media_type=openmetrics.CONTENT_TYPE_LATEST)
    return Response(generate_latest(page), media_type=CONTENT_TYPE_PLAIN_0_0_4)
