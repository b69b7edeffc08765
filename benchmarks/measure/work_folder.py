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
from benchmarks.measure.backends import Backend
from benchmarks.measure.environment import available_bytes
from benchmarks.measure.worker_process import ROOT, Worker, WorkerError
from benchmarks.options import SELECTION, BenchOptions
from export.contract.manifest import data_path
from export.contract.signature import BatchRange, Signature, SignatureError, encoder_signature
from neck.config import ConfigError, EncoderConfig
from neck.pictures import PictureFolder

Job = dict[str, Any] | WorkerError
"""What a worker loads, or why it cannot be made."""

OUTPUTS = ("necks", "levels", "positions", "sam2_outputs")
"""What is asked of the encoder's outputs, as ExportOptions and encoder_signature name it."""

ROOM_BYTES = 8 << 30
"""An export at full size takes up to 2.4 GB."""

PREPARE_SECONDS = 1800.0
"""An export at full size takes half a minute, a plan on a small GPU many."""


ENCODER = ("checkpoint", *SELECTION, "config", "seed", "necks", "levels", "positions", "sam2_outputs", "images")
"""Options that name the encoder and its pictures."""


def identity(asked: BenchOptions) -> dict[str, Any]:
    """What tells the encoder from another one, a changed checkpoint or exporter included."""
    values = {name: getattr(asked, name) for name in ENCODER}
    pictures = PictureFolder.of(asked.images).path if asked.images else None
    inner = sorted(asked.adapter.glob("adapter_*")) if asked.adapter else []
    files = [path for path in (asked.checkpoint, pictures, asked.adapter, *inner) if path and path.exists()]
    stamps = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {**values, "files": stamps, "sources": sources_digest()}


