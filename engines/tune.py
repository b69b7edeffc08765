"""Builds a plan in every form that computes the same, and keeps the fastest that passes: `trt --tune`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.builder.flavor import FlavorError, choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.options import PlanOptions
from engines.layers.layer_report import read_layers
from engines.plan import BuildRequest, PlanResult, Prepared, make_plan, prepare, publish_plan, read_onnx
from engines.run.inputs import SessionError
from engines.run.timing import median_ms
from export.contract.atomic import disk_errors
from export.contract.manifest import ManifestError, check_files, manifest_path, parse_json, read_manifest, to_json
from export.contract.options import AttentionForm, Spelling, Upsampling
from export.lowering.attention import FORMS
from export.pipeline import RejectedError
from export.verification.verify import Report
from neck.progress import counted

FP8_FORM: tuple[AttentionForm, Spelling] = ("fp32acc", "matmul")

UPSAMPLINGS: tuple[Upsampling, ...] = ("deconv", "conv")

FINALISTS, CLOSE, ROUNDS = 3, 1.1, 5
"""So many candidates, within a tenth of the fastest, are measured again in turn: builds lie minutes apart, in which a
GPU's clocks and temperature change by more than the forms differ. The rounds are odd, so that a median is a run."""


class TuneError(RuntimeError):
    """Nothing can be measured here, or no candidate passed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        attention, spelling, upsampling: its forms.
        latency_ms: median on the GPU right after its build, None where it was not measured.
        final_ms: median of the rounds in which the finalists were measured in turn, None for the others.
        worst_relative_l2: of all outputs against PyTorch, None where it was not built.
        layers: the layer report's line.
        problem: why it is out, None where it passed.
        residual: type of the blocks' sums; an `auto` that left tolerance in FP16 was built again in FP32.
        fp8_attention: whether the selected attentions are FP8; the forms are those of the others.
    """

    attention: str
    spelling: str
    upsampling: str
    latency_ms: float | None = None
    worst_relative_l2: float | None = None
    layers: str | None = None
    problem: str | None = None
    final_ms: float | None = None
    residual: str = "auto"
    fp8_attention: bool = False

    @property
    def name(self) -> str:
        """Its forms, as a message and its folder name them."""
        return f"{'fp8' if self.fp8_attention else self.attention}, {self.spelling}, {self.upsampling}"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All candidates, and the plan that was kept."""

    rows: tuple[Row, ...]
    best: PlanResult


def tune_plan(
    options: PlanOptions,
    report: Report = lambda line: None,
    *,
    make: Callable[[PlanOptions, Report, Prepared], PlanResult] = make_plan,
    measure: Callable[[Path], float] | None = None,
) -> Tuning:
    """Builds, verifies and profiles every candidate; the fastest that passes gets the plan's name.

    A run that was stopped goes on where it was: finished rows lie in X.plan.tuning/rows.json and hold while the ONNX
    file, the options, TensorRT and the GPU stay the same.

    Args:
        options: as for make_plan; its attention, spelling and upsampling are what is tried.
        report: told of every step.
        make, measure: build and verify a candidate, and its median latency in ms; replaced in tests.

    Raises:
        TuneError: no GPU, a file that is not FP32, or no candidate that passes.
        CalibrationError, ImageError, ExportError: as make_plan's, of FP8 and INT8.
    """
    if options.build.replay_timing:
        raise TuneError(
            "--tune and --replay-timing cannot be used together: --tune needs new measurements of the kernels, but "
            "--replay-timing only uses recorded kernel times; leave out one of the two options"
        )
    flavor = choose_flavor(options.flavor)
    if flavor.gpu is None and measure is None:
        raise TuneError(
            "--tune measures every candidate, so it needs an NVIDIA GPU with its driver; build without --tune"
        )
    if measure is None and not torch.cuda.is_available():
        raise TuneError(
            "--tune runs every candidate with torch, but the installed torch is a CPU build; install its CUDA build"
        )
    source = read_onnx(options, report)
    if source.manifest is None or source.precision != "fp32" or options.precision in (None, "fp32"):
        raise TuneError(
            f"{options.onnx}: --tune needs an FP32 file written by neck-export; export the encoder in FP32, "
            "and choose the precision of the plan with --fp16, --bf16 or --precision"
        )
    measure = measure or measured_ms
    folder = options.output.with_name(options.output.name + ".tuning")
    state = folder / "rows.json"
    key = BuildRequest(options, flavor, source, options.precision, report).key
    rows = finished_rows(state, key, options.output.name)
    with disk_errors(BuildError, options.output):
        folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(options, source, options.precision, flavor)
    selected = prepared.selected and prepared.selected.quantization
    pairs = [(name, spelling) for name, form in FORMS.items() for spelling in form.tuned]
    candidates = [(pair, upsampling, False) for pair, upsampling in itertools.product(pairs, UPSAMPLINGS)]
    if selected and selected.attentions:  # FP8 attention has one form; what is in FP16 beside it takes the spelling
        candidates += [(FP8_FORM, upsampling, True) for upsampling in UPSAMPLINGS]
    for (attention, spelling), upsampling, eight in counted(candidates, "candidates", len(candidates), "builds"):
        row = Row(attention, spelling, upsampling, fp8_attention=eight)
        if any(other.name == row.name for other in rows):
            continue
        report(f"building candidate {row.name}")
        forms: dict[str, Any] = {"attention": attention, "spelling": spelling, "upsampling": upsampling}
        forms["fp8_attention"] = eight
        candidate = dataclasses.replace(options, **forms, output=place_of(folder, row) / options.output.name)
        rows.append(try_candidate(candidate, lambda one: make(one, report, prepared), measure))
        saved = {"key": key, "rows": [dataclasses.asdict(row) for row in rows]}
        state.write_text(to_json(saved), encoding="utf-8")
    rows = run_final(rows, lambda row: place_of(folder, row) / options.output.name, measure, report)
    best = fastest(rows)
    if best is None:
        reasons = "\n".join(tuning_rows(rows))
        raise TuneError(f"{options.output}: no candidate passed verification\n{reasons}")
    publish_plan(place_of(folder, best), options.output)
    shutil.rmtree(folder, ignore_errors=True)
    manifest = read_manifest(manifest_path(options.output), "plan")
    return Tuning(tuple(rows), PlanResult(options.output, manifest, read_layers(options.output), None))


def measured_ms(plan: Path) -> float:
    """The median latency of a candidate, whose bytes were hashed when it was built or found."""
    return median_ms(plan, read_manifest(manifest_path(plan), "plan"))


def try_candidate(
    options: PlanOptions, make: Callable[[PlanOptions], PlanResult], measure: Callable[[Path], float]
) -> Row:
    """One row; a candidate that fails has its reason in the row instead of stopping the run."""
    forms = (options.attention, options.spelling or "matmul", options.upsampling)
    row = Row(*forms, fp8_attention=options.fp8_attention)
    try:
        result = make(options)
        worst = worst_relative_l2(result.manifest["verification"])
        layers = result.layers.summary() if result.layers else None
        residual = result.manifest.get("residual", "auto")
        row = dataclasses.replace(row, worst_relative_l2=worst, layers=layers, residual=residual)
        return dataclasses.replace(row, latency_ms=measure(result.path))
    except RejectedError as error:
        worst = max(row.relative_l2 for row in error.verdict.comparisons)
        problem = f"rejected: {len(error.verdict.failed_names)} outputs exceeded the tolerance"
        return dataclasses.replace(row, worst_relative_l2=worst, problem=problem)
    except (BuildError, FlavorError, SessionError, MemoryError) as error:
        return dataclasses.replace(row, problem=" ".join(str(error).split())[:200])


def place_of(folder: Path, row: Row) -> Path:
    """The folder of a candidate."""
    return folder / row.name.replace(", ", "-")


def run_final(
    rows: list[Row], plan_of: Callable[[Row], Path], measure: Callable[[Path], float], report: Report
) -> list[Row]:
    """Measures the fastest candidates again, in turn, there and back; returns all rows, theirs with `final_ms`."""
    passed = sorted(
        (row for row in rows if row.problem is None and row.latency_ms), key=lambda row: row.latency_ms or 0
    )
    final = [row for row in passed if (row.latency_ms or 0) <= CLOSE * (passed[0].latency_ms or 0)][:FINALISTS]
    if len(final) < 2:
        return rows
    times: dict[Row, list[float]] = {row: [] for row in final}
    for number in range(ROUNDS):
        report(f"measuring the fastest candidates again, round {number + 1} of {ROUNDS}")
        for row in [*times] if number % 2 == 0 else [*reversed(times)]:
            try:
                times[row].append(measure(plan_of(row)))
            except (SessionError, MemoryError):  # another program took the memory: it stays with its first figure
                del times[row]
    return [dataclasses.replace(row, final_ms=statistics.median(times[row])) if row in times else row for row in rows]


def worst_relative_l2(verification: dict[str, Any]) -> float | None:
    """The largest relative L2 of a verification's outputs, null figures being infinite."""
    outputs = verification.get("outputs") or verification.get("onnx", {}).get("outputs") or []
    figures = [math.inf if row["relative_l2"] is None else float(row["relative_l2"]) for row in outputs]
    return max(figures, default=None)


