"""Which state of a training file is meant: lists the state dicts and modules of a pickle, and takes one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neck.checkpoint_keys import Layout, find_layouts
from neck.weights.records import OpaqueObject, TensorRecord, shown
from neck.weights.tensor_names import plain_name
from neck.weights.torchfile import ADVICE, CheckpointError

WORDS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")
"""What training code calls the model that it trains, the first of them first."""

MOMENTS = {
    "optimizer",
    "optimizers",
    "optim",
    "opt",
    "optimizer_state_dict",
    "optimizer_states",
    "exp_avg",
    "exp_avg_sq",
}
"""What holds tensors named as the weights that are not the weights; taken only where --state names it."""

MOST_VISITED = 2_000_000
"""Entries of all containers that are looked through; two million take 2 s (tests/hostile.py)."""

MOST_PARTS = 200_000
"""Parts of one module; the encoder has 1,162. Modules may share parts, so their number is not the pickle's."""

LONGEST = 512
"""Characters of a place or a name; Meta's longest of the encoder has 66."""

DEEPEST = 8
"""Levels of containers above a state; training code has two or three."""

MOST_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Entries:
    """A state dict, or what a module's would be.

    Attributes:
        kind: `tensors`, or the class of the module.
        tensors: records by name.
        others: names that hold what is no plain tensor but was meant as one (a DTensor, a quantized one): their class.
    """

    kind: str
    tensors: dict[str, TensorRecord]
    others: dict[str, str]

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """The trunks among the names, with the necks beside each."""
        return find_layouts([plain_name(name) for name in self.tensors])

    @property
    def fits(self) -> bool:
        """Whether a SAM 3 trunk with a neck is among the names."""
        return any(layout.necks for layout in self.layouts)

    def __str__(self) -> str:
        what = "" if self.kind == "tensors" else f"a module {self.kind} with "
        names = ", ".join(shown(name, 40) for name in list(self.tensors)[:2])
        return f"{what}{len(self.tensors)} tensors: {names}, ..." if names else f"{what}no tensors"


def find_states(path: Path, root: object) -> dict[str, Entries]:
    """Every state dict and module of a file by its dotted path; the file itself is `""`."""
    states: dict[str, Entries] = {}
    seen: set[int] = set()
    left = MOST_VISITED
    level: list[tuple[str, object]] = [("", root)]
    for _ in range(DEEPEST):
        deeper: list[tuple[str, object]] = []
        for place, node in level:
            if id(node) in seen:
                continue
            seen.add(id(node))
            if _module(node) is not None:
                states[place], spent = _flatten(path, node)
                left -= spent
                continue
            children = list(_children(node))
            left -= 1 + len(children)
            if left < 0:
                raise CheckpointError(
                    f"{path}: the file was refused, because it contains more than {MOST_VISITED:,} entries; {ADVICE}"
                )
            found = _entries(children)
            if found.tensors or found.others:
                states[place] = found
            start = f"{place}." if place else ""
            inner = [(key, value) for key, value in children if isinstance(value, dict | OpaqueObject | list)]
            deeper += [(f"{start}{key}", value) for key, value in inner if len(start) + len(key) <= LONGEST]
        level = deeper
    return states


def choose_state(path: Path, states: Mapping[str, Entries], asked: str | None) -> str:
    """The place of the state to read.

    Without `asked` it is the only one that holds the encoder, or the one that a known word names (WORDS).

    Raises:
        CheckpointError: none, or several and no word to choose by; lists what is there.
    """
    if asked is not None:
        inside = {place: entries for place, entries in states.items() if f"{place}.".startswith(f"{asked}.")}
        if not inside:
            raise CheckpointError(
                f"{path}: the file contains no state dict named {asked!r}; the file contains {listing(states)}"
            )
        states = inside
        if asked in states:
            return asked
    weights = {place: entries for place, entries in states.items() if asked or not MOMENTS & set(place.split("."))}
    fitting = [place for place, entries in weights.items() if entries.fits]
    if not fitting:
        return _least_bad(path, weights, states)
    chosen = _by_words([(place, place.split(".") if place else []) for place in fitting])
    if chosen is None:
        raise CheckpointError(
            f"{path}: the file contains several state dicts with an encoder "
            f"({', '.join(map(shown, fitting[:MOST_LISTED]))}); choose one of them with --state"
        )
    return chosen


