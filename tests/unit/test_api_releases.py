"""The signed repository over the fleet API: only its own files, whole or by ranges, with the right caching."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from cloud.api.app import create_app
from cloud.api.settings import Settings
from tests.releases import Publisher

pytestmark = pytest.mark.anyio
BASE = "/v1/models/repository/"
NASTY = [
    "../publisher/online/snapshot-1.pem", "..%2fonline%2fsnapshot-1.pem", "metadata/../../online/snapshot-1.pem",
    "metadata/..%2f..%2fonline%2fsnapshot-1.pem", ".lock", "metadata", "metadata/", "", "metadata/timestamp.json/",
    "metadata/01.root.json", "metadata/1.root.json%00", "metadata/1.root.jso", "//etc/passwd", "%2fetc%2fpasswd",
    "targets/bundles/x.tar", "targets/bundles/" + "0" * 64 + ".x.tar", "metadata/٣.root.json", "metadata/9.root.json",
    "targets/bundles/" + "0" * 64 + "../x.tar", "a" * 290,
]  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "publisher")
    made.publish()
    return made


@pytest.fixture
async def client(publisher: Publisher, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(
        database_url=f"sqlite:///{tmp_path}/x.db", lake=str(tmp_path / "lake"), models=publisher.folder / "repo"
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
            yield made


def target(publisher: Publisher) -> str:
    return "targets/bundles/" + next((publisher.folder / "repo/targets/bundles").iterdir()).name


async def test_metadata_and_releases_are_served_with_their_caching(
    client: httpx.AsyncClient, publisher: Publisher
) -> None:
    timestamp = await client.get(BASE + "metadata/timestamp.json")
    assert timestamp.content == (publisher.metadata / "timestamp.json").read_bytes()
    assert timestamp.headers["cache-control"] == "no-cache"
    root = await client.get(BASE + "metadata/1.root.json")
    assert "immutable" in root.headers["cache-control"]
    again = await client.get(BASE + "metadata/timestamp.json", headers={"If-None-Match": timestamp.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    publisher.publish(release=2)
    new = await client.get(BASE + "metadata/timestamp.json", headers={"If-None-Match": timestamp.headers["etag"]})
    assert new.status_code == 200
    head = await client.head(BASE + target(publisher))
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 1000


async def test_a_range_is_answered_as_http_says(client: httpx.AsyncClient, publisher: Publisher) -> None:
    url = BASE + target(publisher)
    whole = (await client.get(url)).content
    size = len(whole)
    for asked, start, end in (("bytes=10-19", 10, 20), ("bytes=100-", 100, size), ("bytes=-7", size - 7, size)):
        part = await client.get(url, headers={"Range": asked})
        assert part.status_code == 206
        assert part.content == whole[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    behind = await client.get(url, headers={"Range": f"bytes={size}-"})
    assert behind.status_code == 416
    assert behind.headers["content-range"] == f"bytes */{size}"
    assert behind.json()["status"] == 416
    for odd in ("bytes=5-2", "lines=1-2", "bytes=", "bytes=-", "bytes=a-b", "bytes=1-2,5-6", "bytes=0x1-", "x" * 500):
        ignored = await client.get(url, headers={"Range": odd})
        assert (ignored.status_code, len(ignored.content)) == (200, size), odd
    other = await client.get(url, headers={"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (other.status_code, len(other.content)) == (200, size)


@pytest.mark.parametrize("path", NASTY)
async def test_no_path_leaves_the_repository(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(BASE + path)
    assert answer.status_code in (404, 422), answer.text
    assert b"PRIVATE KEY" not in answer.content
    assert answer.json()["status"] == answer.status_code


async def test_a_missing_root_version_is_never_cached(client: httpx.AsyncClient) -> None:
    """A vehicle asks for the next root until there is none; a cache that kept that answer would hide a rotation."""
    absent = await client.get(BASE + "metadata/2.root.json")
    assert (absent.status_code, absent.headers["cache-control"]) == (404, "no-store")


async def test_a_server_without_a_repository_says_how_to_have_one(tmp_path: Path) -> None:
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/x.db", lake=str(tmp_path / "lake")))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get(BASE + "metadata/timestamp.json")
    assert answer.status_code == 404
    assert "--models DIR" in answer.json()["detail"]


async def test_a_repository_that_cannot_be_renewed_shows_in_health(publisher: Publisher, tmp_path: Path) -> None:
    settings = Settings(
        database_url=f"sqlite:///{tmp_path}/x.db", lake=str(tmp_path / "lake"), models=publisher.folder / "repo",
        model_keys=tmp_path / "nowhere",
    )  # fmt: skip
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        await app.state.service.renewal.step()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            health = (await client.get("/health")).json()
    assert any("no such folder" in problem for problem in health["problems"])
