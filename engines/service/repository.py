"""Plan or ONNX file -> Triton model repository: the function behind `neck-export triton`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.service.activation import activate_command, active_version, remove_versions, serve_version
from engines.service.container_fit import choose_container, has_lean_runtime
from engines.service.ensemble import PREPROCESS_MODEL, chosen_config, images_config, preprocess_config
from engines.service.existing_models import check_ensembles, check_held, listed_outputs
from engines.service.kubernetes import PROXY_IMAGE, Serving, check_folder, kubernetes_files, kubernetes_name, remove_old
from engines.service.model_config import engine_config, read_config, takes_graphs, to_text
from engines.service.options import RepositoryOptions
from engines.service.perf_analyzer import perf_line, write_input
from engines.service.repository_files import (
    CONFIG,
    ELSEWHERE,
    check_name,
    install,
    lay_out,
    next_version,
    replace_config,
    stage_beside,
    versions,
    write_texts,
)
from engines.service.served_model import (
    Source,
    TritonError,
    check_same_encoder,
    choose_outputs,
    read_model,
    verification_note,
)
from export.contract.atomic import disk_errors, locked, new_folder

__all__ = ["Repository", "RepositoryOptions", "TritonError", "make_repository"]


@dataclasses.dataclass(frozen=True)
class Repository:
    """The files that were written.

    Attributes:
        path: the model repository.
        name, version: the model and its new version.
        active: the version that Triton serves: the new one, or the one before if the new one was not verified.
        config: its config.pbtxt.
        files: every file that was written.
        container: the Triton container that fits, None where none is known.
        notes: what a user must know, one sentence each.
        measure: the command that measures the served model.
    """

    path: Path
    name: str
    version: int
    active: int
    config: Path
    files: tuple[Path, ...]
    container: str | None
    notes: tuple[str, ...]
    measure: str


def make_repository(options: RepositoryOptions, report: Callable[[str], None] = lambda line: None) -> Repository:
    """Writes a model repository, or adds a version to the one that is there.

    The config names the version that is served. That is the new one if its files were verified, which ran them, or if
    there is no other; else it stays as it is until `activate_version`, so that servers that start have one that loads.

    Everything is staged beside the repository and renamed in: a version is there whole or not at all, and those that
    are there are never changed. Files are reflinks where the file system has them, else copies, never hard links.
    (Where the folder above is another file system or cannot be written, the stage is a hidden folder of the model's:
    Triton takes it for no version, but a polling server loads the running one once more.)

    Raises:
        TritonError: what was given cannot be served as asked, or the repository cannot be written.
    """
    _check_options(options)
    report("checking the SHA-256 of the files")
    source = read_model(options.model)
    plans = check_same_encoder(source, [read_model(path) for path in options.more]) if options.more else {}
    sources = list(plans.values()) or [source]
    container, notes = choose_container(sources, options.container)
    unverified = [note for note in map(verification_note, sources) if note]
    notes += unverified
    models, more_notes = _models(options, source, plans)
    cluster = _cluster_files(options, sources, tuple(plans), container)
    with disk_errors(TritonError, options.output, ELSEWHERE), new_folder(options.output), locked(options.output):
        for model in models:
            check_held(options.output / model.name, model.config, source if model.files else None)
        check_ensembles(options.output, models[0].config, [model.name for model in models])
        version = next_version(options.output / options.name, options.version)
        before = active_version(options.output / options.name)
        active = before if unverified and before else version
        if active != version:
            _check_active(options, models)
            notes.append(
                f"version {version} is not verified, so version {active} stays active; to serve version "
                f"{version} anyway, run: {activate_command(options.output, options.name, version)}"
            )
        serve_version(models[0].config, version)
        report(f"writing version {version} of {options.name}")
        written: list[Path] = []
        for model in models:
            written += _write(options.output, model, version, active == version)
        if options.keep:
            for model in models:
                remove_versions(options.output, model.name, options.keep)
    if options.kubernetes is not None:
        with disk_errors(TritonError, options.kubernetes):
            written += write_texts(options.kubernetes, cluster)
            remove_old(options.kubernetes, cluster)
    if options.perf_input is not None:
        written.append(write_input(source, options.perf_input))
    measure = perf_line(source, options.name, options.perf_input)
    config, notes = options.output / options.name / CONFIG, [*notes, *more_notes]
    return Repository(
        options.output, options.name, version, active, config, tuple(written), container, tuple(notes), measure
    )


def _check_active(options: RepositoryOptions, models: Sequence[_Model]) -> None:
    """Refuses ensembles that ask more than the version has that stays active."""
    listed = listed_outputs(read_config(options.output / options.name / CONFIG))
    for model in models[1:]:
        lacking = sorted(listed_outputs(model.config) - listed) if model.script is None else []
        if lacking:
            raise TritonError(
                f"{options.output / model.name}: the ensemble needs the outputs {', '.join(lacking)}, but the active "
                f"version of {options.name} does not have them. The new version has them, but only becomes active "
                f"after verification; run `neck-export verify {options.model}`, then repeat this command"
            )


@dataclasses.dataclass(frozen=True)
class _Model:
    """One model of the repository: the engine has `files`, with their names there; another at most one file."""

    name: str
    config: Any
    files: tuple[tuple[Source, str], ...] = ()
    script: Path | None = None


def _models(options: RepositoryOptions, source: Source, plans: dict[str, Source]) -> tuple[list[_Model], list[str]]:
    """The models to write, the engine first, since the others name it; and notes."""
    chosen, notes = choose_outputs(source, options.outputs), []
    files = {capability: f"model_{capability}.plan" for capability in plans}
    listed = source.outputs if source.kind == "plan" else chosen
    config = engine_config(
        source, options.name, listed, files, queue_delay_us=options.queue_delay_us, cuda_graphs=options.cuda_graphs
    )
    laid = [(plans[capability], file) for capability, file in files.items()]
    laid = laid or [(source, "model.plan" if source.kind == "plan" else "model.onnx")]
    models = [_Model(options.name, config, files=tuple(laid))]
    if plans:
        notes.append(
            f"{options.name} can only be served on GPUs of compute capability {', '.join(plans)}, because the "
            "model has no plan for other GPUs"
        )
    if len(listed) != len(chosen):
        name = f"{options.name}-outputs"
        models.append(_Model(name, chosen_config(source, name, options.name, chosen)))
        names = ", ".join(spec.name for spec in chosen)
        notes.append(
            f"the model {options.name} lists all outputs of the plan, because Triton requires it; to receive only "
            f"{names}, use the ensemble {name}"
        )
    if options.ensemble:
        preprocess, images = f"{options.name}-preprocess", f"{options.name}-images"
        models.append(_Model(preprocess, preprocess_config(source, preprocess), script=PREPROCESS_MODEL))
        models.append(_Model(images, images_config(source, images, preprocess, options.name, chosen)))
        notes.append(
            f"{preprocess} needs numpy and Pillow in the container's Python. numpy is already there; to install "
            "Pillow, run in the container: pip install pillow"
        )
    if options.cuda_graphs and source.kind == "plan" and not takes_graphs(source):
        notes.append(
            "CUDA graphs are off, because Triton never launches them for a fixed batch; to use them, build a plan "
            "with a dynamic batch, such as --batch 1:1:4"
        )
    if source.batch.dynamic and source.batch.minimum > 1:
        notes.append(
            f"requests must contain at least {source.batch.minimum} images, because the plan's smallest batch "
            f"is {source.batch.minimum} and Triton does not pad batches"
        )
    return models, notes


def _cluster_files(
    options: RepositoryOptions, sources: Sequence[Source], capabilities: tuple[str, ...], container: str | None
) -> dict[str, str]:
    """The Kubernetes files by name, checked before anything is written; none where none were asked."""
    if options.kubernetes is None:
        return {}
    source = sources[0]
    if options.kubernetes.resolve().is_relative_to(options.output.resolve()):
        raise TritonError(
            f"{options.kubernetes}: this folder lies inside the model repository, where Triton would treat it "
            "as a model; choose another folder"
        )
    if container is None:
        raise TritonError(
            f"{source.path}: the Kubernetes files must name a Triton container, but neck-export does not know a "
            f"container with TensorRT {source.manifest['tensorrt_version']}; look up the container in NVIDIA's support "
            "matrix, and name the container with --container"
        )
    serving = Serving(
        model=options.name,
        source=source,
        capabilities=capabilities,
        container=container,
        storage=options.storage or f"pvc://{kubernetes_name(options.name)}-models",
        own_claim=options.storage is None,
        gpus=options.gpus,
        compatible=any(map(has_lean_runtime, sources)),
        ensemble=options.ensemble,
        image_name=options.image,
        proxy_image=PROXY_IMAGE if options.proxy_image is None else options.proxy_image,
        replicas=options.replicas,
        rollout=options.rollout,
    )
    if source.kind == "plan" and not capabilities and not serving.any_ampere:
        serving = dataclasses.replace(serving, capabilities=(source.compute_capability,))
    files = kubernetes_files(serving)
    check_folder(options.kubernetes, list(files))
    return files


def _write(output: Path, model: _Model, version: int, activate: bool) -> list[Path]:
    """Writes one model; one without a plan or ONNX file gets a version only where its file is new."""
    folder = output / model.name
    with stage_beside(output, folder) as stage:
        (stage / CONFIG).write_text(to_text(model.config), encoding="utf-8")
        if model.files:
            lay_out(stage / "version", model.files)
            shutil.copy(stage / CONFIG, stage / "version" / CONFIG)  # what `activate_version` puts in the model's place
            return install(stage, folder, version, activate)
        there = versions(folder)
        name = "README"
        text = (
            "Triton requires this version folder. An ensemble has no model file, so the folder has only this README.\n"
        )
        if model.script is not None:
            name, text = "model.py", model.script.read_text(encoding="utf-8")
        newest = folder / str(max(there, default=0)) / name
        if newest.is_file() and newest.read_text(encoding="utf-8") == text:
            return replace_config(stage / CONFIG, folder / CONFIG)
        (stage / "version").mkdir()
        (stage / "version" / name).write_text(text, encoding="utf-8")
        return install(stage, folder, max(there, default=0) + 1)


def _check_options(options: RepositoryOptions) -> None:
    check_name(options.name)
    if options.version is not None and not 1 <= options.version < 2**31:
        raise TritonError(f"--version {options.version} is invalid; expected a whole number of at least 1")
    if options.keep is not None and options.keep < 1:
        raise TritonError(f"--keep {options.keep} is invalid; expected the number of versions to keep, at least 1")
    if options.queue_delay_us < 0:
        raise TritonError(f"--queue-delay-us {options.queue_delay_us} is invalid; expected 0 or more microseconds")
    if options.output.exists() and not options.output.is_dir():
        raise TritonError(f"{options.output}: this is a file; name a folder for the model repository with --output")
