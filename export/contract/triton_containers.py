"""Which Triton container carries which TensorRT and ONNX Runtime (no torch)."""

from __future__ import annotations

TENSORRT = {
    "24.05": "10.0.1",
    "24.07": "10.2.0",
    "24.08": "10.3.0",
    "24.12": "10.7.0",
    "25.01": "10.8.0",
    "25.06": "10.11.0",
    "25.08": "10.13.2",
    "25.09": "10.13.3",
    "25.11": "10.14.1",
    "25.12": "10.14.1",
    "26.07": "11.1.0",
    "26.08": "11.2.1",
}
"""TensorRT of Triton's containers, as far as it could be read on 2026-11-30.

NVIDIA's own list (docs.nvidia.com/deeplearning/frameworks/support-matrix) was out of reach. The versions are what
public projects wrote of nvcr.io/nvidia/tensorrt of the same month, which has the TensorRT of Triton's container (said
by a maintainer in triton-inference-server/server issue 5812); months with contradicting or no statements are left
out. The table in Triton's docs/introduction/compatibility.md is of the `trtllm` images, whose TensorRT is another.
"""

ONNX_RUNTIME = {
    "24.04": "1.17.3",
    "24.05": "1.18.0",
    "24.06": "1.18.0",
    "24.07": "1.18.1",
    "24.08": "1.18.1",
    "24.09": "1.19.2",
    "24.10": "1.19.2",
    "24.11": "1.19.2",
    "24.12": "1.20.1",
    "25.01": "1.20.1",
    "25.02": "1.20.1",
    "25.03": "1.21.0",
    "25.04": "1.21.0",
    "25.05": "1.22.0",
    "25.06": "1.22.0",
    "25.07": "1.22.0",
    "25.08": "1.23.0",
    "25.09": "1.23.0",
    "25.10": "1.23.1",
    "25.11": "1.23.2",
    "25.12": "1.23.2",
    "26.01": "1.23.2",
    "26.02": "1.24.1",
    "26.03": "1.24.2",
    "26.04": "1.24.4",
    "26.05": "1.24.4",
    "26.06": "1.24.4",
    "26.07": "1.27.0",
    "26.08": "1.28.0",
}
"""ONNX Runtime of Triton's containers: triton-inference-server/server, docs/introduction/compatibility.md, 2026-08.

26.08 is what public projects wrote of nvcr.io/nvidia/tritonserver:26.08-py3: TensorRT 11.2.1, ONNX Runtime 1.28.0.
"""
