"""A real tritonserver for tests, with ONNX Runtime in place of its GPU backends; needs `make .triton/ready`.

with running(fake_repository(tmp_path, fake_plan(tmp_path))) as server:
    ...  # server.http_url, server.grpc_url
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from exporting import golden_options, trace_quickly

from engines.service.options import RepositoryOptions
from engines.service.repository import make_repository
from export.contract.manifest import manifest_path, read_manifest, write_manifest
from export.contract.options import ExportOptions
from export.contract.signature import BatchRange
from export.pipeline import export_onnx

ROOT = Path(__file__).parent.parent
SERVER = ROOT / ".triton"
STAND_IN = Path(__file__).parent / "fake_backend" / "model.py"
START_S = 600
"""Seconds that a server may take until it is ready; 2 on an idle machine."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is running: `host:port` of both protocols, its log, its process."""

    http_url: str
    grpc_url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain GET."""
        return ask(self.http_url, path)

    @property
    def ready(self) -> bool:
        """Whether it answers and every model is loaded."""
        try:
            return self.get("/v2/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False


def ask(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer to a GET or, with a body, a POST; `_` in a header's name is `-`."""
    connection = http.client.HTTPConnection(url, timeout=600)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("GET" if body is None else "POST", path, body, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def why_missing() -> str | None:
    """Why no server can be started here, or None."""
    if (SERVER / "ready").is_file():
        return None
    why = SERVER / "why"
    return why.read_text().strip() if why.is_file() else "needs a Triton server; run `make .triton/ready`"


@contextlib.contextmanager
def running(
    repository: Path,
    *options: str,
    start_s: float = START_S,
    ports: Sequence[int] | None = None,
    inside: Callable[[Path], Sequence[str | Path]] = lambda backends: (),
) -> Iterator[Server]:
    """Runs a server for as long as the block takes.

    Args:
        repository: the model repository.
        options: further options, such as `--model-control-mode=poll`.
        start_s: seconds that it may take until it is ready.
        ports: of HTTP and gRPC, for one that was stopped and starts again; else ports of its own.
        inside: gives the command that runs the server's command, from the folder of its backends.

    Raises:
        RuntimeError: it ended or was not ready in time; the message holds the errors of its log.
    """
    with tempfile.TemporaryDirectory(prefix="triton-") as name:
        folder = Path(name)
        backends = _backends(folder / "backends")
        for attempt in range(3):
            log, chosen = folder / f"log{attempt}.txt", ports or free_ports(2)
            server = _start(repository, backends, log, options, chosen, inside(backends))
            try:
                if _wait(server, start_s):
                    yield server
                    return
            finally:
                _stop(server.process)
            text = server.log.read_text(errors="replace")
            if "in use" not in text:  # another process was faster to take the port
                break
        errors = [line for line in text.splitlines() if re.match(r"[EF]\d{4} |error", line)]
        raise RuntimeError(f"tritonserver ended or was not ready within {start_s:g} s:\n" + "\n".join(errors or [text]))


def _backends(folder: Path) -> Path:
    folder.mkdir()
    (folder / "python").symlink_to(SERVER / "tritonserver" / "backends" / "python")
    for name in ("tensorrt", "onnxruntime"):
        (folder / name).mkdir()
        shutil.copy(STAND_IN, folder / name)
    return folder


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(
    repository: Path,
    backends: Path,
    log: Path,
    options: Sequence[str],
    ports: Sequence[int],
    inside: Sequence[str | Path],
) -> Server:
    web, grpc = ports
    command = [
        *((which, "--pdeathsig", "TERM") if (which := shutil.which("setpriv")) else ()),  # it never outlives the tests
        *inside,
        SERVER / "tritonserver" / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name=neck-{web}-",
        *("--http-address=127.0.0.1", f"--http-port={web}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--disable-auto-complete-config", "--exit-timeout-secs=5"),
        *options,
    ]
    # the Python backend finds its venv by the first `python3` on the path
    environment = os.environ | {"PATH": f"{SERVER / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return Server(f"127.0.0.1:{web}", f"127.0.0.1:{grpc}", log, process)


def _wait(server: Server, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        if server.ready:
            return True
        time.sleep(0.05)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in _stubs(process):  # a server that was killed or crashed leaves them behind
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _stubs(process: subprocess.Popen[bytes]) -> dict[int, list[str]]:
    """The processes of a server's Python backend and their arguments, one of which is the server's process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended just now
            words = path.read_text(errors="replace").split("\0")
            if words[0].endswith("triton_python_backend_stub") and str(process.pid) in words:
                found[int(path.parent.name)] = words
    return found


def decoders(server: Server) -> list[int]:
    """Processes of the server that decode images."""
    return [pid for pid, words in _stubs(server.process).items() if any("-preprocess_" in word for word in words)]


def fake_options(output: Path, **changes: Any) -> ExportOptions:
    """How the tests export the golden case meta-dual: both necks, dynamic batch 1:4:8, not verified."""
    return golden_options("meta-dual", output, **{"batch": BatchRange(1, 4, 8), "verify": False, **changes})


def fake_plan(folder: Path, name: str = "encoder", **changes: Any) -> Path:
    """Writes NAME.plan and its manifest: an ONNX file's bytes, said to be a TensorRT plan.

    Args:
        folder: where to write it; NAME.onnx is left there too.
        name: the files' name.
        changes: fields of ExportOptions other than `fake_options` sets, such as `input_kind="uint8"`.
    """
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        source = export_onnx(fake_options(folder / f"{name}.onnx", **changes)).path
    plan = folder / f"{name}.plan"
    onnx.save(onnx.load(source), plan, save_as_external_data=False)
    return write_plan_manifest(plan, read_manifest(manifest_path(source), "onnx"))


def write_plan_manifest(plan: Path, source: dict[str, Any], **changes: Any) -> Path:
    """Writes the manifest that `neck-export trt` would write for a plan of this ONNX file."""
    signature = source["signature"]
    values = {
        "key": {},
        "precision": source["precision"],
        "flavor": "tensorrt",
        "tensorrt_version": "10.13.3.9",
        "compute_capabilities": ["8.9"],
        "gpu": {"name": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.65.06", "cuda": "13.0"},
        "options": {"version_compatible": False, "hardware_compatible": "none", "batch": signature["batch"]},
        "batch": signature["batch"],
        "inputs": signature["inputs"],
        "outputs": signature["outputs"],
        "build_seconds": 1.0,
        "layers": None,
        "onnx": source["files"][0],
        "signature": signature,
        "onnx_manifest": source,
        "verification": {"verified": False, "reason": "not verified: a fake"},
    }
    write_manifest(manifest_path(plan), "plan", values | changes, [plan])
    return plan


def fake_repository(folder: Path, model: Path, **options: Any) -> Path:
    """Makes `folder`/model_repository serve a model, as `neck-export triton` does, and returns its path."""
    output = folder / "model_repository"
    make_repository(RepositoryOptions(model=model, output=output, **options))
    return output
