"""Opens a file in the runtime that was asked for, or in the one that goes with it."""

from __future__ import annotations

from pathlib import Path

import torch

from engines.builder.plan_kind import is_plan
from engines.live.file_runtimes import OpenVinoFile, OrtFile
from engines.run.open_plan import open_plan
from engines.run.session import Session
from export.verification.verify import require_runtime


class EncoderError(RuntimeError):
    """A file that cannot stand in for an encoder, or images that it does not take."""


def open_file(
    path: Path, device: str | torch.device | None, runtime: str, simulated: bool
) -> Session | OrtFile | OpenVinoFile:
    """Opens a plan or an ONNX file; the options are those of DeployedEncoder.

    Raises:
        EncoderError: options that do not go together.
        SessionError, RuntimeFileError, FidelityError: it cannot be opened here.
    """
    wanted = torch.device(device) if device is not None else None
    if is_plan(path):
        if runtime != "auto" or simulated or (wanted is not None and wanted.type != "cuda"):
            raise EncoderError(
                f"{path}: a plan only runs in TensorRT on a GPU; leave out the arguments device=, runtime= and "
                "simulated=, or pass the ONNX file instead of the plan"
            )
        return open_plan(path, device=wanted)
    if runtime == "openvino":
        if simulated or (wanted is not None and wanted.type != "cpu"):
            raise EncoderError(
                f"{path}: with runtime='openvino', the file runs only on the CPU, and the rounding to FP16 or BF16 "
                f"cannot be simulated. The passed arguments are device={wanted} and simulated={simulated}. Pass "
                "device='cpu' and simulated=False, or pass runtime='auto' to use ONNX Runtime"
            )
        return OpenVinoFile(path)
    if simulated and wanted is not None and wanted.type != "cpu":
        raise EncoderError(
            f"{path}: simulated=True is only possible on the CPU; leave out the argument simulated, or use device='cpu'"
        )
    if wanted is None:
        wanted = torch.device("cuda" if not simulated and _ort_has_cuda() else "cpu")
    if wanted.type not in ("cpu", "cuda"):
        raise EncoderError(
            f"{path}: ONNX Runtime cannot run the file on the device {wanted}, only on the CPU or an NVIDIA GPU. Pass "
            "device='cpu' or device='cuda'"
        )
    if wanted.type == "cuda" and wanted.index is None and torch.cuda.is_available():
        wanted = torch.device("cuda", torch.cuda.current_device())
    return OrtFile(path, wanted, simulated)


def _ort_has_cuda() -> bool:
    return torch.cuda.is_available() and "CUDAExecutionProvider" in require_runtime().get_available_providers()
