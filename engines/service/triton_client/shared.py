"""Tensors through shared memory instead of the request: system memory, or CUDA memory of one GPU."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import ClientError, import_part
from .model import TYPES, Tensor

Memory = Literal["none", "system", "cuda"]

IN_USE_WAITS_S = (0.001, 0.01, 0.1, 1.0)
"""Over gRPC Triton (2.51) answers before it lets go of a request's regions, which then cannot be unregistered yet."""

NAME = re.compile(r"neck-client-([0-9a-f]+)-(\d+)-(\d+)-[0-9a-f]{16}")
"""Of a region: the namespace of processes, the process, when it started, and a number of the region's own."""

PLACE = Path("/dev/shm")


class SharedMemory:
    """Regions of shared memory, one a tensor, known to the server until they are closed.

    What a client leaves behind that was killed is removed by the next one on the machine.

    Args:
        client: gives tritonclient's client.
        kind: `system` or `cuda`.
        options: `Deadline.options`, what each of its methods is given beside.
    """

    def __init__(
        self, client: Callable[[], Any], kind: Memory, options: Callable[..., dict[str, Any]] = lambda **_: {}
    ) -> None:
        folder = {"system": "shared_memory", "cuda": "cuda_shared_memory"}[kind]
        self._library = import_part(
            f"tritonclient.utils.{folder}", "pip install 'tritonclient[cuda]' on a machine with an NVIDIA GPU"
        )
        self._refusal = import_part("tritonclient.utils", "pip install tritonclient").InferenceServerException
        self._client, self._kind, self._options = client, kind, options
        self._regions: dict[str, tuple[str, Any, int]] = {}
        self._remove_stale()

    def reserve(self, tensor: str, size: int) -> tuple[str, int]:
        """Makes a tensor's region if none of its size exists; returns the region's name and bytes."""
        if tensor in self._regions and self._regions[tensor][2] != size:
            self._give_back(tensor)
        if tensor not in self._regions:
            self._regions[tensor] = self._make(size)
        return self._regions[tensor][0], size

    def put(self, tensor: str, value: np.ndarray) -> tuple[str, int]:
        """Writes a tensor; returns its region's name and bytes."""
        if value.dtype == np.object_:
            raise ClientError(
                "image files have no fixed size, so they cannot be sent through shared memory; leave out "
                "--shared-memory"
            )
        region = self.reserve(tensor, value.nbytes)
        self._library.set_shared_memory_region(self._regions[tensor][1], [np.ascontiguousarray(value)])
        return region

    def get(self, tensor: Tensor, batch: int) -> np.ndarray:
        """Copies a tensor out of its region."""
        shape, handle = [batch, *tensor.shape[1:]], self._regions[tensor.name][1]
        return np.array(self._library.get_contents_as_numpy(handle, TYPES[tensor.datatype], shape))

    def register_again(self) -> None:
        """Registers every region again after the server was restarted."""
        for name, handle, size in self._regions.values():
            with contextlib.suppress(self._refusal):  # it knows this one still
                self._register(name, handle, size)

    def close(self) -> None:
        """Gives every region back, also where the server is gone."""
        with contextlib.ExitStack() as stack:
            for tensor in list(self._regions):
                stack.callback(self._give_back, tensor)

    def _make(self, size: int) -> tuple[str, Any, int]:
        name = f"neck-client-{_namespace():x}-{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:16]}"
        if self._kind == "system":
            handle = self._library.create_shared_memory_region(name, f"/{name}", size, create_only=True)
        else:
            handle = self._library.create_shared_memory_region(name, size, 0)
        try:
            self._register(name, handle, size)
        except BaseException:
            self._library.destroy_shared_memory_region(handle)
            raise
        return name, handle, size

    def _register(self, name: str, handle: Any, size: int) -> None:
        client, options = self._client(), self._options()
        if self._kind == "system":
            client.register_system_shared_memory(name, f"/{name}", size, **options)
        else:
            client.register_cuda_shared_memory(name, self._library.get_raw_handle(handle), 0, size, **options)

    def _give_back(self, tensor: str) -> None:
        name, handle, _ = self._regions.pop(tensor)
        try:
            self._unregister(name)
        finally:
            self._library.destroy_shared_memory_region(handle)

    def _unregister(self, name: str) -> None:
        unregister = getattr(self._client(), f"unregister_{self._kind}_shared_memory")
        for wait_s in IN_USE_WAITS_S:
            try:
                unregister(name, **self._options())
                return
            except self._refusal as error:
                if "in use" not in str(error):
                    raise
            time.sleep(wait_s)
        unregister(name, **self._options())

    def _remove_stale(self) -> None:
        """Removes regions of clients on this machine that live no more: on the server, and their memory."""
        status = getattr(self._client(), f"get_{self._kind}_shared_memory_status")
        known = status(**self._options(as_json=True))
        listed = known.get("regions", {}) if isinstance(known, dict) else [region["name"] for region in known]
        for name in filter(is_stale, list(listed)):
            with contextlib.suppress(self._refusal):  # it is in use, or another client was faster
                self._unregister(name)
        for path in PLACE.glob("neck-client-*"):
            if is_stale(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def is_stale(name: str) -> bool:
    """Whether a region's name is of a process of this namespace that lives no more."""
    found = NAME.fullmatch(name)
    if not found or int(found[1], 16) != _namespace() or not _namespace():
        return False
    return _started(int(found[2])) != int(found[3])


def _namespace() -> int:
    """The namespace of processes, 0 where there is none: another container's process 7 is not ours."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(process: int) -> int:
    """When a process started, in ticks since the boot (proc(5), stat's field 22), 0 where there is none such."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0
