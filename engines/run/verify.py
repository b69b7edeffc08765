"""A plan against the plain PyTorch module: the same images through both, judged by export/fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.builder.flavor import Flavor, FlavorError
from engines.run.open_plan import open_plan
from engines.run.plan_checks import read_header, why_other_gpu
from engines.run.session import Session
from export.contract.manifest import manifest_path, read_manifest, record_in_manifest
from export.contract.signature import BatchRange, Signature
from export.output_files import NamedPath, check_paths, encoder_paths
from export.pipeline import RejectedError
from export.quantization.select_quantization import manifest_tolerances
from export.verification.fidelity import Verdict, check_overrides, compare
from export.verification.reference import check_reference, write_reference
from export.verification.verify import Reference, Report, image_count, make_reference
from export.weights_origin import manifest_encoder
from neck.images import ImageFolder
from neck.necks import Sam3DualViTDetNeck

Runner = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Takes the image as the signature says and gives the outputs by name."""


NO_GPU = "not verified: no NVIDIA driver"


class VerifyError(RuntimeError):
    """A plan that cannot be compared with PyTorch."""


def verify_runner(
    run: Runner,
    signature: Signature,
    reference: Reference,
    precision: str,
    candidate: str,
    overrides: Mapping[str, float] | None = None,
) -> Verdict:
    """Compares a runner's outputs with the reference.

    Args:
        run: the candidate.
        signature: its contract; positions in a file of their own are no outputs of it and are not compared.
        reference: what PyTorch gives.
        precision: which tolerances apply.
        candidate: what runs, for the verdict's method.
        overrides: relative L2 by output name or wildcard.

    Raises:
        VerifyError: other outputs than the signature's.
        FidelityError: an override that fits none, outputs of another shape than the reference's.
    """
    names = [spec.name for spec in signature.outputs]
    check_overrides(overrides or {}, names)
    outputs = run(reference.image(signature))
    if sorted(outputs) != sorted(names):
        raise VerifyError(
            f"{candidate} returns the outputs {', '.join(outputs) or '(none)'}, but the manifest lists "
            f"{', '.join(names)}; build the plan again"
        )
    method = reference.method(candidate, device=f" on {reference.device}")
    found = {name: outputs[name] for name in names}
    return compare(reference.outputs, found, precision, method, overrides, signature.dtype)


def verify_plan(
    plan: Path,
    manifest: Mapping[str, Any] | None = None,
    *,
    encoder: Sam3DualViTDetNeck | None = None,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
    reference: Reference | None = None,
    images: Path | ImageFolder | None = None,
    overrides: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
    flavor: Flavor | None = None,
    device: int | str | torch.device | None = None,
) -> Verdict:
    """Runs a plan on the GPU and compares its outputs with the plain module's; writes nothing.

    Args:
        plan: the plan, its manifest beside it.
        manifest: what the manifest will say, of a plan that was built just now; its bytes are not hashed then.
        encoder: the plain encoder; by default the one that the manifest tells of, on the CPU.
        checkpoint, adapter: its weights and the adapter in them, where they are no longer where the manifest says.
        reference: what `make_reference` made for this signature; by default it is made here, which takes longest.
        images: a folder of images; without one the shipped image.
        overrides: relative L2 by output name or wildcard.
        report: told of every step.
        flavor: which TensorRT; by default the one that built the plan.
        device: the GPU, as in open_plan.

    Raises:
        SessionError: the plan cannot run here.
        VerifyError: nothing tells which encoder the plan holds, or its outputs are others.
        FidelityError, ImageError, CheckpointError, ExportError: as the stages below say.
    """
    with open_plan(plan, flavor, device=device, use_runtime_cache=False, manifest=manifest) as session:
        manifest, here = session.manifest, describe(session.flavor)
        signature = plan_signature(plan, manifest, known=encoder is not None or reference is not None)
        overrides = manifest_tolerances(manifest, overrides)
        check_overrides(overrides, [spec.name for spec in signature.outputs])
        if reference is None:
            if encoder is None:
                encoder = manifest_encoder(manifest_path(plan), manifest["onnx_manifest"], checkpoint, adapter)
            low, high = session.inputs[0].batch
            reference = make_reference(encoder, signature, image_count(BatchRange(low, low, high)), images, report)
        report(f"running the plan in {here}")
        return verify_runner(_runner(session), signature, reference, manifest["precision"], here, overrides)


