"""Int8 for the LSTMs, so that three kinds of processor give the same answer.

Weights are signed, per channel, and kept in seven bits: x86 without VNNI adds two products in 16 bits and saturates on
eight (error 1e-2), while x86 with VNNI and aarch64 do not, and agree to 1e-7. Dense layers stay float: they are a few
kilobytes and lose most. See docs/adr/0042.
"""

import logging
import tempfile
from pathlib import Path

import onnx

QUANTIZED_OP = "DynamicQuantizeLSTM"


def quantize_lstm(model: bytes) -> onnx.ModelProto:
    """Return the model with every LSTM as `DynamicQuantizeLSTM` (domain com.microsoft).

    Raises `RuntimeError` when one stayed float: onnxruntime leaves out in silence what it does not recognise.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - imports onnx tooling, slow

    before = onnx.load_from_string(model)
    floats = sum(node.op_type == "LSTM" for node in before.graph.node)
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        try:
            root.setLevel(logging.ERROR)  # it advises a pre-processing that changes nothing for this graph
            quantize_dynamic(
                before,
                target,
                op_types_to_quantize=["LSTM"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            root.setLevel(level)
        after = onnx.load(target)
    quantized = sum(node.op_type == QUANTIZED_OP for node in after.graph.node)
    if quantized != floats or any(node.op_type == "LSTM" for node in after.graph.node):
        raise RuntimeError(f"{floats} LSTM went in, {quantized} came out quantized")
    return after
