"""Runs an ONNX file in ONNX Runtime's WebGPU provider: python webgpu_run.py FILE INPUT.npy OUTPUTS.npz

Prints as JSON how many nodes each provider ran, by operator. In a process of its own, whose environment names the
Vulkan driver, and in an environment of its own (tests/test_webgpu.py).
"""

import collections
import json
import os
import sys
import tempfile

import numpy as np
import onnxruntime as ort
import onnxruntime_ep_webgpu as webgpu


def main(file: str, image: str, outputs: str) -> None:
    ort.register_execution_provider_library("webgpu", webgpu.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == webgpu.get_ep_name()]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as written: no fusion of ONNX Runtime's own
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        options.add_provider_for_devices(devices[:1], {})
        session = ort.InferenceSession(file, options)
        if (
            webgpu.get_ep_name() not in session.get_providers()
        ):  # ONNX Runtime falls back to the CPU with a line of text
            sys.exit("no WebGPU device")
        names = [output.name for output in session.get_outputs()]
        found = session.run(None, {session.get_inputs()[0].name: np.load(image)})
        with open(session.end_profiling(), encoding="utf-8") as profile:
            events = json.load(profile)
    nodes = collections.defaultdict(collections.Counter)
    for event in events:
        if event.get("cat") == "Node" and "provider" in event.get("args", {}):
            nodes[event["args"]["provider"]][event["args"]["op_name"]] += 1
    np.savez(outputs, **dict(zip(names, found, strict=True)))
    print(json.dumps(nodes))


if __name__ == "__main__":
    main(*sys.argv[1:])
