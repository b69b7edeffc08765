"""Stands in for Triton's tensorrt and onnxruntime backends: runs the ONNX file under the plan's name on the CPU.

Triton's Python backend runs this file for every model of the backend whose folder it is copied to, so a real server
loads the shipped config unchanged: `platform: "tensorrt_plan"`, batching, warm-up, versions.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model; whatever is raised here fails the load, as a plan that cannot be deserialized does."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        files = [config["default_model_filename"], *config["cc_model_filenames"].values()]
        path = next(folder / name for name in files if name and (folder / name).is_file())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # else INT8 sums overflow without VNNI
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.batched = config["max_batch_size"] > 0
        self.names = [output["name"] for output in config["output"]]

    def execute(self, requests: list) -> list:
        """Runs all requests of a batch at once."""
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        if not self.batched:
            return [self._respond(request, self._run(image)) for request, image in zip(requests, images, strict=True)]
        outputs = self._run(np.concatenate(images))
        ends = np.cumsum([len(image) for image in images])[:-1]
        parts = [np.split(output, ends) for output in outputs]
        return [self._respond(request, [part[index] for part in parts]) for index, request in enumerate(requests)]

    def _run(self, image: np.ndarray) -> list[np.ndarray]:
        return self.session.run(self.names, {"image": image})

    def _respond(self, request: object, outputs: list[np.ndarray]) -> object:
        wanted = request.requested_output_names()
        tensors = [
            pb_utils.Tensor(name, output) for name, output in zip(self.names, outputs, strict=True) if name in wanted
        ]
        return pb_utils.InferenceResponse(tensors)
