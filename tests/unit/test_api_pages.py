"""The API's own pages work without a way out: nothing is fetched from another host."""

import asyncio
import re
from pathlib import Path

import httpx

from cloud.api.app import create_app
from cloud.api.settings import Settings


async def fetch(path: str, tmp_path: Path) -> httpx.Response:
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path / 'fleet.db'}", lake=f"{tmp_path}/lake"))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)


def test_the_documentation_page_names_no_other_host_and_its_files_are_served(tmp_path: Path) -> None:
    page = asyncio.run(fetch("/docs", tmp_path))
    assert page.status_code == 200
    assert not re.findall(r"""(?:src|href)=["']https?://""", page.text)
    script = re.search(r'src="(/[^"]+\.js)"', page.text)
    assert script
    assert asyncio.run(fetch(script[1], tmp_path)).status_code == 200
