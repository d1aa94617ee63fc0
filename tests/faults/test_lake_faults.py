"""The lake's mover killed at each step, and a lake that is away, full or read-only: each sample is read exactly once.

The kills are real (SIGKILL to a process of its own), one at each line that the way into the lake is made of.
"""

import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cloud.lake.lake import Lake, LakeAwayError
from cloud.lake.mover import Mover
from cloud.store.fleet_store import FleetStore
from tests.databases import database_url, postgres_uri
from tests.faults.test_full_disk import on_a_small_disk
from tests.windows import sample_items

__all__ = ["database_url", "postgres_uri"]
NOW = 1_772_000_000.0

# One round a line: samples come in; a mover dies at the line; what a reader finds; what the next mover makes of it.
# Each step is a forked process, so that only the first start pays for the imports.
SWEEP = """
    import asyncio, json, os, signal, sys, threading
    import sqlalchemy as sa
    from cloud.lake.lake import Lake
    from cloud.lake.mover import Mover
    from cloud.store import sample_reading, tables
    from cloud.store.fleet_store import FleetStore
    from cloud.store.sample_reading import SampleFilter
    from tests.windows import sample_items

    url, root, stride = sys.argv[1], sys.argv[2], int(sys.argv[3])
    NOW = 1_772_000_000.0
    SAMPLES = 3
    WAY = {"_claim", "_fill", "claim", "load", "finish", "write", "_put_local", "_make", "_sync"}

    def forked(work):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(asyncio.run(work())))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            text = said.read()
        return json.loads(text) if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 else None

    def dies_at(wanted):
        seen = set()

        def line(frame, event, _):
            if event == "line":
                seen.add((frame.f_code, frame.f_lineno))
                if len(seen) == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)
            return line

        def call(frame, *_):
            ours = frame.f_code.co_filename.rsplit("/", 2)[-2:] in (
                ["lake", "lake.py"], ["lake", "mover.py"], ["store", "sample_moves.py"]
            )
            return line if ours and frame.f_code.co_name in WAY else None

        threading.settrace(call)
        sys.settrace(call)

    async def with_store(work):
        store = FleetStore.over(url)
        try:
            return await work(store)
        finally:
            await store.close()

    def ids(lake):
        return sorted(s.sample_id for file in lake.files() for s in lake.read_file(file.path))

    async def unmoved(store):
        async with store.reading() as connection:
            rows = await sample_reading.page(connection, SampleFilter(), before=None, limit=500)
            parts = (await connection.execute(sa.select(tables.sample_part.c.sample_id))).scalars().all()
        return sorted(row["sample_id"] for row in rows if row["state"] == "whole"), sorted(parts)

    number = 0
    while True:
        number += 1
        names = [f"r{number}-{n}" for n in range(SAMPLES)]
        folder = f"{root}/{number}"

        async def fill():
            async def work(store):
                await store.prepare()
                for n, name in enumerate(names):
                    await store.commit(sample_items(name, parts=2, stream_id=name), received_at_s=NOW)
            await with_store(work)

        async def move():
            async def work(store):
                dies_at(1 + (number - 1) * stride)
                await Mover(store, Lake(folder), wall=lambda: NOW).step()
                sys.settrace(None)
                return "lived"
            return await with_store(work)

        async def look():
            async def work(store):
                lake = Lake(folder)
                read, raw = sorted(s.sample_id for s in lake.read()), ids(lake)
                whole, parts = await unmoved(store)
                return {"names": names, "read": read, "raw": raw, "whole": whole, "parts": parts}
            return await with_store(work)

        async def again():
            async def work(store):
                mover = Mover(store, Lake(folder), wall=lambda: NOW)
                await mover.step()
                return mover.detail
            return await with_store(work)

        forked(fill)
        lived = forked(move)
        after_kill = forked(look)
        detail = forked(again)
        told = {"lived": lived, "killed": after_kill, "detail": detail, "recovered": forked(look)}
        print(json.dumps(told), flush=True)
        if lived:
            break
"""


