"""Exported files as backends: ONNX Runtime, OpenVINO, TensorRT's plans."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class RunnerError(RuntimeError):
    """A runtime that does not do what its row would say."""


class OrtRunner:
    """ONNX Runtime by one execution provider; a graph that needs another one is refused, not shared out."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job, self.cuda = job, job["device"] == "cuda"
        self._values: list[Any] = []

    def load(self) -> float | None:
        """Makes the session."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers = [self.job["provider"]]
        self._free = _free_device_bytes() if self.cuda else 0
        if self.cuda:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            providers += ["CUDAExecutionProvider"] if providers != ["CUDAExecutionProvider"] else []
        self.session = ort.InferenceSession(self.job["onnx"], options, providers=providers)
        if self.session.get_providers()[0] != self.job["provider"]:
            raise RunnerError(f"{self.job['provider']} did not start; onnxruntime took {self.session.get_providers()}")
        self.names = [output.name for output in self.session.get_outputs()]
        self.image = np.load(self.job["image"])
        if self.cuda:
            self.binding = self.session.io_binding()
            self._device_image = ort.OrtValue.ortvalue_from_numpy(self.image, "cuda", 0)
            self.binding.bind_ortvalue_input("image", self._device_image)
            for name in self.names:
                self.binding.bind_output(name, "cuda")
        return None

    def run(self) -> None:
        """One run; on a GPU the input lies there already and the outputs stay there."""
        self._values = []
        if self.cuda:
            self.session.run_with_iobinding(self.binding)
            self.binding.synchronize_outputs()
        else:
            self._values = self.session.run(None, {"image": self.image})

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs."""
        values = self.binding.copy_outputs_to_cpu() if self.cuda else self._values
        return {name: np.asarray(value, np.float32) for name, value in zip(self.names, values, strict=True)}

    def device_bytes(self) -> int | None:
        """Device memory that is free no more since before the load."""
        return self._free - _free_device_bytes() if self.cuda else None

    def parts_ms(self) -> dict[str, float] | None:
        """Not told."""
        return None

    def close(self) -> None:
        """Frees the session."""
        self._values = []
        del self.session


class OpenVinoRunner:
    """OpenVINO on the CPU, its inference precision set and read back: it would take BF16 by itself where it can."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job

    def load(self) -> float | None:
        """Compiles the model."""
        import openvino
        import openvino.properties.hint as hint

        wanted = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[self.job["precision"]]
        settings = {hint.inference_precision: wanted, hint.performance_mode: hint.PerformanceMode.LATENCY}
        self.model = openvino.Core().compile_model(self.job["onnx"], "CPU", settings)
        found = self.model.get_property(hint.inference_precision)
        if found != wanted:
            raise RunnerError(f"OpenVINO computes in {found.get_type_name()}, asked was {wanted.get_type_name()}")
        self.request = self.model.create_infer_request()
        self.image = np.load(self.job["image"])
        return None

    def run(self) -> None:
        """One run on the input where it lies."""
        self.request.infer({"image": self.image}, share_inputs=True, share_outputs=True)

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs."""
        ports = {port.any_name: port for port in self.model.outputs}
        return {name: np.array(self.request.get_tensor(port).data, np.float32) for name, port in ports.items()}

    def device_bytes(self) -> int | None:
        """None: it runs on the CPU."""
        return None

    def parts_ms(self) -> dict[str, float] | None:
        """Not told."""
        return None

    def close(self) -> None:
        """Frees the model."""
        del self.request, self.model


class PlanRunner:
    """A TensorRT or TensorRT-RTX plan, by CUDA graph where one can be captured."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job

    def load(self) -> float | None:
        """Loads the plan and binds the input on the GPU."""
        import torch

        from engines.run.plan_checks import SessionError
        from engines.run.session import open_plan

        self.session = open_plan(Path(self.job["plan"]))
        image = {"image": torch.from_numpy(np.load(self.job["image"])).to(self.session.device)}
        self._start = self.session.enqueue
        self._outputs = self.session.bind(image)
        with contextlib.suppress(SessionError):
            captured = self.session.capture(image)
            self._outputs, self._start = captured.outputs, captured.graph.replay
            self._graph = captured
        return None

    def run(self) -> None:
        """One run, input and outputs on the GPU."""
        import torch

        with torch.cuda.stream(self.session.stream):
            self._start()
        torch.cuda.synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs."""
        return {name: value.float().cpu().numpy() for name, value in self._outputs.items()}

    def device_bytes(self) -> int | None:
        """What loading took, the engine's scratch memory included, and the outputs."""
        return self.session.loaded_bytes + sum(value.nbytes for value in self._outputs.values())

    def parts_ms(self) -> dict[str, float] | None:
        """Not told; `neck-export profile` gives the time of each layer."""
        return None

    def close(self) -> None:
        """Frees the engine."""
        self.session.close()


def _free_device_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]
