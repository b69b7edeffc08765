"""From the encoder in PyTorch to an ONNX file that is proved equal to it."""
