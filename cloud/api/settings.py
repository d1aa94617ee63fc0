"""What the service needs to know, read once at start-up: from the environment, or from `fleet-cloud serve`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloud.collector.tls import TlsFiles
from cloud.store.connect import DEFAULT_URL
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.signals import Catalogue, default_catalogue, parse_schema

DEFAULT_LAKE = "var/lake"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One service's configuration. Limits carry their reason.

    From the environment: DATABASE_URL, VOLTWATCH_BUNDLE (a directory), VOLTWATCH_SCHEMA (a file), VOLTWATCH_BROKER
    (HOST:PORT), VOLTWATCH_BROKER_USERNAME, VOLTWATCH_BROKER_PASSWORD, VOLTWATCH_BROKER_CA, VOLTWATCH_BROKER_CERTIFICATE
    and VOLTWATCH_BROKER_KEY (PEM files: the first turns TLS on, one file may hold the other two), VOLTWATCH_LAKE (a
    directory or fsspec URL), VOLTWATCH_CONFIG (config.json: limits of drift and retraining), VOLTWATCH_MANUAL
    (ev_repair_manual.json), VOLTWATCH_EMBEDDING (the directory of the sentence model), VOLTWATCH_MODELS (the signed
    repository of releases), VOLTWATCH_MODEL_KEYS (the directory of its online keys).
    """

    database_url: str = DEFAULT_URL
    bundle: Path | None = None
    schema: Path | None = None
    broker: str | None = None  # None: no collector in this process
    broker_username: str = ""
    broker_password: str = field(default="", repr=False)
    broker_ca: Path | None = None  # None: in the clear
    broker_certificate: Path | None = None
    broker_key: Path | None = None
    lake: str = DEFAULT_LAKE
    config: Path | None = None  # None: the one that comes with the package
    manual: Path | None = None  # None: the one that comes with the package
    embedding: Path | None = None  # None: where the build step puts it; retrieval is by words alone where it is absent
    models: Path | None = None  # None: this server serves no releases
    model_keys: Path | None = None  # None: somebody else renews the repository's timestamp
    max_body_bytes: int = 4 * 2**20  # an hour at 1 Hz with its cells is about 3 MB
    max_frames: int = 3_600  # of one post or message: more is a recording, which `edge-agent replay` takes
    body_timeout_s: float = 30.0  # a body that drips longer is given up
    max_sockets: int = 1_000
    max_socket_message_bytes: int = 1 * 2**20
    max_bad_messages: int = 20  # on one socket, in a row; then it is closed
    send_timeout_s: float = 10.0  # a client that does not read is let go
    max_vehicles_in_memory: int = 2_000  # pipelines of some 100 kB each; the others wait in the store

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the environment; an empty variable counts as absent."""

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        return cls(
            database_url=environment.get("DATABASE_URL") or DEFAULT_URL,
            bundle=path("VOLTWATCH_BUNDLE"),
            schema=path("VOLTWATCH_SCHEMA"),
            broker=environment.get("VOLTWATCH_BROKER") or None,
            broker_username=environment.get("VOLTWATCH_BROKER_USERNAME", ""),
            broker_password=environment.get("VOLTWATCH_BROKER_PASSWORD", ""),
            broker_ca=path("VOLTWATCH_BROKER_CA"),
            broker_certificate=path("VOLTWATCH_BROKER_CERTIFICATE"),
            broker_key=path("VOLTWATCH_BROKER_KEY"),
            lake=environment.get("VOLTWATCH_LAKE") or DEFAULT_LAKE,
            config=path("VOLTWATCH_CONFIG"),
            manual=path("VOLTWATCH_MANUAL"),
            embedding=path("VOLTWATCH_EMBEDDING"),
            models=path("VOLTWATCH_MODELS"),
            model_keys=path("VOLTWATCH_MODEL_KEYS"),
        )

    def broker_tls(self) -> TlsFiles | None:
        """Return the files of TLS to the broker, or None. Raises `ConfigError` for a certificate without a CA."""
        if self.broker_ca is not None:
            return TlsFiles(self.broker_ca, self.broker_certificate, self.broker_key)
        if self.broker_certificate is not None or self.broker_key is not None:
            raise ConfigError("a broker certificate or key without --broker-ca: whose broker to trust must be said too")
        return None

    def catalogue(self) -> Catalogue:
        """Return the catalogue of signals. Raises `ConfigError` when the schema file cannot be used."""
        if self.schema is None:
            return default_catalogue()
        try:
            text = self.schema.read_bytes()
        except OSError as error:
            raise ConfigError(f"schema {self.schema}: cannot be read: {error.strerror}") from error
        return parse_schema(text, str(self.schema))
