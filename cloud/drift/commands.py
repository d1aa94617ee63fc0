"""`fleet-cloud register-reference`: make a release's drift bins known to a store that did not serve it."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from cloud.drift.watch import register_bundle
from cloud.store.connect import DEFAULT_URL
from cloud.store.fleet_store import FleetStore
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema
from edge_agent.pipeline.bundle_dir import load_bundle


def register_reference(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle whose counts wait.")],
    database: Annotated[
        str, typer.Option(envvar="DATABASE_URL", help="sqlite:///PATH or postgresql://…; default var/voltwatch.db")
    ] = DEFAULT_URL,
    schema: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_SCHEMA", help="Signal schema; the electric vehicle's by default.")
    ] = None,
) -> None:
    """Register a release's drift reference; what waited for it counts from now on. Doing it twice changes nothing."""
    loaded = load_bundle(bundle, _catalogue(schema))

    async def register() -> bool:
        store = FleetStore.over(database)
        try:
            await store.prepare()
            return await register_bundle(store, loaded, time.time())
        finally:
            await store.close()

    new = asyncio.run(register())
    said = "is registered" if new else "was registered before"
    typer.echo(f"{bundle}: reference {loaded.drift_reference_sha256[:12]} of release {loaded.manifest.release} {said}")


def _catalogue(path: Path | None) -> Catalogue:
    if path is None:
        return default_catalogue()
    try:
        return parse_schema(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"schema {path}: cannot be read: {error.strerror}") from error
