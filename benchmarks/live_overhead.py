"""What DeployedEncoder costs over the bare ONNX Runtime session of the same file, on a CPU: time, and peak memory.

    python -m benchmarks.live_overhead FILE.onnx [--runs 3]

Each has a process of its own. The time is the module's less that of the session inside it, of the same run, since two
runs of a busy machine differ by more than what is looked for. Outputs of the run before are kept, as a model does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure.worker import peak_bytes
from engines.live.encoder import DeployedEncoder
from export.contract.manifest import manifest_path, read_manifest
from export.proof.verify import require_runtime
from export.weights_origin import manifest_signature

KINDS = ("bare", "deployed")


class Timed:
    """A session that keeps what its last run took, in seconds."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds = time.perf_counter() - start


def images_of(path: Path) -> np.ndarray:
    """Noise of the file's size, float32 (1, 3, H, W)."""
    signature = manifest_signature(manifest_path(path), read_manifest(manifest_path(path), "onnx"))
    return np.random.default_rng(0).standard_normal((1, 3, *signature.image_size), dtype=np.float32)


def run_kind(kind: str, path: Path, runs: int) -> dict[str, Any]:
    """Seconds inside the session and around it, run by run, and the peak of this process in bytes."""
    images, inside, around = images_of(path), list[float](), list[float]()
    if kind == "bare":
        session = require_runtime().InferenceSession(path, providers=["CPUExecutionProvider"])
        run: Callable[[], object] = lambda: session.run(None, {"image": images})  # noqa: E731
    else:
        encoder, tensor = DeployedEncoder(path, device="cpu"), torch.from_numpy(images)
        timed = encoder._file._session = Timed(encoder._file._session)
        run = lambda: encoder(tensor)  # noqa: E731
    kept: object = None
    for _ in range(runs + 1):
        start = time.perf_counter()
        kept = run()
        whole = time.perf_counter() - start
        inside.append(timed.seconds if kind == "deployed" else whole)
        around.append(whole - inside[-1])
    del kept
    return {"inside_s": inside[1:], "around_s": around[1:], "peak_bytes": peak_bytes()}


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help="measure this one, in this process")
    asked = parser.parse_args()
    if asked.kind:
        print(json.dumps(run_kind(asked.kind, asked.file, asked.runs)))
        return
    found = {}
    for kind in KINDS:
        command = [sys.executable, "-m", __spec__.name, str(asked.file), "--runs", str(asked.runs), "--kind", kind]
        found[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    deployed = found["deployed"]
    around, inside = (statistics.median(deployed[name]) for name in ("around_s", "inside_s"))
    summary = {"around_ms": 1e3 * around, "share": around / inside}
    summary["peak_over_bare_bytes"] = deployed["peak_bytes"] - found["bare"]["peak_bytes"]
    print(json.dumps({**found, **summary}, indent=1))


if __name__ == "__main__":
    main()
