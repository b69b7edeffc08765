"""A measured run -> the result, in the form of benchmarks/results/result.schema.json."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import BenchError
from benchmarks.measure.backends import REFERENCE, Backend
from benchmarks.measure.environment import machine_name
from benchmarks.measure.measure_point import MeasurePoint
from benchmarks.measure.run import Run
from benchmarks.measure.worker_process import ROOT
from benchmarks.options import SELECTION
from benchmarks.results.feature_images import feature_images
from benchmarks.results.result_files import can_check, row_problem
from benchmarks.results.rows import (
    MACHINE,
    best_candidate,
    best_rates,
    empty_row,
    make_row,
    plain_twin,
    raise_rates,
    work_of,
)
from benchmarks.roofline import total_bytes, total_operations
from engines.layers.layer_report import read_layers
from neck.images import ImageFolder, find_images, read_image

SHIPPED = "astronaut.jpg (NASA)"
UNCHECKED = "the results were not checked against result.schema.json, because jsonschema is not installed"


def make_result(run: Run) -> dict[str, Any]:
    """The result of a run whose points are measured.

    Raises:
        BenchError: nothing could be measured, or the exporter's benchmark that was asked for fails.
    """
    roofline, rows = all_rows(run)
    environment = run.environment if can_check() else {**run.environment, "form": UNCHECKED}
    machine = {"id": MACHINE, "name": machine_name(run.environment), "environment": environment}
    return {
        "schema": 1,
        "kind": "bench",
        "date": date.today().isoformat(),
        "command": run.options.command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "encoder": _encoder(run),
        "machines": [{**machine, "roofline": roofline}],
        "rows": rows,
        "work": work_of(run.main, run.samples),
        "growth": _growth(run),
        "kernels": _kernels(run),
        "features": _features(run, rows),
        "export": _export(run),
    }


def _encoder(run: Run) -> dict[str, Any]:
    options, signature = run.options, run.main.signature
    random = f"random (seed {options.seed})"
    chosen = [f"{key} {getattr(options, key)}" for key in SELECTION if getattr(options, key) is not None]
    head = {"sam2_outputs": signature.sam2_outputs} if signature.sam2_outputs != "features" else {}  # older have none
    return {
        "checkpoint": ", ".join([str(options.checkpoint), *chosen]) if options.checkpoint else random,
        "image_size": list(run.main.image_size),
        "batch": options.batch,
        "necks": list(signature.necks),
        "levels": list(signature.levels),
        "positions": signature.positions,
        **head,
        "config": run.main.config.to_dict(),
        "parameters": run.place.prepared.parameters,
    }


def _roofline(run: Run) -> dict[str, Any]:
    rates = best_rates(run.samples.all("rates"))
    roofline = {name: rates[name] for name in ("device", "flops_per_s", "copy_bytes_per_s")}
    return raise_rates(roofline, [run.main, *run.swept], run.available(), run.samples)


def all_rows(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine's rates, and the main point's rows, then sweep by sweep.

    The main point is a point of each sweep that has its size.

    Raises:
        BenchError: nothing could be measured.
    """
    roofline = _roofline(run)
    rows = _rows(run, run.main, roofline)
    if not any(row["status"] == "measured" for row in rows):
        reasons = "; ".join(f"{row['backend']}: {row['reason']}" for row in rows)
        raise BenchError(
            f"no backend could be measured: {reasons}; run the command with --fresh to try all backends again"
        )
    for sweep in dict.fromkeys(name for name, _, _ in run.options.sweeps):
        points = [point for point in run.swept if point.sweep == sweep]
        if len(points) < sum(name == sweep for name, _, _ in run.options.sweeps):
            points.append(dataclasses.replace(run.main, sweep=sweep))
        for point in sorted(points, key=lambda one: (one.image_size, one.batch)):
            rows += _rows(run, point, roofline)
    return roofline, rows


