"""From the ONNX file to a TensorRT engine, verified, profiled and deployed."""
