"""What the backends of a benchmark run on: the work folder, the worker that fills it, the jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError
from benchmarks.measure.backends import Backend, RunRequest
from benchmarks.measure.environment import available_bytes
from benchmarks.measure.measure_point import MeasurePoint, Schedule
from benchmarks.measure.worker_process import ROOT, Worker, WorkerError
from benchmarks.options import SELECTION, BenchOptions
from export.contract.errors import ExportError
from export.contract.manifest import data_path
from export.contract.signature import BatchRange, Signature, SignatureError, check_levels, encoder_signature
from neck.config import ConfigError, EncoderConfig
from neck.images import ImageFolder

Size = int | tuple[int, int]

ROOM_BYTES = 8 << 30
"""An export at full size takes up to 2.4 GB."""

PREPARE_SECONDS = 1800.0
"""An export at full size takes half a minute, a plan on a small GPU many."""

OUTPUTS = ("necks", "levels", "positions", "sam2_outputs")
"""Options that name the encoder's outputs, as encoder_signature calls them."""

ENCODER = ("checkpoint", *SELECTION, "config", "seed", *OUTPUTS, "images")
"""Options that name the encoder and its images."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The encoder once it is there.

    Attributes:
        encoder: what was asked, its checkpoint being the one that every backend maps.
        config, signature: at its own size.
        parameters: how many it has.
    """

    encoder: BenchOptions
    config: EncoderConfig
    parameters: int
    signature: Signature


def identity(asked: BenchOptions) -> dict[str, Any]:
    """Values that identify the encoder, including its checkpoint and exporter."""
    values = {name: getattr(asked, name) for name in ENCODER}
    images = ImageFolder.of(asked.images).path if asked.images else None
    inner = sorted(asked.adapter.glob("adapter_*")) if asked.adapter else []
    files = [path for path in (asked.checkpoint, images, asked.adapter, *inner) if path and path.exists()]
    stamps = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {**values, "files": stamps, "sources": sources_digest()}


