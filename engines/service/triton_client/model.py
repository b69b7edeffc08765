"""What the server says of a model."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import ClientError

TYPES = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "BYTES": np.object_}
"""Triton's names of the types that the encoder's files have, bfloat16 aside, which numpy lacks."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of the model: Triton's type name, and its shape, the batch first (-1 where dynamic)."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def bytes_of(self, batch: int) -> int:
        """The bytes of a batch."""
        return batch * math.prod(self.shape[1:]) * np.dtype(TYPES[self.datatype]).itemsize


@dataclasses.dataclass(frozen=True)
class Model:
    """The server's metadata of a model; it accepts 1 to `max_batch` images, or exactly `max_batch` if fixed."""

    image: Tensor
    outputs: tuple[Tensor, ...]
    max_batch: int
    fixed: bool


def describe(
    client: Any,
    name: str,
    version: str,
    outputs: Sequence[str],
    options: Callable[..., dict[str, Any]] = lambda **_: {},
) -> Model:
    """Asks the server for the inputs and outputs of a model.

    Args:
        client: tritonclient's.
        name, version: the model; an empty version is the latest.
        outputs: names or wildcards of the outputs that are wanted; empty for all.
        options: `Deadline.options`, what each method is given beside.

    Raises:
        ClientError: the model is not ready, or has no such outputs, or is no encoder.
    """

    if not client.is_model_ready(name, version, **options()):
        try:
            index = client.get_model_repository_index(**options(as_json=True))
        except Exception as error:  # tritonclient's own: a server may keep its list of models to itself
            why = " ".join(str(error).split())
            if "restricted" not in why and "403" not in why:
                raise
            raise ClientError(
                f"the model {name} is not ready, and the server does not allow clients to list its models "
                f"({why}); check the model's name and the server's log"
            ) from None
        raise ClientError(_why_not_ready(index, name, version))
    metadata = client.get_model_metadata(name, version, **options(as_json=True))
    config = client.get_model_config(name, version, **options(as_json=True))
    inputs, found = (
        [Tensor(one["name"], one["datatype"], tuple(map(int, one["shape"]))) for one in metadata[key]]
        for key in ("inputs", "outputs")
    )
    names = [one.name for one in found]
    unknown = [pattern for pattern in outputs if not fnmatch.filter(names, pattern)]
    if unknown:
        raise ClientError(f"the model {name} has no output {', '.join(unknown)}; choose from {', '.join(names)}")
    if len(inputs) != 1:
        raise ClientError(
            f"the model {name} has {len(inputs)} inputs, but an encoder or its ensemble has exactly one, the "
            "image; check the model's name"
        )
    chosen = [one for one in found if not outputs or any(fnmatch.fnmatchcase(one.name, each) for each in outputs)]
    for one in (*inputs, *chosen):
        if one.datatype not in TYPES:
            raise ClientError(
                f"the tensor {one.name} is {one.datatype}, which numpy does not support; export the encoder "
                "with --output-dtype fp32"
            )
    first = inputs[0].shape[0]
    most = first if first > 0 else max(1, int(config.get("config", config).get("max_batch_size", 1)))
    return Model(inputs[0], tuple(chosen), most, first > 0)


def _why_not_ready(index: Any, name: str, version: str) -> str:
    entries = index.get("models", []) if isinstance(index, dict) else index
    here = [one for one in entries if one["name"] == name]
    if not here:
        ready = sorted({one["name"] for one in entries if one.get("state") == "READY"})
        return f"the server has no model {name}; the models that are ready are: {', '.join(ready) or 'none'}"
    states = [
        f"version {one.get('version', '?')} {one.get('state', '')} {one.get('reason', '')}".strip() for one in here
    ]
    which = f"{name}, version {version}," if version else name
    return f"the model {which} is not ready; the server reports {'; '.join(states)}"
