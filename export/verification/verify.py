"""An ONNX file against the plain PyTorch module: reference outputs, ONNX Runtime's outputs, the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import safetensors.numpy
import torch

from export.contract.extras import install
from export.contract.onnx_file import OnnxFile
from export.contract.signature import KINDS, BatchRange, Signature
from export.contract.sizes import size_text
from export.contract.targets import version_numbers
from export.graph.deployed_module import with_head
from export.verification.fidelity import FidelityError, Verdict, compare
from export.verification.rounding_simulation import (
    AS_WRITTEN,
    is_low_precision,
    simulate,
    spell_out_quantize,
    watch_finite,
)
from neck.images import ImageFolder, find_images, load_images, normalize
from neck.necks import Sam3DualViTDetNeck, forward_necks
from neck.trunk import ViTDetTrunk

Report = Callable[[str], None]
"""Takes a line that says what is being done."""

MEMORY = Path("/proc/meminfo")

SIMULATED = (
    "simulated: ONNX Runtime computes in FP32 and explicitly rounds each tensor that is FP16 or BF16 in the file"
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the plain module gives: made once, it serves every file of the same size, necks and levels.

    Attributes:
        pixels: uint8 (B, H, W, 3).
        outputs: float32 by name.
        device: where it was computed.
        notes: what is to be said of the images.
    """

    pixels: np.ndarray
    outputs: Mapping[str, np.ndarray]
    device: str
    notes: tuple[str, ...] = ()

    def image(self, signature: Signature) -> np.ndarray:
        """The images as a file with this signature takes them."""
        return self.pixels if signature.input == "uint8" else normalize(self.pixels).numpy()

    def method(self, candidate: str, how: str = "", device: str = "") -> str:
        """What was compared with what, for the verdict; `device` says where PyTorch ran, such as ` on cpu`."""
        count = len(self.pixels)
        compared = f"PyTorch FP32{device} compared with {candidate}, {count} image{'s' * (count > 1)}{how}"
        return "; ".join([compared, *self.notes])


def make_reference(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    count: int | None = None,
    images: Path | ImageFolder | None = None,
    report: Report = lambda line: None,
) -> Reference:
    """Runs the plain module in FP32, without TF32, where its weights lie.

    Args:
        encoder: the plain encoder.
        signature: which outputs, and the image's size.
        count: how many images; by default as `image_count` says of the signature's batch.
        images: a folder of images; without one the shipped image.
        report: told before the run.

    Raises:
        ImageError: images that cannot be read.
    """
    notes: list[str] = []
    pixels = reference_pixels(signature, images, count or image_count(signature.batch), notes.append)
    report("computing the reference outputs in PyTorch FP32")
    outputs = reference_outputs(encoder.at_size(signature.image_size), pixels, signature)
    return Reference(pixels, outputs, next(encoder.parameters()).device.type, tuple(notes))


class References:
    """What the plain encoder gives: computed once for each size and number of images, for all verdicts of a command.

    Args:
        encoder, images, report: as make_reference takes them.
    """

    def __init__(
        self,
        encoder: Sam3DualViTDetNeck,
        images: Path | ImageFolder | None = None,
        report: Report = lambda line: None,
    ) -> None:
        self.encoder, self.images, self.report = encoder, images, report
        self._made: dict[tuple[Any, ...], Reference] = {}

    def of(self, signature: Signature, count: int | None = None) -> Reference:
        """The reference for files with a signature, as make_reference makes it.

        Raises:
            ImageError: images that cannot be read.
        """
        count = count or image_count(signature.batch)
        key = (count, signature.image_size, signature.necks, signature.levels, signature.sam2_outputs)
        if key not in self._made:
            self._made[key] = make_reference(self.encoder, signature, count, self.images, self.report)
        return self._made[key]


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Computes FP32 in FP32, whatever the caller's program has set.

    In convolutions on a GPU torch uses TF32 by default, which keeps 10 bits of 23. Under
    `set_float32_matmul_precision("medium")` products use TF32 there, and BF16 on a CPU that has it.
    """
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def reference_pixels(
    signature: Signature, images: Path | ImageFolder | None, count: int, say: Report = lambda line: None
) -> np.ndarray:
    """Images to verify on: uint8 (count, H, W, 3), from a folder or, without one, the image that the package ships.

    Without a folder the further images of a batch are the shipped one shifted sideways. `say` is told of images
    deeper than 8 bits.
    """
    if images is not None:
        folder = ImageFolder.of(images)
        paths = find_images(folder.path)[:count]
        pixels = load_images(paths, signature.image_size, folder.value_range, say)
        return pixels[np.arange(count) % len(pixels)]
    shipped = load_images([Path(__file__).parent.parent / "images" / "astronaut.jpg"], signature.image_size)[0]
    return np.stack([np.roll(shipped, turn * shipped.shape[1] // count, axis=1) for turn in range(count)])


def reference_outputs(encoder: Sam3DualViTDetNeck, pixels: np.ndarray, signature: Signature) -> dict[str, np.ndarray]:
    """Outputs of the plain module in FP32, features and positions of every neck and level of the signature.

    Args:
        encoder: the plain encoder, set to the images' size; where the signature has a head, with it: the mask
            decoder's convolutions run after the neck's, as the model runs them.
        pixels: uint8 (B, H, W, 3).
        signature: which outputs.
    """
    encoder = with_head(encoder, signature)
    images = normalize(pixels).to(next(encoder.parameters()).device)
    with exact_fp32(), torch.inference_mode():
        outputs = forward_necks(encoder, images, signature.necks, signature.levels)
        if encoder.sam2_head is not None:
            feats, _ = outputs["sam2"]
            feats[:] = map(encoder.sam2_head, signature.levels, feats)
    return {
        signature.spec(neck, kind, level).name: tensor.float().cpu().numpy()
        for neck, pair in outputs.items()
        for kind, maps in zip(KINDS, pair, strict=True)
        for level, tensor in zip(signature.levels, maps, strict=True)
        if level in signature.levels_of(neck)
    }


def verify_onnx(
    file: Path | OnnxFile,
    signature: Signature,
    reference: Reference,
    precision: str,
    *,
    overrides: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
) -> Verdict:
    """Compares an ONNX file's outputs with the plain module's.

    An FP16 or BF16 file is judged through its rounding simulation, an FP32 file in ONNX Runtime as it is.

    Args:
        file: the ONNX file, its weights beside it.
        signature: its contract.
        reference: what the plain module gives.
        precision: which tolerances apply.
        overrides: relative L2 by output name or wildcard.
        report: told of every step.

    Raises:
        FidelityError: outputs that the reference lacks, an override that fits none.
    """
    image = reference.image(signature)
    file = OnnxFile.of(file)
    model, folder = file.load()
    low = is_low_precision(model)
    report(f"running the file in ONNX Runtime{', in FP32 with explicit rounding to FP16 or BF16' if low else ''}")
    rounded = simulate(model) if low else []
    names = [spec.name for spec in signature.outputs]
    candidate = dict(zip(names, run_model(model, folder, image), strict=True))
    if signature.positions == "file":
        stored = safetensors.numpy.load_file(positions_path(file.path))
        shapes = {name: (len(image), *array.shape[1:]) for name, array in stored.items()}
        candidate |= {name: np.broadcast_to(array, shapes[name]) for name, array in stored.items()}
    method = reference.method(f"ONNX Runtime {require_runtime().__version__}", f", {SIMULATED}" if low else "")
    verdict = compare(reference.outputs, candidate, precision, method, overrides, signature.dtype)
    if rounded and any(comparison.non_finite for comparison in verdict.comparisons):
        report("searching for the first tensor that contains NaN or infinity")
        verdict = dataclasses.replace(verdict, first_bad=first_non_finite(model, rounded, folder, image))
    return verdict


def positions_path(path: Path) -> Path:
    """Where the position encodings lie when they are not outputs of the graph."""
    return path.with_name(path.stem + ".positions.safetensors")


def require_runtime() -> ModuleType:
    """ONNX Runtime.

    Raises:
        FidelityError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise FidelityError(
            f"the file cannot be verified, because ONNX Runtime is not installed; run {install('cpu')}, or "
            "use --no-verify"
        ) from None
    return onnxruntime


