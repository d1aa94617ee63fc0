"""The autoencoder: gaps, its storage, and its int8 form."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edge_agent.contract.errors import BundleError
from export import autoencoder
from export.autoencoder import Autoencoder, export_autoencoder
from export.quantize import QUANTIZED_OP, quantize_lstm


@pytest.fixture(scope="module")
def detector(trained) -> Autoencoder:
    return autoencoder.load(trained.models / "lstm_ae_best.pt")[0]


def session(model: onnx.ModelProto):
    return ort.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("hidden", [8, 16, 32, 48, 64])
def test_every_lstm_is_quantized_at_every_size(hidden):
    """The other exporter leaves some sizes in float without a word."""
    model = quantize_lstm(export_autoencoder(Autoencoder(23, hidden), 60))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count(QUANTIZED_OP) == 2
    assert "LSTM" not in kinds


def test_weights_keep_to_seven_bits_so_that_no_processor_saturates(detector):
    model = quantize_lstm(export_autoencoder(detector, 60))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quantized = [x for x in tensors.values() if x.dtype == np.int8 and x.size > 1]
    assert quantized
    assert all(np.abs(x.astype(int)).max() <= 64 for x in quantized)
    scales = [x for n, x in tensors.items() if n.endswith("_scale") and x.size > 1]
    assert len(scales) >= 2  # per channel


def test_int8_stays_near_float(detector, trained):
    model = session(quantize_lstm(export_autoencoder(detector, 60)))
    with torch.no_grad():
        expected = detector(torch.from_numpy(trained.pooled[:60]))[1].numpy()
    found = np.array([model.run(["anomaly_score"], {"pooled": x[None]})[0][0] for x in trained.pooled[:60]])
    assert np.mean(np.abs(found - expected) / expected) < 0.03


def test_missing_signals_count_nowhere_and_nothing_at_all_is_no_anomaly(detector, trained):
    x = torch.from_numpy(trained.pooled[5:6].copy())
    x[:, :, 4] = torch.nan
    x[:, 1::2, 7] = torch.nan
    x[:, 3, 8] = torch.inf
    with torch.no_grad():
        error, score = detector(x)
        assert error[0, 4] == 0
        assert torch.isfinite(error).all()
        assert torch.isfinite(score).all()
        error, score = detector(torch.full_like(x, torch.nan))
    assert error.abs().sum() == 0
    assert score == 0


def test_a_signal_gone_wild_is_bounded_and_more_anomalous_than_usual(detector, trained):
    usual = torch.from_numpy(trained.pooled[5:6].copy())
    wild = usual.clone()
    wild[:, 20:, 2] = 9e8
    with torch.no_grad():
        assert detector(wild)[1] > 3 * detector(usual)[1]
        assert detector(wild)[1] < 1e6


def test_what_is_saved_is_what_is_loaded(detector, tmp_path):
    autoencoder.save(detector, tmp_path / "a.pt", {"pooled_frames": 60, "note": "x"})
    again, config = autoencoder.load(tmp_path / "a.pt")
    x = torch.randn(2, 60, 23)
    with torch.no_grad():
        torch.testing.assert_close(again(x), detector(x), rtol=0, atol=0)
    assert config["pooled_frames"] == 60


@pytest.mark.parametrize("content", [None, b"", b"not torch", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_autoencoder_is_one_line(tmp_path, content):
    path = tmp_path / "lstm_ae_best.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"lstm_ae_best\.pt") as refused:
        autoencoder.load(path)
    assert "\n" not in str(refused.value)


def test_a_stored_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": {}, "config": Evil()}, tmp_path / "e.pt")
    with pytest.raises(BundleError, match="not a stored autoencoder"):
        autoencoder.load(tmp_path / "e.pt")
