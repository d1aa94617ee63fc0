"""A publisher, its repository behind a real HTTP server that can misbehave, and a vehicle that looks into it.

The repository is the cloud's own code on a real disk; what an attacker changes is changed in its files, with the keys
that the attacker is supposed to have. The vehicle runs the updater's own code, its first loads in real processes.
"""

import contextlib
import io
import shutil
import ssl
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from cloud.rollouts import keys
from cloud.rollouts.publishing import publish
from cloud.rollouts.repository import ModelRepository, Release
from edge_agent.config import Config, SourceConfig, UpdateConfig
from edge_agent.contract.bundle import Decision, WindowSpec
from edge_agent.contract.messages import Desired
from edge_agent.update import floor, slots
from edge_agent.update.installation import Installation
from edge_agent.update.outcome import UpdateResult
from tests.bundles import build_bundle
from tests.vehicles import catalogue, write_files

NOW_S = 1_800_000_000.0  # 2027-01-15
DAY_S = 86_400.0
SPEC = WindowSpec(frames=60, stride_s=20, vector_period_s=10)


class Publisher:
    """Has every key, and a clock that the test sets."""

    def __init__(self, folder: Path, *, root_keys: int = 2, threshold: int = 1, now_s: float = NOW_S) -> None:
        self.now_s = now_s
        self.folder = folder
        self.repository = ModelRepository(folder / "repo", wall=lambda: self.now_s)
        self.offline, self.online = folder / "offline", folder / "online"
        counts = {"root": root_keys}
        of_role = {
            role: [
                keys.create(self.offline if role in keys.OFFLINE_ROLES else self.online, role, number + 1)
                for number in range(counts.get(role, 1))
            ]
            for role in keys.ROLES
        }
        self.of_role = of_role
        self.root = self.repository.create(of_role, threshold=threshold)

    @property
    def signers(self) -> dict[str, CryptoSigner]:
        return {**keys.read_all(self.offline, "offline"), **keys.read_all(self.online, "online")}

    @property
    def metadata(self) -> Path:
        return self.folder / "repo" / "metadata"

    def bundle(self, release: int = 1, **options: Any) -> Path:
        name = f"bundle-{release}-{len(list(self.folder.iterdir()))}"
        options.setdefault("decision", Decision(k=1, n=1, clear_windows=1))
        return build_bundle(
            self.folder / name, catalogue(), spec=SPEC, release=release, golden=True,
            failure_types=("battery_degradation", "motor_bearing_wear"), **options,
        )  # fmt: skip

    def publish(self, bundle: Path | None = None, *, counter: int | None = None, release: int = 1) -> Release:
        return publish(self.repository, bundle or self.bundle(release), catalogue(), self.signers, counter=counter)

    def publish_unverified(self, archive: bytes, custom: dict[str, Any] | None = None, name: str = "x") -> Release:
        """Sign whatever there is, as a publisher whose own checks were got round."""
        counter = max((r.counter for r in self.repository.releases()), default=0) + 1
        full = {
            "counter": counter, "release": 1, "name": name, "state_id": "tiny-1", "contract_version": "1.0",
            "compatible_makes": [], "manifest_sha256": "0" * 64, **(custom or {}),
        }  # fmt: skip
        return self.repository.publish(archive, full, f"bundles/{name}-{full['counter']}.tar", self.signers)

    def rewrite(
        self, name: str, change: Callable[[Metadata[Any]], None], signers: list[CryptoSigner] | None = None
    ) -> None:
        """Change a file of the metadata and sign it with `signers` (None: with nothing, the old signatures stay)."""
        path = self.metadata / name
        metadata: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
        change(metadata)
        if signers is not None:
            metadata.signatures.clear()
            for signer in signers:
                metadata.sign(signer, append=True)
        path.write_bytes(metadata.to_bytes())

    def saved(self) -> dict[str, bytes]:
        """All files of the metadata, as an attacker records them."""
        return {path.name: path.read_bytes() for path in self.metadata.glob("*.json")}

    def replay(self, saved: dict[str, bytes]) -> None:
        """Serve what was recorded, and nothing newer."""
        for path in self.metadata.glob("*.json"):
            path.unlink()
        for name, data in saved.items():
            (self.metadata / name).write_bytes(data)


