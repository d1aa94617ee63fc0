"""From an alert to cited sections: safety first, the right ones on top, and nothing made up."""

import pytest

from cloud.advice.advise import CITED, Advice, Facts, Reason, query_of, spoken, stem
from cloud.advice.advisor import Advisor
from edge_agent.contract.bundle import WindowSpec
from edge_agent.contract.signals import FAILURE_TYPES, SEVERITIES, default_catalogue
from tests.unit.advice.probe import PROBE, facts


def ids(advice: Advice) -> list[str]:
    return [citation.section.id for citation in advice.sections]


@pytest.mark.parametrize("which", ["by_words", "by_both"])
def test_an_alert_of_the_probe_gets_its_section_first(which: str, request: pytest.FixtureRequest) -> None:
    advisor: Advisor = request.getfixturevalue(which)
    answers = [(advisor.answer(facts(p["alert"])), p["expect"]) for p in PROBE["alerts"]]
    wrong = [(answer.query, ids(answer), expect) for answer, expect in answers if ids(answer)[0] not in expect]
    assert len(wrong) <= 1, wrong
    assert all(set(ids(answer)) & set(expect) for answer, expect in answers)


@pytest.mark.parametrize("failure_type", FAILURE_TYPES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_safety_comes_with_every_alert_and_never_from_the_search(
    by_words: Advisor, failure_type: str, severity: str
) -> None:
    seen = Facts(failure_type=failure_type, severity=severity, evidence=(Reason("nothing.anybody.knows"),))
    advice = by_words.answer(seen)
    assert advice.outcome == "cited"
    assert len(advice.sections) == CITED
    assert {"HV-02", "HV-04"} <= {c.section.id for c in advice.safety}
    assert all(c.section.kind == "safety" for c in advice.safety)
    assert all(c.section.kind == "repair" and failure_type in c.section.failure_types for c in advice.sections)
    off_topic = by_words.answer(seen, "how do I bake bread")
    assert off_topic.safety == advice.safety
    assert off_topic.outcome == "no_source"


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_thermal_alert_begins_with_getting_everybody_out(by_words: Advisor, severity: str) -> None:
    advice = by_words.answer(Facts(failure_type="thermal_runaway_risk", severity=severity))
    first, second = (citation.section for citation in advice.safety[:2])
    assert (first.id, second.id) == ("EM-01", "EM-02")
    assert "everybody out" in first.title
    assert "25 m" in " ".join(first.steps)


def test_an_isolation_alert_warns_of_the_chassis_before_anything_else(by_words: Advisor) -> None:
    name = "Vehicle.Powertrain.TractionBattery.InsulationResistance"
    advice = by_words.answer(
        Facts(failure_type="charging_fault", severity="high", rule="isolation_loss", evidence=(Reason(name, 21.0),))
    )
    assert advice.safety[0].section.id == "HV-06"
    assert advice.safety[0].matched == ("isolation_loss", name)
    assert ids(advice)[0] == "CHG-06"


def test_a_citation_says_what_of_the_evidence_it_speaks_of(by_words: Advisor) -> None:
    signal = "Vehicle.Powertrain.ElectricMotor.Vibration.RMS"
    evidence = (Reason("vibration_per_krpm_g.6h_change", 0.03, 9.2), Reason(f"{signal}.mean", 0.3, 7.0),
                Reason(f"reconstruction_error.{signal}", 3.1))  # fmt: skip
    advice = by_words.answer(Facts(failure_type="motor_bearing_wear", severity="medium", evidence=evidence))
    first = advice.sections[0]
    assert first.section.id == "MOT-01"
    assert first.matched == tuple(reason.name for reason in evidence)
    assert "motor vibration against speed (vibration_per_krpm_g.6h_change, +9.2)" in first.why
    assert first.why.count("Vibration RMS") == 1
    for citation in advice.sections:
        assert all(stem(name) in citation.section.signals for name in citation.matched)


def test_a_section_for_another_severity_stands_behind_those_that_fit(by_words: Advisor) -> None:
    hot = (Reason("motor_rise_per_load_c.6h", 22.0, 6.1),)
    low = by_words.answer(Facts(failure_type="motor_bearing_wear", severity="low", evidence=hot))
    critical = by_words.answer(Facts(failure_type="motor_bearing_wear", severity="critical", evidence=hot))
    assert ids(critical)[0] == "MOT-07"
    assert all("low" in c.section.severities for c in low.sections)
    assert "meant for severity" in critical.sections[-1].why


@pytest.mark.parametrize("alert", PROBE["alerts_without_a_section"])
def test_an_anomaly_of_signals_the_manual_does_not_know_has_no_source(
    by_both: Advisor, alert: dict[str, object]
) -> None:
    advice = by_both.answer(facts(alert))
    assert advice.outcome == "no_source"
    assert advice.sections == ()
    assert {"EM-01", "HV-02", "HV-04"} <= {c.section.id for c in advice.safety}, "it may be any of the failures"
    assert stem(facts(alert).evidence[0].name) in advice.summary
    assert "Searched" in advice.summary


def test_an_anomaly_of_known_signals_is_cited_with_the_safety_of_what_it_may_be(by_words: Advisor) -> None:
    coolant = Reason("reconstruction_error.Vehicle.Powertrain.ElectricMotor.CoolantTemperature", 4.0)
    advice = by_words.answer(Facts(failure_type="anomaly", severity="medium", evidence=(coolant,)))
    assert set(ids(advice)) <= {"INV-02", "INV-03", "INV-04"}
    assert "no section is written for anomaly" in advice.sections[0].why
    assert {"HV-02", "HV-04", "HV-09"} <= {c.section.id for c in advice.safety}


def test_a_question_is_answered_by_the_manual_or_not_at_all(by_both: Advisor) -> None:
    seen = Facts(failure_type="inverter_overheating", severity="low")
    found = by_both.answer(seen, "how long do I have to wait before the cover may come off")
    assert ids(found)[0] == "HV-03"
    assert found.query == "how long do I have to wait before the cover may come off"
    refused = by_both.answer(seen, "how do I bake bread")
    assert refused.outcome == "no_source"
    assert "cooking and food (not covered)" in refused.summary


def test_a_section_that_a_question_names_comes_first(by_both: Advisor) -> None:
    seen = Facts(failure_type="inverter_overheating", severity="low")
    assert ids(by_both.answer(seen, "what does section hv-03 say?"))[0] == "HV-03"
    assert ids(by_both.answer(seen, "INV-03"))[0] == "INV-03"
    assert ids(by_both.answer(seen, "XX-99")) == [] or ids(by_both.answer(seen, "XX-99"))[0] != "XX-99"


def test_every_feature_and_signal_has_words_and_a_stem_without_statistics() -> None:
    from export.features import FeatureGraph  # noqa: PLC0415 - imports torch

    catalogue = default_catalogue()
    names = {s.name for s in (*catalogue.scalars, *catalogue.vectors)}
    for feature in FeatureGraph(catalogue, WindowSpec()).feature_names:
        base = stem(feature)
        assert base in names or "." not in base or base.split(".")[0] in ("cells", "probes", "battery"), feature
        assert spoken(feature).strip()
        assert "_" not in spoken(feature), feature
    assert stem("Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages[17] against the pack's median") == (
        "Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages"
    )
    assert stem("Vehicle.Powertrain.TractionBattery.Temperature.Max.max").endswith("Temperature.Max")


def test_the_query_tells_type_rule_direction_and_worst_cell() -> None:
    query = query_of(
        Facts(failure_type="battery_degradation", severity="low", worst_cell=3, worst_cell_deviation_v=-0.06,
              evidence=(Reason("cells.lowest_deviation_v.24h", -0.06, -7.0),))
    )  # fmt: skip
    assert query.text == "battery degradation; one cell below the others low; weakest cell below the pack's median"
    assert query.names == ("cells.lowest_deviation_v",)
