"""From an alert, or a question about it, to cited sections: safety first, then repair, or plainly "no source". Pure.

Promises: safety sections are chosen by failure type and severity, never by a search, so no retrieval can hide them, and
those of a thermal event come before everything. A repair section is cited only when it was written for the alert's
failure type; for a type the manual does not know (`anomaly`) only when it names a signal of the evidence; for a
question only when the search found the manual to be about it. Nothing is made up: each citation says why it stands.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cloud.advice.manual import Manual, Section
from cloud.advice.retrieval import Found, Hit, Method, Query
from edge_agent.contract.signals import FAILURE_TYPES

CITED = 3  # more is not read beside a vehicle; the manual has the rest
SIGNAL_WEIGHT = 0.15  # a named signal counts as much as three words in ten: it is what was measured, not said
MAX_QUESTION_CHARS = 400

_STATISTIC = re.compile(r"\.(mean|std|min|max|slope_per_s|median|present)$")
_HORIZON = re.compile(r"\.(1h|6h|24h|168h)(_change)?$")
_OF_CELLS = ("battery_degradation", "thermal_runaway_risk")

# what a feature, a rule or a failure type is called by people
WORDS = {
    "battery_degradation": "battery degradation",
    "motor_bearing_wear": "motor bearing wear",
    "inverter_overheating": "inverter overheating",
    "thermal_runaway_risk": "battery thermal runaway",
    "charging_fault": "charging fault",
    "pack_resistance_ohm": "pack resistance",
    "pack_resistance_25c_ohm": "pack resistance corrected for temperature",
    "inverter_rise_c": "inverter temperature above coolant",
    "inverter_rise_per_load_c": "inverter temperature rise against load",
    "motor_rise_c": "motor temperature above coolant",
    "motor_rise_per_load_c": "motor temperature rise against load",
    "vibration_per_krpm_g": "motor vibration against speed",
    "charge_power_ratio": "charging power against requested power",
    "charge_deficit_kw": "charging power missing against the request",
    "plugged_idle_share": "plugged in without charging current",
    "inlet_rise_c": "charging inlet temperature above outside",
    "inlet_rise_per_load_c": "charging inlet temperature rise against current",
    "isolation_ohm_per_v": "isolation resistance per volt",
    "battery_heating_c_per_load_s": "battery heating against load",
    "battery_temperature_spread_c": "temperature spread within the battery",
    "cell_spread_at_rest_v": "spread between cells at rest",
    "battery.max_rise_30s_c_per_s": "rapid battery temperature rise",
    "cells.spread_v": "spread between cells",
    "cells.spread_max_v": "largest spread between cells under load",
    "cells.lowest_v": "lowest cell voltage",
    "cells.second_lowest_v": "second lowest cell voltage",
    "cells.spread_at_rest_v": "spread between cells at rest",
    "cells.lowest_at_rest_v": "lowest cell at rest",
    "cells.second_lowest_at_rest_v": "second lowest cell at rest",
    "cells.lowest_deviation_v": "one cell below the others",
    "cells.lowest_change_v": "one cell falling away from the others",
    "cells.lowest_gap_v": "gap from the lowest cell to the next",
    "probes.spread_c": "spread between temperature probes",
    "probes.hottest_above_median_c": "hottest probe above the others",
    "probes.max_rise_c_per_s": "rapid rise of one temperature probe",
    "probes.max_rise_30s_c_per_s": "rapid rise of one temperature probe",
    "gb38031_temperature_rise": "rapid battery temperature rise",
    "gb38031_voltage_drop": "cell voltage collapsed",
    "temperature_jump": "battery temperature jumped between two readings",
    "over_temperature": "battery above its highest temperature",
    "inverter_over_temperature": "inverter above its highest temperature",
    "inlet_over_temperature": "charging inlet above its highest temperature",
    "isolation_loss": "isolation loss",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One piece of an alert's evidence; `deviation` in robust standard deviations."""

    name: str
    value: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an alert says, as far as advice needs it."""

    failure_type: str
    severity: str
    rule: str = ""
    worst_cell: int | None = None  # 0-based
    worst_cell_deviation_v: float | None = None
    evidence: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Citation:
    """A cited section, why it stands there, and which names of the evidence it speaks of."""

    section: Section
    why: str
    matched: tuple[str, ...] = ()
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer. `outcome` is "no_source" when no repair section is cited; `summary` then says what was searched."""

    outcome: Literal["cited", "no_source"]
    summary: str
    query: str
    method: Method
    safety: tuple[Citation, ...]
    sections: tuple[Citation, ...]


def stem(name: str) -> str:
    """Return the signal, feature or rule behind an evidence's name, as the manual writes it."""
    name = name.removeprefix("reconstruction_error.").split(" against ", maxsplit=1)[0]
    name = name.split("[", maxsplit=1)[0]
    name = _HORIZON.sub("", name)
    return _STATISTIC.sub("", name) or name


def spoken(name: str) -> str:
    """Return what people call a signal or feature."""
    base = stem(name)
    if base in WORDS:
        return WORDS[base]
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", " ".join(base.split(".")[-3:])).replace("_", " ").split()
    told = [p for i, p in enumerate(parts) if p.lower() != parts[i - 1].lower() or i == 0]
    return " ".join(p for p in told if p not in ("Vehicle", "Powertrain")) or base


