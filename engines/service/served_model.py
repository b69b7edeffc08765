"""The plan or ONNX file that Triton shall serve: what its manifest says, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engines.builder.flavor import RTX_MAGIC
from engines.builder.onnx_graph import BuildError
from engines.builder.plan_kind import is_plan
from export.contract.dtypes import ELEMENT_TYPES
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest
from export.contract.signature import BatchRange, Signature, TensorSpec
from export.contract.targets import release_numbers

DATA_TYPES = {one.name: f"TYPE_{one.triton}" for one in ELEMENT_TYPES if one.triton}
"""Triton's name of each type that a file's tensors may have."""


class TritonError(ValueError):
    """A model repository that cannot be written as requested; the message contains the reason and the fix."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file to serve, checked against its manifest.

    Attributes:
        path: the plan or ONNX file.
        kind: which of the two.
        manifest: its manifest.
        batch: the batch sizes that it takes.
        image: its only input.
        outputs: all of its outputs, in its order.
    """

    path: Path
    kind: Literal["plan", "onnx"]
    manifest: dict[str, Any]
    batch: BatchRange
    image: TensorSpec
    outputs: tuple[TensorSpec, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the manifest speaks of: the file itself, its weights, its layer report."""
        return tuple(self.path.with_name(entry["name"]) for entry in self.manifest["files"])

    @property
    def bytes(self) -> int:
        """The size of them all."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def compute_capability(self) -> str:
        """The one that a plan was built for.

        Raises:
            TritonError: the manifest does not name exactly one.
        """
        named = self.manifest.get("compute_capabilities")
        if not isinstance(named, list) or len(named) != 1 or not re.fullmatch(r"\d{1,2}\.\d", str(named[0])):
            raise TritonError(
                f"{manifest_path(self.path)}: the manifest names the compute capabilities {named!r}, but the manifest "
                "of a plan for Triton must name exactly one compute capability, such as 8.9. On a machine with the GPU "
                f"that Triton will use, build the plan {self.path.name} again with `neck-export trt --flavor tensorrt`"
            )
        return str(named[0])


def read_model(path: Path) -> Source:
    """Reads a plan's or an ONNX file's manifest and checks its files byte for byte.

    Raises:
        TritonError: missing, changed since, a plan that Triton cannot load, or one that failed verification.
    """
    if path.is_dir() or not path.exists():
        found = "this is a folder" if path.is_dir() else "there is no such file"
        raise TritonError(
            f"{path}: {found}; pass a plan built with `neck-export trt` or an ONNX file written with `neck-export onnx`"
        )
    kind: Literal["plan", "onnx"] = "onnx" if path.suffix == ".onnx" else "plan"
    where = manifest_path(path)
    try:
        is_plan(path)
        with path.open("rb") as file:
            header = file.read(len(RTX_MAGIC))
        manifest = read_manifest(where, kind)
        if kind == "plan":
            _refuse_rtx(path, header, manifest)
        check_files(where, manifest)
        if path.name not in [entry["name"] for entry in manifest["files"]]:
            raise TritonError(f"{where}: the manifest does not list {path.name}; export or build the file again")
        _check_facts(manifest)
        source = Source(path, kind, manifest, *_tensors(manifest))
        _check_tensors(source)
        verification_note(source)
    except (BuildError, ManifestError) as error:
        raise TritonError(str(error)) from None
    except OSError as error:
        raise TritonError(f"{path}: the file cannot be read ({error.strerror}); check its permissions") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TritonError(f"{where}: the manifest is damaged ({error!r}); export or build {path.name} again") from None
    return source


def verification_note(source: Source) -> str | None:
    """The note about an unverified file; None for a verified one.

    Raises:
        TritonError: the file was verified and failed.
    """
    checked = source.manifest.get("verification") or {"verified": False}
    if checked["verified"] is True:
        return None
    graph = checked.get("onnx", {})
    for verdict in (checked, graph):
        if verdict.get("outputs") and not verdict["verified"]:
            bad = [output["name"] for output in verdict["outputs"] if not output.get("passed")]
            raise TritonError(
                f"{source.path}: verification failed ({', '.join(bad)}), so the file is not deployed; `neck-export "
                "bisect` finds the block that exceeds the tolerance"
            )
    reason = str(checked.get("reason", "not verified: the manifest does not say why"))
    reason = reason if reason.startswith("not verified") else f"not verified: {reason}"
    graph_only = (
        "; neck-export verified only the ONNX graph from which the plan was built, not the plan itself"
        if graph.get("verified")
        else ""
    )
    return f"{source.path.name} {reason}{graph_only}"


def choose_outputs(source: Source, asked: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The outputs that match names or wildcards, in the file's order; all if none is given.

    Raises:
        TritonError: a name that no output has, saying which are there.
    """
    import fnmatch

    names = [spec.name for spec in source.outputs]
    for pattern in asked:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise TritonError(
                f"--outputs {pattern!r}: {source.path.name} has no such output; choose from {', '.join(names)}"
            )
    chosen = [spec for spec in source.outputs if any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in asked)]
    return tuple(chosen) if asked else source.outputs


def origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two files of one encoder share according to their manifests: architecture, weights, contract."""
    exported = manifest.get("onnx_manifest") if manifest["kind"] == "plan" else manifest
    known: dict[str, Any] = {"precision": manifest.get("precision")}
    if manifest["kind"] == "plan":
        known |= {name: manifest[name] for name in ("batch", "inputs", "outputs")}
    if exported:
        weights = {key: value for key, value in exported["weights"].items() if key not in ("path", "name")}
        return known | {"encoder": exported["encoder"], "weights": weights}
    return known | {"ONNX file": manifest.get("onnx")}


def check_same_encoder(first: Source, others: Sequence[Source]) -> dict[str, Source]:
    """The plans by compute capability, where they are one encoder built for several GPUs.

    Raises:
        TritonError: another encoder or contract, one GPU twice, or a file that is no plan.
    """
    plans: dict[str, Source] = {}
    for source in (first, *others):
        if source.kind != "plan":
            raise TritonError(
                f"{source.path}: this file is an ONNX file, but with --plan, all model files must be TensorRT plans. "
                "Build a plan from the ONNX file with `neck-export trt` and pass the plan instead of the ONNX file, or "
                "leave out the ONNX file"
            )
        ours, theirs = origin(first.manifest), origin(source.manifest)
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if different:
            raise TritonError(
                f"{source.path}: the plan differs from {first.path} in {', '.join(different)}; all plans of "
                "one model must contain the same encoder, so build them from the same ONNX file"
            )
        twice = plans.setdefault(source.compute_capability, source)
        if twice is not source:
            raise TritonError(
                f"{source.path}: the plan is for compute capability {source.compute_capability}, and so is "
                f"{twice.path}; leave out one of the two plans"
            )
    return plans


def _refuse_rtx(path: Path, header: bytes, manifest: Mapping[str, Any]) -> None:
    if manifest["flavor"] == "rtx" or header == RTX_MAGIC:
        raise TritonError(
            f"{path}: this is a TensorRT-RTX plan, which Triton's tensorrt backend cannot load; build a plan on the "
            "serving GPU with `neck-export trt --flavor tensorrt`, or serve the ONNX file"
        )


def _check_facts(manifest: Mapping[str, Any]) -> None:
    """Refuses a manifest whose facts are not of the kind that is read here."""
    exported = manifest.get("onnx_manifest") if manifest["kind"] == "plan" else manifest
    wanted: list[tuple[str, Any, type]] = []
    if manifest["kind"] == "plan":
        version, options = manifest["tensorrt_version"], manifest["options"]
        release_numbers(version)
        wanted += [("options", options, dict), ("version_compatible", options["version_compatible"], bool)]
    if exported is not None:
        wanted += [(key, exported[key], dict) for key in ("encoder", "weights")]
        wanted.append(("opset", exported.get("opset", 0), int))
        targets = exported.get("targets") or {}
        wanted.append(("targets", targets, dict))
        lists = [targets.get(key, []) for key in ("asked", "products") if isinstance(targets, dict)]
        wanted += [("targets", names, list) for names in lists]
        wanted += [("targets", name, str) for names in lists if isinstance(names, list) for name in names]
    for name, value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


def _tensors(manifest: Mapping[str, Any]) -> tuple[BatchRange, TensorSpec, tuple[TensorSpec, ...]]:
    """Batch, input and outputs."""
    try:
        if manifest["kind"] == "onnx":
            signature = Signature.from_dict(manifest["signature"])
            return signature.batch, signature.image, signature.outputs
        inputs, outputs = (
            tuple(TensorSpec(port["name"], port["dtype"], tuple(port["shape"])) for port in manifest[key])
            for key in ("inputs", "outputs")
        )
        if len(inputs) != 1 or not outputs:
            raise TypeError(
                f"the plan has {len(inputs)} inputs and {len(outputs)} outputs, but an encoder has one input and at "
                "least one output"
            )
        return BatchRange.parse(manifest["batch"]), inputs[0], outputs
    except ValueError as error:
        raise TypeError(str(error)) from None


def _check_tensors(source: Source) -> None:
    """Refuses tensors that a config cannot say: Triton itself takes a name twice without a word."""
    ports = (source.image, *source.outputs)
    names = [port.name for port in ports]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise TypeError(f"the manifest lists more than one tensor with the name {', '.join(twice)}")
    for port in ports:
        if port.dtype not in DATA_TYPES:
            raise TritonError(
                f"{source.path}: the tensor {port.name} is {port.dtype}, but neck-export serves only "
                f"{', '.join(DATA_TYPES)} with Triton; export the encoder with `neck-export onnx --output-dtype fp32`"
            )
        if port.shape[0] != source.batch.dim or not all(isinstance(side, int) and side > 0 for side in port.shape[1:]):
            raise TypeError(
                f"the tensor {port.name} has the shape {port.shape}. The batch size in the manifest is "
                f"{source.batch}, so the first dimension must be {source.batch.dim!r}. Every other dimension must be "
                "an integer above 0"
            )
