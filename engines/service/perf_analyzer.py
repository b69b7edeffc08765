"""The `perf_analyzer` line that measures a served model, and an input file for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from engines.service.served_model import Source, TritonError
from export.contract.atomic import disk_errors

IMAGE = Path(__file__).parent.parent.parent / "export" / "images" / "astronaut.jpg"


def perf_line(source: Source, name: str, folder: Path | None = None) -> str:
    """The command that measures a model of a running Triton over gRPC, at 1 to 4 requests at a time.

    Options are those of perf_analyzer's documentation (cli and input_data): `--shape` has no batch where the model's
    config has a largest batch, and `-b` is then the batch of every request.

    Args:
        source: the file that is served.
        name: the model's name.
        folder: what `write_input` wrote; without one perf_analyzer sends random data.
    """
    shape = source.image.shape[1:] if source.batch.dynamic else source.image.shape
    words = ["perf_analyzer", "-m", name, "-i", "grpc", "-u", "localhost:8001"]
    words += ["--shape", f"{source.image.name}:{','.join(map(str, shape))}"]
    words += ["-b", str(source.batch.optimum)] if source.batch.dynamic else []
    words += ["--input-data", str(folder) if folder else "random", "--concurrency-range", "1:4", "--percentile", "95"]
    return shlex.join(words)


def write_input(source: Source, folder: Path) -> Path:
    """Writes the packaged image as a model's input, in the form that `--input-data FOLDER` reads.

    The file has the input's name and holds one request's data row by row; of a dynamic batch that is one image.

    Raises:
        TritonError: it cannot be written.
    """
    from neck.images import load_images, normalize

    height, width = source.image.shape[2:] if source.image.dtype == "float32" else source.image.shape[1:3]
    count = 1 if source.batch.dynamic else source.batch.optimum
    pixels = load_images([IMAGE], (int(height), int(width))).repeat(count, axis=0)
    data = normalize(pixels).numpy() if source.image.dtype == "float32" else pixels
    path = folder / source.image.name
    with disk_errors(TritonError, folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    return path
