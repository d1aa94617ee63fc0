"""Moves whole samples from the store into the lake, batch by batch, beside the API.

Promises: a sample that its vehicle was told is stored lies in the store until it lies in the lake, and then in exactly
one file, wherever this process dies (the order is `cloud.store.sample_moves`'s). One that cannot be used becomes
"broken" with the reason and holds up no other. A lake that cannot be written is said (`detail`), and tried again; the
samples wait in the store meanwhile. The number of small files is bounded: the more files a day has, the longer a batch
that is not full waits. Small files are not merged afterwards.
"""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cloud.lake.lake import Lake, LakeAwayError, LakeSample, day_of, new_path
from cloud.store import sample_moves
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.sample_moves import Candidate
from cloud.store.sample_rows import Key, mismatch
from cloud.store.wire_time import unix_s
from edge_agent.contract import samples
from edge_agent.contract.errors import MessageError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverConfig:
    """How large a file is, and how long its samples wait for it."""

    batch_samples: int = 1_000  # some 10 MB: what one file costs to open is little against reading it
    batch_bytes: int = 32 * 2**20  # in memory at once, twice: joined and as a file
    wait_s: float = 5.0  # of a batch that is not full, when its day has no file yet
    wait_more_s: float = 5.0  # more for each file that the day has: 120 files in its first ten hours
    wait_max_s: float = 600.0  # then one file in ten minutes, so some 200 files a day beside the full ones
    look_s: float = 3_600.0  # the lake is listed so often: others may add and remove files
    patience_s: float = 60.0  # a write that takes longer is said on /health; it is never begun twice at once


@dataclass(frozen=True, slots=True)
class Usage:
    """What lay in the lake when it was last looked at, and what was moved there since."""

    files: int
    bytes: int
    looked_at_s: float  # Unix seconds


def plan(waiting: Sequence[Candidate], config: MoverConfig) -> tuple[list[Candidate], bool]:
    """Choose the next file's samples (one day's, from the oldest on), and say whether it is full."""
    chosen: list[Candidate] = []
    size = 0
    for candidate in waiting:
        if day_of(candidate.received_at_s) != day_of(waiting[0].received_at_s):
            continue
        if chosen and size + candidate.length > config.batch_bytes:
            return chosen, True
        chosen.append(candidate)
        size += candidate.length
    return chosen, len(chosen) >= config.batch_samples


def wait_s(files_of_day: int, config: MoverConfig) -> float:
    """Return the least time between two files that are not full."""
    return min(config.wait_max_s, config.wait_s + config.wait_more_s * files_of_day)


