"""Reads a pickle as data: nothing that it names is looked up, imported or called.

`pickletools.genops` of the standard library splits a pickle of any protocol into operations; the machine below
carries them out on plain containers. What a pickle names becomes a `Name`, what it would make of it an `OpaqueObject`
that keeps its arguments and state, and a tensor a `TensorRecord` that says where its numbers lie.

Why not torch's weights_only unpickler with opaque objects on its list of safe globals: it calls what is on that list,
makes tensors and buffers of any claimed size while it reads, knows protocol 2 only, and its list is the process's.
Why not pickle.Unpickler with a find_class of our own: its C code hashes every key (a tuple of itself twice, sixty
deep, never ends), resizes its memo to any index, and gives no place to count. So too nothing here copies what the
memo can hold: a list that is copied by every operation that names it is a file of quadratic cost.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from neck.weights.records import (
    DamagedPickleError,
    Key,
    Name,
    OpaqueObject,
    PickleError,
    StorageRecord,
    TensorRecord,
    call,
    storage_of,
)

MOST_OPERATIONS = 2_000_000
"""Of one pickle. The encoder with its EMA and AdamW's state has 53,000; two million empty dicts take 134 MB and 2 s."""


def read_pickle(file: BinaryIO, storages: dict[str, StorageRecord] | None = None) -> object:
    """Reads one pickle and leaves the file just after it.

    Args:
        file: one whose `read` gives no more than is there, whatever it is asked for, such as io.BytesIO.
        storages: is given the storages that the pickle speaks of, by their keys.

    Returns:
        None, numbers, strings, bytes, lists (sets too), tuples, dicts, and the classes above.

    Raises:
        PickleError: damaged, too long, or asks for what only running it could give.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count >= MOST_OPERATIONS:
                raise PickleError(
                    "the pickle in the file has too many operations: neck-export reads only pickles with at most "
                    f"{MOST_OPERATIONS:,} operations"
                )
            if opcode.name == "STOP":
                return machine.stack.pop()
            operation = OPERATIONS.get(opcode.name)
            if operation is None:
                raise PickleError(
                    f"the pickle in the file contains the operation {opcode.name}, which torch.save never writes and "
                    "which neck-export therefore does not execute"
                )
            operation(machine, arg)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise DamagedPickleError(f"the pickle is damaged ({type(error).__name__}: {str(error)[:80]})") from None
    raise DamagedPickleError("the pickle is damaged (its last operation, STOP, is missing)")


class _Machine:
    """The stack, the marks on it, and the memo of one pickle."""

    def __init__(self, storages: dict[str, StorageRecord]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Name] = {}

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self, _: object) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def name(self, module: str, name: str) -> Name:
        return self.names.setdefault((module, name), Name(module, name))

    def named(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.push(self.name(module, name))

    def stack_named(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a class or function is not a string")
        self.push(self.name(module, name))

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | OpaqueObject):
            raise TypeError(f"items are appended to a value of type {type(target).__name__}, which is not a list")
        (target if isinstance(target, list) else target.items).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = [(key if isinstance(key, str) else Key(key), value) for key, value in _pairs(items)]
        if isinstance(target, OpaqueObject):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError(
                f"the pickle adds key-value pairs to a value of type {type(target).__name__}, but key-value pairs can "
                "only be added to a dict"
            )

    def make_dict(self, _: object) -> None:
        items = self.since_mark()
        self.push({})
        self.update(items)

    def reduce(self, _: object) -> None:
        args, made_by = self.stack.pop(), self.stack.pop()
        self.push(call(made_by, args))

    def new_with_keywords(self, _: object) -> None:
        keywords, args, made_by = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.push(call(made_by, (args, keywords) if keywords else args))

    def instance(self, arg: str) -> None:
        args = tuple(self.since_mark())
        self.named(arg)
        self.push(call(self.stack.pop(), args))

    def call_marked(self, _: object) -> None:
        made_by, *args = self.since_mark()
        self.push(call(made_by, tuple(args)))

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OpaqueObject):
            target.state = state
        elif not isinstance(target, dict | TensorRecord):  # attributes of a state dict or a parameter: of no use here
            raise TypeError(f"attributes are set on a value of type {type(target).__name__}, which has none")

    def storage(self, _: object) -> None:
        record = storage_of(self.stack.pop())
        if isinstance(record, StorageRecord):
            self.storages[record.key] = record
        self.push(record)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a dict in the pickle has a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))


OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        ),
        _Machine.push,
    ),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, arg: None),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, arg: machine.push([])),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda machine, arg: machine.push(machine.since_mark())),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, arg: machine.extend(machine.since_mark())),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, arg: machine.since_mark().clear(),
    "DUP": lambda machine, arg: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, arg: machine.tuple_of(1),
    "TUPLE2": lambda machine, arg: machine.tuple_of(2),
    "TUPLE3": lambda machine, arg: machine.tuple_of(3),
    "DICT": _Machine.make_dict,
    "APPEND": lambda machine, arg: machine.extend([machine.stack.pop()]),
    "SETITEM": lambda machine, arg: machine.update([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, arg: machine.update(machine.since_mark()),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "INST": _Machine.instance,
    "OBJ": _Machine.call_marked,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