def _rows(run: Run, point: MeasurePoint, roofline: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for one in run.swept_backends() if point.sweep else run.backends:
        if one.id in run.unavailable:
            rows.append(empty_row(one, point, "unavailable", run.unavailable[one.id]))
        else:
            twin = plain_twin(one, run.available())
            rows.append(_sound(make_row(one, point, run.samples, roofline, twin), one, point))
    return rows


def _sound(row: dict[str, Any], backend: Backend, point: MeasurePoint) -> dict[str, Any]:
    """The row, or where its figures cannot be, one that says so: it must not cost the report."""
    problem = row_problem(row)
    return (
        row if problem is None else empty_row(backend, point, "failed", f"the measured figures are invalid: {problem}")
    )


def _growth(run: Run) -> list[dict[str, Any]]:
    """The closed form at every point, of the plain module."""
    found = {}
    for point in (run.main, *run.swept):
        parts = point.plain_parts
        work = {"operations": total_operations(parts), "least_bytes": total_bytes(parts, "fp32")}
        found[point.image_size, point.batch] = {"image_size": list(point.image_size), "batch": point.batch, **work}
    return [found[key] for key in sorted(found)]


def _kernels(run: Run) -> list[dict[str, Any]] | None:
    """The layer report of the plan that was named, else of the one that was measured."""
    built = sorted(run.place.folder.glob("rewritten-*-plan/*.plan"))
    plan = run.options.plan or (built[0] if built else None)
    return plan_kernels(plan) if plan else None


def plan_kernels(plan: Path) -> list[dict[str, Any]] | None:
    """The layer report beside a plan, where there is one; the kernels' times are `neck-export profile`'s to tell."""
    layers = read_layers(plan)
    if layers is None:
        return None
    return [{"name": one.name, "kind": one.kind, "ms": None, "bytes": one.bytes} for one in layers.kernels]


def _features(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Images of the first image's features, by the reference and by the fastest backend within tolerance."""
    name = best_candidate(rows)
    if name is None:
        return None
    folders = {one: run.folder / run.main.slug / one for one in (REFERENCE, name)}
    found = {
        one: {file.stem: np.load(file)[:1] for file in sorted(folder.glob("*.npy"))} for one, folder in folders.items()
    }
    for folder in (run.folder / run.main.slug).iterdir():
        for file in folder.glob("*.npy") if folder.name not in folders else ():
            file.unlink()
    if not found[name] or set(found[REFERENCE]) < set(found[name]):
        run.report(
            "the report contains no pictures of the feature maps, because an earlier run of the benchmark deleted the "
            "outputs from which the pictures are drawn. To get the pictures, use --fresh, which measures everything "
            "again"
        )
        return None
    return feature_images(found[REFERENCE], found[name], _image(run), name)


def _image(run: Run) -> str:
    """The first image's name, and where it is deeper than 8 bits what became of its values."""
    images = run.options.images
    if images is None:
        return SHIPPED
    folder, notes = ImageFolder.of(images), list[str]()
    path = find_images(folder.path)[0]
    read_image(path, folder.value_range, notes.append)
    return notes[0] if notes else path.name


def _export(run: Run) -> dict[str, Any] | None:
    """What the exporter itself costs, measured where it was asked for."""
    if not run.options.export:
        return None
    path = run.folder / "export.json"
    if not path.is_file():
        run.report("measuring the cost of an export, compared with plain torch.onnx.export")
        command = [sys.executable, "-m", "benchmarks.export", "--runs", "1", "--json", str(path)]
        # what it costs does not depend on the values, so where something has to be chosen, random ones do
        chosen = (run.options.state, run.options.prefix, run.options.adapter_alpha)
        plain = run.options.checkpoint and all(choice is None for choice in chosen)
        checkpoint = ["--checkpoint", str(run.options.checkpoint)] if plain else []
        done = subprocess.run([*command, *checkpoint], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["the process printed nothing"])[-1]
            raise BenchError(f"the benchmark of the exporter (python -m benchmarks.export) failed: {last}")
    export: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return export
