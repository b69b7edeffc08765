"""What is checked before a plan is loaded, so that a mismatch is a sentence (inputs.py: before a run)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.builder.flavor import RTX_MAGIC, Flavor, FlavorError, choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.plan_kind import is_plan
from engines.run.inputs import SessionError
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest
from export.contract.targets import release_numbers, version_numbers


def check_plan(
    plan: Path, flavor: Flavor | None = None, device: int = 0, known: Mapping[str, Any] | None = None
) -> tuple[Flavor, dict[str, Any]]:
    """Checks all that can be known before a plan is loaded: its bytes, its manifest, this machine.

    Args:
        plan: the file, its manifest X.plan.json beside it.
        flavor: which TensorRT; by default the one that built the plan.
        device: index of the GPU that it shall run on.
        known: what the manifest will say, of a plan that this process has just built; by default it is read, and the
            files are compared with it.

    Returns:
        The flavor, for that GPU, and the manifest.

    Raises:
        SessionError: the first thing that is wrong, and what to do.
    """
    header, where = read_header(plan), manifest_path(plan)
    try:
        is_plan(plan)
        manifest = dict(known or read_manifest(where, "plan"))
        if header.startswith(RTX_MAGIC) != (manifest["flavor"] == "rtx"):
            raise SessionError(
                f"{plan}: the manifest says that this is a plan for {manifest['flavor']}, but the file begins with "
                f"{header[:4]!r}, and no plan for {manifest['flavor']} begins like that; build the plan again"
            )
        if known is None:
            _check_files(plan, where, manifest)
        manifest_specs(manifest)
        flavor = (flavor or choose_flavor(manifest["flavor"], device)).on(device)
        check_version(plan, manifest, flavor)
        check_gpu(plan, manifest, flavor)
        invalid = flavor.why_invalid(header)
    except (BuildError, ManifestError, FlavorError) as error:
        raise SessionError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise SessionError(f"{where}: the manifest is damaged ({why}); build {plan.name} again") from None
    if invalid:
        remedy = flavor.driver_problem() or "build the plan again on this machine"
        raise SessionError(f"{plan}: {flavor.title} cannot run the plan here ({invalid}); {remedy}")
    return flavor, manifest


def _check_files(plan: Path, where: Path, manifest: dict[str, Any]) -> None:
    check_files(where, manifest)
    names = [entry["name"] for entry in manifest["files"]]
    if plan.name not in names:
        raise SessionError(
            f"{where}: the manifest does not list the plan {plan.name}. Files that the manifest lists: "
            f"{', '.join(names) or 'none'}. Build the plan again with `neck-export trt`"
        )


def read_header(plan: Path) -> bytes:
    """The first bytes of a plan, by which its flavor and RTX's own check know it."""
    try:
        with plan.open("rb") as file:
            header = file.read(4096)
    except FileNotFoundError:
        rejected = plan.with_name(f"{plan.name}.rejected")
        why = (
            f"the plan failed verification and was kept as {rejected}; see {rejected}.json"
            if rejected.exists()
            else "build it with `neck-export trt`"
        )
        raise SessionError(f"No such file: {plan}; {why}") from None
    except OSError as error:
        raise SessionError(
            f"{plan}: the file cannot be read ({error.strerror}); pass a readable plan built with `neck-export trt`"
        ) from None
    if not header:
        raise SessionError(f"{plan}: the file is empty; build the plan again")
    return header


def manifest_specs(manifest: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of the inputs and outputs, sorted, -1 for a dynamic batch."""
    ports = [*manifest["inputs"], *manifest["outputs"]]
    shapes = [tuple(-1 if isinstance(side, str) else side for side in port["shape"]) for port in ports]
    return sorted((port["name"], port["dtype"], shape) for port, shape in zip(ports, shapes, strict=True))


def check_version(plan: Path, manifest: Mapping[str, Any], flavor: Flavor) -> None:
    """Raises SessionError where a plan is of another flavor, or of a TensorRT whose plans this one does not load.

    RTX is asked itself (`Flavor.why_invalid`).
    """
    theirs, version = manifest["flavor"], manifest["tensorrt_version"]
    if theirs != flavor.name:
        raise SessionError(
            f"{plan}: the plan was built for --flavor {theirs}, but {flavor.name} was requested; use --flavor {theirs}"
        )
    built, here = release_numbers(version), release_numbers(flavor.version)
    known = min(len(built), len(here))
    built, here = built[:known], here[:known]
    compatible = manifest["options"]["version_compatible"] is True
    if flavor.name == "tensorrt" and built != here and not (compatible and here > built):
        exact = "or later" if compatible else "exactly"
        add = ", and add --version-compatible if later TensorRT versions must load the plan too"
        remedy = "" if compatible else add
        raise SessionError(
            f"{plan}: the plan needs TensorRT {version} {exact}, but {flavor.version} is installed; build the "
            f"plan again{remedy}"
        )


def check_gpu(plan: Path, manifest: Mapping[str, Any], flavor: Flavor) -> None:
    """Raises SessionError where there is no GPU, or not one that the plan was built for."""
    if flavor.gpu is None:
        raise SessionError(
            f"{plan}: this machine has no NVIDIA GPU that CUDA can use. Check the GPU and its driver with "
            "`nvidia-smi`, or run the plan on another machine with an NVIDIA GPU"
        )
    why = why_other_gpu(manifest, flavor)
    if why is None:
        return
    here = flavor.gpu.compute_capability
    if flavor.capabilities and here not in flavor.capabilities:
        raise SessionError(f"{plan}: {why}; build the plan again with --flavor tensorrt")
    remedy = f"with --compute-capability {here}" if flavor.name == "rtx" else "on this GPU"
    raise SessionError(f"{plan}: {why}; build the plan again {remedy}")


def why_other_gpu(manifest: Mapping[str, Any], flavor: Flavor) -> str | None:
    """Why a plan does not run on the GPU at hand, by what it was built for; None where it does, or there is no GPU."""
    if flavor.gpu is None:
        return None
    here, named = (
        flavor.gpu.compute_capability,
        f"{flavor.gpu.name} (compute capability {flavor.gpu.compute_capability})",
    )
    if flavor.capabilities and here not in flavor.capabilities:
        return f"TensorRT-RTX {flavor.version} does not support {named}"
    built = manifest["compute_capabilities"]
    # RTX's default is 8.0 and later; TensorRT's hardware compatibility `same` is the rule without it, too
    later = manifest["options"]["hardware_compatible"] == "ampere+" or not built
    if here in built or (later and version_numbers(here) >= (8, 0)):
        return None
    wanted = "8.0 or later" if later else ", ".join(built)
    return f"the plan is for compute capability {wanted}, but the GPU is {named}"
