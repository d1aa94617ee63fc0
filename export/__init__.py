"""From trained models to one exact, quantized ONNX graph in a bundle, with proof that it answers as they do."""
