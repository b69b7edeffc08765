"""What a repository's folders hold already: older versions of the same model, or something that is left alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from engines.service.model_config import read_config, schema
from engines.service.repository_files import CONFIG, ELSEWHERE, MANIFEST, versions
from engines.service.served_model import Source, TritonError
from export.contract.manifest import ManifestError, read_manifest


def check_held(model: Path, config: Any, source: Source | None) -> None:
    """Refuses a folder that contains anything but older versions of this model."""
    if not model.exists():
        return
    if not model.is_dir():
        raise TritonError(f"{model}: this is a file, not a folder; {ELSEWHERE}")
    held = read_config(model / CONFIG)
    if held is None:
        if any(model.iterdir()):
            raise TritonError(
                f"{model}: the folder contains files, but no {CONFIG}, so it was not created by neck-export and "
                f"is left unchanged; {ELSEWHERE}"
            )
        return
    check_contract(model, held, config)
    if source is None:
        return
    for version in versions(model):
        where = model / str(version) / MANIFEST
        try:
            old = read_manifest(where, source.kind)
        except ManifestError as error:
            raise TritonError(
                f"{model}: the folder contains a model that neck-export did not write ({error}); {ELSEWHERE}"
            ) from None
        before, after = _shared(old), _shared(source.manifest)
        different = [key for key in after if before[key] is not None and before[key] != after[key]]
        if different:
            raise TritonError(
                f"{model}: the folder already contains a different model. The file {source.path} does not have the "
                f"same {' and '.join(different)} as version {version} in the folder; {ELSEWHERE}"
            )


def check_ensembles(output: Path, engine: Any, written: Collection[str]) -> None:
    """Refuses an engine without outputs that an ensemble, left as it is, asks of it: that would no longer load.

    Args:
        output: the repository.
        engine: the engine's new config.
        written: names of the models that are written with it.

    Raises:
        TritonError: naming the ensemble and the outputs.
    """
    listed = listed_outputs(engine)
    for name in (f"{engine.name}-images", f"{engine.name}-outputs"):
        held = None if name in written else read_config(output / name / CONFIG)
        missing = sorted(listed_outputs(held) - listed) if held is not None else []
        if missing:
            remedy = "add --ensemble" if name.endswith("-images") else "add --outputs"
            raise TritonError(
                f"{output / name}: this ensemble returns {', '.join(missing)}, but the new version of "
                f"{engine.name} does not have these outputs; {remedy} to write the ensemble again, or remove the "
                "ensemble's folder"
            )


def listed_outputs(config: Any) -> set[str]:
    """Names of the outputs that a config lists."""
    return {spec.name for spec in config.output}


def _shared(manifest: dict[str, Any]) -> dict[str, Any]:
    """What all versions of a model have in common; their weights differ, or there were no need of a version."""
    exported = manifest.get("onnx_manifest") if manifest["kind"] == "plan" else manifest
    return {"precision": manifest.get("precision"), "encoder": (exported or {}).get("encoder")}


def contract(config: Any) -> dict[str, Any]:
    """What clients and older versions of a model rely on, as text; outputs by name."""
    names = schema().DataType.Name
    tensors = {
        f"{key} {tensor.name}": f"{names(tensor.data_type)} {list(tensor.dims)}"
        for key in ("input", "output")
        for tensor in getattr(config, key)
    }
    backend = config.platform or config.backend
    return {"backend": backend, "max_batch_size": config.max_batch_size, **tensors}


def check_contract(path: Path, old: Any, new: Any) -> None:
    """Refuses a config that breaks clients or versions of the model that is there; outputs may be added.

    Raises:
        TritonError: saying what differs.
    """
    before, after = contract(old), contract(new)
    inputs = {key for key in {**before, **after} if not key.startswith("output ")}
    shared = {key for key in before if key in after}
    different = sorted(key for key in inputs | shared if before.get(key) != after.get(key))
    lacking = sorted(key.removeprefix("output ") for key in before if key not in after and key.startswith("output "))
    if lacking and not different and any(key.startswith("output ") for key in shared):
        raise TritonError(
            f"{path}: the new version does not have the outputs {', '.join(lacking)}, which clients of the "
            f"model may request; export the file with these outputs, or {ELSEWHERE}"
        )
    if different or not any(key.startswith("output ") for key in shared):
        told = [f"{key} was {before.get(key, 'absent')}, but is now {after.get(key, 'absent')}" for key in different]
        raise TritonError(
            f"{path}: the folder already contains a different model: "
            f"{'; '.join(told) or 'the two models have no output in common'}; {ELSEWHERE}"
        )
