"""From an ONNX file to the bytes of a plan."""
