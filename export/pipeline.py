"""Checkpoint -> verified ONNX file: the one function behind `neck-export onnx`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import safetensors.torch
import torch

from export.attention import AttentionForm
from export.deploy import DeployEncoder
from export.fidelity import Verdict, check_overrides
from export.manifest import (
    check_files,
    data_path,
    file_entry,
    manifest_path,
    publish,
    read_manifest,
    replace_manifest,
    sha256,
    staging,
    write_manifest,
)
from export.precision import TORCH_TYPES, TYPES, Precision, lower
from export.rewrite import Rewrites
from export.signature import BatchRange, InputKind, Positions, Signature, encoder_signature
from export.trace import ExportError, trace
from export.upsampling import Upsampling
from export.verify import Report, positions_path, verify_onnx
from neck.checkpoint import load_encoder, random_encoder
from neck.config import EncoderConfig, check_image_size
from neck.necks import Sam3DualViTDetNeck
from neck.trunk import ViTDetTrunk
from neck.weightfile import find_file

NUMPY_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export; the command line's options, whose help says more.

    Attributes:
        checkpoint: a checkpoint, or None for seeded random weights.
        config: the architecture where the checkpoint does not tell it.
        image_size: (height, width) in pixels, or None for the config's.
        verify: whether to compare the file with PyTorch before it gets its name.
    """

    output: Path
    checkpoint: Path | None = None
    config: EncoderConfig | None = None
    seed: int = 0
    image_size: int | tuple[int, int] | None = None
    batch: BatchRange = BatchRange()
    necks: str = "sam3"
    levels: str = "all"
    positions: Positions = "graph"
    input_kind: InputKind = "float"
    precision: Precision = "fp32"
    attention: AttentionForm = "auto"
    upsampling: Upsampling = "auto"
    keep_fp32: tuple[str, ...] = ()
    output_precision: Precision | None = None
    opset: int | None = None
    rewrites: Rewrites = Rewrites()
    verify: bool = True
    images: Path | None = None
    tolerances: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What came of an export: the file, its manifest, and the verdict, None where none was asked."""

    path: Path
    manifest: dict[str, Any]
    verdict: Verdict | None

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies."""
        return manifest_path(self.path)


class RejectedError(Exception):
    """The file does not compute what PyTorch computes; nothing was left under its name."""

    def __init__(self, path: Path, verdict: Verdict) -> None:
        super().__init__(f"{path}: rejected, {', '.join(verdict.failed_names)} left tolerance")
        self.path, self.verdict = path, verdict


def export_onnx(options: ExportOptions, report: Report = lambda line: None) -> ExportResult:
    """Exports the encoder to an ONNX file that is proved equal to it, with its weights and manifest beside it.

    Args:
        options: what to export and where.
        report: told of every step.

    Raises:
        CheckpointError, ConfigError, SignatureError, PictureError, ExportError: something given cannot be used.
        RejectedError: the file's outputs left tolerance.
    """
    report("weights: " + (str(options.checkpoint) if options.checkpoint else f"random, seed {options.seed}"))
    encoder = load(options)
    signature = sign(options, encoder)
    check_overrides(options.tolerances, [spec.name for spec in signature.outputs])
    with _disk_errors(options.output), ThreadPoolExecutor(1) as background, staging(options.output) as folder:
        _check_room(options, encoder, signature)
        origin = background.submit(_origin, options)
        staged = folder / options.output.name
        model = write_onnx(
            encoder,
            signature,
            staged,
            precision=options.precision,
            rewrites=options.rewrites,
            report=report,
            attention=options.attention,
            keep_fp32=options.keep_fp32,
            output_precision=options.output_precision,
            opset=options.opset,
            upsampling=options.upsampling,
        )
        verdict = None
        if options.verify:
            verdict = verify_onnx(
                staged,
                signature,
                encoder,
                options.precision,
                images=options.images,
                overrides=options.tolerances,
                report=report,
            )
            if not verdict.passed:
                raise RejectedError(options.output, verdict)
        report("hashes and manifest")
        values = _manifest(options, encoder, signature, model, verdict) | {"weights": origin.result()}
        manifest = write_manifest(manifest_path(staged), "onnx", values, sorted(folder.iterdir()))
        publish(folder, options.output)
    return ExportResult(options.output, manifest, verdict)


def verify_file(
    path: Path,
    checkpoint: Path | None = None,
    images: Path | None = None,
    tolerances: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
) -> Verdict:
    """Verifies a file that was exported before, and writes the verdict into its manifest.

    Args:
        path: the ONNX file.
        checkpoint: its weights, where they are no longer where the manifest says.
        images, tolerances, report: as in verify_onnx.

    Raises:
        ManifestError: the manifest is missing or the files are not those that it speaks of.
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
        RejectedError: the outputs left tolerance; the manifest says so too.
    """
    where = manifest_path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file; export it by `neck-export onnx`")
    manifest = read_manifest(where, "onnx")
    report("hashes")
    check_files(where, manifest)
    report("weights")
    encoder = manifest_encoder(where, manifest, checkpoint)
    signature = Signature.from_dict(manifest["signature"])
    verdict = verify_onnx(
        path, signature, encoder, manifest["precision"], images=images, overrides=tolerances, report=report
    )
    replace_manifest(where, manifest | {"verification": verdict.to_dict()})
    if not verdict.passed:
        raise RejectedError(path, verdict)
    return verdict