def check_memory(signature: Signature, encoder: Sam3DualViTDetNeck) -> None:
    """Refuses at once where ONNX Runtime cannot hold a global block's scores and their softmax.

    Raises:
        FidelityError: saying what it takes and what is free.
    """
    if not isinstance(encoder.trunk, ViTDetTrunk) or not MEMORY.is_file():
        return
    found = re.search(r"MemAvailable: *(\d+) kB", MEMORY.read_text())
    tokens, heads = math.prod(encoder.trunk.grid), encoder.trunk.config.num_heads
    needed = 2 * image_count(signature.batch) * heads * tokens**2 * 4
    if found and needed > int(found[1]) * 1024:
        height, width = signature.image_size
        raise FidelityError(
            f"verification at {height}x{width} pixels needs {size_text(needed)} of memory for the attention "
            f"of one block, but only {size_text(int(found[1]) * 1024)} are free.\nUse a smaller --image-size "
            "or --batch, or --no-verify"
        )


def image_count(batch: BatchRange) -> int:
    """How many images a file is verified on: two where the batch is dynamic, to see that they do not mix."""
    return max(batch.minimum, min(batch.maximum, 2))


def run_model(model: ir.Model, folder: Path, image: np.ndarray) -> list[np.ndarray]:
    """Runs a model whose external weights lie in `folder` in ONNX Runtime on the CPU."""
    return run_session(open_model(model, folder), {"image": image})


def run_session(session: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a session of `open_model`.

    Its run is one long call, during which Python sees no signal, so it has a thread of its own: Ctrl-C ends it at once.
    """
    run = require_runtime().RunOptions()
    with ThreadPoolExecutor(1) as thread:
        try:
            return list(thread.submit(session.run, None, dict(feeds), run).result())
        except BaseException:
            run.terminate = True
            raise


def open_model(model: ir.Model, folder: Path) -> Any:
    """A session on the CPU of a model whose external weights lie in `folder`, its Q and DQ run as they are written.

    Raises:
        FidelityError: ONNX Runtime does not load it, such as one of an opset that is newer than its version.
    """
    ort = require_runtime()
    if version_numbers(ort.__version__) < (1, 24) and model.opset_imports.get("", 0) >= 23:
        spell_out_quantize(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The default order computes scalar outputs last and keeps the large tensors that they are computed from: 20.6 GB
    # instead of 8.7 GB for a full-size FP16 file whose 97 softmaxes and layer norms are watched (ONNX Runtime 1.32).
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry(*AS_WRITTEN)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common class of its own
        raise FidelityError(
            f"ONNX Runtime {ort.__version__} cannot load the graph: {' '.join(str(error).split())[:300]}.\nExport the "
            "encoder with --opset auto, install a newer ONNX Runtime, or skip the verification with --no-verify"
        ) from None


def first_non_finite(model: ir.Model, rounded: list[ir.Value], folder: Path, image: np.ndarray) -> str | None:
    """The first node in the order of computation whose result is not finite, by module path and operator."""
    names = watch_finite(model.graph, rounded)
    sums = run_model(model, folder, image)
    return next((name for name, total in zip(names, sums, strict=True) if not np.isfinite(total)), None)
