"""What the encoder would have given and the file does not: it may be passed on, and reading it is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engines.live.locate_encoder import AttachError


class NotComputedError(AttachError, AttributeError):
    """A value that the attached file does not compute was read; an AttributeError too, so that hasattr is answered."""


def _shaped(name: str) -> Callable[..., Any]:
    def method(self: NotComputed, *args: Any, **options: Any) -> NotComputed:
        like = getattr(torch.empty(self.shape, device="meta"), name)(*args, **options)
        return NotComputed(self.what, like.shape, self.dtype, self.device, self.source)

    return method


def _moved(name: str) -> Callable[..., Any]:
    def method(self: NotComputed, *args: Any, **options: Any) -> NotComputed:
        like = getattr(torch.empty((), dtype=self.dtype, device=self.device), name)(*args, **options)
        return NotComputed(self.what, self.shape, like.dtype, like.device, self.source)

    return method


def _combined(name: str) -> Callable[..., Any]:
    def method(self: NotComputed, other: Any) -> NotComputed:
        shape = torch.broadcast_shapes(self.shape, getattr(other, "shape", ()))
        return NotComputed(self.what, shape, self.dtype, self.device)

    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: NotComputed, *args: object, **options: object) -> Any:
        raise self.error(name)

    return method


class NotComputed:
    """Stands where a tensor would: it has a shape, a type and a place, and no value.

    It is no Tensor: torch.compile would look into one.

    Args:
        what: what it is, for the error.
        shape, dtype, device: of the tensor.
        source: the run of the file (adapter.Run) that it belongs to; other views of it keep that.
    """

    requires_grad = False

    def __init__(
        self,
        what: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        source: Any = None,
    ) -> None:
        self.what, self.shape, self.dtype, self.device, self.source = what, torch.Size(shape), dtype, device, source

    view, reshape, permute, transpose, flatten, unflatten = map(
        _shaped, ("view", "reshape", "permute", "transpose", "flatten", "unflatten")
    )
    to, float, half, bfloat16, cpu, cuda, contiguous, detach = map(
        _moved, ("to", "float", "half", "bfloat16", "cpu", "cuda", "contiguous", "detach")
    )
    # transformers 5.24's Sam3TrackerModel adds to its coarsest level and then drops it
    __add__, __radd__, __sub__, __mul__, __rmul__ = map(_combined, ("add", "add", "sub", "mul", "mul"))
    __getitem__, __iter__, __bool__, __float__, __int__, __array__, __eq__, __lt__, __gt__ = map(
        _refused, ("[]", "iter", "bool", "float", "int", "numpy", "==", "<", ">")
    )
    __hash__ = object.__hash__

    @property
    def ndim(self) -> int:
        """How many sides the shape has."""
        return len(self.shape)

    def dim(self) -> int:
        """The same."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one side."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def error(self, name: str) -> NotComputedError:
        """What to raise where something reads it."""
        return NotComputedError(
            f"{self.what} ({name}) is not among the values that the attached file computes; use detach(model) to "
            "have the model's own encoder compute it"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls where it is an argument of a function.

        Raises:
            NotComputedError: for all but tensor + this.
        """
        name = getattr(func, "__name__", str(func))
        if name in ("add", "mul") and len(args) == 2:
            first, second = args if isinstance(args[0], NotComputed) else args[::-1]
            return first + second
        raise _find((args, kwargs)).error(name)

    def __repr__(self) -> str:
        return f"NotComputed({self.what}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> NotComputed:
        """Itself: it holds nothing that could be changed."""
        return self

    def __reduce__(self) -> Any:
        """Without its run: saved features are read without the file."""
        return NotComputed, (self.what, tuple(self.shape), self.dtype, self.device)


def _find(value: Any) -> Any:
    """The first NotComputed in nested arguments; there is one, or torch would not have asked."""
    if isinstance(value, NotComputed):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for one in inner if (found := _find(one)) is not None), None)
