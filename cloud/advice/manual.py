"""The repair manual: what a section is, and reading one file of them whole or not at all.

Promises: a `Manual` has unique section ids, known failure types and severities, at least `MIN_SECTIONS` repair sections
for each of the five failure types, and safety sections for each. Anything else is a `ConfigError` of one line that
names the section. What a section says is the file's own matter; finding one is `retrieval.py`'s.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.messages import Severity
from edge_agent.contract.signals import FAILURE_TYPES

DEFAULT_PATH = Path(__file__).with_name("ev_repair_manual.json")
MIN_SECTIONS = 4  # of repair, for each failure type: fewer leave an alert with a single answer whatever was seen
MAX_BYTES = 5_000_000  # a manual of 2,000 sections; larger is another file by mistake

SectionId = Annotated[str, Meta(pattern=r"^[A-Z]{2,4}-\d{2,3}$")]
Line = Annotated[str, Meta(min_length=2, max_length=1000)]
FailureType = Literal[FAILURE_TYPES]  # type: ignore[valid-type]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section. `signals` are VSS paths, features and rules exactly as an alert's evidence names them.

    `rank` orders safety sections, the most urgent first; repair sections are ordered by relevance.
    """

    id: SectionId
    title: Annotated[str, Meta(min_length=5, max_length=160)]
    kind: Literal["safety", "repair"]
    failure_types: Annotated[tuple[FailureType, ...], Meta(min_length=1)]
    severities: Annotated[tuple[Severity, ...], Meta(min_length=1)]
    symptoms: Annotated[tuple[Line, ...], Meta(min_length=1)]
    signals: tuple[Line, ...]
    tools: Annotated[tuple[Line, ...], Meta(min_length=1)]
    steps: Annotated[tuple[Line, ...], Meta(min_length=2)]
    stop: Line
    sources: Annotated[tuple[Line, ...], Meta(min_length=1)]
    rank: Annotated[int, Meta(ge=1, le=999)] = 999


class Manual(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole manual; `sha256` is of the bytes it was read from.

    `not_covered` names topics that the manual says nothing about: a question nearer to one of them has no source here.
    """

    title: Line
    version: Annotated[str, Meta(min_length=1, max_length=40)]
    notice: Line
    not_covered: tuple[Line, ...] = ()
    sections: Annotated[tuple[Section, ...], Meta(min_length=1)]
    sha256: str = ""


def load(path: Path | None = None) -> Manual:
    """Read a manual, the package's own by default. Raises `ConfigError` when it cannot be used as it is."""
    path = path or DEFAULT_PATH
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"manual {path}: larger than {MAX_BYTES} bytes: that is no manual")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"manual {path}: cannot be read: {error.strerror}") from error
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Manual:
    """Read a manual's bytes; `name` stands in the error. Raises `ConfigError`."""
    try:
        manual = msgspec.json.decode(data, type=Manual)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"manual {name}: {_where(data, str(error))}") from error
    seen: set[str] = set()
    for section in manual.sections:
        if section.id in seen:
            raise ConfigError(f"manual {name}: section {section.id} stands twice; every id must be its own")
        seen.add(section.id)
    repair = Counter(t for s in manual.sections if s.kind == "repair" for t in s.failure_types)
    safety = Counter(t for s in manual.sections if s.kind == "safety" for t in s.failure_types)
    for failure_type in FAILURE_TYPES:
        if repair[failure_type] < MIN_SECTIONS:
            raise ConfigError(
                f"manual {name}: {failure_type} has {repair[failure_type]} repair sections; "
                f"every failure type needs at least {MIN_SECTIONS}"
            )
        if not safety[failure_type]:
            raise ConfigError(f"manual {name}: no safety section applies to {failure_type}; add one of kind 'safety'")
    return msgspec.structs.replace(manual, sha256=hashlib.sha256(data).hexdigest())


def _where(data: bytes, message: str) -> str:
    """Name the section an error lies in: `$.sections[12]` says little to the person who wrote it."""
    start = message.find("$.sections[")
    if start < 0:
        return message[:300]
    number = message[start + len("$.sections[") :].split("]", maxsplit=1)[0]
    try:
        sections = msgspec.json.decode(data)["sections"]
        named = str(sections[int(number)].get("id", "without an id"))[:40]
    except (msgspec.DecodeError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        return message[:300]
    return f"section {named}: {message[:300]}"