def _least_bad(path: Path, weights: Mapping[str, Entries], states: Mapping[str, Entries]) -> str:
    """The only state, or the only one with a trunk, so that what it lacks can be said; else an error that lists all."""
    trunks = [place for place, entries in weights.items() if entries.layouts]
    if len(weights) == 1 or len(trunks) == 1:
        return (trunks or list(weights))[0]
    raise CheckpointError(
        f"{path}: no state dict in this file contains a SAM 3 image encoder; use a SAM 3 checkpoint. The file "
        f"contains {listing(states)}"
    )


def _by_words(places: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """The place that a known word, or being the only one, singles out at every depth."""
    while len(places) > 1:
        here = [place for place, rest in places if not rest]
        if here:
            return here[0]
        groups = {rest[0] for _, rest in places}
        word = next(iter(groups)) if len(groups) == 1 else next((word for word in WORDS if word in groups), None)
        if word is None:
            return None
        places = [(place, rest[1:]) for place, rest in places if rest[0] == word]
    return places[0][0]


def listing(states: Mapping[str, Entries]) -> str:
    """The states of a file for a message, those with an encoder first."""
    if not states:
        return "no tensors"
    places = sorted(states, key=lambda place: (not states[place].fits, place))
    more = f", and {len(places) - MOST_LISTED} more state dicts" if len(places) > MOST_LISTED else ""
    return ", ".join(f"{shown(place) or 'itself'} ({states[place]})" for place in places[:MOST_LISTED]) + more


def _children(node: object) -> Iterator[tuple[str, Any]]:
    """The named parts of a dict, of an object that the pickle would have made, or of a short list."""
    if isinstance(node, OpaqueObject):
        yield from ((key, value) for key, value in _attributes(node).items() if isinstance(key, str))
    elif isinstance(node, dict):
        yield from ((key, value) for key, value in node.items() if isinstance(key, str))
    elif isinstance(node, list) and len(node) <= MOST_LISTED:
        yield from ((str(index), value) for index, value in enumerate(node))


def _attributes(node: OpaqueObject) -> dict[Any, Any]:
    """An object's attributes: its state, the first of (state, slots), or what torch.fx rebuilds a graph from."""
    for state in (node.state, *(node.state if isinstance(node.state, tuple) else ()), *node.args[:1]):
        if isinstance(state, dict):
            return state
    return {}


def _module(node: object) -> dict[Any, Any] | None:
    """The attributes of a torch.nn.Module, None of anything else."""
    attributes = _attributes(node) if isinstance(node, OpaqueObject) else {}
    parts = (attributes.get("_modules"), attributes.get("_parameters"), attributes.get("_buffers"))
    return attributes if all(isinstance(part, dict) for part in parts) else None


def _entries(children: Sequence[tuple[str, Any]], kind: str = "tensors") -> Entries:
    tensors = {key: value for key, value in children if isinstance(value, TensorRecord)}
    others = {
        key: value.kind
        for key, value in children
        if isinstance(value, OpaqueObject)
        and (value.kind.startswith("torch._utils._rebuild") or value.kind.endswith("Tensor"))
    }
    return Entries(kind, tensors, others)


def _flatten(path: Path, root: object) -> tuple[Entries, int]:
    """The state dict of a module, by its `_parameters`, `_buffers` and `_modules`; how many parts it has."""
    found: list[tuple[str, Any]] = []
    pending = [("", root)]
    spent = 0
    while pending:
        prefix, node = pending.pop()
        attributes = _module(node)
        if attributes is None:
            continue
        left_out = attributes.get("_non_persistent_buffers_set")
        left_out = {name for name in left_out if isinstance(name, str)} if isinstance(left_out, list) else set()
        parts = [*attributes["_parameters"].items(), *attributes["_buffers"].items()]
        found += _named(path, prefix, [(name, value) for name, value in parts if name not in left_out])
        inner = _named(path, prefix, attributes["_modules"].items())
        pending += [(f"{name}.", value) for name, value in reversed(inner)]
        spent += 1 + len(inner) + len(parts) + len(left_out)
        if spent > MOST_PARTS:
            raise CheckpointError(
                f"{path}: the file was refused, because a module in it has more than {MOST_PARTS:,} submodules and "
                f"tensors; {ADVICE}"
            )
    return _entries(found, root.kind if isinstance(root, OpaqueObject) else "module"), spent


def _named(path: Path, prefix: str, parts: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    named = [(name, value) for name, value in parts if isinstance(name, str)]
    if any(len(prefix) + len(name) > LONGEST for name, _ in named):
        raise CheckpointError(
            f"{path}: the file was refused, because a module in it has a name of more than {LONGEST} "
            f"characters; {ADVICE}"
        )
    return [(f"{prefix}{name}", value) for name, value in named]
