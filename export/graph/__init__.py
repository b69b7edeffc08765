"""The canonical ONNX graph: the deployed module, its exact rewrites, the trace."""