def manifest_encoder(where: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None) -> Sam3DualViTDetNeck:
    """The plain encoder that a file was exported from, set to its image size.

    Raises:
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
    """
    config = EncoderConfig.from_dict(manifest["encoder"])
    weights = manifest["weights"]
    if weights["random"] and checkpoint is None:
        return random_encoder(config, weights["seed"])
    source = checkpoint or Path(weights["path"])
    if not source.exists():
        raise ExportError(f"{source}: the weights that {where.name} names are not there; say where by --checkpoint")
    if not weights["random"] and sha256(find_file(source)) != weights["sha256"]:
        raise ExportError(f"{source}: is not the checkpoint that was exported ({where.name} has its SHA-256)")
    encoder = load_encoder(source, config, necks=config.necks)
    encoder.set_imgsz(config.image_size)
    return encoder


def load(options: ExportOptions) -> Sam3DualViTDetNeck:
    """The plain encoder of an export, set to its image size."""
    config = options.config or EncoderConfig()
    if options.image_size is not None:
        check_image_size(options.image_size, config.patch_size)  # before a long load
    if options.checkpoint is None:
        named = [name for name in ("sam2", "interactive", "propagation") if name in options.necks]
        dual = options.necks in ("both", "all") or named == ["sam2"]
        necks = ("sam3", "sam2") if dual else ("sam3", "interactive", "propagation") if named else ("sam3",)
        encoder = random_encoder(dataclasses.replace(config, necks=necks), options.seed)
    else:
        encoder = load_encoder(options.checkpoint, options.config)
    if options.image_size is not None:
        encoder.set_imgsz(options.image_size)
    return encoder


def sign(options: ExportOptions, encoder: Sam3DualViTDetNeck) -> Signature:
    """The signature of an export."""
    return encoder_signature(
        encoder_config(encoder),
        necks=options.necks,
        levels=options.levels,
        positions=options.positions,
        input_kind=options.input_kind,
        batch=options.batch,
        dtype=NUMPY_NAMES[options.output_precision or options.precision],
    )


def encoder_config(encoder: Sam3DualViTDetNeck) -> EncoderConfig:
    """The config of an encoder of ours at its present image size, with the necks that it has."""
    trunk = encoder.trunk
    if not isinstance(trunk, ViTDetTrunk):
        raise ExportError(f"the trunk is a {type(trunk).__name__}; build a Signature for it and call write_onnx")
    patch, (height, width) = trunk.config.patch_size, trunk.grid
    return dataclasses.replace(trunk.config, image_size=(height * patch, width * patch), necks=tuple(encoder.necks))


def write_onnx(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    path: Path,
    *,
    precision: Precision = "fp32",
    rewrites: Rewrites | None = None,
    report: Report = lambda line: None,
    **lowering: Any,  # noqa: ANN401 - export.precision.lower's
) -> ir.Model:
    """Traces, lowers and writes an encoder with any trunk: X.onnx and X.onnx.data, neither verified nor atomic.

    Returns:
        The lowered model, its weights still unread.
    """
    report("trace")
    module = DeployEncoder(encoder, signature, rewrites or Rewrites())
    model = trace(module)
    lower(model, precision, **lowering)
    report("write")
    ir.save(model, path, external_data=data_path(path).name)
    if signature.positions == "file":
        specs = signature.of_kind("pos")
        sizes = {level: signature.level_sizes[level] for level in signature.levels}
        dtype = getattr(torch, signature.dtype)
        maps = {level: torch.empty(1, 1, *size) for level, size in sizes.items()}
        encodings = {level: encoder.position_encoding(empty).to(dtype) for level, empty in maps.items()}
        stored = {spec.name: encodings[int(spec.name.rsplit("_", 1)[1])].clone() for spec in specs}
        safetensors.torch.save_file(stored, positions_path(path))
    return model


def _origin(options: ExportOptions) -> dict[str, Any]:
    """Where the weights came from."""
    if options.checkpoint is None:
        return {"random": True, "seed": options.seed}
    path = find_file(options.checkpoint)
    return {"random": False, "path": str(path.resolve()), **file_entry(path)}


def _manifest(
    options: ExportOptions, encoder: Sam3DualViTDetNeck, signature: Signature, model: ir.Model, verdict: Verdict | None
) -> dict[str, Any]:
    operators = collections.Counter(node.op_type for node in model.graph)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxruntime")}
    return {
        "versions": {"neck-export": tool_version(), **versions},
        "encoder": encoder_config(encoder).to_dict(),
        "signature": signature.to_dict(),
        "precision": options.precision,
        "attention": options.attention,
        "upsampling": options.upsampling,
        "keep_fp32": list(options.keep_fp32),
        "opset": model.opset_imports[""],
        "rewrites": dataclasses.asdict(options.rewrites),
        "graph": {"nodes": sum(operators.values()), "operators": dict(operators.most_common())},
        "verification": verdict.to_dict() if verdict else {"verified": False, "reason": "not asked: --no-verify"},
    }


def tool_version() -> str:
    """Version of this package, or `unknown` where it runs from a folder that is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("neck-export")
    return "unknown"


def _check_room(options: ExportOptions, encoder: Sam3DualViTDetNeck, signature: Signature) -> None:
    """Refuses before the work where the disk cannot hold the result."""
    used = [encoder.trunk, *(encoder.necks[neck] for neck in signature.necks)]
    elements = sum(parameter.numel() for module in used for parameter in module.parameters())
    needed = elements * TORCH_TYPES[TYPES[options.precision]].itemsize
    free = shutil.disk_usage(options.output.parent).free
    if free < needed:
        raise ExportError(
            f"{options.output.parent}: {free / 1e9:.2f} GB are free, the file needs {needed / 1e9:.2f} GB; "
            f"make room or choose another --output"
        )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system says of the output folder into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"{path.parent}: the disk is full; make room or choose another --output") from None
        raise ExportError(f"{error.filename or path}: {error.strerror}; choose another --output") from None