def finished_rows(state: Path, key: dict[str, Any], name: str) -> list[Row]:
    """Rows of an earlier run with the same key whose plans are still there; none where the file is damaged.

    Args:
        state: the file of the rows, in the folder of the candidates.
        key: what decides that they hold.
        name: of a candidate's plan in its folder.
    """
    try:
        saved = parse_json(state.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in saved["rows"]] if saved["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if row.problem is not None or is_whole(place_of(state.parent, row) / name)]


def is_whole(plan: Path) -> bool:
    """Whether a plan is as its manifest says, byte for byte."""
    where = manifest_path(plan)
    try:
        check_files(where, read_manifest(where, "plan"))
    except ManifestError:
        return False
    return True


def fastest(rows: list[Row]) -> Row | None:
    """The fastest row that passed: of the finalists where there were any."""
    passed = [row for row in rows if row.problem is None and row.latency_ms is not None]
    return min(passed, key=lambda row: (row.final_ms is None, row.final_ms or row.latency_ms), default=None)


def tuning_rows(rows: list[Row]) -> list[str]:
    """The table of all candidates."""
    forms = f"{'attention':10} {'spelling':10} {'upsampling':10}"
    lines = [f"{forms} {'ms':>8} {'ms again':>8} {'worst L2':>9}  result"]
    for row in rows:
        latency = "" if row.latency_ms is None else f"{row.latency_ms:.3f}"
        final = "" if row.final_ms is None else f"{row.final_ms:.3f}"
        worst = "" if row.worst_relative_l2 is None else f"{row.worst_relative_l2:.2e}"
        outcome = row.problem or row.layers or "passed"
        outcome += ", residual sums in FP32" if row.residual == "fp32" else ""
        forms = f"{'fp8' if row.fp8_attention else row.attention:10} {row.spelling:10} {row.upsampling:10}"
        lines.append(f"{forms} {latency:>8} {final:>8} {worst:>9}  {outcome}")
    return lines


def tuning_lines(tuning: Tuning) -> list[str]:
    """The table and what was kept."""
    best = fastest(list(tuning.rows))
    kept = f"kept: {best.name}" if best else "kept: none"
    return [*tuning_rows(list(tuning.rows)), kept]
