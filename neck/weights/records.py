"""What a pickle's names, calls, storages and tensors become: records of ours, made without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

MOST_DIMENSIONS = 64
"""torch's own limit."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
"""What torch.save calls the storages of each type."""

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""Every type of torch by its name; vars() because getattr() on torch may import."""


class PickleError(ValueError):
    """A pickle that torch.save did not write, or that asks for something forbidden."""


class DamagedPickleError(PickleError):
    """A pickle that ends early or has bytes that make no sense."""


def shown(text: str, most: int = 80) -> str:
    """Text of a file for a message: one line, no control characters, not long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


@dataclasses.dataclass(eq=False, slots=True)
class Name:
    """A class or function that a pickle names, and no more than its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class OpaqueObject:
    """An object that a pickle would have made with a call: arguments, state and items, recorded but never executed."""

    made_by: object
    args: tuple[Any, ...] = ()
    state: object = None
    items: list[Any] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        """Name of the class, for a message."""
        made_by = self.made_by
        if str(made_by).endswith("._reconstructor") and self.args:  # copyreg's, of pickles before protocol 2
            made_by = self.args[0]
        return str(made_by) if isinstance(made_by, Name) else "object"


@dataclasses.dataclass(eq=False, slots=True)
class StorageRecord:
    """A storage of a file: `count` elements of a type, a view that begins after `first` elements."""

    key: str
    dtype: torch.dtype
    count: int
    first: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class TensorRecord:
    """A tensor of a file; positions and sizes count elements of its type."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    bits: tuple[str, ...] = ()  # of `conj`, `neg`: the stored numbers are still to be conjugated, negated


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Key:
    """A dict key that is not a string, compared by identity, so that no hostile key is ever hashed."""

    value: object


def call(made_by: object, args: object) -> object:
    """The result recorded for a call: a record of a tensor, a plain container, or an opaque object."""
    if not isinstance(made_by, Name | OpaqueObject) or not isinstance(args, tuple):
        raise PickleError(
            f"the pickle in the file calls an object of type {type(made_by).__name__}, which is not a function or class"
        )
    maker = MAKERS.get((made_by.module, made_by.name)) if isinstance(made_by, Name) else None
    return maker(*args) if maker else OpaqueObject(made_by, args)


def storage_of(identity: object) -> object:
    """The record of a persistent id, all of which torch.save writes as tuples."""
    kind = identity[0] if isinstance(identity, tuple) and identity else None
    if kind == "module" and isinstance(identity, tuple) and len(identity) > 1:  # a class and its source (before 1.6)
        return identity[1]
    if not isinstance(identity, tuple) or kind != "storage" or len(identity) not in (5, 6):
        raise PickleError("the pickle in the file contains a persistent id that does not name a tensor storage")
    _, name, key, _, count, *view = identity
    dtype = STORAGES.get(name.name) if isinstance(name, Name) and name.module in ("torch", "torch.storage") else None
    if dtype is None or not isinstance(key, str):
        raise PickleError("the pickle in the file contains a tensor storage of unknown type")
    record = StorageRecord(key, dtype, _whole(count))
    if view and view[0] is not None:
        _, first, count = view[0]
        record.first, record.count = _whole(first), _whole(count)
    return record


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise PickleError("the pickle in the file describes a tensor with an invalid size")
    return value


def _tensor(
    storage: object, offset: object, size: object, stride: object, _grad: object = None, _hooks: object = None,
    metadata: object = None,
) -> TensorRecord:  # fmt: skip
    return _tensor_v3(storage, offset, size, stride, None, None, None, metadata)


def _tensor_v3(
    storage: object, offset: object, size: object, stride: object, _grad: object, _hooks: object, dtype: object,
    metadata: object = None,
) -> TensorRecord:  # fmt: skip
    if not isinstance(storage, StorageRecord) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError(
            "the pickle in the file contains a tensor without a storage, so the file is damaged or was not written by "
            "torch.save"
        )
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        raise PickleError("the pickle in the file describes a tensor with an invalid size")
    element = DTYPES.get(dtype.name) if isinstance(dtype, Name) and dtype.module == "torch" else storage.dtype
    if element is None:
        raise PickleError(
            f"the pickle in the file contains a tensor with the data type {dtype}, which the installed version of "
            "PyTorch does not have. A newer version of PyTorch may support the data type"
        )
    bits = tuple(bit for bit in ("conj", "neg") if isinstance(metadata, dict) and metadata.get(bit))
    sides, steps = tuple(_whole(side) for side in size), tuple(_whole(step) for step in stride)
    return TensorRecord(storage, element, _whole(offset), sides, steps, bits)


def _subclass(function: object, kind: object, args: object, state: object = None) -> object:
    """A tensor of a subclass, or with attributes; read as the plain tensor, where that is how it is stored."""
    itself = isinstance(function, Name) and function.name == "_rebuild_from_type_v2"  # nested, it would recurse
    made = OpaqueObject(kind) if itself else call(function, args)
    return made if isinstance(made, TensorRecord) else OpaqueObject(kind, (made, state))


def _dict(*args: object) -> object:
    """OrderedDict() and defaultdict(factory); their items follow as operations."""
    return OpaqueObject(Name("collections", "OrderedDict"), args) if args and not isinstance(args[0], Name) else {}


def _first(value: object, *_: object) -> object:
    return value


MAKERS: dict[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("torch", "Size"): _first,
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _dict,
    ("builtins", "set"): _first,
    ("builtins", "frozenset"): _first,
    ("__builtin__", "set"): _first,
}
"""The whole list of what a call in a pickle may become besides an opaque object, all of it written above."""
