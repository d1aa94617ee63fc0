"""Everything that lives as long as the server: store, bundle, telemetry pipelines, collector. Started and stopped here.

A store or broker that is away at the start is not fatal: both are tried again, and /health says so meanwhile. A bundle
that is not whole, or whose graph does not load, leaves the guards.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

from cloud.advice.advisor import Advisor
from cloud.api.settings import Settings
from cloud.api.telemetry import TelemetryService
from cloud.collector.mqtt import Collector, CollectorConfig, parse_broker
from cloud.drift import watch
from cloud.drift.limits import load_limits
from cloud.lake.lake import Lake
from cloud.lake.mover import Mover
from cloud.rollouts import renewal
from cloud.rollouts.renewal import Renewal
from cloud.rollouts.repository import ModelRepository
from cloud.store import sample_expiry
from cloud.store.fleet_store import FleetStore, StoreAwayError
from edge_agent.contract.errors import BundleError, ConfigError
from edge_agent.contract.signals import Catalogue
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.inference import Scorer

log = logging.getLogger(__name__)
REST_STEP_S = 60.0  # how often vehicles that fell silent are looked for
LAKE_STEP_S = 2.0  # how often samples that are due for the lake are looked for: two small queries


def usable_bundle(path: Path, catalogue: Catalogue) -> LoadedBundle:
    """Load a bundle, and its graph once: bytes that match their hash may still be no graph. Raises `BundleError`."""
    loaded = load_bundle(path, catalogue)
    Scorer(loaded, catalogue)
    return loaded


class Service:
    """One running service. `start` and `stop` bracket its life; raises `ConfigError` for settings it cannot use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started_s = time.monotonic()
        self.limits = load_limits(settings.config)
        self.catalogue: Catalogue = settings.catalogue()
        self.bundle: LoadedBundle | None = None
        self.bundle_detail = "no bundle: guards only"
        if settings.bundle is not None:
            try:
                self.bundle = usable_bundle(settings.bundle, self.catalogue)
                self.bundle_detail = ""
            except BundleError as error:  # guards still work; /health says why there is nothing more
                log.error("api: %s", error)  # noqa: TRY400 - one line is all there is to say
                self.bundle_detail = f"{error}; until then guards only"
        self.advisor = Advisor(settings.manual, settings.embedding)
        self.store = FleetStore.over(settings.database_url)
        self.store_ready = False
        self.telemetry = TelemetryService(
            self.catalogue,
            self.bundle,
            self.store,
            wall=self.wall,
            max_vehicles_in_memory=settings.max_vehicles_in_memory,
        )
        self.mover = Mover(self.store, Lake(settings.lake), wall=self.wall)
        self.collector: Collector | None = None
        if settings.broker is not None:
            host, port = parse_broker(settings.broker)
            # one session a store: two clouds on one broker each get everything, instead of taking turns
            store = hashlib.sha256(self.store.identity.encode()).hexdigest()[:12]
            config = CollectorConfig(
                host=host, port=port, username=settings.broker_username, password=settings.broker_password,
                tls=settings.broker_tls(),
                client_id=f"voltwatch-collector-{store}",
            )  # fmt: skip
            self.collector = Collector(self.store, config, wall=self.wall)
        self.drift = watch.DriftWatch(self.store, self.bundle, self.limits, wall=self.wall)
        self.sockets = 0
        self.counters: Counter[str] = Counter()
        self._steps: list[tuple[str, float, Callable[[], Awaitable[None]], bool]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.every("drift", watch.EVERY_S, self.drift.step)
        self.every("lake", LAKE_STEP_S, self.mover.step)
        self.every("sample_expiry", sample_expiry.EVERY_S, lambda: sample_expiry.step(self.store, self.wall()))
        self.models: ModelRepository | None = None
        self.renewal: Renewal | None = None
        if settings.models is not None:
            self.models = ModelRepository(settings.models, wall=self.wall)
            self.renewal = Renewal(self.models, settings.model_keys)
            self.every("models", renewal.EVERY_S, self.renewal.step, needs_store=False)
        self.every("telemetry_rest", REST_STEP_S, self.telemetry.rest)

    def every(
        self, name: str, seconds: float, work: Callable[[], Awaitable[None]], *, needs_store: bool = True
    ) -> None:
        """Run `work` again and again from the start to the stop, with so many seconds between two runs."""
        self._steps.append((name, seconds, work, needs_store))

    def wall(self) -> float:
        """Return the server's clock, Unix seconds."""
        return time.time()

    async def start(self) -> None:
        """Prepare the store, then collect. Raises `ConfigError` when a newer release has been at the store."""
        try:
            await self.store.prepare()
            self.store_ready = True
        except StoreAwayError as error:
            log.warning("api: %s; trying again", error)
        self._begin(self._run(), "service")
        for name, seconds, work, needs_store in self._steps:
            self._begin(self._repeat(name, seconds, work, needs_store=needs_store), name)

    async def stop(self) -> None:
        """Stop collecting, save the pipelines' states, close the store."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        try:
            await self.telemetry.close()
        finally:
            await self.store.close()

    def _begin(self, work: Coroutine[None, None, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _repeat(
        self, name: str, seconds: float, work: Callable[[], Awaitable[None]], *, needs_store: bool
    ) -> None:
        while True:
            ready = self.store_ready or not needs_store
            if ready:
                try:
                    await work()
                    self.counters[f"{name}_runs"] += 1
                except StoreAwayError as error:
                    log.debug("%s: %s", name, error)
                    self.counters[f"{name}_store_away"] += 1
                except Exception:
                    log.exception("%s: failed; it is tried again", name)
                    self.counters[f"{name}_failures"] += 1
            await asyncio.sleep(seconds if ready else 1.0)

    async def _run(self) -> None:
        while not self.store_ready:
            await asyncio.sleep(random.uniform(0.5, 2.0))  # noqa: S311 - jitter
            try:
                await self.store.prepare()
                self.store_ready = True
            except StoreAwayError as error:
                log.debug("api: %s", error)
            except ConfigError as error:  # it came back with another password, or of a newer release
                log.error("api: %s", error)  # noqa: TRY400 - one line is all there is to say
        while self.collector is not None:
            try:
                await self.collector.run()
            except Exception:
                log.exception("api: the collector stopped by a fault of its own; starting it again")
                self.collector.counters["crashes"] += 1
            await asyncio.sleep(1)
