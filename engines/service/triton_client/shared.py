"""Tensors through shared memory instead of the request: system memory, or CUDA memory of one GPU."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any, Literal

import numpy as np

from .errors import ClientError, import_part
from .model import TYPES, Tensor

Memory = Literal["none", "system", "cuda"]

IN_USE_WAITS_S = (0.001, 0.01, 0.1, 1.0)
"""Over gRPC Triton (2.51) answers before it lets go of a request's regions, which then cannot be unregistered yet."""


class SharedMemory:
    """Regions of shared memory, one a tensor, known to the server until they are closed."""

    def __init__(self, client: Any, kind: Memory) -> None:  # noqa: ANN401 - tritonclient has no types
        folder = {"system": "shared_memory", "cuda": "cuda_shared_memory"}[kind]
        self._library = import_part(
            f"tritonclient.utils.{folder}", "pip install 'tritonclient[cuda]', on a GPU machine"
        )
        self._refusal = import_part("tritonclient.utils", "pip install tritonclient").InferenceServerException
        self._client, self._kind = client, kind
        self._regions: dict[str, tuple[str, Any, int]] = {}

    def reserve(self, tensor: str, size: int) -> tuple[str, int]:
        """Makes a tensor's region where there is none of its size; returns the region's name and bytes."""
        if tensor in self._regions and self._regions[tensor][2] != size:
            self._give_back(tensor)
        if tensor not in self._regions:
            self._regions[tensor] = self._make(size)
        return self._regions[tensor][0], size

    def _make(self, size: int) -> tuple[str, Any, int]:
        name = f"neck-{uuid.uuid4().hex}"
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

    def _register(self, name: str, handle: Any, size: int) -> None:  # noqa: ANN401
        if self._kind == "system":
            self._client.register_system_shared_memory(name, f"/{name}", size)
        else:
            self._client.register_cuda_shared_memory(name, self._library.get_raw_handle(handle), 0, size)

    def put(self, tensor: str, value: np.ndarray) -> tuple[str, int]:
        """Writes a tensor; returns its region's name and bytes."""
        if value.dtype == np.object_:
            raise ClientError("picture files have no fixed size for shared memory; send them without it")
        region = self.reserve(tensor, value.nbytes)
        self._library.set_shared_memory_region(self._regions[tensor][1], [np.ascontiguousarray(value)])
        return region

    def get(self, tensor: Tensor, batch: int) -> np.ndarray:
        """Copies a tensor out of its region."""
        shape, handle = [batch, *tensor.shape[1:]], self._regions[tensor.name][1]
        return np.array(self._library.get_contents_as_numpy(handle, TYPES[tensor.datatype], shape))

    def close(self) -> None:
        """Gives every region back, also where the server is gone."""
        with contextlib.ExitStack() as stack:
            for tensor in list(self._regions):
                stack.callback(self._give_back, tensor)

    def _give_back(self, tensor: str) -> None:
        name, handle, _ = self._regions.pop(tensor)
        try:
            self._unregister(name)
        finally:
            self._library.destroy_shared_memory_region(handle)

    def _unregister(self, name: str) -> None:
        unregister = getattr(self._client, f"unregister_{self._kind}_shared_memory")
        for wait_s in IN_USE_WAITS_S:
            try:
                unregister(name)
                return
            except self._refusal as error:
                if "in use" not in str(error):
                    raise
            time.sleep(wait_s)
        unregister(name)
