"""The client: one model of one server, over HTTP or gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .address import connect, read_address
from .deadline import Deadline
from .errors import ClientError, import_part, told
from .images import normalize, read_bytes, read_pixels
from .model import Tensor, describe
from .shared import Memory, SharedMemory

Protocol = Literal["http", "grpc"]


class TritonClient:
    """A connection to one model of a server, for one thread.

    Args:
        url: `[https://]HOST[:PORT]`; without a scheme the port is 8000 (HTTP) or 8001 (gRPC) where left out. HTTP takes
            a path behind it. `USER:PASSWORD@` may stand before the host.
        model: the model's name.
        version: its version; empty for the server's choice, the latest.
        protocol: `http` or `grpc`.
        memory: how tensors travel: `none` in the request, or through `system` or `cuda` shared memory, which needs the
            server on this machine.
        outputs: names or wildcards of the outputs that are wanted; empty for all.
        timeout_s: seconds that a call may take, from the first byte to the last.
        user, password: for basic authentication.
        token: sent as `Authorization: Bearer TOKEN`.
        headers: further headers of every request.
        ca: file of the certificates that https trusts (PEM), else that of the environment's SSL_CERT_FILE, else the
            usual ones.

    No message contains a password, a token or a header's value.

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
        user: str = "",
        password: str = "",
        token: str = "",
        headers: Mapping[str, str] | None = None,
        ca: Path | str | None = None,
    ) -> None:
        address = read_address(url, protocol, user, password, token, headers)
        self.url = address.shown
        self.name, self.version = model, version
        self._deadline = Deadline(timeout_s, protocol, self.url)
        self._library = import_part(f"tritonclient.{protocol}", f"pip install 'tritonclient[{protocol}]'")
        parts = import_part("tritonclient.utils", "pip install tritonclient")
        self._type_name, self._refusal = parts.np_to_triton_dtype, parts.InferenceServerException
        self._connect = lambda: connect(self._library, protocol, address, ca, timeout_s)
        self._client: Any = None
        self._shared: SharedMemory | None = None
        try:
            with self._call():
                self._client = self._connect()
                if memory != "none":
                    self._shared = SharedMemory(lambda: self._client, memory, self._deadline.options)
                self.model = describe(self._client, model, version, outputs, self._deadline.options)
        except BaseException:
            if self._client is not None:
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
                with self._call():
                    self._shared.close()
        finally:
            self._client.close()

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Bounds a call and turns what goes wrong into one sentence."""
        with told(self.url), self._deadline.running(self._drop):
            yield

    def _drop(self) -> None:
        """Takes new connections: one that was given up in the middle of an answer holds the rest of it."""
        if self._client is not None:
            self._client.close()
            self._client = self._connect()

    def features(self, images: Sequence[Path | str]) -> dict[str, np.ndarray]:
        """The features of image files, in their order, in as few requests as the model's batch allows."""
        parts = [self.infer(self.prepare(part)) for part in self.split(images)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def split(self, images: Sequence[Path | str]) -> list[Sequence[Path | str]]:
        """Splits a list of images into batches that the model accepts."""
        size = self.model.max_batch
        if not images:
            raise ClientError("no image was given; pass one or more image files")
        if self.model.fixed and len(images) % size:
            raise ClientError(
                f"{len(images)} images were given, but {self.name} accepts exactly {size} images in each request; "
                f"pass {size} images or a multiple of {size}, which is then sent in several requests"
            )
        return [images[start : start + size] for start in range(0, len(images), size)]

    def prepare(self, images: Sequence[Path | str]) -> np.ndarray:
        """The model's input for image files: their bytes for an ensemble, else pixels of the encoder's size."""
        image = self.model.image
        if image.datatype == "BYTES":
            data = np.empty((len(images), *[1] * (len(image.shape) - 1)), dtype=np.object_)
            data.reshape(-1)[:] = [read_bytes(Path(path)) for path in images]
            return data
        raw = image.datatype == "UINT8"
        size = image.shape[1:3] if raw else image.shape[2:4]
        pixels = np.stack([read_pixels(Path(path), (size[0], size[1])) for path in images])
        return pixels if raw else normalize(pixels)

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model on its input, the batch first, and returns the wanted outputs by name.

        Raises:
            ClientError: the server cannot be reached, refused it in its own words, or answered something else.
        """
        with self._call():
            try:
                return self._ask(images)
            except self._refusal as error:
                if self._shared is None or "find shared memory region" not in str(error):
                    raise
            self._shared.register_again()  # the server was started again
            return self._ask(images)

    def _ask(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """One request."""
        image = self._library.InferInput(self.model.image.name, list(images.shape), self._type_name(images.dtype))
        wanted = {tensor: self._library.InferRequestedOutput(tensor.name) for tensor in self.model.outputs}
        if self._shared:
            image.set_shared_memory(*self._shared.put(self.model.image.name, images))
            for tensor, output in wanted.items():
                output.set_shared_memory(*self._shared.reserve(tensor.name, tensor.bytes_of(len(images))))
        else:
            image.set_data_from_numpy(images)
        result = self._client.infer(
            self.name,
            [image],
            model_version=self.version,
            outputs=list(wanted.values()),
            **self._deadline.options(),
        )
        return self._outputs(result, len(images))

    def _outputs(self, result: Any, batch: int) -> dict[str, np.ndarray]:
        """The answer's outputs, all that were asked for and of the shapes that the model has.

        Raises:
            ClientError: one is missing or has another shape or type.
        """
        told_of = {tensor: result.get_output(tensor.name) for tensor in self.model.outputs}
        missing = [tensor.name for tensor, output in told_of.items() if output is None]
        if missing:
            raise ClientError(
                f"{self.url}: the server's answer does not contain the outputs {', '.join(missing)}; {self._look}"
            )
        found = {}
        for tensor, output in told_of.items():
            self._check(tensor, output, batch)
            try:
                value = self._shared.get(tensor, batch) if self._shared else result.as_numpy(tensor.name)
            except (ValueError, TypeError) as error:  # fewer bytes than the shape has
                raise ClientError(
                    f"{self.url}: the output {tensor.name} in the answer is incomplete ({error}); {self._look}"
                ) from None
            if value is None:
                raise ClientError(f"{self.url}: the output {tensor.name} in the answer has no data; {self._look}")
            found[tensor.name] = value
        return found

    def _check(self, tensor: Tensor, output: Any, batch: int) -> None:
        shape, datatype = (
            (output.get("shape", ()), output.get("datatype"))
            if isinstance(output, dict)
            else (output.shape, output.datatype)
        )
        wanted = (batch, *tensor.shape[1:])
        fits = len(shape) == len(wanted) and all(side in (-1, int(of)) for side, of in zip(wanted, shape, strict=True))
        if not fits or datatype != tensor.datatype:
            raise ClientError(
                f"{self.url}: the output {tensor.name} in the answer is {datatype} {list(shape)}; expected "
                f"{tensor.datatype} {list(wanted)}; {self._look}"
            )

    @property
    def _look(self) -> str:
        return f"check that {self.url} is the address of a Triton server that serves the model {self.name}"
