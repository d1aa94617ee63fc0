"""What the search finds on the probe, by words alone and by words and meaning, with bounds that can fail."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.advice import manual as manuals
from cloud.advice.advisor import Advisor
from cloud.advice.embedding import Embedder
from cloud.advice.retrieval import Index, Query, tokens
from edge_agent.contract.errors import ConfigError
from tests.unit.advice.probe import PROBE, measure

MANUAL = manuals.load()
WORDS = Index(MANUAL)


@pytest.fixture(scope="module")
def both(sentence_model: Path) -> Index:
    return Index(MANUAL, Embedder.load(sentence_model))


def test_the_probe_is_large_enough_and_names_sections_that_exist() -> None:
    ids = {s.id for s in MANUAL.sections}
    asked = PROBE["questions"] + PROBE["alerts"]
    assert len(asked) >= 40
    assert all(set(query["expect"]) <= ids for query in asked)
    assert ids - {e for query in asked for e in query["expect"]} <= {"HV-07", "HV-09", "HV-10"}


def test_no_question_of_the_probe_stands_in_the_manual() -> None:
    lines = [line.lower() for s in MANUAL.sections for line in (s.title, *s.symptoms, *s.steps)]
    for question in PROBE["questions"]:
        assert not any(question["text"].rstrip("?").lower() in line for line in lines), question["text"]


def test_words_and_meaning_find_what_was_asked_in_other_words(both: Index) -> None:
    measured = measure(both)
    assert both.method == "hybrid"
    assert measured.top_1 >= 0.62
    assert measured.recall_at_3 >= 0.92


def test_meaning_is_worth_its_weights(both: Index) -> None:
    assert measure(both).recall_at_3 >= measure(WORDS).recall_at_3 + 0.15


def test_words_alone_still_find_most_of_it() -> None:
    measured = measure(WORDS)
    assert WORDS.method == "bm25"
    assert measured.top_1 >= 0.48
    assert measured.recall_at_3 >= 0.65


def test_the_floor_holds_on_the_half_it_was_not_chosen_on(both: Index) -> None:
    measured = measure(both, calibrate=False)
    assert measured.refused <= 0.16
    assert measured.answered_off_topic <= 0.20


def test_words_alone_refuse_what_shares_no_word_with_the_manual() -> None:
    for question in ("how do I bake bread", "what is the capital of France", "milk prices in Spain"):
        assert not WORDS.search(Query(question)).answers, question


def test_a_title_finds_its_own_section(both: Index) -> None:
    for index in (WORDS, both):
        for section in MANUAL.sections:
            found = index.search(Query(section.title))
            assert found.answers
            assert found.hits[0].section.id == section.id


def test_an_exact_name_is_found_as_a_name() -> None:
    assert WORDS.search(Query("", ("plugged_idle_share",))).hits[0].section.id in ("CHG-01", "CHG-02")
    assert tokens("inlet_rise_c") == ["inlet_rise_c", "inlet", "rise"]
    assert tokens("Vehicle.Powertrain.ElectricMotor.Speed")[0] == "vehicle.powertrain.electricmotor.speed"


def test_the_same_question_has_the_same_answer_from_several_threads(both: Index) -> None:
    queries = [Query(q["text"]) for q in PROBE["questions"][:16]]
    alone = [both.search(q) for q in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both.search, queries * 4)) == alone * 4


@given(st.text(max_size=3_000))
def test_any_text_is_answered_or_refused(text: str) -> None:
    found = WORDS.search(Query(text))
    assert len(found.hits) == len(MANUAL.sections)
    assert all(0.0 <= hit.score < 10.0 for hit in found.hits)


def test_vectors_are_remembered_beside_the_model_and_a_damaged_file_is_made_again(
    sentence_model: Path, tmp_path: Path
) -> None:
    folder = copied(sentence_model, tmp_path)
    first = Index(MANUAL, Embedder.load(folder)).search(Query("hot inlet"))
    (stored,) = folder.glob("vectors-*")
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x7f")
    assert Index(MANUAL, Embedder.load(folder)).search(Query("hot inlet")) == first
    before = stored.stat().st_mtime_ns
    assert Index(MANUAL, Embedder.load(folder)).search(Query("hot inlet")) == first
    assert stored.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "manifest.json"])
def test_a_damaged_sentence_model_is_refused_and_words_alone_still_serve(
    sentence_model: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(sentence_model, tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=f"{name}.*fleet-cloud advice-model") as caught:
        Embedder.load(folder)
    assert "\n" not in str(caught.value)
    advisor = Advisor(embedding=folder)
    assert advisor.method == "bm25"
    assert name in advisor.detail


def copied(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "minilm"
    folder.mkdir()
    for name in ("model.onnx", "tokenizer.json", "manifest.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder
