"""Drift in the store, on SQLite and on PostgreSQL: what counts, what waits, what is set aside, what is raised."""

import asyncio
import gc
import tracemalloc

import msgspec
import pytest
import sqlalchemy as sa

from cloud.drift.decide import Judged, Scope
from cloud.drift.limits import Drift, Limits
from cloud.drift.look import Looked, Wanted, look
from cloud.drift.watch import DriftWatch, register_bundle
from cloud.store import drift_rows, tables
from cloud.store.drift_rows import AlertWanted, Span
from cloud.store.fleet_store import FleetStore
from edge_agent.contract.messages import DriftCounts, DriftVariable
from edge_agent.contract.signals import default_catalogue
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from tests.bundles import build_bundle
from tests.databases import database_url, postgres_uri, store
from tests.drift_fleet import HEAT, SPEED, status, told, with_reference

__all__ = ["database_url", "postgres_uri", "store"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
HOUR = 3600.0
SPAN = Span(NOW - 7 * 24 * HOUR, NOW + 1)
LIMITS = Limits()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> LoadedBundle:
    folder = with_reference(build_bundle(tmp_path_factory.mktemp("bundle") / "b", default_catalogue()))
    return load_bundle(folder, default_catalogue())


async def looked_at(
    store: FleetStore, scope: Scope = "fleet", *, limits: Drift = LIMITS.drift, **wanted: str
) -> tuple[dict[tuple[str, str], Judged], Looked]:
    looked = Looked()
    found: dict[tuple[str, str], Judged] = {}
    async with store.reading() as connection:
        for known in await drift_rows.references_counted(connection, SPAN):
            async for _, _, judged in look(
                connection, known, SPAN, Wanted(frozenset({scope}), **wanted), limits, looked
            ):  # fmt: skip
                found |= {(one.variable, one.stratum): one for one in judged}
    return found, looked


async def test_counts_of_two_vehicles_and_two_hours_add_up_and_come_once(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    batch = [told(v, seq, NOW - seq * HOUR, reference) for v in ("EV_1", "EV_2") for seq in (1, 2)]
    await store.commit(batch, received_at_s=NOW)
    await store.commit(batch, received_at_s=NOW + 5)  # a broker that repeats
    async with store.reading() as connection:
        known = (await drift_rows.known(connection))[0]
        up_to = await drift_rows.newest(connection)
        totals = await drift_rows.totals(connection, reference, SPAN, up_to=up_to)
        sums, wrong = await drift_rows.vehicle_sums(connection, known, SPAN, "EV_1", up_to=up_to)
    assert [(t.vehicle_id, t.stratum, t.windows, t.messages) for t in totals] == [
        ("EV_1", "driving", 120, 2), ("EV_2", "driving", 120, 2),
    ]  # fmt: skip
    row = sums["driving"]
    assert row[known.bins.slices[SPEED]].tolist() == [3600, 2400, 1200, 0]
    assert row[known.bins.slices[HEAT]].tolist() == [96, 24, 0]
    assert wrong == []


async def test_a_count_belongs_to_the_end_of_its_span_by_a_trusted_clock_and_to_its_arrival_by_none(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    await store.commit(
        [told("EV_1", 1, NOW - 3 * HOUR, reference), told("EV_1", 2, 5.0, reference, trusted=False)],
        received_at_s=NOW,
    )
    async with store.reading() as connection:
        rows = await connection.execute(sa.select(tables.drift.c.at_s).order_by(tables.drift.c.ingest_id))
        assert [r.at_s for r in rows] == [NOW - 3 * HOUR, NOW]


async def test_counts_of_an_unknown_release_wait_and_count_when_it_becomes_known(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    misfit = DriftCounts(
        model_release=1, reference=reference, first_time="2026-02-25T00:00:00.000Z",
        last_time="2026-02-25T00:00:00.000Z", windows=60,
        variables=(DriftVariable(name=HEAT, stratum="driving", counts=(30, 30)),),
    )  # fmt: skip
    batch = [told("EV_1", seq, NOW - seq * HOUR, reference, release=9) for seq in range(1, 12)]
    await store.commit([*batch, told("EV_1", 99, NOW, reference, counts=misfit)], received_at_s=NOW)
    async with store.reading() as connection:
        waiting = await drift_rows.waiting(connection, SPAN)
        assert [(r["reference"], r["messages"], int(r["windows"]), r["last_release"]) for r in waiting] == [
            (reference, 12, 720, 9)
        ]
        assert await drift_rows.references_counted(connection, SPAN) == []
    assert await register_bundle(store, bundle, NOW)
    assert not await register_bundle(store, bundle, NOW)  # twice changes nothing
    async with store.reading() as connection:
        assert await drift_rows.waiting(connection, SPAN) == []
        problems = await drift_rows.problems(connection, SPAN)
    assert [(p["problem"], p["messages"]) for p in problems] == [("'heat' has 2 counts, its bins are 3", 1)]
    found, looked = await looked_at(store, "vehicle", vehicle_id="EV_1")
    assert looked.totals[0].windows == 11 * 60
    assert found[SPEED, "driving"].verdict == "ok"


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        (DriftVariable(name=HEAT, stratum="driving", counts=(60, 0)), "'heat' has 2 counts, its bins are 3"),
        (DriftVariable(name="new", stratum="driving", counts=(60, 0, 0)), "'new' is no variable of this reference"),
    ],
)
async def test_counts_that_do_not_fit_the_bins_are_set_aside_and_never_added(
    store: FleetStore, bundle: LoadedBundle, variable: DriftVariable, problem: str
) -> None:
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    wrong = DriftCounts(
        model_release=1, reference=reference, first_time="2026-02-25T00:00:00.000Z",
        last_time="2026-02-25T00:00:00.000Z", windows=60, variables=(variable,),
    )  # fmt: skip
    written = await store.commit(
        [told("EV_1", 1, NOW, reference), told("EV_1", 2, NOW, reference, counts=wrong)], received_at_s=NOW
    )
    assert written.stored == 2  # it is kept, and acknowledged: the vehicle cannot mend it
    async with store.reading() as connection:
        problems = await drift_rows.problems(connection, SPAN)
        totals = await drift_rows.totals(connection, reference, SPAN, up_to=10**9)
    assert [(p["problem"], p["messages"], p["vehicles"]) for p in problems] == [(problem, 1, 1)]
    assert [t.windows for t in totals] == [60]


async def test_a_misfit_that_slipped_in_while_its_reference_was_registered_is_found_when_it_is_read(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    wrong = DriftCounts(
        model_release=1, reference=reference, first_time="2026-02-25T00:00:00.000Z",
        last_time="2026-02-25T00:00:00.000Z", windows=60,
        variables=(DriftVariable(name="new", stratum="driving", counts=(60, 0)),),
    )  # fmt: skip
    await register_bundle(store, bundle, NOW)
    await store.commit([told("EV_1", 1, NOW, reference, counts=wrong)], received_at_s=NOW)
    async with store.writing() as connection:  # what its transaction saw: no such reference
        await connection.execute(sa.update(tables.drift).values(problem=""))
    await store.commit(fleet(reference, 1, 12), received_at_s=NOW)
    watch = DriftWatch(store, bundle, LIMITS, wall=lambda: NOW + 1)
    await watch.step()
    async with store.reading() as connection:
        problems = await drift_rows.problems(connection, SPAN)
    assert [p["problem"] for p in problems] == ["'new' is no variable of this reference"]


def fleet(reference: str, vehicles: int, hours: int, *, shift: float = 0.0, first: int = 1) -> list:  # type: ignore[type-arg]
    return [
        told(f"EV_{v}", first + hour, NOW - hour * HOUR, reference, shift=shift)
        for v in range(1, vehicles + 1)
        for hour in range(hours)
    ]


async def test_a_make_is_judged_by_its_own_vehicles(store: FleetStore, bundle: LoadedBundle) -> None:
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    makes = {f"EV_{v}": "good" if v <= 4 else "bad" for v in range(1, 9)}
    await store.commit([status(v, make) for v, make in makes.items()], received_at_s=NOW)
    batch = [
        told(v, hour + 1, NOW - hour * HOUR, reference, shift=0.9 if make == "bad" else 0.0)
        for v, make in makes.items()
        for hour in range(4)
    ]
    await store.commit(batch, received_at_s=NOW)
    limits = msgspec.structs.replace(LIMITS.drift, min_windows=200)
    good, _ = await looked_at(store, "make", make="good", limits=limits)
    bad, _ = await looked_at(store, "make", make="bad", limits=limits)
    assert good[SPEED, "driving"].verdict == "ok"
    assert bad[SPEED, "driving"].verdict == "drift"
    assert good[SPEED, "driving"].size.vehicles == bad[SPEED, "driving"].size.vehicles == 4


async def test_one_vehicle_of_many_is_capped_in_the_fleet(store: FleetStore, bundle: LoadedBundle) -> None:
    """Twenty healthy vehicles of an hour each, and one that floods ten thousand shifted windows."""
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)
    flood = told("flood", 1, NOW, reference, windows=10_000, shift=1.0)
    await store.commit([*fleet(reference, 30, 1), flood], received_at_s=NOW)
    found, _ = await looked_at(store)
    judged = found[SPEED, "driving"]
    assert judged.size.vehicles == 31
    assert judged.distances is not None
    assert judged.distances.ks == pytest.approx(0.05 * 5 / 6, abs=0.002)  # by windows it would be 0.7
    assert judged.verdict == "ok"


async def test_the_watch_raises_keeps_and_clears_alerts_of_fleet_make_and_vehicle(
    store: FleetStore, bundle: LoadedBundle
) -> None:
    reference = bundle.drift_reference_sha256
    now = NOW
    watch = DriftWatch(store, bundle, LIMITS, wall=lambda: now)
    await store.commit([status(f"EV_{v}", "m") for v in range(1, 4)], received_at_s=NOW)
    await store.commit(fleet(reference, 3, 12, shift=0.99), received_at_s=NOW)
    now = NOW + 1
    await watch.step()

    async def alerts(**wanted: object) -> list:  # type: ignore[type-arg]
        async with store.reading() as connection:
            return await drift_rows.alerts(connection, AlertWanted(**wanted), before=None, limit=100)  # type: ignore[arg-type]

    raised = await alerts(is_open=True)
    assert {(r["scope"], r["scope_id"]) for r in raised} == {
        ("fleet", ""), ("make", "m"), ("vehicle", "EV_1"), ("vehicle", "EV_2"), ("vehicle", "EV_3"),
    }  # fmt: skip
    of_fleet = next(r for r in raised if r["scope"] == "fleet" and r["variable"] == SPEED)
    assert of_fleet["value"] >= of_fleet["threshold"]
    assert (of_fleet["windows"], of_fleet["vehicles"], of_fleet["model_release"]) == (3 * 12 * 60, 3, 1)
    assert [one.variable for last in watch.last for one in last.fleet if one.verdict == "drift"]

    await watch.evaluate()  # the same again: no second row
    assert len(await alerts()) == len(raised)

    now = NOW + 8 * 24 * HOUR  # the counts have left the span; nothing new is heard
    await store.commit(
        [
            told(f"EV_{v}", 100 + hour, now - hour * HOUR, reference)
            for v in range(1, 4)
            for hour in range(1, 12)
        ],
        received_at_s=now,
    )  # fmt: skip
    await watch.evaluate()
    assert await alerts(is_open=True) == []
    assert len(await alerts(is_open=False)) == len(raised)


async def test_an_alert_outlives_silence_for_one_span_only(store: FleetStore, bundle: LoadedBundle) -> None:
    now = NOW + 1
    watch = DriftWatch(store, bundle, LIMITS, wall=lambda: now)
    await store.commit(fleet(bundle.drift_reference_sha256, 3, 12, shift=0.99), received_at_s=NOW)
    await watch.step()

    async def standing() -> int:
        async with store.reading() as connection:
            return len(await drift_rows.alerts(connection, AlertWanted(is_open=True), before=None, limit=100))

    assert await standing()
    now = NOW + 7 * 24 * HOUR - 10  # all but the newest counts have left: too few to say
    await watch.evaluate()
    assert await standing()
    now = NOW + 15 * 24 * HOUR
    await watch.evaluate()
    assert not await standing()


async def test_two_servers_on_one_store_register_once_and_raise_once(store: FleetStore, bundle: LoadedBundle) -> None:
    await store.commit(fleet(bundle.drift_reference_sha256, 3, 12, shift=0.99), received_at_s=NOW)
    watches = [DriftWatch(store, bundle, LIMITS, wall=lambda: NOW + 1) for _ in range(4)]
    await asyncio.gather(*(watch.step() for watch in watches))
    async with store.reading() as connection:
        raised = await drift_rows.alerts(connection, AlertWanted(), before=None, limit=100)
    places = [(r["scope"], r["scope_id"], r["variable"], r["stratum"]) for r in raised]
    assert len(places) == len(set(places)) == 5  # two variables of the fleet, one of each vehicle


async def test_the_watch_does_not_read_again_what_has_not_changed(store: FleetStore, bundle: LoadedBundle) -> None:
    await store.commit(fleet(bundle.drift_reference_sha256, 3, 12, shift=0.99), received_at_s=NOW)
    watch = DriftWatch(store, bundle, LIMITS, wall=lambda: NOW + 1)
    await watch.step()
    first = watch.last
    await watch.step()
    assert watch.last is first


async def test_the_memory_of_a_look_does_not_grow_with_the_messages(store: FleetStore, bundle: LoadedBundle) -> None:
    """Thirty times the messages of the same vehicles: what is held at most stays that of one chunk."""
    reference = bundle.drift_reference_sha256
    await register_bundle(store, bundle, NOW)

    async def peak(messages: range) -> int:
        for v in range(1, 6):
            batch = [told(f"EV_{v}", n, NOW - n * 60, reference) for n in messages]
            await store.commit(batch, received_at_s=NOW)
        gc.collect()  # what earlier tests left is not of this look
        tracemalloc.start()
        _, looked = await looked_at(store)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(t.messages for t in looked.totals) == 5 * (messages.stop - 1)
        return most

    few = await peak(range(1, drift_rows.CHUNK + 1))  # a whole chunk of each
    many = await peak(range(drift_rows.CHUNK + 1, 5 * drift_rows.CHUNK + 1))
    assert many < 1.5 * few
