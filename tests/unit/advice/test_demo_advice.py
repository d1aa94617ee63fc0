"""What the demo prints under an alert."""

from typing import Any

from rich.console import Console

from cloud.advice.advisor import Advisor
from cloud.api.v1.advice import AdviceOut, ManualOut, RetrievalOut, _section
from cloud.demo import screen
from cloud.demo.fleet_api import advice_path
from tests.unit.advice.probe import PROBE, facts

WHERE = "http://127.0.0.1:8000" + advice_path({"alert_id": "a/1", "vehicle_id": "EV_1"})


def printed(advisor: Advisor, alert: dict[str, Any], width: int = 80) -> str:
    seen = facts(alert)
    answer = advisor.answer(seen)
    manual = advisor.manual
    body = AdviceOut(
        alert_id="a/1", vehicle_id="EV_1", failure_type=seen.failure_type, severity=alert["severity"], question=None,
        outcome=answer.outcome, summary=answer.summary, safety=[_section(c) for c in answer.safety],
        sections=[_section(c) for c in answer.sections],
        retrieval=RetrievalOut(method=answer.method, detail=advisor.detail, query=answer.query),
        manual=ManualOut(title=manual.title, version=manual.version, sha256=manual.sha256, notice=manual.notice),
    ).model_dump()  # fmt: skip
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(screen.advice(body, WHERE))
    return capture.get()


def test_safety_stands_above_two_or_three_cited_sections_and_the_rest_is_named(by_words: Advisor) -> None:
    text = printed(by_words, PROBE["alerts"][0]["alert"])
    assert text.index("HV-02") < text.index("MOT-01")
    assert 2 <= sum(f"MOT-0{n} " in text for n in range(1, 8)) <= 3
    assert "1. Check the sensor first" in text
    assert "/v1/alerts/a%2F1/advice?vehicle_id=EV_1" in text.replace("│\n│", "").replace(" ", "")
    assert "words alone" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_critical_thermal_alert_prints_what_to_do_at_once(by_words: Advisor) -> None:
    alert = next(p["alert"] for p in PROBE["alerts"] if p["alert"]["rule"] == "gb38031_temperature_rise")
    text = printed(by_words, alert, width=120)
    assert text.index("EM-01") < text.index("Get everybody out at once") < text.index("HV-01") < text.index("THR-01")


def test_no_source_is_printed_as_such(by_words: Advisor) -> None:
    text = printed(by_words, PROBE["alerts_without_a_section"][0])
    assert "no source" in text
    assert "Pump.Discharge.Pressure" in text