class Mover:
    """Moves samples whenever `step` is called. `wall` is the server's clock, Unix seconds."""

    def __init__(
        self, store: FleetStore, lake: Lake, *, wall: Callable[[], float], config: MoverConfig | None = None
    ) -> None:
        self.detail = ""  # why the lake cannot be used now; empty when it can
        self.usage: Usage | None = None  # None: not looked at yet
        self.counters: Counter[str] = Counter()
        self.lake = lake
        self._store = store
        self._wall = wall
        self._config = config or MoverConfig()
        self._files: Counter[str] = Counter()  # by day
        self._newest_s: float | None = None  # when the newest file that was not full was written
        self._stuck: threading.Thread | None = None  # still waits for a lake that did not answer

    async def step(self) -> None:
        """Move what is due. Raises `StoreAwayError`; a fault of the lake is kept in `detail` and tried again."""
        try:
            await self._move()
        except StoreAwayError:
            raise
        except Exception as error:
            detail = str(error) if isinstance(error, LakeAwayError) else f"lake {self.lake.name}: {error!r:.200}"
            if not self.detail:  # once an outage; a driver of fsspec may raise anything, so the kind goes with it
                log.warning("%s; samples wait in the store", detail, exc_info=not isinstance(error, LakeAwayError))
            self.detail = detail
            self.counters["failures"] += 1
        else:
            self.detail = ""

    async def _move(self) -> None:
        if self.usage is None or not 0 <= self._wall() - self.usage.looked_at_s < self._config.look_s:
            await self._look()
        async with self._store.reading() as connection:
            unfinished = await sample_moves.claimed(connection)
        for path in unfinished:
            await self._fill(path)
        while (claimed := await self._claim()) is not None:
            await self._fill(claimed)

    async def _claim(self) -> str | None:
        """Choose the samples of the next file, if one is due."""
        async with self._store.reading() as connection:
            if not self._due(await sample_moves.candidates(connection, self._config.batch_samples)):
                return None
        async with self._store.writing() as connection:
            chosen = self._due(await sample_moves.candidates(connection, self._config.batch_samples, hold=True))
            if not chosen:
                return None
            path = new_path(chosen[0].received_at_s)
            await sample_moves.claim(connection, path, [candidate.key for candidate in chosen])
            return path

    def _due(self, waiting: Sequence[Candidate]) -> list[Candidate]:
        chosen, full = plan(waiting, self._config)
        if not chosen or full or self._newest_s is None:
            return chosen
        pause_s = wait_s(self._files[day_of(chosen[0].received_at_s)], self._config)
        return chosen if not 0 <= self._wall() - self._newest_s < pause_s else []  # a clock set back waits for nothing

    async def _fill(self, path: str) -> None:
        async with self._store.reading() as connection:
            rows = await sample_moves.load(connection, path)
        good, broken = await self._in_thread(lambda: _check(rows))
        size = await self._in_thread(lambda: self.lake.write(good, path)) if good else 0
        async with self._store.writing() as connection:
            moved = await sample_moves.finish(connection, path, broken, self._wall())
        self.counters["samples"] += moved
        self.counters["broken"] += len(broken)
        if len(rows) < self._config.batch_samples:
            self._newest_s = self._wall()
        if good and self.usage is not None:
            self.counters["files"] += 1
            self._files[day_of(good[0].received_at_s)] += 1
            self.usage = Usage(self.usage.files + 1, self.usage.bytes + size, self.usage.looked_at_s)

    async def _look(self) -> None:
        files = await self._in_thread(self.lake.files)
        self._files = Counter(file.day for file in files)
        self.usage = Usage(len(files), sum(file.bytes for file in files), self._wall())

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run what may block in a thread of its own, which a stop of the service does not wait for.

        Raises `LakeAwayError` when it takes longer than the patience, and again as long as it does.
        """
        waited = f"lake {self.lake.name}: no answer within {self._config.patience_s:g} s"
        if self._stuck is not None and self._stuck.is_alive():
            raise LakeAwayError(waited)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def tell(say: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if answer.done() else say())

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - this thread's outermost; raised again where it is awaited
                fault = error
                tell(lambda: answer.set_exception(fault))
            else:
                tell(lambda: answer.set_result(result))

        thread = threading.Thread(target=run, name="lake", daemon=True)
        thread.start()
        await asyncio.wait([answer], timeout=self._config.patience_s)
        if not answer.done():
            self._stuck = thread
            answer.cancel()
            raise LakeAwayError(waited)
        return answer.result()


def _check(rows: Sequence[tuple[dict[str, Any], bytes]]) -> tuple[list[LakeSample], dict[Key, str]]:
    """Return what can be read again by whoever reads the lake, and why the rest cannot."""
    good: list[LakeSample] = []
    broken: dict[Key, str] = {}
    for row, packed in rows:
        problem = mismatch(row, packed)
        if not problem:
            try:
                samples.unpack(packed)
                end_s = unix_s(row["end_time"])
            except MessageError as error:
                problem = f"it does not unpack: {error}"
        if problem:
            broken[row["vehicle_id"], row["sample_id"]] = problem
            continue
        good.append(
            LakeSample(
                vehicle_id=row["vehicle_id"], sample_id=row["sample_id"], reason=row["reason"],
                alert_id=row["alert_id"], failure_type=row["failure_type"], stratum=row["stratum"],
                end_s=end_s, clock_trusted=row["clock_trusted"], received_at_s=row["received_at_s"],
                model_release=row["model_release"], state_id=row["state_id"], coverage=row["coverage"],
                elapsed_s=row["elapsed_s"], sha256=row["sha256"], packed=packed,
            )
        )  # fmt: skip
    return good, broken
