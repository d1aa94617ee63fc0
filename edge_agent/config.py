"""The agent's configuration: one TOML file, read once at the start, into one frozen value.

    vehicle_id = "EV_001"
    make = "volta"                       # optional: which bundles fit
    data_dir = "/var/lib/voltwatch"      # queue and state; one agent each
    bundle = "/opt/voltwatch/bundle"     # absent: guards only
    [source]
    mapping = "ev_can.toml"
    dbc = "ev.dbc"
    interface = "socketcan"              # any of python-can's
    channel = "can0"
    [mqtt]
    host = "broker.example"

Relative paths are relative to the file. An unknown key is an error that names the nearest known one.
"""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from edge_agent.contract import topics
from edge_agent.contract.errors import ConfigError, MessageError

Port = Annotated[int, Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's tables."""


class SourceConfig(Section, frozen=True, kw_only=True):
    """Where arrivals come from. `options` go to python-can as they are (see its documentation of the interface)."""

    kind: Literal["can"] = "can"
    mapping: str
    dbc: str
    interface: str
    channel: str
    bitrate: Annotated[int, Meta(ge=1)] | None = None
    options: dict[str, str | int | float | bool] = {}


class BrokerConfig(Section, frozen=True, kw_only=True):
    """The broker. `protocol` 5 falls back to 3.1.1 with a warning; `ca` turns TLS on."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 1883
    protocol: Literal[5, 4] = 5
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30
    username: str = ""
    password: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""


class OutboxConfig(Section, frozen=True, kw_only=True):
    """The queue on the disk."""

    max_bytes: Annotated[int, Meta(ge=65_536)] = 64 * 2**20  # weeks of alerts, or some days of samples


class Config(Section, frozen=True, kw_only=True):
    """A configuration file as written, its paths made absolute."""

    vehicle_id: str
    data_dir: str
    source: SourceConfig
    make: str = ""
    bundle: str = ""
    schema: str = ""  # absent: the electric vehicle's catalogue that comes with the package
    speed: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    mqtt: BrokerConfig = BrokerConfig()
    outbox: OutboxConfig = OutboxConfig()


def load_config(path: Path) -> Config:
    """Read a configuration file. Raises `ConfigError`, one line that names the file, the key and what to do.

    The files of TLS must be there and readable: without them no broker is ever reached.
    """
    config = parse_config(read_text(path, "config"), str(path), path.resolve().parent)
    for key in ("ca", "certificate", "key"):
        file = getattr(config.mqtt, key)
        try:
            if file:
                Path(file).open("rb").close()
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
            raise ConfigError(f"config {path}: mqtt.{key} {file}: {reason}") from error
    return config


def parse_config(text: str, origin: str, folder: Path) -> Config:
    """Read a configuration's text; relative paths are taken from `folder`. Raises `ConfigError`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {origin}: not valid TOML: {error}") from error
    _refuse_unknown(table, Config, origin, "")
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config {origin}: {error}") from error
    try:
        topics.check_vehicle_id(config.vehicle_id)
    except MessageError as error:
        raise ConfigError(f"config {origin}: {error}") from error
    return _absolute(config, folder)


def read_text(path: Path, what: str) -> str:
    """Read a text file of the user's. Raises `ConfigError` naming what it should have been."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error}") from error


def _refuse_unknown(table: dict[str, Any], kind: type[Section], origin: str, where: str) -> None:
    """Name the nearest known key, which the decoder's own message does not."""
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"config {origin}: unknown key {where + key!r}; {hint}")
        inner = _section(fields[key].type)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(value, inner, origin, f"{where}{key}.")


def _section(kind: Any) -> type[Section] | None:
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _absolute(config: Config, folder: Path) -> Config:
    def path(text: str) -> str:
        return str(folder / Path(text).expanduser()) if text else ""

    replace = msgspec.structs.replace
    mqtt, source = config.mqtt, config.source
    return replace(
        config,
        data_dir=path(config.data_dir),
        bundle=path(config.bundle),
        schema=path(config.schema),
        source=replace(source, mapping=path(source.mapping), dbc=path(source.dbc)),
        mqtt=replace(mqtt, ca=path(mqtt.ca), certificate=path(mqtt.certificate), key=path(mqtt.key)),
    )
