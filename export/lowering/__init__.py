"""From the canonical FP32 graph to a precision, an attention form and an opset."""
