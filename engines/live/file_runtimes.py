"""An ONNX file in ONNX Runtime or OpenVINO, reading and writing torch's tensors where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from engines.live.ort_placement import FirstRun
from export.contract.dtypes import BY_NAME
from export.contract.export_command import export_again
from export.contract.onnx_file import OnnxFile
from export.verification.rounding_simulation import simulate
from export.verification.verify import open_model, require_runtime


class RuntimeFileError(RuntimeError):
    """A file that a runtime does not load here."""


class OrtFile:
    """ONNX Runtime on the CPU or one GPU, by I/O binding: no input and no output is copied.

    Args:
        path: the ONNX file, its weights beside it.
        device: where it runs.
        simulated: write the roundings of an FP16 or BF16 graph out (CPU); its outputs are then float32.

    Raises:
        RuntimeFileError: ONNX Runtime or its provider is not there, or does not take the graph.
    """

    def __init__(self, path: Path, device: torch.device, simulated: bool = False) -> None:
        ort, self.device, self.path = require_runtime(), device, path
        self._version, self._first = ort.__version__, None  # type: str, FirstRun | None
        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise RuntimeFileError(
                    f"{path}: this ONNX Runtime has no CUDA provider; run pip install onnxruntime-gpu, or use the "
                    "CPU: device='cpu'"
                )
            # TF32 is on by default there: an FP32 file would be computed with 10 bits of 23
            providers = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": "0"})]
            self._first = FirstRun(options)
        try:
            if simulated:
                model, folder = OnnxFile(path).load()
                simulate(model)
                self._session = open_model(model, folder)
            else:
                self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common class of its own
            why = " ".join(str(error).split())[:300]
            raise RuntimeFileError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load the file ({why}); `neck-export inspect` "
                "lists the runtimes that can"
            ) from None
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeFileError(
                f"{path}: ONNX Runtime's CUDA provider did not start; run `neck-export doctor` to check the "
                "GPU and its driver"
            )

    def run(self, image: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Fills the outputs; those of the file that are not among them are not handed out.

        Raises:
            RuntimeFileError: at the first run on a GPU, if a heavy operator was computed on the CPU.
        """
        binding = self._session.io_binding()
        index = self.device.index or 0
        for bind, tensors in ((binding.bind_input, {"image": image}), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                element = getattr(onnx.TensorProto, BY_NAME[str(tensor.dtype).removeprefix("torch.")].onnx)
                bind(name, self.device.type, index, element, list(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if self._first is not None:
            first, self._first = self._first, None
            if heavy := first.heavy_on_cpu(self._session):
                numbers = ".".join(self._version.split(".")[:2])
                again = export_again(self.path, target=f"onnxruntime-gpu-{numbers}", attention="auto", opset="auto")
                raise RuntimeFileError(
                    f"{self.path}: ONNX Runtime {self._version} would compute {heavy} on the CPU instead of the GPU. "
                    "To compute everything on the CPU, pass device='cpu'. To compute everything on the GPU, update "
                    f"onnxruntime-gpu, or export the file again for ONNX Runtime {self._version}:"
                    f"\n{again}"
                )

    def close(self) -> None:
        """Frees the session."""
        self._session = None


class OpenVinoFile:
    """OpenVINO on the CPU, in the precision of the graph; it writes into torch's memory.

    Raises:
        RuntimeFileError: OpenVINO is not installed, or does not take the graph.
    """

    def __init__(self, path: Path) -> None:
        self.device = torch.device("cpu")
        try:
            import openvino
            import openvino.properties.hint as hint
        except ImportError:
            raise RuntimeFileError(f"{path}: OpenVINO is not installed; run pip install openvino") from None
        self._tensor, self._scratch = openvino.Tensor, {}  # type: Any, dict[tuple[str, int], Any]
        settings = {hint.inference_precision: openvino.Type.f32}  # by itself it would take BF16 where it can
        try:
            self._request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise RuntimeFileError(
                f"{path}: OpenVINO {openvino.__version__} cannot load the file ({why}); pass "
                "runtime='auto' to run it with ONNX Runtime instead"
            ) from None

    def run(self, image: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Fills the outputs, as OrtFile.run."""
        self._request.set_tensor("image", self._tensor(image.numpy(), shared_memory=True))
        for port in self._request.model_outputs:
            # one that is not wanted would be written where an earlier run's was
            name, kept = port.any_name, (port.any_name, len(image))
            if name in outputs:
                tensor = self._tensor(outputs[name].numpy(), shared_memory=True)
            else:
                sides = [len(image), *(side.get_length() for side in list(port.partial_shape)[1:])]
                tensor = self._scratch.setdefault(kept, self._tensor(port.element_type, sides))
            self._request.set_tensor(name, tensor)
        self._request.infer()

    def close(self) -> None:
        """Frees the model."""
        self._request = None
        self._scratch.clear()
