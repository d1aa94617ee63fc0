"""What one vehicle can do to the fleet's figures, on SQLite and PostgreSQL: no sum overflows, no lie gets a weight."""

import asyncio
from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from cloud.collector import ingest
from cloud.drift.bins import MOST_WINDOWS
from cloud.drift.limits import Limits
from cloud.drift.watch import DriftWatch, register_bundle
from cloud.store import connect, drift_rows, reading, tables
from cloud.store.drift_rows import Span
from cloud.store.fleet_store import FleetStore
from cloud.store.items import EventItem, Item, RefusedItem, folded
from edge_agent.contract import messages, topics
from edge_agent.contract.messages import DriftCounts, DriftVariable, EventData, Loss
from edge_agent.contract.signals import default_catalogue
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from tests.bundles import build_bundle
from tests.databases import database_url, postgres_uri, store
from tests.drift_fleet import HEAT, SPEED, iso, told, with_reference
from tests.windows import drift_counts, event_bytes

__all__ = ["database_url", "postgres_uri", "store"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
HOUR = 3600.0
SPAN = Span(NOW - 7 * 24 * HOUR, NOW + 1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    folder = with_reference(build_bundle(tmp_path_factory.mktemp("bundle") / "b", default_catalogue()))
    return load_bundle(folder, default_catalogue())


def unchecked(topic: str, data: EventData, seq: int, *, event_id: str = "", stream_id: str = "z") -> EventItem:
    """An event as a release that did not bound its numbers stored it."""
    envelope = messages.event(
        data, event_id=event_id or f"e{seq}", vehicle_id="EVIL", time=iso(NOW), stream_id=stream_id, seq=seq,
        boot_id="b", clock_trusted=True,
    )  # fmt: skip
    return EventItem("EVIL", topic, envelope, folded(data), messages.encode(envelope))


def counts(
    reference: str, windows: int, speed: Sequence[int], heat: Sequence[int], at_s: float = NOW - HOUR
) -> DriftCounts:
    return DriftCounts(
        model_release=1, reference=reference, first_time=iso(at_s - HOUR), last_time=iso(at_s), windows=windows,
        variables=(
            DriftVariable(name=SPEED, stratum="driving", counts=tuple(speed)),
            DriftVariable(name=HEAT, stratum="driving", counts=tuple(heat)),
        ),
    )  # fmt: skip


def honest(reference: str, vehicles: int = 30) -> list[Item]:
    return [told(f"EV_{v}", n, NOW - n * HOUR, reference) for v in range(vehicles) for n in range(1, 15)]


async def fleet_psi(store: FleetStore, bundle: LoadedBundle) -> dict[str, float]:
    watch = DriftWatch(store, bundle, Limits(), wall=lambda: NOW + 1)
    for _ in range(2):  # the first sets aside what does not fit, the second no longer counts it
        await watch.evaluate()
    return {one.variable: one.distances.psi for last in watch.last for one in last.fleet if one.distances}


@pytest.mark.parametrize(
    ("windows", "speed"),
    [(MOST_WINDOWS + 1, 60 * (MOST_WINDOWS + 1)), (2**62, 2**62), (1, 2**61), (1, 100_001), (10**30, 10**30)],
)
def test_counts_that_no_vehicle_makes_are_refused(windows: int, speed: int) -> None:
    body = drift_counts(
        windows=windows, variables=(DriftVariable(name=SPEED, stratum="driving", counts=(speed, 0)),),
    )  # fmt: skip
    item = ingest.decide(topics.drift("EV_1"), event_bytes(body, 1))
    assert isinstance(item, RefusedItem)
    assert "is outside 0 to" in item.detail


def test_a_loss_of_more_than_a_stream_ever_holds_is_refused_and_a_large_one_is_not() -> None:
    def decide(count: int) -> Item:
        told = Loss(stream_id="x", stream="drift", first_seq=1, last_seq=None, count=count, reason="r")
        return ingest.decide(topics.notice("EV_1"), event_bytes(told, 1))

    assert isinstance(decide(10**12), EventItem)
    assert isinstance(decide(10**12 + 1), RefusedItem)


async def test_counts_beyond_any_bound_that_are_stored_already_stop_neither_the_watch_nor_an_answer(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    huge, topic = 2**62, topics.drift("EVIL")
    stored: list[Item] = [
        *(unchecked(topic, counts(reference, huge, (huge, 0, 0, 0), (huge, 0, 0)), n) for n in (1, 2)),
        *(unchecked(topic, counts(reference, 1, (0, 0, 2**61, 0), (0, 1, 0)), n) for n in range(3, 8)),
        *(unchecked(topic, counts("ab" * 32, huge, (huge, 0, 0, 0), (huge, 0, 0)), n) for n in (8, 9)),
    ]
    await store.commit([*stored, *honest(reference)], received_at_s=NOW)
    async with store.reading() as connection:  # as it waits for its release
        assert {int(r["windows"]) for r in await drift_rows.waiting(connection, SPAN)} > {2 * MOST_WINDOWS}
    await register_bundle(store, bundle, NOW)
    async with store.writing() as connection:  # an older release set nothing of it aside
        await connection.execute(sa.update(tables.drift).values(problem=""))
    assert max((await fleet_psi(store, bundle)).values()) < 0.01
    async with store.reading() as connection:
        problems = await drift_rows.problems(connection, SPAN)
    assert sum(p["messages"] for p in problems) == 7
    assert {p["vehicles"] for p in problems} == {1}


async def test_losses_beyond_any_bound_that_are_stored_already_are_summed(store: FleetStore) -> None:
    huge = Loss(stream_id="x", stream="drift", first_seq=1, last_seq=2, count=2**62, reason="r")
    await store.commit([unchecked(topics.notice("EVIL"), huge, seq) for seq in (1, 2, 3)], received_at_s=NOW)
    async with store.reading() as connection:
        assert await reading.loss_totals(connection) == (3, 3 * 2**62)


async def test_a_sum_that_overflows_is_not_a_store_that_is_away(store: FleetStore) -> None:
    async with store.engine.connect() as connection:
        with pytest.raises(sa.exc.DBAPIError) as failed:
            await connection.execute(
                sa.text("SELECT SUM(x) FROM (SELECT 9223372036854775807 AS x UNION ALL SELECT 1) AS t")
                if store.dialect == "sqlite"
                else sa.text("SELECT 9223372036854775807::bigint + 1::bigint")
            )
    assert not connect.is_away(failed.value)


@pytest.mark.parametrize(
    ("windows", "speed", "heat", "problem"),
    [
        (60, (0, 0, 60 * 10**6, 0), (48, 12, 0), f"'{SPEED}': its counts are not 60 frames a window"),
        (60, (0, 0, 60 * 59, 0), (48, 12, 0), f"'{SPEED}': its counts are not 60 frames a window"),
        (60, (1800, 1200, 600, 0), (0, 0, 3600), f"'{HEAT}': its counts are not one a window"),
    ],
)  # fmt: skip
async def test_counting_more_of_a_variable_than_its_windows_gives_no_weight(
    store: FleetStore, bundle: LoadedBundle, windows: int, speed: tuple[int, ...], heat: tuple[int, ...], problem: str
) -> None:
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    await store.commit(honest(reference), received_at_s=NOW)
    before = await fleet_psi(store, bundle)
    lie = told("EVIL", 1, NOW, reference, counts=counts(reference, windows, speed, heat))
    lies = [lie] if isinstance(lie, EventItem) else [unchecked("t", counts(reference, windows, speed, heat), 1)]
    await store.commit(lies, received_at_s=NOW)
    async with store.reading() as connection:
        assert [p["problem"] for p in await drift_rows.problems(connection, SPAN)] == [problem]
    assert await fleet_psi(store, bundle) == before


async def test_an_event_that_comes_again_in_another_stream_counts_once(database_url: str, bundle: LoadedBundle) -> None:
    reference = bundle.drift_reference_sha256
    stores = [FleetStore.over(database_url) for _ in range(2)]
    await stores[0].prepare()
    try:
        await register_bundle(stores[0], bundle, NOW)
        for turn in range(10):  # of two collectors at once, then in one batch and after both
            said = counts(reference, 60, (1800, 1200, 600, 0), (48, 12, 0))
            same: list[Item] = [
                unchecked("t", said, turn + 1, event_id=f"boot/{turn}", stream_id=f"file-{n}") for n in range(4)
            ]
            await asyncio.gather(*(s.commit([item], received_at_s=NOW) for s, item in zip(stores, same, strict=False)))
            await stores[0].commit(same, received_at_s=NOW)
        other = counts("cd" * 32, 60, (1800, 1200, 600, 0), (48, 12, 0))  # the same recording, with other bins
        await stores[0].commit([unchecked("t", other, 1, event_id="boot/0", stream_id="new")], received_at_s=NOW)
        async with stores[0].reading() as connection:
            totals = await drift_rows.totals(connection, reference, SPAN, up_to=10**9)
            problems = await drift_rows.problems(connection, SPAN)
            waiting = await drift_rows.waiting(connection, SPAN)
        assert [(t.vehicle_id, t.windows, t.messages) for t in totals] == [("EVIL", 600, 10)]
        assert [(p["problem"], p["messages"]) for p in problems] == [(drift_rows.BEFORE, 30)]
        assert [(w["reference"], w["messages"]) for w in waiting] == [("cd" * 32, 1)]
    finally:
        for store in stores:
            await store.close()


async def test_counts_that_did_not_fit_leave_their_event_free_to_count(store: FleetStore, bundle: LoadedBundle) -> None:
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    wrong = counts(reference, 60, (60, 0, 0, 0), (48, 12, 0))
    right = counts(reference, 60, (1800, 1200, 600, 0), (48, 12, 0))
    for n, said in enumerate((wrong, right, right)):
        await store.commit([unchecked("t", said, 1, event_id="e", stream_id=f"file-{n}")], received_at_s=NOW)
    async with store.reading() as connection:
        totals = await drift_rows.totals(connection, reference, SPAN, up_to=10**9)
    assert [t.messages for t in totals] == [1]
