"""What Mosquitto is told: its configuration, and the list of who may write and read which topic. Pure text.

The user name is the certificate's common name (`names.py`). `pattern` lines hold for everyone, with `%u` their own
name, so a vehicle can write and read only under itself. The leaves are written out rather than as `+`: the number of
topics is then the number of messages that a vehicle can make the broker retain.

What this cannot say: whether a message may be retained. A vehicle may retain an event under itself; whoever subscribes
later gets it again, the collector stores it once under its key and says nothing about "now" from it. Nor does Mosquitto
2.0 refuse a subscription: it grants any, and delivers only what may be read.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

from cloud.identity.names import Role
from edge_agent.contract import messages, topics

WRITES = ("notice", "drift", "sample", "status", "model/state")  # beside alert and current, which have types
READS = ("ack", "model/desired")
COLLECTOR_WRITES = ("ack", "model/desired")
SUBSCRIBER_READS = ("alert/+", "current/+")
ENVELOPE_BYTES = 1024  # topic, headers and properties around a payload of the contract's size


def access_list(services: Iterable[tuple[Role, str]], banned: Iterable[str]) -> str:
    """Return the ACL file. `services` are the certificates' names with their roles; `banned` have no valid one left.

    A revoked certificate opens no new connection. The `deny` of a banned name ends what an open one may do.
    """
    kinds = ("alert", "current")
    writes = (*(f"{kind}/{leaf}" for kind in kinds for leaf in topics.ALERT_TYPES), *WRITES)
    lines = [
        "# Written by `fleet-cloud provision`, and written again with every change: do not edit.",
        "# Mosquitto reads it at its start and on SIGHUP.",
        "",
        "# Everyone, under the name in their own certificate (%u):",
        *(f"pattern write {topics.ROOT}/%u/{leaf}" for leaf in writes),
        *(f"pattern read {topics.ROOT}/%u/{leaf}" for leaf in READS),
    ]
    for role, name in sorted(services, key=lambda service: service[1]):
        lines += ["", f"user {name}"]
        if role is Role.COLLECTOR:
            lines += [f"topic read {topics.ROOT}/+/#"]
            lines += [f"topic write {topics.ROOT}/+/{leaf}" for leaf in COLLECTOR_WRITES]
        elif role is Role.SUBSCRIBER:
            lines += [f"topic read {topics.ROOT}/+/{leaf}" for leaf in SUBSCRIBER_READS]
    for name in sorted(banned):
        lines += ["", "# revoked, and none issued since", f"user {name}", "topic deny #"]
    return "\n".join(lines) + "\n"


def configuration(folder: PurePosixPath, port: int) -> str:
    """Return mosquitto.conf for a broker whose files lie in `folder` on its machine."""
    return f"""\
# Mosquitto 2 for Voltwatch, written once by `fleet-cloud provision init`; it is yours to change.
# `acl`, `crl.pem` and `identity.pem` beside it are written again by `fleet-cloud provision`:
#   copy them here and `systemctl reload mosquitto` (SIGHUP). The folder must belong to the broker's user:
#   chown -R mosquitto: {folder}

listener {port}
cafile {folder}/ca.crt
certfile {folder}/identity.pem
keyfile {folder}/identity.pem
crlfile {folder}/crl.pem
tls_version tlsv1.2

# Nobody without a certificate of our authority; its name is the user, and the client id too:
# nobody can take over another's connection.
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder}/acl

# Nothing here is what "nothing lost" rests on: vehicles keep everything until the collector has committed it.
persistence true
persistence_location {folder}/data/
autosave_interval 60
# The default of 1000 drops in silence what comes while the collector is away; vehicles would send it again, later.
max_queued_messages 200000
max_queued_bytes 536870912
# As many as the collector takes unacknowledged; 20 would be 20 messages a round trip.
max_inflight_messages 500
# A message of the contract with its topic; vehicles are told, and set aside what is larger.
max_packet_size {messages.MAX_MESSAGE_BYTES + ENVELOPE_BYTES}
persistent_client_expiration 14d
set_tcp_nodelay true
connection_messages true
log_dest stderr
log_type error
log_type warning
log_type notice
"""
