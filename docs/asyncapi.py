"""Writes docs/asyncapi.yaml: `python docs/asyncapi.py`. Schemas come from the message types, topics from the grammar.

A test holds the committed file against this, and captured traffic against the file.
"""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from edge_agent.contract import messages, topics

TARGET = Path(__file__).with_name("asyncapi.yaml")
VEHICLE = {
    "description": "One topic level: 1 to 64 of A-Z a-z 0-9 _ . - beginning with a letter or digit.",
    "examples": ["EV_001"],
}
FAILURE = {"description": "Failure type.", "enum": list(topics.ALERT_TYPES)}
DRIFT = (
    "Counts against the bundle's bins, mergeable by adding: one message a span of time and stratum. The spans of a "
    "vehicle do not overlap; each ends after an hour of the source's time, or when the agent ends."
)
SAMPLE = (
    "Raw windows for training, around alerts and a small random share, each in one part or several: the payloads of "
    "all parts, joined, have the sample's sha256 and are what samples.unpack reads."
)

# name → (address after the vehicle, retained, who sends, summary, message schema names)
CHANNELS: dict[str, tuple[str, bool, str, str, tuple[str, ...]]] = {
    "alert": ("alert/{failure_type}", False, "vehicle", "Transitions of alerts, in the alert stream.", ("Alert",)),
    "current": ("current/{failure_type}", True, "vehicle", "Present state of one failure type; empty when it is over.",
                ("Current",)),
    "notice": ("notice", False, "vehicle", "Loss records and replay summaries, in the alert stream.",
               ("Loss", "ReplaySummary")),
    "drift": ("drift", False, "vehicle", DRIFT, ("DriftCounts",)),
    "sample": ("sample", False, "vehicle", SAMPLE, ("Sample",)),
    "status": ("status", True, "vehicle", "What the agent says of itself; last will: offline.", ("Status",)),
    "ack": ("ack", False, "collector", "What is committed in the collector's store: the agent deletes exactly that.",
            ("Ack",)),
    "model_desired": ("model/desired", True, "cloud", "Which signed release to install; empty: nothing is desired.",
                      ("Desired",)),
    "model_state": ("model/state", True, "vehicle", "Which release decides, said at every boot and change.",
                    ("ModelState",)),
}  # fmt: skip
EVENTS = {kind.__name__: name for name, kind in messages.EVENT_TYPES.items()}


def document() -> dict[str, Any]:
    """Return the whole description as plain values."""
    _, schemas = msgspec.json.schema_components(
        [
            messages.Event,
            messages.Status,
            messages.Current,
            messages.Ack,
            messages.Desired,
            messages.ModelState,
            *messages.EVENT_TYPES.values(),
        ],
        ref_template="#/components/schemas/{name}",
    )
    schemas["Event"]["description"] = "The CloudEvents 1.0 envelope (structured JSON)."
    for name, event_type in EVENTS.items():
        schemas[name + "Event"] = {
            "title": name + "Event",
            "description": f"CloudEvents 1.0 envelope whose data is {name}.",
            "allOf": [
                {"$ref": "#/components/schemas/Event"},
                {
                    "properties": {
                        "type": {"const": event_type},
                        "data": {"$ref": f"#/components/schemas/{name}"},
                    },
                },
            ],
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Voltwatch on the wire",
            "version": messages.SCHEMA_VERSION,
            "description": (
                "MQTT 5 (3.1.1 works), QoS 1. Events are kept by the vehicle until the collector's ack lists their "
                "number: a PUBACK is not delivery. A receiver stores (vehicle, streamid, seq) once and acknowledges "
                "repeats again. Unknown fields of a newer minor version are kept; a newer major version is parked. A "
                f"message has at most {messages.MAX_MESSAGE_BYTES} bytes."
            ),
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(name) for name in CHANNELS},
        "operations": {name: _operation(name) for name in CHANNELS},
        "components": {
            "messages": {m: _message(m) for _, _, _, _, names in CHANNELS.values() for m in names},
            "schemas": dict(sorted(schemas.items())),
        },
    }


def schema_of(topic: topics.Topic, payload: bytes) -> dict[str, Any]:
    """Return the schema that a payload on a topic must fit, with the components it refers to.

    Raises `KeyError` for a topic or event type that the document does not describe.
    """
    names = CHANNELS[f"{topic.kind}_{topic.leaf}" if topic.kind == "model" else topic.kind][4]
    name = names[0]
    if name in EVENTS:
        of_type = {EVENTS[candidate]: candidate for candidate in names}
        name = of_type[msgspec.json.decode(payload)["type"]]
    whole = document()
    return {"components": whole["components"], **_payload(name)}


def _payload(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name + 'Event' if name in EVENTS else name}"}


def _message(name: str) -> dict[str, Any]:
    kind = "application/cloudevents+json" if name in EVENTS else "application/json"
    return {"name": name, "contentType": kind, "payload": _payload(name)}


def _channel(name: str) -> dict[str, Any]:
    address, retained, _, summary, names = CHANNELS[name]
    parameters = {"vehicle_id": VEHICLE} | ({"failure_type": FAILURE} if "{failure_type}" in address else {})
    return {
        "address": f"{topics.ROOT}/{{vehicle_id}}/{address}",
        "summary": summary,
        "description": "Retained." if retained else "Not retained.",
        "parameters": parameters,
        "messages": {m: {"$ref": f"#/components/messages/{m}"} for m in names},
    }


def _operation(name: str) -> dict[str, Any]:
    _, retained, sender, summary, _ = CHANNELS[name]
    return {
        "action": "send" if sender == "vehicle" else "receive",  # from the vehicle's side
        "channel": {"$ref": f"#/channels/{name}"},
        "summary": summary,
        "bindings": {"mqtt": {"qos": 1, "retain": retained, "bindingVersion": "0.2.0"}},
    }


class _Dumper(yaml.SafeDumper):
    """Writes a repeated part out again: a person reads it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def text() -> str:
    """Return the document as YAML."""
    head = "# Written by docs/asyncapi.py from edge_agent/contract; do not edit.\n"
    return head + str(yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True))


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
