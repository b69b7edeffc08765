"""What a run skipped, in a few lines: how many tests, for want of what, and what brings it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

CPP_PACKAGES = (
    "g++ cmake ninja-build libjpeg-dev zlib1g-dev libssl-dev libcurl4-openssl-dev nlohmann-json3-dev libpython3-dev"
)

WANTS = (
    (r"NVIDIA's headers|SDK|NECK_CUDA_ROOT", "NVIDIA's headers", "set NECK_TENSORRT_INCLUDE and NECK_CUDA_ROOT"),
    (r"nvcc", "CUDA's compiler", "install CUDA's toolkit, its bin on PATH"),
    (r"clang", "clang", "for `make lint-cpp`: install clang and clang-tidy"),
    (r"onnxruntime_c_api", "ONNX Runtime's C header", "apt-get install libonnxruntime-dev"),
    (r"\bapt install (g\+\+|libjpeg)", "the C++ tools", f"apt-get install {CPP_PACKAGES}"),
    (r"\bopenssl\b", "OpenSSL's command", "apt-get install openssl"),
    (r"installs from the lock|of the lock", "an environment of the lock", "make .venv/ready"),
    (r"nginx", "nginx", "apt-get install nginx-light"),
    (r"Chromium", "a browser", "apt-get install chromium chromium-driver fonts-dejavu-core"),
    (r"[Tt]riton ?server|nvidia-pytriton", "a Triton server", "make .triton/ready"),
    (r"packages with SAM 3", "Meta's and Ultralytics' packages", "make .families/ready"),
    (r"unshare", "namespaces", "run as root, with util-linux"),
    (r"tmpfs|mount", "the right to mount a tmpfs", "run as root"),
    (r"/proc\b", "Linux's /proc", "-"),
    (r"without a GPU|where no GPU is", "a machine without a GPU", "-"),
    (r"\bGPU\b|cuda|NVIDIA driver", "an NVIDIA GPU", "run `pytest -m gpu` on a machine with its driver"),
    (r"TensorRT-RTX|tensorrt_rtx", "TensorRT-RTX", "pip install '.[rtx]'"),
    (r"tritonclient", "Triton's client", "pip install '.[triton]'"),
    (r"[Oo]pen[Vv](ino|INO)", "OpenVINO", "pip install '.[bench]'"),
    (r"CuPy", "CuPy", "pip install cupy-cuda13x where a GPU is"),
    (r"transformers", "transformers", "pip install '.[sam3]'"),
    (r"ONNX Runtime", "ONNX Runtime", "pip install '.[cpu]'"),
    (r"huggingface_hub", "huggingface_hub", "pip install '.[hub]'"),
    (r"package index", "the package index", "run with a network"),
    (r"selenium", "Selenium", "pip install '.[dev]'"),
    (r"hatchling", "hatchling", "pip install '.[dev]'"),
)
"""Words of a reason, what it wants, what brings it; the first that fits counts."""


def summary_lines(reasons: Iterable[str]) -> list[str]:
    """One line for each thing that was wanted, the most wanted first.

    Args:
        reasons: why, once for every skipped test (once for a file that was skipped whole).
    """
    counts = Counter(_wanted(reason.removeprefix("Skipped: ")) for reason in reasons)
    return [f"{count:5}  want {what}: {remedy}" for (what, remedy), count in counts.most_common()]


def _wanted(reason: str) -> tuple[str, str]:
    found = ((what, remedy) for words, what, remedy in WANTS if re.search(words, reason))
    return next(found, (" ".join(reason.split())[:100], "-"))
