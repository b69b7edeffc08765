"""A verdict on an ONNX file that another tool wrote: there is no manifest, so what it is must be found out."""