@dataclass
class Faults:
    """How the server misbehaves; of a release's file unless it says otherwise."""

    cut_after: int | None = None  # bytes of each answer
    cuts_left: int = 1_000_000
    drip_s: float = 0.0  # a byte at a time
    endless: bool = False
    no_ranges: bool = False
    replaced: dict[str, bytes] = field(default_factory=dict)  # path → what comes instead
    header_drip_s: float = 0.0
    asked: list[tuple[str, str]] = field(default_factory=list)


class Server:
    """Files of `folder` over HTTP/1.1 with ranges, and with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults = Faults()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/")
        faults = self.faults
        wanted = handler.headers.get("Range", "")
        faults.asked.append((path, wanted))
        file = self.folder / path
        if path in faults.replaced:
            data = faults.replaced[path]
        elif file.is_file():
            data = file.read_bytes()
        else:
            handler.send_error(404)
            return
        of_target = path.startswith("targets/")
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not faults.no_ranges else 0
        body = data[first:]
        if faults.header_drip_s and of_target:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(10_000):
                handler.wfile.write(b"X-More: 1\r\n")
                time.sleep(faults.header_drip_s)
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if faults.endless and of_target:
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write(body)
            while True:
                handler.wfile.write(b"\0" * 65_536)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if of_target and faults.cut_after is not None and faults.cuts_left > 0 and len(body) > faults.cut_after:
            faults.cuts_left -= 1
            handler.wfile.write(body[: faults.cut_after])
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(2)
        elif of_target and faults.drip_s:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(faults.drip_s)
        else:
            handler.wfile.write(body)

    def turn_on_tls(self, folder: Path) -> Path:
        """Speak TLS from now on, by a certificate that signs itself; returns it."""
        key = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cloud")])
        begin = datetime.now(UTC) - timedelta(days=1)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=30))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, None)
        )  # fmt: skip
        file = folder / "server.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")
        return file

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Vehicle:
    """What the updater leaves on one vehicle's disk; `wall_s` is what its clock says."""

    def __init__(self, folder: Path, url: str, root: Path, **update: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder)
        self.folder = folder
        self.model = folder / "data" / "model"
        self.wall_s = NOW_S + 60.0
        self.root = folder / "root.json"
        self.root.write_bytes(root.read_bytes())
        source = SourceConfig(mapping="", dbc="", interface="virtual", channel="")
        options = {"load_s": 20.0, "window_s": 5.0, **update}
        self.config = Config(
            vehicle_id="EV_7", data_dir=str(folder / "data"), schema=str(folder / "small.json"), make="volta",
            source=source, update=UpdateConfig(repository=url, root=str(self.root), **options),
        )  # fmt: skip

    def update(self, target: str | Release = "", counter: int = 0) -> UpdateResult:
        if isinstance(target, Release):
            target, counter = target.target, counter or target.counter
        desired = Desired(target=target, counter=counter, time="2027-01-15T08:00:00.000Z") if target else None
        return Installation(self.config, catalogue(), wall_s=self.wall_s).run(desired)

    @property
    def known(self) -> slots.Slots:
        return slots.read(self.model)

    def change(self, change: Callable[[slots.Slots], slots.Slots]) -> None:
        slots.write(self.model, change(self.known))

    def confirm(self) -> None:
        """Do as an agent does with whom the release does well."""
        self.change(lambda s: slots.confirm(slots.loaded(slots.begin_load(s, "boot"))))

    @property
    def floor_s(self) -> float:
        return floor.read(self.model).floor_s

    def forget(self) -> None:
        """Re-flash it: all that it knew is gone."""
        shutil.rmtree(self.model)


def tar_of(members: list[tuple[str, bytes]], change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """Any archive at all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change is not None:
                change(info)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


@contextlib.contextmanager
def shop(folder: Path, **options: Any) -> Iterator[tuple[Publisher, Server]]:
    """A publisher and its server."""
    publisher = Publisher(folder / "publisher", **options)
    server = Server(folder / "publisher" / "repo")
    try:
        yield publisher, server
    finally:
        server.close()


def refusal(result: UpdateResult, *reasons: str) -> str:
    """Hold a result against the reasons it may have; returns the one line."""
    assert result.ending in ("refused", "failed"), msgspec.to_builtins(result)
    assert result.reason in reasons, msgspec.to_builtins(result)
    assert result.detail
    assert "\n" not in result.detail
    return result.detail
