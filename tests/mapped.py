"""Whether a tensor's numbers lie in the mapped file, as the kernel tells: no figure of memory is judged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Whether all of a contiguous tensor lies in one region that this process has mapped from the file."""
    start = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        region, *_, name = line.split(maxsplit=5)
        first, last = (int(side, 16) for side in region.split("-"))
        if name == str(path.resolve()) and first <= start and start + tensor.nbytes <= last:
            return True
    return False
