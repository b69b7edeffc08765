"""Which block first leaves tolerance, and the smallest FP32 island that mends it: `neck-export bisect`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from engines.bisect_trials import TRIAL, Runner, run_on_gpu, run_simulated
from engines.builder.onnx_source import plan_source
from engines.builder.plan_kind import is_plan
from export.contract.atomic import disk_errors, workspace
from export.contract.export_command import REPLACED_FORMS, export_command
from export.contract.manifest import check_files, data_path, manifest_path, read_manifest
from export.contract.onnx_file import OnnxFile, check_path
from export.contract.options import Rewrites
from export.contract.signature import Signature
from export.graph.cleanup import MODULE
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import BLOCKS, trace
from export.lowering.attention import spelling_at
from export.lowering.precision import lower
from export.quantization.choice import budget_overrides
from export.quantization.select_quantization import manifest_quantization
from export.verification.fidelity import Comparison, compare_output, tolerance_for
from export.verification.verify import Report, reference_pixels
from export.weights_origin import manifest_encoder
from neck.checkpoint_keys import NECK_MODULES
from neck.images import ImageFolder, normalize
from neck.necks import Sam3DualViTDetNeck

MOST_MODULES = 8
"""More FP32 modules than this are no island: BF16 is the answer then."""


class BisectError(RuntimeError):
    """The file cannot be searched, or no small island mends it."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a search found.

    Attributes:
        figures: of each block and output, in the order of computation.
        first_bad: path of the first module that leaves tolerance, None where none does.
        keep_fp32: modules that bring every output back inside.
        command: exports the mended file; None where nothing is wrong.
    """

    figures: tuple[Comparison, ...]
    first_bad: str | None
    keep_fp32: tuple[str, ...]
    command: str | None


def bisect(
    path: Path,
    checkpoint: Path | None = None,
    images: Path | ImageFolder | None = None,
    overrides: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
    run: Runner | None = None,
    *,
    adapter: Path | None = None,
) -> Finding:
    """Finds the first module of a low-precision ONNX file or plan that leaves tolerance, and what to keep in FP32.

    The reference of a block is the same graph in FP32, which computes what PyTorch computes to 1e-6.

    Args:
        path: the ONNX file or the plan, with its manifest.
        checkpoint, adapter: its weights and what was merged into them, where they are no longer where the manifest
            says.
        images: a folder of images; without one the shipped image.
        overrides: relative L2 by output name or wildcard.
        report: told of every step.
        run: computes a low-precision model; by default the rounding simulation in ONNX Runtime, of a plan the GPU.

    Raises:
        BisectError: an FP32 file, or one that no few modules mend.
        ManifestError, CheckpointError, ExportError: the file or its weights cannot be read.
    """
    check_path(path)
    where = manifest_path(path)
    if is_plan(path):
        manifest = plan_source(where)
        run = run or functools.partial(run_on_gpu, plan=read_manifest(where, "plan"))
    else:
        OnnxFile(path).check()
        manifest = read_manifest(where, "onnx")
        check_files(where, manifest)
    if manifest["precision"] == "fp32":
        raise BisectError(
            f"{path}: the file is in FP32, so it has no rounding error to locate; pass an FP16, BF16, FP8 or INT8 file"
        )
    encoder = manifest_encoder(where, manifest, checkpoint, adapter)
    room = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    with (
        workspace(path.with_name(f"{path.name}.bisect"), room) as folder,
        disk_errors(BisectError, folder, "set TMPDIR to a folder on a disk with more free space"),
    ):
        if adapter:  # for the command that mends
            weights = manifest["weights"]
            manifest = manifest | {"weights": weights | {"adapter": weights["adapter"] | {"path": str(adapter)}}}
        budget = (manifest.get("quantization") or {}).get("budget")
        allowed = budget_overrides(budget, ["*"]) | dict(overrides or {})  # of the blocks too, whose figures are shown
        search = Search(manifest, encoder, images, allowed, folder, report, run or run_simulated)
        return search.find(path, checkpoint)


class Search:
    """One search: the FP32 reference once, then a trial for every set of FP32 modules."""

    def __init__(
        self,
        manifest: dict[str, Any],
        encoder: Sam3DualViTDetNeck,
        images: Path | ImageFolder | None,
        overrides: Mapping[str, float],
        folder: Path,
        report: Report,
        run: Runner,
    ) -> None:
        self.manifest, self.overrides, self.folder = manifest, overrides, folder
        self.report, self.run, self.trials = report, run, 0
        signature = Signature.from_dict(manifest["signature"])
        pixels = reference_pixels(signature, images, signature.batch.minimum, report)
        self.image = pixels if signature.input == "uint8" else normalize(pixels).numpy()
        self.outputs = [spec.name for spec in signature.of_kind("feat")]
        report("tracing the encoder")
        self.canonical = trace(DeployEncoder(encoder, signature, Rewrites(**manifest["rewrites"])))
        report("computing the reference: running the encoder's graph in FP32 with ONNX Runtime")
        self.reference = self._outputs("fp32", ())

    def find(self, path: Path, checkpoint: Path | None) -> Finding:
        """Searches; see bisect."""
        kept = tuple(self.manifest["keep_fp32"])
        figures = self.trial(kept)
        first = next((row.name for row in figures if not row.passed), None)
        if first is None:
            return Finding(tuple(figures), None, kept, None)
        if self.manifest.get("residual", "auto") != "fp32" and self._mended(self.trial(kept, "fp32")):
            return Finding(tuple(figures), first, kept, self._command(path, checkpoint, kept, residual="fp32"))
        added: tuple[str, ...] = ()
        trial = figures
        while not self._mended(trial):
            module = next((row.name for row in trial if not row.passed and row.name not in added), None)
            if module is None or len(added) == MOST_MODULES:
                raise BisectError(
                    f"{path}: the module {first} is the first to exceed the tolerance, but keeping "
                    f"{', '.join(added)} in FP32 does not bring the outputs within the tolerance; export with "
                    "--precision bf16 instead"
                )
            added = (*added, module)
            trial = self.trial((*kept, *added))
        added = self._shrunk(kept, added)
        return Finding(tuple(figures), first, (*kept, *added), self._command(path, checkpoint, (*kept, *added)))

    def _command(self, path: Path, checkpoint: Path | None, keep_fp32: Sequence[str], **changes: str) -> str:
        """The command that exports the mended file."""
        output = path.with_name(f"{path.stem}.mended.onnx")
        output = output if os.access(path.parent, os.W_OK) else Path("build") / output.name
        manifest = self.manifest | {"keep_fp32": list(keep_fp32)}
        return export_command(manifest, manifest_path(path), output, checkpoint, changes)

    def trial(self, keep_fp32: Sequence[str], residual: str | None = None) -> list[Comparison]:
        """The figures of every block and output with some modules, or the residual sums, in FP32."""
        self.trials += 1
        kept = ", ".join([*keep_fp32, *(["the additions of the residual connections"] if residual else [])])
        self.report(f"trial {self.trials}: running the file " + (f"with {kept} in FP32" if kept else "unchanged"))
        precision = self.manifest["precision"]
        found = self._outputs(precision, keep_fp32, residual)
        names = {self._level(output): output for output in self.outputs}  # an override names the file's output
        return [
            compare_output(
                name, self.reference[name], array, tolerance_for(names.get(name, name), precision, self.overrides)
            )
            for name, array in found.items()
        ]

    def _mended(self, figures: Iterable[Comparison]) -> bool:
        """Whether every output of the file is inside; blocks may be outside where nothing comes of it."""
        modules = {self._level(name) for name in self.outputs}
        return all(row.passed for row in figures if row.name in modules)

    def _shrunk(self, kept: tuple[str, ...], added: tuple[str, ...]) -> tuple[str, ...]:
        """Drops modules that are not needed, then takes a part of a module where a part is enough."""
        for module in added:
            fewer = tuple(other for other in added if other != module)
            if fewer and self._mended(self.trial((*kept, *fewer))):
                added = fewer
        for module in added:
            smaller = module
            while (part := self._enough(kept, added, module, smaller)) is not None:
                smaller = part
            added = tuple(smaller if other == module else other for other in added)
        return added

    def _enough(self, kept: tuple[str, ...], added: tuple[str, ...], module: str, whole: str) -> str | None:
        for part in self._children(whole):
            if self._mended(self.trial((*kept, *(part if other == module else other for other in added)))):
                return part
        return None

    def _children(self, module: str) -> list[str]:
        paths = {node.metadata_props[MODULE] for node in self.canonical.graph}
        below = {path[len(module) + 1 :].split(".")[0] for path in paths if path.startswith(module + ".")}
        return [f"{module}.{name}" for name in sorted(below)]

    def _outputs(self, precision: str, keep_fp32: Sequence[str], residual: str | None = None) -> dict[str, np.ndarray]:
        """Every block's tokens and every output of the graph in one precision, by module path."""
        model, options = self.canonical.clone(), {}
        if precision != "fp32":
            options = {name: self.manifest[name] for name in ("attention", "upsampling")}
            form = self.manifest.get("attention_form") or options["attention"]
            options["attention"] = REPLACED_FORMS.get(form, form)
            options["spelling"] = self.manifest.get("attention_spelling") or spelling_at(self.manifest["opset"])
            options["residual"] = residual or self.manifest.get("residual", "auto")
            options["quantization"] = manifest_quantization(self.manifest)
        lower(model, cast(Any, precision), keep_fp32=keep_fp32, **options)
        names = self._watch(model)
        file = self.folder / TRIAL
        ir.save(model, file, external_data=data_path(file).name)
        run = run_simulated if precision == "fp32" else self.run
        arrays = run(ir.load(file), self.folder, self.image, keep_fp32)
        return {name: np.asarray(array, np.float32) for name, array in zip(names, arrays, strict=True)}

    def _watch(self, model: ir.Model) -> list[str]:
        """Makes the last value of every block an output, before the levels; returns the modules' paths."""
        graph = model.graph
        last: dict[str, ir.Value] = {}
        for node in graph:
            path = node.metadata_props[MODULE]
            if path.startswith(BLOCKS) and node.op_type != "Cast":
                last[".".join(path.split(".")[:3])] = node.outputs[0]
        levels = {str(value.name): value for value in graph.outputs if value.name in self.outputs}
        graph.outputs[:] = [*last.values(), *levels.values()]
        return [*last, *(self._level(name) for name in levels)]

    def _level(self, output: str) -> str:
        """The module that gives an output of the file: sam3_feat_0 -> convs.0, sam2_high_res_0 -> sam2_convs.0."""
        parts = output.split("_")
        return f"{NECK_MODULES[parts[0]]}.{parts[-1]}"


def finding_lines(finding: Finding) -> list[str]:
    """The finding for a screen."""
    lines = [f"{'module':20} {'rel. L2':>10} {'cosine':>11}"]
    for row in finding.figures:
        word = (
            "" if row.passed else f"  {row.non_finite} non-finite values" if row.non_finite else "  outside tolerance"
        )
        lines.append(f"{row.name:20} {row.relative_l2:10.2e} {row.cosine:11.8f}{word}")
    if finding.first_bad is None:
        return [*lines, "Every block and output is within tolerance."]
    return [
        *lines,
        f"first module outside tolerance: {finding.first_bad}",
        f"this command exports a corrected file: {finding.command}",
    ]
