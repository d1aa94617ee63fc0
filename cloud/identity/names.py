"""What a certificate's common name says: the broker takes it as the user name, and the ACL goes by it. Pure.

A vehicle's is its vehicle id. Every other one begins with `_`, with which no vehicle id can begin: no vehicle can be
named so that it gets a service's rights.
"""

import ipaddress
import re
from enum import StrEnum

from edge_agent.contract import topics
from edge_agent.contract.errors import ConfigError

_SERVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)
_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
# RFC 1123; the last label is no number, or a mistyped address would pass for a name
_HOST = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*(?![0-9]+\Z){_LABEL}", re.ASCII)


class Role(StrEnum):
    """What the owner of a certificate may do."""

    VEHICLE = "vehicle"  # writes as itself, reads its own acks and orders
    COLLECTOR = "collector"  # reads every vehicle, writes acks and orders
    SUBSCRIBER = "subscriber"  # reads alerts
    BROKER = "broker"  # is the server; no client at all


def common_name(role: Role, name: str) -> str:
    """Return the name in the certificate. Raises `MessageError` or `ConfigError` for one that is not allowed."""
    if role is Role.VEHICLE:
        return topics.check_vehicle_id(name)
    if not _SERVICE.fullmatch(name):
        raise ConfigError(
            f"{role} name {name[:80]!a} is not allowed: 1 to 32 of a-z 0-9 - beginning with a letter or digit"
        )
    return f"_{role}-{name}"


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the hosts, each once. Raises `ConfigError` for what is neither a DNS name nor an IP address."""
    for host in hosts:
        if address(host) is None and not _HOST.fullmatch(host):
            raise ConfigError(
                f"broker host {host[:80]!a} is neither a DNS name nor an IP address (no port, no scheme; "
                f"an international name in its xn-- form)"
            )
    if not hosts:
        raise ConfigError("no broker host: give --broker-host, the name vehicles reach the broker by")
    return tuple(dict.fromkeys(hosts))


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
