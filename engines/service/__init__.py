"""From a plan or an ONNX file to a service: Triton, Kubernetes, KServe."""