def digest(values: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sources_digest() -> str:
    """Digest of the code that decides what is exported and run."""
    folders = ("neck", "export", "engines/builder", "engines/run", "benchmarks/measure")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files.append(ROOT / "engines" / "plan.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def seconds_path(path: Path) -> Path:
    """Beside an ONNX file that is whole: the seconds that its export took."""
    return path.with_suffix(".seconds")


def about_file(path: Path) -> dict[str, Any]:
    """`onnx`, `build_s` (by whichever run exported it) and `file_bytes` of an exported file."""
    size = path.stat().st_size + data_path(path).stat().st_size
    return {"onnx": path, "build_s": float(seconds_path(path).read_text()), "file_bytes": size}


class ArtifactCache:
    """A folder for one encoder and a worker that makes what lies in it; a context that ends the worker."""

    prepared: Prepared

    def __init__(self, work: Path, asked: BenchOptions) -> None:
        self.asked = asked
        self.folder = work / f"encoder-{digest(identity(asked))}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._worker: Worker | None = None

    def ask(self, command: str, **values: Any) -> Any:
        """Asks the preparing worker, which is started again where it died."""
        if self._worker is None:
            self._worker = Worker(self.folder / "prepare.log")
        try:
            return self._worker.ask(command, PREPARE_SECONDS, **values)
        except WorkerError:
            self.rest()
            raise

    def rest(self) -> None:
        """Stops the preparing worker to free its memory for the backends; the next request starts another."""
        if self._worker:
            self._worker.close()
        self._worker = None

    def prepare(self) -> Prepared:
        """Finds or makes the weights.

        Raises:
            BenchError: they cannot be read or made.
        """
        try:
            self.prepared = self.ask("weights", asked=self.asked, folder=self.folder)
        except WorkerError as error:
            raise BenchError(f"the encoder cannot be loaded: {error}") from None
        return self.prepared

    def point(self, image_size: Size | None, batch: int, schedule: Schedule, sweep: str | None = None) -> MeasurePoint:
        """The point of a size; None is the config's own.

        Raises:
            BenchError: a size, neck or level that cannot be.
        """
        config = self.prepared.config
        try:
            if image_size is not None:
                config = dataclasses.replace(config, image_size=image_size)  # type: ignore[arg-type]
            kept = {name: getattr(self.asked, name) for name in OUTPUTS}
            signature = encoder_signature(config, batch=BatchRange(batch, batch, batch), **kept)
            check_levels(signature, config)
        except (ConfigError, SignatureError, ExportError) as error:
            raise BenchError(str(error)) from None
        height, width = config.image_size
        name = f"{height}x{width} batch {batch}" + (" (sweep)" if sweep else "")
        return MeasurePoint(name, sweep, config, signature, schedule)

    def jobs(self, backends: Sequence[Backend], point: MeasurePoint) -> dict[str, RunRequest | WorkerError]:
        """What each backend's worker must load, or why it cannot be made; missing images and files are made.

        Two files are made at a time, since an export keeps one core busy, but plans one by one: their builder measures.
        """
        image = self.folder / f"image-{point.files}.npy"
        if not image.is_file():
            try:
                self.ask("image", asked=self.asked, signature=point.signature, path=image)
            except WorkerError as error:
                raise BenchError(f"the input image cannot be prepared: {error}") from None
        self.rest()
        made = {
            one.id: RunRequest(one, self.prepared.encoder, point.config, point.signature, image) for one in backends
        }
        firsts = {self._folder(job): job for job in reversed(made.values()) if job.backend.file}
        at_once = 1 if any(one.runtime == "plan" for one in backends) or available_bytes() < ROOM_BYTES else 2
        with ThreadPoolExecutor(at_once) as pool:
            files = dict(
                zip(firsts, pool.map(lambda job: self._file(job, point.schedule), firsts.values()), strict=True)
            )
        encoder = dataclasses.replace(self.prepared.encoder, images=None)  # what runs needs none; it would import torch
        found: dict[str, RunRequest | WorkerError] = {}
        for name, job in made.items():
            try:
                about = files[self._folder(job)] if job.backend.file else {}
                if isinstance(about, WorkerError):
                    raise about
                if job.backend.runtime == "plan":
                    about = about | self._plan(job, about, point.schedule)
                found[name] = dataclasses.replace(job, encoder=encoder, **about)
            except WorkerError as error:
                found[name] = error
        return found

    def _folder(self, job: RunRequest) -> Path:
        """Of an exported file, which several backends may run."""
        height, width = job.config.image_size
        name = f"{job.backend.module}-{job.backend.precision}-{height}x{width}-b{job.signature.batch.optimum}"
        return self.folder / (f"{name}-plan" if job.backend.runtime == "plan" else name)

    def _file(self, job: RunRequest, schedule: Schedule) -> dict[str, Any] | WorkerError:
        """The ONNX file of a backend, by a worker of its own."""
        path = self._folder(job) / "encoder.onnx"
        if seconds_path(path).is_file():
            return about_file(path)
        path.parent.mkdir(exist_ok=True)
        try:
            return self._by_itself(path.parent, schedule, "file", job=job, path=path)
        except WorkerError as error:
            return error

    def _plan(self, job: RunRequest, about: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
        """The plan of a file, by a worker of its own: one flavor of TensorRT to a process."""
        path, flavor = about["onnx"].with_name(f"{job.backend.provider}.plan"), job.backend.provider
        plan = self._by_itself(path.parent, schedule, "plan", onnx=about["onnx"], path=path, flavor=flavor)
        return {**plan, "build_s": about["build_s"] + plan["build_s"]}

    def _by_itself(self, folder: Path, schedule: Schedule, command: str, **asked: Any) -> dict[str, Any]:
        with Worker(folder.with_name(f"{folder.name}.log")) as worker:
            seconds = min(PREPARE_SECONDS, max(schedule.ends - time.monotonic(), 0.1))
            made: dict[str, Any] = worker.ask(command, seconds, **asked)
            return made

    def drop(self, point: MeasurePoint) -> None:
        """Removes the files of a point that nothing runs any more (1.8 GB each at full size)."""
        for folder in (*self.folder.glob(f"*-{point.files}"), *self.folder.glob(f"*-{point.files}-plan")):
            shutil.rmtree(folder)

    def __enter__(self) -> ArtifactCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()
