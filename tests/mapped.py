"""Whether tensors' numbers lie in the mapped file, as the kernel tells: no figure of memory is judged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def are_mapped(tensors: Iterable[Tensor], path: Path) -> list[bool]:
    """Of each contiguous tensor, whether all of it lies in a region that this process has mapped from the file."""
    lines = [line.split(maxsplit=5) for line in MAPS.read_text().splitlines()]
    regions = [line[0].split("-") for line in lines if line[-1] == str(path.resolve())]
    spans = [(int(first, 16), int(last, 16)) for first, last in regions]
    places = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    return [any(first <= start and end <= last for first, last in spans) for start, end in places]
