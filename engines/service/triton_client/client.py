"""The client: one model of one server, over HTTP or gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .errors import ClientError, import_part, told
from .model import describe
from .pictures import normalise, read_bytes, read_pixels
from .shared import Memory, SharedMemory

Protocol = Literal["http", "grpc"]

PORTS = {"http": 8000, "grpc": 8001}


class TritonClient:
    """A connection to one model of a server, for one thread.

    Args:
        url: host and port, without a scheme; the port is 8000 (HTTP) or 8001 (gRPC) where left out.
        model: the model's name.
        version: its version; empty for the server's choice, the latest.
        protocol: `http` or `grpc`.
        memory: how tensors travel: `none` in the request, or through `system` or `cuda` shared memory, which needs the
            server on this machine.
        outputs: names or wildcards of the outputs that are wanted; empty for all.
        timeout_s: seconds that a call may take.

    Raises:
        ClientError: no server, no such model or output, or no shared memory of that kind.
    """

    def __init__(
        self,
        url: str = "localhost",
        model: str = "sam3-encoder",
        version: str = "",
        *,
        protocol: Protocol = "http",
        memory: Memory = "none",
        outputs: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> None:
        self.url = url if ":" in url else f"{url}:{PORTS[protocol]}"
        if "//" in url or not url:
            raise ClientError(f"url {url!r}: expected host:port without a scheme, such as localhost:{PORTS[protocol]}")
        self.name, self.version = model, version
        self._library = import_part(f"tritonclient.{protocol}", f"pip install 'tritonclient[{protocol}]'")
        self._type_name = import_part("tritonclient.utils", "pip install tritonclient").np_to_triton_dtype
        self._limit = {} if protocol == "http" else {"client_timeout": timeout_s}
        waits = {"connection_timeout": timeout_s, "network_timeout": timeout_s} if protocol == "http" else {}
        with told(self.url):
            self._client = self._library.InferenceServerClient(self.url, **waits)
        try:
            self._shared = None if memory == "none" else SharedMemory(self._client, memory)
            with told(self.url):
                self.model = describe(self._client, model, version, outputs, self._limit.get("client_timeout"))
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives shared memory back and closes the connection."""
        try:
            if self._shared:
                with told(self.url):
                    self._shared.close()
        finally:
            self._client.close()

    def features(self, pictures: Sequence[Path | str]) -> dict[str, np.ndarray]:
        """The features of picture files, in their order, in as few requests as the model's batch allows."""
        parts = [self.infer(self.prepare(part)) for part in self.split(pictures)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def split(self, pictures: Sequence[Path | str]) -> list[Sequence[Path | str]]:
        """Cuts a list of pictures into batches that the model takes."""
        size = self.model.max_batch
        if not pictures:
            raise ClientError("no picture was given; give one or more picture files")
        if self.model.fixed and len(pictures) % size:
            raise ClientError(f"{len(pictures)} pictures: {self.name} takes exactly {size} at once; give a multiple")
        return [pictures[start : start + size] for start in range(0, len(pictures), size)]

    def prepare(self, pictures: Sequence[Path | str]) -> np.ndarray:
        """The model's input for picture files: an ensemble takes the files' bytes, the encoder pixels of its size."""
        image = self.model.image
        if image.datatype == "BYTES":
            data = np.empty((len(pictures), *[1] * (len(image.shape) - 1)), dtype=np.object_)
            data.reshape(-1)[:] = [read_bytes(Path(path)) for path in pictures]
            return data
        raw = image.datatype == "UINT8"
        size = image.shape[1:3] if raw else image.shape[2:4]
        pixels = np.stack([read_pixels(Path(path), (size[0], size[1])) for path in pictures])
        return pixels if raw else normalise(pixels)

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model on its input, the batch first, and returns the wanted outputs by name.

        Raises:
            ClientError: the server cannot be reached or refused it, in the server's own words.
        """
        datatype = self._type_name(images.dtype)
        image = self._library.InferInput(self.model.image.name, list(images.shape), datatype)
        wanted = {tensor: self._library.InferRequestedOutput(tensor.name) for tensor in self.model.outputs}
        with told(self.url):
            if self._shared:
                image.set_shared_memory(*self._shared.put(self.model.image.name, images))
                for tensor, output in wanted.items():
                    output.set_shared_memory(*self._shared.reserve(tensor.name, tensor.bytes_of(len(images))))
            else:
                image.set_data_from_numpy(images)
            result = self._client.infer(
                self.name, [image], model_version=self.version, outputs=list(wanted.values()), **self._limit
            )
            if self._shared:
                return {one.name: self._shared.get(one, len(images)) for one in wanted}
            return {one.name: result.as_numpy(one.name) for one in wanted}
