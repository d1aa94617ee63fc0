"""Which certificates there are: `register.json`, the truth that the revocation list and the ACL are made from. Pure.

A certificate is entered as pending before its file appears, and as issued after: what a kill leaves pending is decided
at the next start by whether its file is there. No certificate that ever left is missing here.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from cloud.identity.names import Role
from edge_agent.contract.errors import ConfigError

State = Literal["pending", "issued", "revoked"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One certificate. Times are RFC 3339, UTC; the serial number is hexadecimal."""

    serial: str
    role: Role
    name: str  # as the operator calls it: the vehicle id, or a service's name
    common_name: str
    issued: str
    until: str
    state: State
    revoked: str = ""
    reason: str = ""


class Register(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole register, and what `init` was told."""

    version: Literal[1] = 1
    hosts: tuple[str, ...]
    port: int
    entries: tuple[Entry, ...] = ()

    def by_owner(self) -> dict[tuple[Role, str], list[Entry]]:
        """Return all certificates by their owner's role and name, each owner's oldest first."""
        owned: dict[tuple[Role, str], list[Entry]] = {}
        for entry in self.entries:
            owned.setdefault((entry.role, entry.name), []).append(entry)
        return owned

    def with_entries(self, entries: Iterable[Entry]) -> "Register":
        """Return the register with these entries too, or instead of those of the same serial number."""
        known = {old.serial: old for old in self.entries} | {new.serial: new for new in entries}
        return msgspec.structs.replace(self, entries=tuple(known.values()))

    def services(self) -> tuple[tuple[Role, str], ...]:
        """Return the collectors and subscribers that have a certificate which is not revoked."""
        wanted = (Role.COLLECTOR, Role.SUBSCRIBER)
        return tuple({(e.role, e.common_name): None for e in self.entries if e.role in wanted and e.state == "issued"})

    def banned(self) -> tuple[str, ...]:
        """Return the common names of which every certificate is revoked."""
        good = {entry.common_name for entry in self.entries if entry.state != "revoked"}
        bad = {
            entry.common_name for entry in self.entries if entry.state == "revoked" and entry.role is not Role.BROKER
        }
        return tuple(sorted(bad - good))


def encode(register: Register) -> bytes:
    """Return the file's bytes: readable, one key a line."""
    return msgspec.json.format(msgspec.json.encode(register), indent=1) + b"\n"


def decode(data: bytes, origin: str) -> Register:
    """Read the file's bytes. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(data, type=Register)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"register {origin}: {error}; restore it from your backup") from error