def test_a_mover_killed_at_any_line_leaves_each_sample_readable_exactly_once(database_url: str, tmp_path: Path) -> None:
    stride = (
        "2" if database_url.startswith("sqlite") else "5"
    )  # every line was tried once; half a minute is enough here
    command = [sys.executable, "-c", textwrap.dedent(SWEEP), database_url, str(tmp_path / "lakes"), stride]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) > 40 // int(stride), "it died at too few lines to show anything"
    unmoved = already = 0
    for number, told in enumerate(rounds, start=1):
        killed, recovered = told["killed"], told["recovered"]
        names: list[str] = killed["names"]
        assert killed["read"] == killed["raw"], f"round {number}: a reader would see one twice"
        assert killed["read"] in ([], names), f"round {number}: half a file is there"
        assert killed["whole"] in ([], names), f"round {number}: half of them are marked"
        assert killed["whole"] or killed["read"], f"round {number}: a sample is neither in the store nor in the lake"
        assert len(killed["parts"]) == 2 * len(killed["whole"])
        unmoved += not killed["read"]
        already += bool(killed["read"] and killed["whole"])
        assert told["detail"] == ""
        assert recovered["raw"] == recovered["read"] == names
        assert recovered["whole"] == recovered["parts"] == []
    assert rounds[-1]["lived"] == "lived"
    assert unmoved, "it died before the file was there"
    assert already, "it died between the file and the mark"


# A disk that is filled, emptied, made read-only and writable again under the service; prints what /health says.
DISK = """
    import asyncio, json, subprocess, sys
    from pathlib import Path
    import httpx
    from cloud.api import create_app
    from cloud.api.settings import Settings
    from tests.windows import sample_items

    disk, folder = Path(sys.argv[1]), Path(sys.argv[2])

    async def main():
        app = create_app(Settings(database_url=f"sqlite:///{folder}/v.db", lake=f"{disk}/lake", embedding=Path("none")))
        async with app.router.lifespan_context(app):
            service = app.state.service
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cloud") as client:

                async def show(name, *, well):
                    await service.store.commit(sample_items(name, stream_id=name), received_at_s=service.wall())
                    for _ in range(100):
                        service.mover._newest_s = None  # its batch need not wait
                        await service.mover.step()
                        health = await client.get("/health")
                        states = (await client.get("/v1/samples")).json()["by_state"]
                        if bool(service.mover.detail) is not well and states["whole"] == (not well):
                            break
                        await asyncio.sleep(0.05)
                    print(json.dumps([health.status_code, health.json()["status"], health.json()["problems"], states]))

                await show("s1", well=True)
                with (disk / "ballast").open("wb", buffering=0) as ballast:
                    try:
                        while True:
                            ballast.write(b"x" * 4096)
                    except OSError:
                        pass
                await show("s2", well=False)
                (disk / "ballast").unlink()
                await show("s3", well=True)
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
                await show("s4", well=False)
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                await show("s5", well=True)
                left = [path.name for path in disk.rglob("*") if path.is_file() and path.suffix != ".parquet"]
                read = sorted(sample.sample_id for sample in service.mover.lake.read())
                print(json.dumps([left, read]))

    asyncio.run(main())
"""


def test_a_lake_that_is_full_or_read_only_is_a_problem_on_health_and_its_samples_wait(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = on_a_small_disk(disk, sys.executable, "-c", textwrap.dedent(DISK), str(disk), str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    told: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    well, full, emptied, read_only, writable = told[:5]
    guards_only = "no bundle: guards only"
    for said, moved in ((well, 1), (emptied, 3), (writable, 5)):
        assert said[2:] == [[guards_only], {"waiting": 0, "whole": 0, "lake": moved, "broken": 0}]
    for said, moved, why in ((full, 1, "No space left on device"), (read_only, 3, "Read-only file system")):
        assert said[:2] == [200, "degraded"], "the rest works"
        (problem,) = set(said[2]) - {guards_only}
        assert problem.startswith(f"lake {disk}/lake: {why}")
        assert said[3] == {"waiting": 0, "whole": 1, "lake": moved, "broken": 0}
    assert told[5] == [[], ["s1", "s2", "s3", "s4", "s5"]], "nothing half is left, and each is read once"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1/lake", "webhdfs://127.0.0.1:1/lake"])
def test_a_lake_whose_server_is_away_is_no_empty_lake_and_no_fault_at_the_start(url: str, tmp_path: Path) -> None:
    lake = Lake(url)
    with pytest.raises(LakeAwayError, match=url):
        lake.files()
    with pytest.raises(LakeAwayError, match=url):
        list(lake.read())

    async def move() -> tuple[str, str]:
        store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
        await store.prepare()
        await store.commit(sample_items("s"), received_at_s=NOW)
        mover = Mover(store, lake, wall=lambda: NOW)
        await mover.step()
        moved_later = Mover(store, Lake(str(tmp_path / "lake")), wall=lambda: NOW)
        await moved_later.step()
        await store.close()
        return mover.detail, moved_later.detail

    said, later = asyncio.run(move())
    assert said.startswith(f"lake {url}: ")
    assert later == ""
    assert [sample.sample_id for sample in Lake(str(tmp_path / "lake")).read()] == ["s"]