def digest(values: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sources_digest() -> str:
    """Of the code that decides what is exported and run."""
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
    return {"onnx": str(path), "build_s": float(seconds_path(path).read_text()), "file_bytes": size}


class Workplace:
    """A folder for one encoder and a worker that makes what lies in it; a context that ends the worker."""

    def __init__(self, work: Path, asked: BenchOptions) -> None:
        self.asked = asked
        self.folder = work / f"encoder-{digest(identity(asked))}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ends = float("inf")  # when no file is made any more, in time.monotonic seconds
        self._worker: Worker | None = None
        self._prepared: dict[str, Any] = {}
        self.config = EncoderConfig()  # the encoder's own, once it is prepared

    def ask(self, command: str, **values: Any) -> dict[str, Any]:
        """Asks the preparing worker, which is started again where it died."""
        if self._worker is None:
            self._worker = Worker(self.folder / "prepare.log")
        try:
            return self._worker.ask(command, PREPARE_SECONDS, **values)
        except WorkerError:
            self.rest()
            raise

    def rest(self) -> None:
        """Ends the preparing worker; the next question starts one. What it holds is free for the backends."""
        if self._worker:
            self._worker.close()
        self._worker = None

    def prepare(self) -> dict[str, Any]:
        """Finds or makes the weights.

        Returns:
            `weights`, `config`, `parameters` and `signature`, as prepare.make_weights.

        Raises:
            BenchError: they cannot be read or made.
        """
        try:
            self._prepared = self.ask("weights", **self._encoder(), folder=str(self.folder), image_size=None, batch=1)
        except WorkerError as error:
            raise BenchError(f"the encoder cannot be made: {error}") from None
        self.config = EncoderConfig.from_dict(self._prepared["config"])
        return self._prepared

    def _encoder(self) -> dict[str, Any]:
        asked = self.asked
        config = asked.config.to_dict() if asked.config else None
        values = {name: getattr(asked, name) for name in (*SELECTION, "seed", *OUTPUTS)}
        paths = {name: str(path) if (path := getattr(asked, name)) else None for name in ("checkpoint", "adapter")}
        return {**values, **paths, "config": config}

    def sign(self, image_size: int | tuple[int, int] | None, batch: int) -> tuple[EncoderConfig, Signature]:
        """Config and signature at a size; None is the config's own.

        Raises:
            BenchError: a size, neck or level that cannot be.
        """
        config = self.config
        try:
            if image_size is not None:
                config = dataclasses.replace(config, image_size=image_size)  # type: ignore[arg-type]
            kept = {name: getattr(self.asked, name) for name in OUTPUTS}
            signature = encoder_signature(config, batch=BatchRange(batch, batch, batch), **kept)
        except (ConfigError, SignatureError) as error:
            raise BenchError(str(error)) from None
        if not all(side for level in signature.levels for side in signature.level_sizes[level]):
            raise BenchError(f"image size {config.image_size[0]}x{config.image_size[1]} leaves a level empty")
        return config, signature

    def jobs(self, backends: Sequence[Backend], config: EncoderConfig, signature: Signature) -> dict[str, Job]:
        """What a worker loads, by backend; the picture and the files are made where they are not there.

        Two files are made at a time, since an export keeps one core busy, but plans one by one: their builder measures.
        """
        batch, (height, width) = signature.batch.optimum, config.image_size
        place = f"{height}x{width}-b{batch}"
        values = {"batch": batch, "signature": signature.to_dict(), "config": config.to_dict()}
        image = self.folder / f"image-{place}.npy"
        if not image.is_file():
            try:
                self.ask("image", **values, **self._pictures(), path=str(image))
            except WorkerError as error:
                raise BenchError(f"the picture cannot be made: {error}") from None
        self.rest()
        values |= {name: self._prepared[name] for name in ("weights", *SELECTION)} | {"image": str(image)}
        folders = {
            one.id: self.folder / f"{one.module}-{one.precision}-{place}{'-plan' * (one.runtime == 'plan')}"
            for one in backends
            if one.file
        }
        firsts = {folder: one for one in reversed(backends) if (folder := folders.get(one.id))}
        at_once = 1 if any(one.runtime == "plan" for one in backends) or available_bytes() < ROOM_BYTES else 2
        with ThreadPoolExecutor(at_once) as pool:
            files = dict(zip(firsts, pool.map(lambda at: self._file(firsts[at], values, at), firsts), strict=True))
        found: dict[str, Job] = {}
        for one in backends:
            made: Job = files[folders[one.id]] if one.file else {"build_s": None, "file_bytes": None}
            if one.runtime == "plan" and not isinstance(made, WorkerError):
                made = self._plan(one, made, folders[one.id])
            found[one.id] = made if isinstance(made, WorkerError) else {**dataclasses.asdict(one), **values, **made}
        return found

    def _pictures(self) -> dict[str, Any]:
        """The user's folder and what of a deep picture is black and white, as JSON values."""
        given = PictureFolder.of(self.asked.images) if self.asked.images else None
        ends = dataclasses.astuple(given.value_range) if given and given.value_range else None
        return {"images": str(given.path) if given else None, "picture_range": ends}

    def _file(self, backend: Backend, values: Mapping[str, Any], folder: Path) -> Job:
        """The ONNX file of a backend, by a worker of its own."""
        path = folder / "encoder.onnx"
        if seconds_path(path).is_file():
            return about_file(path)
        folder.mkdir(exist_ok=True)
        asked = {**self._encoder(), **values, "checkpoint": self._prepared["weights"]}
        asked |= {"image_size": values["config"]["image_size"], "path": str(path)}
        asked |= {name: getattr(backend, name) for name in ("precision", "module", "runtime")}
        asked |= self._pictures()
        return self._by_itself(folder, "file", asked)

    def _plan(self, backend: Backend, made: Mapping[str, Any], folder: Path) -> Job:
        """The plan of a file, by a worker of its own: one flavour of TensorRT to a process."""
        path = folder / f"{backend.provider}.plan"
        plan = self._by_itself(folder, "plan", {"onnx": made["onnx"], "path": str(path), "flavor": backend.provider})
        if isinstance(plan, WorkerError):
            return plan
        return {**made, **plan, "build_s": made["build_s"] + plan["build_s"]}

    def _by_itself(self, folder: Path, command: str, asked: Mapping[str, Any]) -> Job:
        with Worker(folder.with_name(f"{folder.name}.log")) as worker:
            try:
                return worker.ask(command, min(PREPARE_SECONDS, max(self.ends - time.monotonic(), 0.1)), **asked)
            except WorkerError as error:
                return error

    def drop(self, config: EncoderConfig, signature: Signature) -> None:
        """Removes the files of a point that nothing runs any more (1.8 GB each at full size)."""
        height, width = config.image_size
        place = f"{height}x{width}-b{signature.batch.optimum}"
        for folder in (*self.folder.glob(f"*-{place}"), *self.folder.glob(f"*-{place}-plan")):
            shutil.rmtree(folder)

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()