def query_of(facts: Facts) -> Query:
    """Turn an alert into words and exact names: what fails, which rule spoke, and each piece of evidence."""
    said = [WORDS.get(facts.failure_type, facts.failure_type.replace("_", " "))]
    names = []
    if facts.rule:
        said.append(spoken(facts.rule))
        names.append(facts.rule)
    for reason in facts.evidence:
        direction = "" if reason.deviation is None else " high" if reason.deviation > 0 else " low"
        words = spoken(reason.name)
        if not any(words in told for told in said):
            said.append(words + direction)
        if stem(reason.name) not in names:
            names.append(stem(reason.name))
    if facts.worst_cell is not None and facts.failure_type in _OF_CELLS and (facts.worst_cell_deviation_v or 0.0) < 0:
        said.append("weakest cell below the pack's median")
    return Query("; ".join(said), tuple(names))


def advise(manual: Manual, facts: Facts, found: Found, query: Query, *, question: str | None = None) -> Advice:
    """Put the answer together from what the search found.

    Without `question` the search was for `query_of(facts)`. `found` has every section of the manual, best first.
    """
    if question is None:
        cited = _for_alert(facts, found.hits)
        summary = _alert_summary(manual, facts, cited, query)
    else:
        named = {word.upper() for word in re.findall(r"[A-Za-z]+-\d+", question)}
        asked = [h for h in found.hits if h.section.id.upper() in named]
        near = [h for h in found.hits if h not in asked] if found.answers else []
        cited = [Citation(h.section, "named in the question", (), h.score) for h in asked]
        cited += [
            Citation(h.section, f"found for the question, {_by(h)}", (), h.score) for h in near[: CITED - len(asked)]
        ]
        cited = cited[:CITED]
        summary = _question_summary(manual, cited, found)
    return Advice(
        outcome="cited" if cited else "no_source", summary=summary, query=question or query.text, method=found.method,
        safety=_safety(manual, facts), sections=tuple(cited),
    )  # fmt: skip


def _for_alert(facts: Facts, hits: Sequence[Hit]) -> list[Citation]:
    known = facts.failure_type in FAILURE_TYPES
    ranked: list[tuple[bool, float, Citation]] = []
    for hit in hits:
        section = hit.section
        if section.kind != "repair" or (known and facts.failure_type not in section.failure_types):
            continue
        matched = _matched(facts, section)
        if not known and not matched:
            continue
        score = hit.score + SIGNAL_WEIGHT * _strength(facts, section)
        why = f"written for {facts.failure_type}" if known else f"no section is written for {facts.failure_type}"
        if matched:
            first = {stem(name): name for name in reversed(matched)}  # one signal in several statistics is one reason
            why += f"; speaks of {', '.join(_told(facts, name) for name in matched if first[stem(name)] == name)}"
        elif hit.words > 0:
            why += f"; {_by(hit)} among its sections"
        severe = facts.severity in section.severities
        if not severe:
            why += f"; meant for severity {' or '.join(section.severities)}"
        ranked.append((not severe, -score, Citation(section, why, matched, round(score, 4))))
    ranked.sort(key=lambda item: item[:2])
    return [citation for _, _, citation in ranked[:CITED]]


def _matched(facts: Facts, section: Section) -> tuple[str, ...]:
    """Return the names of rule and evidence that the section lists, in the alert's order."""
    names = [facts.rule] if facts.rule else []
    names += [reason.name for reason in facts.evidence]
    return tuple(dict.fromkeys(name for name in names if stem(name) in section.signals))


def _strength(facts: Facts, section: Section) -> float:
    """Return which share of what was seen the section names, 0 to 1: a rule counts whole, evidence by its place."""
    weights = {facts.rule: 1.0} if facts.rule else {}
    for place, reason in enumerate(facts.evidence):
        weights.setdefault(stem(reason.name), 1.0 / (1 + place))
    total = sum(weights.values())
    return sum(w for name, w in weights.items() if name in section.signals) / total if total else 0.0


def _told(facts: Facts, name: str) -> str:
    for reason in facts.evidence:
        if reason.name == name and reason.deviation is not None:
            return f"{spoken(name)} ({name}, {reason.deviation:+.1f})"
    return f"{spoken(name)} ({name})"


def _by(hit: Hit) -> str:
    return "nearest in words" if hit.meaning is None else "nearest in words and meaning"


def _safety(manual: Manual, facts: Facts) -> tuple[Citation, ...]:
    """Choose by type and severity; an alert of no known type may be any of them."""
    types = {facts.failure_type} if facts.failure_type in FAILURE_TYPES else set(FAILURE_TYPES)
    chosen = [
        s for s in manual.sections
        if s.kind == "safety" and facts.severity in s.severities and types.intersection(s.failure_types)
    ]  # fmt: skip
    chosen.sort(key=lambda s: s.rank)
    return tuple(
        Citation(s, f"safety for {', '.join(sorted(types.intersection(s.failure_types)))}, severity {facts.severity}",
                 _matched(facts, s))
        for s in chosen
    )  # fmt: skip


def _alert_summary(manual: Manual, facts: Facts, cited: Sequence[Citation], query: Query) -> str:
    if cited:
        return f"{facts.failure_type}, {facts.severity}: safety first, then {', '.join(c.section.id for c in cited)}."
    named = ", ".join(query.names) or "nothing"
    return (
        f"No source: {manual.title} has no section for {facts.failure_type}, and none names what was seen ({named}). "
        f"Searched {len(manual.sections)} sections for: {query.text}. Follow the maker's manual."
    )


def _question_summary(manual: Manual, cited: Sequence[Citation], found: Found) -> str:
    if cited:
        return f"Found in {', '.join(c.section.id for c in cited)}; the nearest first."
    topic = "" if found.nearest_not_covered is None else f"; nearest topic: {found.nearest_not_covered} (not covered)"
    return (
        f"No source: none of the {len(manual.sections)} sections of {manual.title} is near enough to the question "
        f"(relevance {found.relevance:.2f}, needed {found.floor:.2f}{topic}). Follow the maker's manual."
    )
