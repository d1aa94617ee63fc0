"""One folder of identities, and what may be done with it: begin, issue, renew, revoke, list.

    ca/           ca.key ca.crt            the authority; its key is made once and never overwritten
    register.json                          which certificates there are
    broker/       mosquitto.conf acl crl.pem ca.crt identity.pem data/
    collector/NAME/  subscriber/NAME/      ca.crt identity.pem
    vehicle/ID/                            ca.crt identity.pem agent.toml …: copied to the vehicle as it is

Every change is made under a lock, file by file whole. A process killed at any moment leaves no half identity: the next
one decides what was unfinished, from the register. Private keys go into files of mode 0600 and nowhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import msgspec

from cloud.identity import authority as ca
from cloud.identity import durable, mosquitto, register
from cloud.identity.authority import Authority
from cloud.identity.durable import PUBLIC, SECRET, Content
from cloud.identity.names import Role, check_hosts, common_name
from cloud.identity.register import Entry, Register
from edge_agent.contract.errors import ConfigError, SourceError

BROKER = "broker"  # the one broker's name in the register
DEFAULT_COLLECTOR = "default"
DEFAULT_PORT = 8883  # IANA: secure-mqtt
DAYS: Mapping[Role, int] = {
    Role.VEHICLE: 5 * 365,  # renewed by hand, in a workshop: seldom; a stolen one is revoked, not waited for
    Role.COLLECTOR: 2 * 365,
    Role.SUBSCRIBER: 365,
    Role.BROKER: 2 * 365,
}
MAX_DAYS = ca.CA_DAYS
_AT_ONCE = 256  # certificates between two writes of the register
_UNDELIVERED = "never delivered"


@dataclass(frozen=True, slots=True)
class Wanted:
    """An identity to be there: its owner, and the files that go with it beside certificate and authority.

    With a signing `request` (PEM) the key is the owner's own and never comes here: only its certificate is delivered.
    """

    role: Role
    name: str
    days: int
    files: Mapping[str, Content] = field(default_factory=dict)
    request: bytes = b""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What is in an identity's folder now. `made`: it was not there before."""

    entry: Entry
    folder: Path
    made: bool


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the list: a certificate, its state by the clock, and whether it is the one in its folder."""

    entry: Entry
    state: str
    days_left: int
    here: bool


class Provisioning:
    """The identities in `folder`. `passphrase` opens the authority's key, if it has one; `now` is the clock.

    Raises `ConfigError`, `UnavailableError` and `MessageError`.
    """

    def __init__(
        self, folder: Path, *, passphrase: bytes = b"", now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.folder = folder
        self._passphrase = passphrase
        self._now = now

    # What a command asks for ------------------------------------------------------------------------------------

    def init(
        self, hosts: tuple[str, ...], port: int = DEFAULT_PORT, *, install: PurePosixPath | None = None, days: int = 0
    ) -> list[Delivered]:
        """Make the authority, the broker's folder and the first collector, each unless it is there already."""
        hosts = check_hosts(hosts)
        place = install or PurePosixPath(self._where(Role.BROKER, BROKER).resolve())
        if not str(place).isprintable() or not place.is_absolute():
            raise ConfigError(f"the broker's folder {str(place)!a} must be an absolute path")
        at = self._time()
        with durable.locked(self.folder):
            self._sweep()
            self._begin(hosts, port, at)
            authority, book = self._open()
            if (book.hosts, book.port) != (hosts, port):
                raise ConfigError(
                    f"{self.folder} was made for {', '.join(book.hosts)} port {book.port}; other names: "
                    f"`provision renew broker --role broker --broker-host …`"
                )
            book = self._settle(authority, book, at)
            conf = {"mosquitto.conf": Content(mosquitto.configuration(place, port).encode(), PUBLIC)}
            wanted = (
                Wanted(Role.BROKER, BROKER, days or DAYS[Role.BROKER], conf),
                Wanted(Role.COLLECTOR, DEFAULT_COLLECTOR, days or DAYS[Role.COLLECTOR]),
            )
            return self._ensure(authority, book, wanted, at)

    def add(self, wanted: Sequence[Wanted]) -> list[Delivered]:
        """Make each identity, unless it is there already. All are checked before the first is made."""
        owners = {common_name(one.role, one.name) for one in wanted}
        if len(owners) != len(wanted):
            raise ValueError("an owner is named twice")
        at = self._time()
        with durable.locked(self.folder):
            authority, book = self._ready(at)
            return self._ensure(authority, book, wanted, at)

    def renew(
        self, role: Role, names: Sequence[str], *, days: int = 0, hosts: tuple[str, ...] = (), request: bytes = b""
    ) -> list[Delivered]:
        """Give each a new key and certificate; the old one works on until it ends or is revoked."""
        at = self._time()
        with durable.locked(self.folder):
            authority, book = self._ready(at)
            owned = book.by_owner()
            for name in names:
                if (role, name) not in owned:
                    raise _unknown(book, role, name)
            if hosts:
                book = self._save(msgspec.structs.replace(book, hosts=check_hosts(hosts)))
            wanted = [Wanted(role, name, days or DAYS[role], request=request) for name in names]
            return self._issue(authority, book, wanted, at)

    def revoke(self, role: Role, name: str, reason: str, *, older: bool = False) -> tuple[Entry, ...]:
        """Revoke an owner's certificates (`older`: all but the newest). Returns those that were not revoked before."""
        if role is Role.BROKER:
            raise ConfigError("vehicles have no revocation list of brokers: a stolen broker key needs a new authority")
        if not reason.isprintable() or len(reason) > 200:
            raise ConfigError("a reason is up to 200 printable characters")
        at = self._time()
        with durable.locked(self.folder):
            authority, book = self._ready(at)
            entries = self._known(book, role, name)
            due = tuple(e for e in (entries[:-1] if older else entries) if e.state != "revoked")
            if due:
                book = self._save(book.with_entries(_revoke(entry, at, reason) for entry in due))
                self._derive(authority, book, at)
            return due

    def listing(self, role: Role | None = None) -> list[Listed]:
        """Return every certificate, oldest first."""
        at = self._time()
        book = self._book()
        listed = []
        for entry in book.entries:
            if role in {None, entry.role}:
                left = datetime.fromisoformat(entry.until) - at
                state = entry.state if entry.state != "issued" else "valid" if left > timedelta(0) else "expired"
                listed.append(Listed(entry, state, left.days, self._serial_in(entry) == entry.serial))
        return listed

    def broker(self) -> tuple[str, int]:
        """Return the host and port that vehicles connect to."""
        book = self._book()
        return book.hosts[0], book.port

    # The register and what is made from it ----------------------------------------------------------------------

    def _begin(self, hosts: tuple[str, ...], port: int, at: datetime) -> None:
        """Make the authority and an empty register where there is neither."""
        if not any((self.folder / "ca").glob("*")):
            if self._register.exists():
                raise ConfigError(f"{self.folder}/ca: the authority's files are gone; restore them from your backup")
            made = ca.new_authority(at)
            pem = {
                "ca.key": Content(ca.key_pem(made.key, self._passphrase), SECRET),
                "ca.crt": Content(made.certificate_pem(), PUBLIC),
            }
            durable.place(self.folder / "ca", pem)
        if not self._register.exists():
            self._save(Register(hosts=hosts, port=port))

    def _ready(self, at: datetime) -> tuple[Authority, Register]:
        self._sweep()
        authority, book = self._open()
        return authority, self._settle(authority, book, at)

    def _open(self) -> tuple[Authority, Register]:
        book = self._book()
        key, certificate = self._read("ca/ca.key"), self._read("ca/ca.crt")
        return ca.load_authority(key, certificate, str(self.folder / "ca"), self._passphrase), book

    def _book(self) -> Register:
        if not self._register.exists():
            raise SourceError(f"{self.folder} holds no identities; begin with `provision init`")
        return register.decode(self._read("register.json"), str(self._register))

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"{self.folder / name} is missing; restore it from your backup") from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(f"{self.folder / name} cannot be read: {reason}") from error

    def _settle(self, authority: Authority, book: Register, at: datetime) -> Register:
        """Decide what a killed process left pending, and make list and ACL say what the register says."""
        pending = [entry for entry in book.entries if entry.state == "pending"]
        if pending:
            arrived = {entry.serial for entry in pending if self._serial_in(entry) == entry.serial}
            book = self._save(
                book.with_entries(
                    _issued(entry) if entry.serial in arrived else _revoke(entry, at, _UNDELIVERED) for entry in pending
                )
            )
        self._derive(authority, book, at)
        return book

    def _derive(self, authority: Authority, book: Register, at: datetime) -> None:
        broker = self._where(Role.BROKER, BROKER)
        if broker.is_dir():
            for name, content in self._derived(authority, book, at).items():
                path = broker / name
                present = path.read_bytes() if path.exists() else b""
                same = present == content.data
                if name == "crl.pem":  # a signature is never the same twice
                    same = ca.revoked_serials(present) == _revoked(book).keys()
                if not same:
                    durable.replace(path, content)

    def _derived(self, authority: Authority, book: Register, at: datetime) -> dict[str, Content]:
        revoked = ca.revocation_list(authority, _revoked(book).items(), at=at)
        acl = mosquitto.access_list(book.services(), book.banned())
        return {"acl": Content(acl.encode(), SECRET), "crl.pem": Content(revoked, PUBLIC)}

    def _save(self, book: Register) -> Register:
        durable.replace(self._register, Content(register.encode(book), SECRET))
        return book

    # Issuing ----------------------------------------------------------------------------------------------------

    def _ensure(self, authority: Authority, book: Register, wanted: Sequence[Wanted], at: datetime) -> list[Delivered]:
        owned = book.by_owner()
        there = {id(one): self._present(owned.get((one.role, one.name), []), one, at) for one in wanted}
        for one in wanted:
            if there[id(one)] is not None:
                self._complete(authority, one)
        made = self._issue(authority, book, [one for one in wanted if there[id(one)] is None], at)
        fresh = {(d.entry.role, d.entry.name): d for d in made}
        return [there[id(one)] or fresh[one.role, one.name] for one in wanted]

    def _present(self, owned: list[Entry], wanted: Wanted, at: datetime) -> Delivered | None:
        """Return what is there; None where it is to be made. Raises `ConfigError` where that is for a person to say."""
        entries = [entry for entry in owned if entry.reason != _UNDELIVERED]
        if not entries:
            return None
        newest, folder = entries[-1], self._where(wanted.role, wanted.name)
        again = f"`provision renew {wanted.name} --role {wanted.role}` makes a new one"
        if newest.state == "revoked":
            raise ConfigError(f"{wanted.name}: its certificate was revoked at {newest.revoked}; {again}")
        if datetime.fromisoformat(newest.until) <= at:
            raise ConfigError(f"{wanted.name}: its certificate expired at {newest.until}; {again}")
        if self._serial_in(newest) != newest.serial:
            raise ConfigError(f"{wanted.name}: its certificate was issued, but is not in {folder} any more; {again}")
        for name, content in wanted.files.items():
            path = folder / name
            if name == "agent.toml" and path.exists() and path.read_bytes() != content.data:
                raise ConfigError(f"{path} differs from what would be written now; delete it to have it written again")
        return Delivered(newest, folder, made=False)

    def _complete(self, authority: Authority, wanted: Wanted) -> None:
        folder = self._where(wanted.role, wanted.name)
        files = {"ca.crt": Content(authority.certificate_pem(), PUBLIC), **wanted.files}
        for name, content in files.items():
            if not (folder / name).exists():
                durable.replace(folder / name, content)

    def _issue(self, authority: Authority, book: Register, wanted: Sequence[Wanted], at: datetime) -> list[Delivered]:
        delivered: list[Delivered] = []
        for first in range(0, len(wanted), _AT_ONCE):
            signed: list[tuple[Wanted, Entry, bytes]] = []
            for one in wanted[first : first + _AT_ONCE]:
                entry, pem = self._sign(authority, book, one, at)
                signed.append((one, entry, pem))
            book = self._save(book.with_entries(entry for _, entry, _ in signed))
            for one, entry, pem in signed:
                self._deliver(authority, book, one, pem, at)
                delivered.append(Delivered(_issued(entry), self._where(one.role, one.name), made=True))
            book = self._save(book.with_entries(_issued(entry) for _, entry, _ in signed))
        self._derive(authority, book, at)
        return delivered

    def _sign(self, authority: Authority, book: Register, wanted: Wanted, at: datetime) -> tuple[Entry, bytes]:
        called = common_name(wanted.role, wanted.name)
        hosts = book.hosts if wanted.role is Role.BROKER else ()
        if wanted.request:
            private, public = b"", ca.requested_key(wanted.request, called, f"of {wanted.name}")
        else:
            key = ca.new_key()
            private, public = ca.key_pem(key), key.public_key()
        signed = ca.issue(authority, public, called, wanted.role, at=at, days=wanted.days, hosts=hosts)
        entry = Entry(
            serial=f"{signed.serial_number:x}", role=wanted.role, name=wanted.name, common_name=called,
            issued=_iso(at), until=_iso(signed.not_valid_after_utc), state="pending",
        )  # fmt: skip
        return entry, private + ca.certificate_pem(signed)

    def _deliver(self, authority: Authority, book: Register, wanted: Wanted, pem: bytes, at: datetime) -> None:
        """Put an identity into its folder: a new one whole, in one that is there the one file that changes."""
        folder = self._where(wanted.role, wanted.name)
        identity = Content(pem, SECRET)
        if folder.exists():
            durable.replace(folder / "identity.pem", identity)
            self._complete(authority, wanted)
            return
        files = {"identity.pem": identity, "ca.crt": Content(authority.certificate_pem(), PUBLIC), **wanted.files}
        if wanted.role is Role.BROKER:
            durable.place(folder, files | self._derived(authority, book, at), folders=("data",))
        else:
            durable.place(folder, files)

    # Where things lie -------------------------------------------------------------------------------------------

    @property
    def _register(self) -> Path:
        return self.folder / "register.json"

    def _where(self, role: Role, name: str) -> Path:
        return self.folder / BROKER if role is Role.BROKER else self.folder / role / name

    def _serial_in(self, entry: Entry) -> str:
        """Return the serial number of the certificate in an owner's folder; empty where there is none."""
        try:
            found = ca.certificate_in((self._where(entry.role, entry.name) / "identity.pem").read_bytes())
        except OSError:
            return ""
        return f"{found.serial_number:x}" if found is not None else ""

    def _known(self, book: Register, role: Role, name: str) -> tuple[Entry, ...]:
        entries = tuple(book.by_owner().get((role, name), ()))
        if not entries:
            raise _unknown(book, role, name)
        return entries

    def _sweep(self) -> None:
        durable.sweep(self.folder, *(self.folder / role for role in Role))

    def _time(self) -> datetime:
        at = self._now().astimezone(UTC).replace(microsecond=0)
        if at.year < 2025:
            raise ConfigError(f"this machine's clock says {_iso(at)}: set it first, certificates carry their time")
        return at


def _unknown(book: Register, role: Role, name: str) -> ConfigError:
    near = get_close_matches(name, {e.name for e in book.entries if e.role is role}, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `provision list` shows who has"
    return ConfigError(f"no {role} {name[:80]!a} has a certificate of this authority{hint}")


def _issued(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, state="issued")


def _revoke(entry: Entry, at: datetime, reason: str) -> Entry:
    return msgspec.structs.replace(entry, state="revoked", revoked=_iso(at), reason=reason)


def _revoked(book: Register) -> dict[int, datetime]:
    return {int(e.serial, 16): datetime.fromisoformat(e.revoked) for e in book.entries if e.state == "revoked"}


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