def verify_plan_file(
    plan: Path,
    checkpoint: Path | None = None,
    images: Path | ImageFolder | None = None,
    overrides: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
    *,
    adapter: Path | None = None,
    save: Path | None = None,
    notes: list[str] | None = None,
    device: int | str | torch.device | None = None,
) -> Verdict:
    """Verifies a plan that was built before, on the GPU, and writes the verdict into its manifest.

    Args:
        plan, checkpoint, images, overrides, report, adapter, device: as in verify_plan.
        save: where to keep the images and the plain module's outputs; written without a GPU too.
        notes: takes what the user should know: that the manifest could not be updated.

    Raises:
        ManifestError: the manifest is missing or speaks of another plan.
        SessionError: the plan cannot run here.
        RejectedError: the outputs left tolerance; the manifest says so too, where it can be written.
        VerifyError, FidelityError, ImageError, CheckpointError, ExportError: as in verify_plan.
    """
    where = manifest_path(plan)
    manifest = read_manifest(where, "plan")
    reference = None
    if save is not None:
        check_reference(save)
        read = encoder_paths(plan, manifest.get("onnx_manifest") or {}, checkpoint)
        check_paths([NamedPath("the reference file (--save-reference)", save)], read)
        signature = plan_signature(plan, manifest, known=False)
        encoder = manifest_encoder(where, manifest["onnx_manifest"], checkpoint, adapter)
        count = image_count(BatchRange.parse(manifest["batch"]))
        reference = make_reference(encoder, signature, count, images, report)
        write_reference(save, reference.pixels, {spec.name: reference.outputs[spec.name] for spec in signature.outputs})
    verdict = verify_plan(
        plan,
        checkpoint=checkpoint,
        adapter=adapter,
        reference=reference,
        images=images,
        overrides=overrides,
        report=report,
        device=device,
    )
    record_in_manifest(where, manifest | {"verification": verdict.to_dict()}, [] if notes is None else notes)
    if not verdict.passed:
        raise RejectedError(plan, verdict)
    return verdict


def plan_signature(plan: Path, manifest: Mapping[str, Any], known: bool) -> Signature:
    """The contract in a plan's manifest.

    Args:
        plan, manifest: the plan and its manifest.
        known: whether the caller has the encoder.

    Raises:
        VerifyError: the plan was built from a foreign ONNX file, so nothing tells what to compare with.
    """
    if not manifest.get("signature") or not (known or manifest.get("onnx_manifest")):
        raise VerifyError(
            f"{plan}: the plan was built from an ONNX file that neck-export did not write, so it is unknown which "
            "PyTorch encoder to compare the plan with; export the encoder with `neck-export onnx` and build a plan "
            "from the exported file"
        )
    return Signature.from_dict(manifest["signature"])


def _runner(session: Session) -> Runner:
    return lambda image: session.infer({"image": image})


def describe(flavor: Flavor) -> str:
    """The TensorRT and the GPU, for a verdict's method."""
    name = "TensorRT-RTX" if flavor.name == "rtx" else "TensorRT"
    gpu = flavor.gpu
    on = f" on {gpu.name} (compute capability {gpu.compute_capability}, driver {gpu.driver})" if gpu else ""
    return f"{name} {flavor.version}{on}"


def why_not_run(plan: Path, manifest: Mapping[str, Any], flavor: Flavor) -> str | None:
    """Why a plan that was built here does not run here, in the words of its manifest; None where it does.

    A plan may be built for another GPU than the one at hand, on a machine that has one.
    """
    if flavor.gpu is None:
        return NO_GPU
    why = why_other_gpu(manifest, flavor)
    if why is None and not torch.cuda.is_available():
        why = "the installed torch is a CPU build; install its CUDA build"
    if why is None:
        why = _why_refused(plan, flavor)
    return None if why is None else f"not verified: {why}"


def _why_refused(plan: Path, flavor: Flavor) -> str | None:
    """Why TensorRT itself does not run a plan here; None if it does, or if only loading the plan can tell."""
    try:
        invalid = flavor.why_invalid(read_header(plan))
    except FlavorError as error:
        return str(error)
    if not invalid:
        return None
    remedy = flavor.driver_problem()
    return (
        f"TensorRT-RTX {flavor.version} reports that the plan cannot run here "
        f"({invalid}){f'; {remedy}' if remedy else ''}"
    )
