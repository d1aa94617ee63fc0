"""Repair advice on an alert: cited sections of the manual, safety first, or plainly "no source".

What is cited and why is decided in `cloud.advice`; here are only the question and the answer.
"""

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import AfterValidator, Field, StringConstraints

from cloud.advice.advise import CITED, MAX_QUESTION_CHARS, Advice, Citation, Facts, Reason
from cloud.api import models
from cloud.api.endpoint import AWAY, NOT_FOUND, WRONG, Running, only_known_parameters
from cloud.api.problems import ProblemError
from cloud.api.service import Service
from cloud.api.v1.alerts import AMBIGUOUS, AlertId, OfVehicle, one_alert
from cloud.store import reading
from cloud.store.reading import Row

router = APIRouter(prefix="/v1/alerts", tags=["advice"], dependencies=[Depends(only_known_parameters)], responses=WRONG)


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be printable characters on one line")
    return value


Question = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=2, max_length=MAX_QUESTION_CHARS),
    AfterValidator(_one_line),
]


class SectionOut(models.Answer):
    """One cited section of the manual, whole, with the reason why it stands here."""

    id: str = Field(examples=["MOT-01"])
    title: str
    kind: Literal["safety", "repair"]
    why: str = Field(examples=["written for motor_bearing_wear; speaks of motor vibration against speed"])
    matched: list[str] = Field(description="The alert's rule and evidence that the section speaks of.")
    score: float | None = Field(description="Relevance within this answer; null for safety, which is never searched.")
    symptoms: list[str]
    tools: list[str]
    steps: list[str] = Field(description="In order.")
    stop: str = Field(description="When to stop and call the manufacturer.")
    sources: list[str] = Field(description="Where figures come from.")


class RetrievalOut(models.Answer):
    """How the manual was searched."""

    method: Literal["hybrid", "bm25"] = Field(description="bm25: by words alone, no sentence model is installed.")
    detail: str
    query: str = Field(description="What was searched for: the alert in words, or the question.")


class ManualOut(models.Answer):
    """Which manual this is from."""

    title: str
    version: str
    sha256: str
    notice: str


class AdviceOut(models.Answer):
    """Safety first, then repair. `outcome` is "no_source" where the manual says nothing about it."""

    alert_id: str
    vehicle_id: str
    failure_type: str = Field(description="As a person corrected it, where somebody did.")
    severity: Literal["low", "medium", "high", "critical"]
    question: str | None
    outcome: Literal["cited", "no_source"]
    summary: str = Field(examples=["motor_bearing_wear, medium: safety first, then MOT-01, MOT-02, MOT-03."])
    safety: list[SectionOut] = Field(description="By failure type and severity, the most urgent first.")
    sections: list[SectionOut] = Field(description=f"At most {CITED}, the most relevant first.")
    retrieval: RetrievalOut
    manual: ManualOut


@router.get(
    "/{alert_id}/advice", summary="Repair advice on an alert", responses={**AWAY, **NOT_FOUND, **AMBIGUOUS}
)  # fmt: skip
async def advice(
    running: Running,
    alert_id: AlertId,
    question: Annotated[
        Question | None,
        Query(
            description="A question in free words, in English; without it the alert itself is asked about.",
            examples=["how long do I have to wait before the cover may come off?"],
        ),
    ] = None,
    vehicle_id: OfVehicle = None,
) -> AdviceOut:
    """Cited sections of the repair manual: safety for this failure type and severity first, then what fits best.

    Without `question` the alert asks: its type, rule, evidence and worst cell. With it the manual is searched for the
    question; one that it does not speak of gets `no_source`, never a guess. Which search answered (by words, or by
    words and meaning) is in `retrieval`. The maker's own manual goes first.
    """
    async with running.store.reading() as connection:
        found = await one_alert(connection, alert_id, vehicle_id)
        row = await reading.alert(connection, found["vehicle_id"], alert_id)
    if row is None:  # READ COMMITTED: alerts are never removed by us, but a person at the database may
        raise ProblemError(404, f"there is no alert {alert_id} here any more")
    facts = _facts(row)
    answer = await asyncio.to_thread(running.advisor.answer, facts, question)  # computes for milliseconds
    return _shown(running, row, facts, question, answer)


def _facts(row: Row) -> Facts:
    """Read what advice needs; a person's correction counts more than the model's word."""
    body: dict[str, Any] = msgspec.json.decode(row["body"])
    return Facts(
        failure_type=row["work_failure_type"] or row["failure_type"],
        severity=row["work_severity"] or row["severity"],
        rule=row["rule"],
        worst_cell=body.get("worst_cell"),
        worst_cell_deviation_v=body.get("worst_cell_deviation_v"),
        evidence=tuple(
            Reason(reason["name"], reason.get("value"), reason.get("deviation")) for reason in body.get("evidence", [])
        ),
    )


def _shown(running: Service, row: Row, facts: Facts, question: str | None, answer: Advice) -> AdviceOut:
    advisor = running.advisor
    manual = advisor.manual
    return AdviceOut(
        alert_id=row["alert_id"], vehicle_id=row["vehicle_id"], failure_type=facts.failure_type,
        severity=facts.severity,  # type: ignore[arg-type]
        question=question, outcome=answer.outcome, summary=answer.summary,
        safety=[_section(c) for c in answer.safety], sections=[_section(c) for c in answer.sections],
        retrieval=RetrievalOut(method=answer.method, detail=advisor.detail, query=answer.query),
        manual=ManualOut(title=manual.title, version=manual.version, sha256=manual.sha256, notice=manual.notice),
    )  # fmt: skip


def _section(citation: Citation) -> SectionOut:
    section = citation.section
    return SectionOut(
        id=section.id, title=section.title, kind=section.kind, why=citation.why, matched=list(citation.matched),
        score=citation.score, symptoms=list(section.symptoms), tools=list(section.tools), steps=list(section.steps),
        stop=section.stop, sources=list(section.sources),
    )  # fmt: skip
