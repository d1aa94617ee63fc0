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
    [drift]
    publish_s = 3600                     # how often drift counts leave
    [samples]
    bytes_a_day = 131072                 # raw windows for training; 0 = none
    [update]                             # absent: the bundle is what it is
    repository = "https://cloud.example/v1/models/repository/"
    root = "root.json"                   # the signed root that this vehicle was built with

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
from edge_agent.pipeline.drift import PUBLISH_S
from edge_agent.pipeline.sampling import SamplingLimits

Port = Annotated[int, Meta(ge=1, le=65535)]
_SAMPLING = SamplingLimits()


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


class DriftConfig(Section, frozen=True, kw_only=True):
    """Counts against the bundle's bins. A message a stratum is about 9 kB, however much or little it counted."""

    publish_s: Annotated[float, Meta(ge=60.0, le=86_400.0)] = PUBLISH_S


class SamplesConfig(Section, frozen=True, kw_only=True):
    """Raw windows for training; what each means stands at `SamplingLimits`."""

    bytes_a_day: Annotated[int, Meta(ge=0, le=100 * 2**20)] = _SAMPLING.bytes_a_day
    random_share: Annotated[float, Meta(ge=0.0, le=1.0)] = _SAMPLING.random_share
    windows_before: Annotated[int, Meta(ge=0, le=12)] = _SAMPLING.windows_before  # each is 10 kB of the saved state
    windows_after: Annotated[int, Meta(ge=0, le=12)] = _SAMPLING.windows_after

    @property
    def limits(self) -> SamplingLimits:
        """The same, as the pipeline takes it."""
        return SamplingLimits(self.bytes_a_day, self.random_share, self.windows_before, self.windows_after)


class UpdateConfig(Section, frozen=True, kw_only=True):
    """Releases over the air (`edge_agent.update`); without a `repository` there are none. `ca` checks its TLS."""

    repository: Annotated[str, Meta(pattern=r"^(https?://.+)?$")] = ""
    root: str = ""
    desired: Annotated[str, Meta(pattern=r"^(https?://.+)?$")] = ""  # to poll; else known by the repository's address
    ca: str = ""
    certificate: str = ""
    key: str = ""
    poll_s: Annotated[float, Meta(ge=1.0)] = 3600.0  # the fallback where MQTT's `model/desired` does not come through
    max_bytes: Annotated[int, Meta(ge=65_536, le=2**30)] = 32 * 2**20  # ours are below 2 MB; golden windows may grow
    min_rate_bytes_s: Annotated[int, Meta(ge=1)] = 512  # over half a minute: the slowest cellular link is twice that
    timeout_s: Annotated[float, Meta(ge=1.0)] = 1800.0  # one try, all in all; the next resumes the download
    memory_bytes: Annotated[int, Meta(ge=16 * 2**20)] = 256 * 2**20  # a release's first load, beside the libraries
    load_s: Annotated[float, Meta(ge=1.0)] = 60.0  # its first load and golden windows; a Raspberry Pi takes 2
    window_s: Annotated[float, Meta(gt=0.0)] = 1.0  # to score one window: more would fall behind at ten times real time
    probation_windows: Annotated[int, Meta(ge=1)] = 5
    probation_s: Annotated[float, Meta(ge=1.0)] = 3600.0  # or so long without a fault where no windows come
    warm_up_s: Annotated[float, Meta(ge=0.0)] = 604_800.0  # the longest sums of the trend are over a week
    min_counter: Annotated[int, Meta(ge=0)] = 0  # the release this vehicle left the factory with: older is a rollback


class Config(Section, frozen=True, kw_only=True):
    """A configuration file as written, its paths made absolute."""

    vehicle_id: str
    data_dir: str
    source: SourceConfig
    make: str = ""
    bundle: str = ""
    schema: str = ""  # absent: the electric vehicle's catalogue that comes with the package
    speed: Annotated[float, Meta(gt=0.0, le=1000.0)] = 1.0
    mqtt: BrokerConfig = BrokerConfig()
    outbox: OutboxConfig = OutboxConfig()
    drift: DriftConfig = DriftConfig()
    samples: SamplesConfig = SamplesConfig()
    update: UpdateConfig = UpdateConfig()


def load_config(path: Path) -> Config:
    """Read a configuration file. Raises `ConfigError`, one line that names the file, the key and what to do.

    The files of TLS must be there and readable: without them no broker is ever reached.
    """
    config = parse_config(read_text(path, "config"), str(path), path.resolve().parent)
    files = [(f"mqtt.{key}", getattr(config.mqtt, key)) for key in ("ca", "certificate", "key")]
    files += [(f"update.{key}", getattr(config.update, key)) for key in ("root", "ca", "certificate", "key")]
    for key, file in files:
        try:
            if file:
                Path(file).open("rb").close()
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
            raise ConfigError(f"config {path}: {key} {file}: {reason}") from error
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
    if config.update.repository and not config.update.root:
        raise ConfigError(f"config {origin}: update.repository needs update.root, the signed root it is trusted by")
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
    mqtt, source, update = config.mqtt, config.source, config.update
    return replace(
        config,
        data_dir=path(config.data_dir),
        bundle=path(config.bundle),
        schema=path(config.schema),
        source=replace(source, mapping=path(source.mapping), dbc=path(source.dbc)),
        mqtt=replace(mqtt, ca=path(mqtt.ca), certificate=path(mqtt.certificate), key=path(mqtt.key)),
        update=replace(
            update, root=path(update.root), ca=path(update.ca), certificate=path(update.certificate),
            key=path(update.key),
        ),
    )  # fmt: skip
