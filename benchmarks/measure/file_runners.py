"""Exported files as backends: ONNX Runtime, OpenVINO, TensorRT's plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.measure.backends import TENSORRT_PROVIDER, Runner, RunRequest
from engines.live.ort_placement import FirstRun

FP16_ALLOWED = "trt_fp16_enable"
"""ONNX Runtime's TensorRT provider builds weakly typed engines: without it an FP16 file is computed in FP32."""


class RunnerError(RuntimeError):
    """A runtime that does not do what its row would say."""


class OrtRunner(Runner):
    """ONNX Runtime by one execution provider; one whose heavy operators another one computes is refused."""

    def __init__(self, job: RunRequest) -> None:
        self.job, self.cuda, self.provider = job, job.backend.device == "cuda", job.backend.provider
        self._values: list[Any] = []
        self._taken: int | None = None

    def load(self) -> float | None:
        """Makes the session; on a GPU it is run once to measure its device memory."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})  # on by default: FP32 would keep 10 bits of 23
        providers: list[Any] = [cuda if self.provider == cuda[0] else self.provider]
        free = _free_device_bytes() if self.cuda else None
        if self.cuda:
            first = FirstRun(options)
        if self._tensorrt():
            allowed = {FP16_ALLOWED: "1" if self.job.backend.precision == "fp16" else "0"}
            providers = [(self.provider, allowed), cuda]
        self.session = ort.InferenceSession(self.job.onnx, options, providers=providers)
        if self.session.get_providers()[0] != self.provider:
            raise RunnerError(
                f"ONNX Runtime could not start {self.provider} and chose {self.session.get_providers()} instead; "
                f"check that the libraries of {self.provider} are installed"
            )
        if self._tensorrt():
            self._check_fp16(allowed[FP16_ALLOWED])
        self.names = [output.name for output in self.session.get_outputs()]
        self.image = np.load(self.job.image)
        if self.cuda:
            self.binding = self.session.io_binding()
            self._device_image = ort.OrtValue.ortvalue_from_numpy(self.image, "cuda", 0)
            self.binding.bind_ortvalue_input("image", self._device_image)
            for name in self.names:
                self.binding.bind_output(name, "cuda")
            self.run()
            if heavy := first.heavy_on_cpu(self.session):
                raise RunnerError(
                    f"ONNX Runtime {ort.__version__} would compute {heavy} on the CPU instead of the GPU, so this "
                    "backend is not measured. To measure this backend, install a version of onnxruntime-gpu whose "
                    f"{self.provider} supports these operators"
                )
            # now: later, what other workers load and free is between the two
            self._taken = _taken(free, _free_device_bytes())
        return None

    def _tensorrt(self) -> bool:
        return bool(self.provider == TENSORRT_PROVIDER)

    def _check_fp16(self, asked: str) -> None:
        """Refuses a provider that does not compute an FP16 file in FP16, as its row would say."""
        found = self.session.get_provider_options()[TENSORRT_PROVIDER].get(FP16_ALLOWED)
        if found != asked:
            raise RunnerError(
                f"ONNX Runtime set {FP16_ALLOWED} to {found}, but {asked} was requested, so TensorRT might not compute "
                f"in {self.job.backend.precision.upper()}. This backend is not measured; try another version of "
                "onnxruntime-gpu"
            )

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
        """Device memory that the load and the first run took."""
        return self._taken

    def note(self) -> str | None:
        """A note that TensorRT's provider chooses types itself."""
        if not self._tensorrt():
            return None
        return "FP16 is allowed, but TensorRT may compute layers in FP32 if that is faster (the engine is weakly typed)"


class OpenVinoRunner(Runner):
    """OpenVINO on the CPU with a stated inference precision, read back, because OpenVINO may choose BF16 by itself."""

    def __init__(self, job: RunRequest) -> None:
        self.job = job

    def load(self) -> float | None:
        """Compiles the model."""
        import openvino
        import openvino.properties.hint as hint

        wanted = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[self.job.backend.precision]
        settings = {hint.inference_precision: wanted, hint.performance_mode: hint.PerformanceMode.LATENCY}
        self.model = openvino.Core().compile_model(self.job.onnx, "CPU", settings)
        found = self.model.get_property(hint.inference_precision)
        if found != wanted:
            raise RunnerError(
                f"OpenVINO chose the precision {found.get_type_name()}, but {wanted.get_type_name()} was requested, so "
                "this backend is not measured"
            )
        self.request = self.model.create_infer_request()
        self.image = np.load(self.job.image)
        return None

    def run(self) -> None:
        """One run on the input where it lies."""
        self.request.infer({"image": self.image}, share_inputs=True, share_outputs=True)

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs."""
        ports = {port.any_name: port for port in self.model.outputs}
        return {name: np.array(self.request.get_tensor(port).data, np.float32) for name, port in ports.items()}


class PlanRunner(Runner):
    """A TensorRT or TensorRT-RTX plan, by CUDA graph where one can be captured."""

    def __init__(self, job: RunRequest) -> None:
        self.job, self._note = job, None  # type: RunRequest, str | None

    def load(self) -> float | None:
        """Loads the plan and binds the input on the GPU."""
        import torch

        from engines.run.inputs import SessionError
        from engines.run.open_plan import open_plan

        self.session = open_plan(self.job.plan, use_runtime_cache=False)
        self._image = {"image": torch.from_numpy(np.load(self.job.image)).to(self.session.device)}
        try:
            self._graph = self.session.capture(self._image)
            self._outputs, self._start = self._graph.outputs, self._graph.graph.replay
        except SessionError as error:
            # bound again: the capture bound buffers of its own, which went with it
            self._outputs, self._start = self.session.bind(self._image), self.session.enqueue
            self._note = f"measured without a CUDA graph, because none could be captured ({error})"
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
        """Device memory of loading, with the engine's scratch memory and the outputs."""
        loaded: int = self.session.loaded_bytes
        if loaded <= 0:  # something else was freed meanwhile
            return None
        return loaded + sum(value.nbytes for value in self._outputs.values())

    def note(self) -> str | None:
        """Whether it runs without a CUDA graph, and why."""
        return self._note

    def lower_bound_ms(self) -> float | None:
        """By the plan's layer report; None for a plan without one and for a GPU that the table does not have."""
        import torch

        from engines.layers.layer_report import read_layers
        from engines.layers.lower_bound import lower_bound
        from engines.layers.published_gpus import published_gpu

        layers, gpu = read_layers(self.job.plan), published_gpu(torch.cuda.get_device_name())
        return lower_bound(layers, gpu).bound_ms if layers and gpu else None


def _free_device_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def _taken(before: int | None, after: int) -> int | None:
    """What became less; None where something else was freed meanwhile, so that nothing is told."""
    return None if before is None or before <= after else before - after
