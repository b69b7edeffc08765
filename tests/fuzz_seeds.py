"""Writes the first corpora of tests/cpp/fuzz from real files: fuzz_seeds.py FOLDER makes a folder for each kind."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import cpp_build
import unusual_images

from export.contract.manifest import manifest_path

DATA = Path(__file__).parent / "data"
WHOLE, CUT = b"\0\0", b"\x81\0"
"""What a file's seed begins with: the file stays whole, or loses its second half while it is read."""
OUTPUT = {"name": "feat", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}


def images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [path.read_bytes() for path in unusual_images.write_all(Path(folder))]


def safetensors() -> list[bytes]:
    """The golden encoders' files, and the header of the largest without its data."""
    files = [path.read_bytes() for path in sorted(DATA.rglob("*.safetensors"))]
    largest = max(files, key=len)
    return [*files, largest[: 8 + struct.unpack("<Q", largest[:8])[0]]]


def manifests() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for changes in ({}, cpp_build.RTX, {"files": []}):
            yield manifest_path(cpp_build.write_plan(Path(folder), b"plan", **changes)).read_bytes()


def answers() -> Iterator[bytes]:
    """A model's metadata, its config, an error, and an inference's answer with its tensor."""
    port = {"name": "feat", "datatype": "FP32", "shape": [-1, 4]}
    model = {"name": "m", "versions": ["1"], "platform": "p", "inputs": [{**port, "datatype": "BYTES"}]}
    for content in ({**model, "outputs": [port]}, {"max_batch_size": 4}, {"error": "no model m"}):
        yield WHOLE + json.dumps(content).encode()
    for name in ("a", "b"):
        text = json.dumps({"outputs": [{**OUTPUT, "name": name}]}).encode()
        yield struct.pack(">H", len(text)) + text + bytes(16)


def write(folder: Path, seeds: Iterable[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write(root / "images", images())
    write(root / "cut-images", (cut + data for data in images() for cut in (WHOLE, CUT)))
    write(root / "safetensors", (cut + data for data in safetensors() for cut in (WHOLE, CUT)))
    write(root / "manifest", (cut + data for data in manifests() for cut in (WHOLE, CUT)))
    write(root / "nested", (bytes([8 * 17 + kind] * count) for kind in range(8) for count in (1, 2, 8)))
    write(root / "answers", answers())
