"""From trained models to one exact, quantized ONNX graph in a bundle, with proof that it answers as they do."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is loaded, so before any module of ours
