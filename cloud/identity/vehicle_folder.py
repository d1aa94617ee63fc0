"""What goes to a vehicle besides its identity: `agent.toml`, and the files of its make that it names. Pure but reading.

A base configuration says what all vehicles of a make share (source, bundle, update, …). It is taken over as it is
written, comments too; who the vehicle is and where its broker is comes from provisioning, so the base says neither.
"""

import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

from cloud.identity.durable import PUBLIC, Content
from cloud.identity.names import Role, check_hosts, common_name
from edge_agent.contract.errors import ConfigError

OWN_KEY = "vehicle.key"
_OURS = ("vehicle_id", "make", "mqtt")
_COPIED = (("source", "mapping"), ("source", "dbc"), ("schema",), ("update", "root"))
_DEFAULT = """\
data_dir = "/var/lib/voltwatch"
# bundle = "/opt/voltwatch/bundle"   # without one only the guards watch

[source]
mapping = "mapping.toml"   # to be put beside this file: which signals your bus has
dbc = "vehicle.dbc"
interface = "socketcan"
channel = "can0"
"""


def vehicle_files(
    vehicle_id: str, make: str, base: Path | None, host: str, port: int, *, own_key: bool = False
) -> dict[str, Content]:
    """Return `agent.toml` and the files beside it by name. Raises `ConfigError` for a base that cannot be used.

    `own_key`: the vehicle made its key itself, and has it in `OWN_KEY` beside these files.
    """
    files: dict[str, Content] = {}
    shared = _DEFAULT
    if base is not None:
        shared, table = _read(base)
        for keys in _COPIED:
            _copy(base, table, keys, files)
    common_name(Role.VEHICLE, vehicle_id)
    check_hosts((host,))
    if any(not c.isprintable() or c in '"\\' for c in make) or len(make) > 64:
        raise ConfigError(f"make {make[:80]!a} is not allowed: up to 64 printable characters without quotes")
    text = f'vehicle_id = "{vehicle_id}"\n' + (f'make = "{make}"\n' if make else "") + shared.rstrip("\n")
    text += f"""

[mqtt]
host = "{host}"
port = {port}
ca = "ca.crt"
certificate = "identity.pem"
key = "{OWN_KEY if own_key else "identity.pem"}"
"""
    _parse(text, f"for {vehicle_id}")
    files["agent.toml"] = Content(text.encode(), PUBLIC)
    return files


def _read(base: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = base.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise ConfigError(f"base configuration {base}: {reason}") from error
    table = _parse(text, str(base))
    for key in _OURS:
        if key in table:
            raise ConfigError(f"base configuration {base}: leave out {key!r}: provisioning writes it for each vehicle")
    return text, table


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration {origin}: not valid TOML: {error}") from error


def _copy(base: Path, table: dict[str, Any], keys: tuple[str, ...], files: dict[str, Content]) -> None:
    """Take along a file that the base names without a folder and that lies beside it; others are on the vehicle."""
    value: Any = table
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or value != PurePosixPath(value).name or value in {"", ".", ".."}:
        return
    if value in {"agent.toml", "ca.crt", "identity.pem", OWN_KEY}:
        raise ConfigError(f"base configuration {base}: {'.'.join(keys)} must not be named {value}")
    try:
        files[value] = Content((base.parent / value).read_bytes(), PUBLIC)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"base configuration {base}: {'.'.join(keys)} {value}: {reason}") from error
