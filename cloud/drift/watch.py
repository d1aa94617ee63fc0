"""The step that watches for drift: makes the release's own bins known, looks at the rolling span, writes drift alerts.

It runs again when there are new counts, or an hour after the last time, as old ones leave the span; and never more
than a twentieth of the time, so that a large fleet's look does not take the server from its requests.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cloud.drift.decide import Judged, Open, Scope, change
from cloud.drift.limits import Limits
from cloud.drift.look import Looked, Wanted, look
from cloud.store import drift_rows
from cloud.store.drift_rows import Known, Span
from cloud.store.fleet_store import FleetStore
from edge_agent.contract import bundle as contract
from edge_agent.contract.errors import BundleError
from edge_agent.pipeline.bundle_dir import LoadedBundle

log = logging.getLogger(__name__)
EVERY_S = 60.0
AGAIN_S = 3600.0  # with nothing new: counts come by the hour, and leave the span so
REST = 19.0  # so many times as long as the last look took
LOOKS = 2  # of a fleet that are answered at once: each keeps a core busy for its seconds
ALL: frozenset[Scope] = frozenset({"vehicle", "make", "fleet"})


@dataclass(frozen=True, slots=True)
class Last:
    """The fleet's verdicts of the newest look, for whoever shows them; no query needed."""

    at_s: float
    known: Known
    fleet: tuple[Judged, ...]


class DriftWatch:
    """Watches one store. `step` is called again and again; what it last saw of the fleet is in `last`."""

    def __init__(
        self, store: FleetStore, bundle: LoadedBundle | None, limits: Limits, *, wall: Callable[[], float]
    ) -> None:
        self._store, self._bundle, self._limits, self._wall = store, bundle, limits.drift, wall
        self._registered = False
        self._seen = -1
        self._looked_at = -AGAIN_S
        self._not_before = 0.0
        self.last: tuple[Last, ...] = ()  # one a reference
        self.turns = asyncio.Semaphore(LOOKS)  # for whoever looks at many messages beside the watch

    async def step(self) -> None:
        """Do what is due. Raises `StoreAwayError` when the store is away."""
        if not self._registered and self._bundle is not None:
            await register_bundle(self._store, self._bundle, self._wall())
            self._registered = True
        started = time.monotonic()
        if started < self._not_before:
            return
        async with self._store.reading() as connection:
            newest = await drift_rows.newest(connection)
        if newest == self._seen and started - self._looked_at < AGAIN_S:
            return
        await self.evaluate()
        self._seen, self._looked_at = newest, started
        self._not_before = time.monotonic() + REST * (time.monotonic() - started)

    async def evaluate(self) -> None:
        """Look at the span that ends now, and write what changed."""
        now = self._wall()
        span = Span(now - self._limits.window_hours * 3600.0, now)
        async with self._store.reading() as connection:
            counted = await drift_rows.references_counted(connection, span)
            alerted = await drift_rows.references_alerted(connection)
        references = {k.reference: k for k in (*counted, *alerted)}.values()
        last = [Last(now, known, await self._reference(known, span, now)) for known in references]
        self.last = tuple(last)

    async def _reference(self, known: Known, span: Span, now: float) -> tuple[Judged, ...]:
        fleet: tuple[Judged, ...] = ()
        looked = Looked()
        wanted = Wanted(ALL, complete=False)
        async with self._store.reading() as connection:
            held = await drift_rows.open_alerts(connection, known.reference)
            async for scope, scope_id, judged in look(connection, known, span, wanted, self._limits, looked):
                await self._write(known, scope, scope_id, judged, held.pop((scope, scope_id), []), now)
                if scope == "fleet":
                    fleet = tuple(judged)
        for (scope, scope_id), alerts in held.items():  # nothing was counted for them
            await self._write(known, scope, scope_id, [], alerts, now)
        if looked.wrong:
            async with self._store.writing() as connection:
                await drift_rows.set_aside(connection, looked.wrong)
        return fleet

    async def _write(
        self, known: Known, scope: Scope, scope_id: str, judged: list[Judged], alerts: list[Open], now: float
    ) -> None:
        changes = change(judged, alerts, now_s=now, limits=self._limits)
        for one in changes.raised:
            log.info("drift: %s %s: %s (%s) left the reference of release %d", scope, scope_id, one.variable,
                     one.stratum, known.model_release)  # fmt: skip
        if changes.raised or changes.updated or changes.cleared:
            async with self._store.writing() as connection:
                await drift_rows.write_changes(connection, known, scope, scope_id, changes, now)


async def register_bundle(store: FleetStore, bundle: LoadedBundle, at_s: float) -> bool:
    """Make the bins of a bundle known; False when they were already. Raises `StoreAwayError`, `BundleError`."""
    file = bundle.path / contract.DRIFT_REFERENCE
    try:
        body = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(body).hexdigest() != bundle.drift_reference_sha256:
        raise BundleError(f"{file}: was changed after the bundle was loaded; restart with a whole bundle")
    async with store.writing() as connection:
        return await drift_rows.register(connection, bundle.drift_reference_sha256, bundle.manifest, body, at_s)
