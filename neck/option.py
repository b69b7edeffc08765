"""Options of the command line are fields of dataclasses, and each is declared once: an annotation carries its help.

    keep_fp32: Annotated[tuple[str, ...], Option("Keep this module in FP32; repeatable.", "Precision")] = ()

No torch and no typer here: `--help` reads these declarations, and so does every program that calls a stage.
"""

from __future__ import annotations

import builtins
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

MISSING = dataclasses.MISSING
UNSET: Any = object()
"""No default: the option must be given."""


class OptionError(ValueError):
    """A value that an option does not take.

    Args:
        message: what was given and what is expected.
        name: the option; without one it is the option whose value was parsed.
    """

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


@dataclasses.dataclass(frozen=True)
class Option:
    """How a field is given on the command line.

    Attributes:
        help: a full sentence, with an example where that helps.
        panel: the heading under which `--help` lists the option.
        name: the option's name if it is not the field's. With dashes in front it is the only spelling, so that a
            switch has no `--no-` form.
        read: the type that is read from the command line if it is not the field's own.
        default: what is read if nothing is given, if that is not the field's own default.
        parse: makes the field's value of what was read, and of what `also` read.
        always: call `parse` for None, too: nothing was given.
        also: further options that `parse` takes.
        argument: whether the value stands alone, without a name.
        settings: further arguments of typer.Option, such as min.
    """

    help: str
    panel: str = "Options"
    name: str = ""
    read: Any = None
    default: Any = UNSET
    parse: Callable[..., Any] | None = None
    always: bool = False
    also: tuple[Option, ...] = ()
    argument: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def but(self, **changed: Any) -> Option:
        """The same option with other values of these attributes."""
        return dataclasses.replace(self, **changed)

    def key(self, field: str = "") -> str:
        """The parameter's name."""
        return field if field and self.name.startswith("--") else self.name.lstrip("-").replace("-", "_") or field


class _Names(dict[str, Any]):
    """What annotations name; a type that only type checkers import is any object."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, object)


class Group:
    """Marks a field whose value is a dataclass of further options."""


def declared(annotation: Any) -> tuple[Any, Option | type | None]:
    """The type of an annotation, and its option, or the dataclass of a group; None if it is neither."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    kind, *marks = get_args(annotation)
    found = next((mark for mark in marks if isinstance(mark, Option)), None)
    return kind, found or (kind if Group in marks else None)


def fields(options: type) -> Iterator[tuple[dataclasses.Field[Any], Option | type]]:
    """Every field of a dataclass that is an option or a group; an option's `read` and `default` are filled in."""
    names = vars(sys.modules[options.__module__])
    for field in dataclasses.fields(options):
        kind, found = declared(eval(str(field.type), names, _Names(names)))
        if isinstance(found, Option):
            given = found.default
            if given is UNSET and (found.read or isinstance(field.default, tuple)):
                given = None if _has_default(field) else UNSET
            elif given is UNSET and field.default is not MISSING:
                given = field.default
            read = list[get_args(kind)[0]] if get_origin(kind) is tuple else kind  # type: ignore[misc]
            found = found.but(read=found.read or read, default=given)
        if found:
            yield field, found


def parameters(options: type) -> Iterator[tuple[str, Option]]:
    """Name and declaration of every option of a dataclass and of its groups."""
    for field, found in fields(options):
        if isinstance(found, Option):
            yield found.key(field.name), found
            yield from ((one.key(), one) for one in found.also)
        else:
            yield from parameters(found)


def build(options: type, given: Mapping[str, Any]) -> Any:
    """The dataclass with the values that the command line gave.

    Raises:
        OptionError: a value that an option does not take.
    """
    values = {}
    for field, found in fields(options):
        if not isinstance(found, Option):
            values[field.name] = build(found, given)
            continue
        value = given[found.key(field.name)]
        value = (tuple(value) or None) if isinstance(value, list) else value
        if found.parse and (value is not None or found.always):
            try:
                value = found.parse(value, *(given[one.key()] for one in found.also))
            except OptionError as error:
                error.name = error.name or found.key(field.name).replace("_", "-")
                raise
        if value is not None or not _has_default(field):
            values[field.name] = value
    return options(**values)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
