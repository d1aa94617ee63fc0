"""GET /v1/samples, on SQLite and PostgreSQL: what waits, what is broken and why, what lies in the lake."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud.api import create_app
from cloud.api.service import Service
from cloud.api.settings import Settings
from tests.databases import database_url, postgres_uri
from tests.windows import sample_items

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
DAY_S = 86_400.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(url: str, lake: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """The service with its background steps standing still: the test takes each step itself."""
    app = create_app(Settings(database_url=url, lake=str(lake)))
    async with app.router.lifespan_context(app):
        for task in app.state.service._tasks:
            task.cancel()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cloud") as client:
            yield client, app.state.service


async def test_it_says_what_waits_what_is_broken_and_why_and_what_lies_in_the_lake(
    database_url: str, tmp_path: Path
) -> None:
    async with serving(database_url, tmp_path / "lake") as (client, service):

        async def ask(**parameters: Any) -> dict[str, Any]:
            answer = await client.get("/v1/samples", params=parameters)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        assert (await ask())["by_state"] == {"waiting": 0, "whole": 0, "lake": 0, "broken": 0}
        await service.store.commit(
            [
                *sample_items("good", stream_id="a", reason="alert", alert_id="a1", failure_type="charging_fault"),
                *sample_items("cut", stream_id="b", sha256="0" * 64),
                *sample_items("half", stream_id="c", parts=3, vehicle_id="EV_2")[:1],
            ],
            received_at_s=NOW,
        )
        await service.store.commit(sample_items("later", stream_id="d"), received_at_s=NOW + DAY_S)
        await service.mover.step()
        told = await ask()
        assert told["by_state"] == {"waiting": 1, "whole": 1, "lake": 1, "broken": 1}  # a second file waits its time
        assert told["by_reason"] == {"alert": 1, "random": 3}
        assert [(day["day"], day["samples"]) for day in told["by_day"]] == [("2026-02-26", 1), ("2026-02-25", 3)]
        assert told["lake"]["files"] == 1
        assert told["lake"]["bytes"] == sum(file.stat().st_size for file in (tmp_path / "lake").rglob("*.parquet"))
        assert told["lake"]["detail"] == ""
        shown = {sample["sample_id"]: sample for sample in told["samples"]}
        assert set(shown) == {"cut", "half"}
        assert "sum" in shown["cut"]["detail"]
        assert shown["half"]["detail"] == "parts 2, 3 of 3 have not come"
        (stored,) = (await ask(state="lake"))["samples"]
        assert (stored["alert_id"], stored["reason"], stored["stored"] is None) == ("a1", "alert", False)
        assert (tmp_path / "lake" / stored["file"]).is_file()
        assert [s["sample_id"] for s in (await ask(state="any", vehicle_id="EV_2"))["samples"]] == ["half"]
        assert [s["sample_id"] for s in (await ask(state="any", alert_id="a1"))["samples"]] == ["good"]
        assert len((await ask(state="any", reason="random"))["samples"]) == 3


async def test_pages_follow_each_other_while_more_arrives(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path / "lake") as (client, service):
        for n in range(5):
            await service.store.commit(sample_items(f"s{n}", stream_id=f"t{n}"), received_at_s=NOW)
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = (await client.get("/v1/samples", params={"state": "any", "limit": 2, **cursor})).json()
            seen += [sample["sample_id"] for sample in page["samples"]]
            await service.store.commit(sample_items(f"new{len(seen)}", stream_id=f"n{len(seen)}"), received_at_s=NOW)
            if page["next"] is None:
                break
            cursor = {"cursor": page["next"]}
        assert seen == ["s4", "s3", "s2", "s1", "s0"]
        wrong = await client.get("/v1/samples", params={"state": "lost"})
        assert wrong.status_code == 422
        mistyped = await client.get("/v1/samples", params={"vehicle": "EV_1"})
        assert mistyped.status_code == 422
