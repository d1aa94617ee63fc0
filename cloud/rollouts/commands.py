"""`fleet-cloud models …`: the signed repository of releases, made and published into by whoever has its keys."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cloud.rollouts import keys
from cloud.rollouts.publishing import publish as publish_bundle
from cloud.rollouts.repository import ModelRepository, Release
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema

models = typer.Typer(
    no_args_is_help=True,
    help="""Releases for the fleet: a repository that is signed, so that a vehicle believes nobody but its keys.

    Begin with `init`, then `publish` a bundle; `fleet-cloud serve --models DIR` serves it. Keep the offline keys where
    no server is: who has the targets key can ship a model.""",
)
Repository = Annotated[
    Path, typer.Option("--repository", envvar="VOLTWATCH_MODELS", help="The repository's folder, which is served.")
]
Offline = Annotated[
    Path, typer.Option(envvar="VOLTWATCH_OFFLINE_KEYS", help="Folder of the root and targets keys. Never on a server.")
]
Online = Annotated[Path, typer.Option(envvar="VOLTWATCH_MODEL_KEYS", help="Folder of the snapshot and timestamp keys.")]
REPOSITORY, OFFLINE, ONLINE = Path("var/models"), Path("var/keys/offline"), Path("var/keys/online")


@models.command()
def init(
    *,
    repository: Repository = REPOSITORY,
    offline_keys: Offline = OFFLINE,
    online_keys: Online = ONLINE,
    root_keys: Annotated[int, typer.Option(help="How many root keys.", min=1, max=9)] = 2,
    threshold: Annotated[int, typer.Option(help="How many of them a change of keys needs.", min=1, max=9)] = 1,
) -> None:
    """Make an empty repository and its keys; prints the root file that vehicles are given."""
    if (repository / "metadata" / "1.root.json").exists():
        raise ConfigError(f"repository {repository}: exists already; nothing was changed")
    if threshold > root_keys:
        raise ConfigError(f"--threshold {threshold} is more than --root-keys {root_keys}")
    if offline_keys.resolve() == online_keys.resolve():
        raise ConfigError("--offline-keys and --online-keys are the same folder: the server's must not ship models")
    signers = {
        role: [
            keys.create(offline_keys if role in keys.OFFLINE_ROLES else online_keys, role, number)
            for number in range(1, 1 + (root_keys if role == "root" else 1))
        ]
        for role in keys.ROLES
    }
    root = ModelRepository(repository).create(signers, threshold=threshold)
    print(f"repository {repository}: made; give {root} to every vehicle as update.root")
    print(f"keys: {offline_keys} is to be kept offline, {online_keys} goes to the server (--model-keys)")


@models.command()
def publish(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    *,
    repository: Repository = REPOSITORY,
    offline_keys: Offline = OFFLINE,
    online_keys: Online = ONLINE,
    counter: Annotated[int | None, typer.Option(help="Default: one above the highest.", min=1, max=2**53)] = None,
    schema: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_SCHEMA", help="Signal schema; the electric vehicle's by default.")
    ] = None,
) -> None:
    """Verify a bundle, sign it and publish it. To go back, publish the old bundle again: its counter is a new one."""
    signers = {**keys.read_all(offline_keys, "offline"), **keys.read_all(online_keys, "online")}
    release = publish_bundle(ModelRepository(repository), bundle, _catalogue(schema), signers, counter=counter)
    print(f"published {release.target}: counter {release.counter}, release {release.release}, {release.length} bytes")


@models.command()
def withdraw(
    counter: Annotated[int, typer.Argument(help="The release's counter.", min=1)],
    *,
    repository: Repository = REPOSITORY,
    offline_keys: Offline = OFFLINE,
    online_keys: Online = ONLINE,
) -> None:
    """Take a release off the signed list: no vehicle installs it any more. Vehicles that run it go on doing so."""
    signers = {**keys.read_all(offline_keys, "offline"), **keys.read_all(online_keys, "online")}
    release = ModelRepository(repository).withdraw(counter, signers)
    print(f"withdrawn {release.target}")


@models.command("list")
def list_releases(
    *,
    repository: Repository = REPOSITORY,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what is published, and until when its signatures hold."""
    held = ModelRepository(repository)
    releases, roles = held.releases(), held.roles()
    if as_json:
        document = {
            "releases": [release._asdict() for release in releases],
            "roles": [{"role": r.role, "version": r.version, "expires": r.expires.isoformat()} for r in roles],
        }
        print(json.dumps(document))
        return
    for release in releases:
        print(_line(release))
    if not releases:
        print("nothing is published; `fleet-cloud models publish BUNDLE`")
    now = datetime.now(UTC)
    for role in roles:
        left = role.expires - now
        state = f"{left.days} days" if left.days > 1 else f"{max(0, round(left.total_seconds() / 3600))} hours"
        print(f"{role.role}: version {role.version}, " + (f"{state} left" if left.total_seconds() > 0 else "EXPIRED"))


@models.command()
def renew(
    *,
    repository: Repository = REPOSITORY,
    online_keys: Online = ONLINE,
    force: Annotated[bool, typer.Option(help="Even where more than half of their life is left.")] = False,
) -> None:
    """Sign snapshot and timestamp again; the server does so by itself."""
    done = ModelRepository(repository).renew(keys.read_all(online_keys, "online"), force=force)
    print(f"signed again: {', '.join(done)}" if done else "nothing is due")


@models.command()
def rotate(
    role: Annotated[str, typer.Argument(help=f"Whose keys: {', '.join(keys.ROLES)}.")],
    *,
    repository: Repository = REPOSITORY,
    offline_keys: Offline = OFFLINE,
    online_keys: Online = ONLINE,
) -> None:
    """Replace a role's key by a fresh one (of root keys, the first): after a theft, or as a habit."""
    if role not in keys.ROLES:
        raise ConfigError(f"role {role!r} is not one of {', '.join(keys.ROLES)}")
    signers = {**keys.read_all(offline_keys, "offline"), **keys.read_all(online_keys, "online")}
    folder = offline_keys if role in keys.OFFLINE_ROLES else online_keys
    fresh = keys.create(folder, role, keys.next_number(folder, role))
    version = ModelRepository(repository).rotate(role, fresh, signers)
    print(f"root version {version}: {role} has a fresh key; vehicles follow with their next look")


def _catalogue(schema: Path | None) -> Catalogue:
    if schema is None:
        return default_catalogue()
    try:
        return parse_schema(schema.read_bytes(), str(schema))
    except OSError as error:
        raise ConfigError(f"schema {schema}: cannot be read: {error.strerror}") from error


def _line(release: Release) -> str:
    makes = ", ".join(release.compatible_makes) or "every make"
    return (
        f"{release.counter:>6}  {release.target}  release {release.release}, state {release.state_id}, for {makes}, "
        f"{release.length} bytes, sha256 {release.sha256[:12]}…"
    )
