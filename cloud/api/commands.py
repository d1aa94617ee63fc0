"""`fleet-cloud serve` and `fleet-cloud broker`: each checks what it needs before it starts anything."""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from cloud.advice import manual as manuals
from cloud.advice.embedding import Embedder
from cloud.api.app import create_app
from cloud.api.service import usable_bundle
from cloud.api.settings import DEFAULT_LAKE, Settings
from cloud.collector.mqtt import parse_broker
from cloud.collector.tls import tls_context
from cloud.lake.lake import Lake
from cloud.rollouts import keys
from cloud.rollouts.repository import ModelRepository
from cloud.store.fleet_store import FleetStore, StoreAwayError
from edge_agent.contract.errors import UnavailableError

SHUTDOWN_S = 2  # for open requests and sockets; with saving the state the process is gone in less than five


def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65_535)] = 8000,
    broker: Annotated[
        str, typer.Option(envvar="VOLTWATCH_BROKER", help="MQTT broker to collect from, HOST:PORT.")
    ] = "127.0.0.1:1883",
    broker_ca: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_BROKER_CA", help="Authority of the broker, PEM; turns TLS on.")
    ] = None,
    broker_certificate: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_BROKER_CERTIFICATE", help="The collector's certificate, PEM.")
    ] = None,
    broker_key: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_BROKER_KEY", help="Its key, PEM; may be the same file.")
    ] = None,
    database: Annotated[
        str, typer.Option(envvar="DATABASE_URL", help="sqlite:///PATH or postgresql://…; default var/voltwatch.db")
    ] = "",
    lake: Annotated[
        str,
        typer.Option(
            envvar="VOLTWATCH_LAKE",
            help="Where samples for training go: a directory, or any URL fsspec has a driver for.",
        ),
    ] = DEFAULT_LAKE,
    bundle: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_BUNDLE", help="Bundle that scores frames which come over HTTP.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_SCHEMA", help="Signal schema; the electric vehicle's by default.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_MODELS", help="Signed repository of releases, for the vehicles.")
    ] = None,
    model_keys: Annotated[
        Path | None, typer.Option(envvar="VOLTWATCH_MODEL_KEYS", help="Its online keys, to renew its timestamp.")
    ] = None,
) -> None:
    """Serve the fleet API, and collect from the MQTT broker, in one process.

    A broker that is away is waited for (/health says so); a port in use, a wrong bundle, a wrong
    database URL or a file that is no database is an error at once; a database server that is away is waited for.
    """
    settings = dataclasses.replace(
        Settings.from_environment(), bundle=bundle, schema=schema, broker=broker, lake=lake,
        broker_ca=broker_ca, broker_certificate=broker_certificate, broker_key=broker_key,
        models=models, model_keys=model_keys,
    )  # fmt: skip
    if database:
        settings = dataclasses.replace(settings, database_url=database)
    with _listen(host, port) as listener:
        _check(settings)
        address = listener.getsockname()
        logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
        for talkative in ("alembic", "asyncio", "aiosqlite", "bm25s", "onnxruntime"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(f"fleet-cloud: http://{shown}:{address[1]}/docs, collecting from {broker}", flush=True)
        config = uvicorn.Config(
            create_app(settings), log_level="info", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S,
            ws_max_size=2 * settings.max_socket_message_bytes, ws_max_queue=4, server_header=False, log_config=None,
        )  # fmt: skip
        server = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn raises what it caught once more when it is done: being told to end, and ending, is success
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[listener])
        if not server.started:
            raise typer.Exit(1)


def broker(
    host: Annotated[str, typer.Option(help="Address to listen on; anyone who reaches it may publish.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the MQTT 5 listener.", min=1, max=65_535)] = 1883,
    port_v4: Annotated[int, typer.Option(help="Port of an MQTT 3.1.1 listener; 0 for none.", min=0, max=65_535)] = 0,
) -> None:
    """Run the embedded MQTT broker: for trying things out. It keeps everything in memory, and knows no accounts.

    In production run Mosquitto. What is lost here with its memory is sent again by the vehicles: they wait for the
    collector's own acknowledgement.
    """
    from iotcore import Broker  # noqa: PLC0415 - 14 MB of native code that only this command needs

    for wanted in filter(None, (port, port_v4)):
        _listen(host, wanted).close()
    with tempfile.TemporaryDirectory(prefix="voltwatch-broker-") as folder:
        config = Path(folder) / "broker.toml"
        config.write_text(_broker_config(host, port, port_v4))
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        try:
            running = Broker(config_path=str(config)).start()
        except (OSError, RuntimeError) as error:
            raise UnavailableError(f"the broker did not start on {host}:{port}: {error}") from error
        print(f"fleet-cloud: MQTT 5 broker on {host}:{port}; stop it with Ctrl-C", flush=True)
        try:
            while not stop.wait(0.5):
                if not running.is_running:
                    raise UnavailableError("the broker's process has ended; start it again")
        finally:
            running.stop()


def _broker_config(host: str, port: int, port_v4: int) -> str:
    """Rumqttd's configuration. Its default would listen on 0.0.0.0, in MQTT 3.1.1."""
    listeners = [("v5", port)] + ([("v4", port_v4)] if port_v4 else [])
    tables = "".join(
        f"""
[{version}.1]
name = "{version}"
listen = "{host}:{at}"
next_connection_delay_ms = 1
[{version}.1.connections]
connection_timeout_ms = 60000
max_payload_size = 262144
max_inflight_count = 500
dynamic_filters = true
"""
        for version, at in listeners
    )
    # 10 segments of 16 MB a topic filter: the most that a session which falls behind can ask for
    router = """id = 0
[router]
id = 0
max_connections = 2000
max_outgoing_packet_count = 500
max_segment_size = 16777216
max_segment_count = 10
"""
    return router + tables


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything starts. Raises `UnavailableError` for a port in use or an address that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UnavailableError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # SO_REUSEADDR lets two processes bind; only one can listen
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"port {port} on {host} cannot be used: {(error.strerror or str(error)).lower()}; "
            f"stop what uses it, or choose another with --port"
        ) from error
    return listener


def _check(settings: Settings) -> None:
    """Find what can never work before the server starts: one line instead of a traceback."""
    catalogue = settings.catalogue()
    if settings.bundle is not None:
        usable_bundle(settings.bundle, catalogue)
    if settings.broker is not None:
        parse_broker(settings.broker)
        if (files := settings.broker_tls()) is not None:
            tls_context(files)
    Lake(settings.lake)
    if settings.models is not None:
        ModelRepository(settings.models).releases()
    if settings.model_keys is not None:
        keys.read_all(settings.model_keys, "online")
    manuals.load(settings.manual)
    if settings.embedding is not None:
        Embedder.load(settings.embedding)

    async def prepare() -> None:
        store = FleetStore.over(settings.database_url)
        try:
            with contextlib.suppress(StoreAwayError):  # waited for, as a broker that is away
                await store.prepare()
        finally:
            await store.close()

    asyncio.run(prepare())
