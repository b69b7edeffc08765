"""What was measured, how and on which machine, in words: the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.findings import NOTHING, scaled, size_name
from benchmarks.results.result_files import Result, of_machine

TITLE = "SAM 3 image encoder: benchmark"

DEVICE_PEAK = (
    "Peak device memory is measured differently for each runtime. PyTorch: the largest amount of device memory that "
    "PyTorch's allocator held at any time after the module was loaded or compiled. The amount includes weights, "
    "activations and outputs, but not the CUDA context and not the memory used by the compilation. ONNX Runtime: the "
    "device memory taken by loading the ONNX file and by the first run, including the memory of the CUDA libraries. "
    "TensorRT: the device memory taken by loading the plan, including scratch memory, plus the size of the outputs."
)


def about(result: Result) -> str:
    """One line under the title."""
    encoder = result["encoder"]
    necks = " and ".join(encoder["necks"])
    size = size_name(encoder["image_size"], encoder["batch"])
    return f"{size}, {necks} neck, {scaled(encoder['parameters'], '')} parameters, {result['date']}"


def commands(result: Result) -> list[str]:
    """Every command that the result was measured by, once."""
    told = [of_machine(result, machine, "command") for machine in result["machines"]]
    return list(dict.fromkeys(told))


def method(result: Result) -> list[str]:
    """The method of measurement, in sentences that hold for this result."""
    rows = [row for row in result["rows"] if row["status"] == "measured" and row["sweep"] is None]
    runs = sorted({row["latency"]["runs"] for row in rows})
    warm = sorted({row["warm_up_runs"] for row in rows if row.get("warm_up_runs") is not None})
    lines = [
        "In every round, all backends ran one after the other, so gradual changes in the speed of the machine affect "
        "all backends alike."
    ]
    if runs:
        lines.append(f"Timed runs per backend: {_range(runs)}; warm-up runs before them: {_range(warm) or 'unknown'}.")
    if any(row.get("peak_device_bytes") for row in rows):
        lines.append(DEVICE_PEAK)
    settings = {
        f"{name}={value}"
        for machine in result["machines"]
        for name, value in machine["environment"].get("settings", {}).items()
    }
    if settings:
        lines.append(f"Every backend ran in its own process with {', '.join(sorted(settings))}.")
    return [
        *lines,
        "A ratio is computed for each round; the report shows the median and, in parentheses, the lowest and "
        "highest ratio.",
        "Every numerical error in this report compares an output with its reference. The reference is the same output, "
        "computed by PyTorch in FP32 with the original encoder, to which no graph rewrites were applied. The sums in "
        "the error formulas are accumulated in float64.",
        "The floor is a lower bound on latency. It is the larger of two durations: the number of operations divided "
        "by the measured matrix multiplication rate, and the minimum memory traffic divided by the measured copy "
        "rate. A multiply-add counts as 2 operations.",
    ]


def _range(values: list[int]) -> str:
    return "" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def encoder_facts(result: Result) -> list[tuple[str, str]]:
    """Facts about the encoder that was measured."""
    encoder = result["encoder"]
    pairs = [
        ("Weights", encoder["checkpoint"]),
        ("Image size", size_name(encoder["image_size"])),
        ("Batch", str(encoder["batch"])),
        ("Necks", ", ".join(encoder["necks"])),
        ("Levels", ", ".join(str(level) for level in encoder["levels"])),
        ("Positions", encoder["positions"]),
        *([("Outputs of the sam2 neck", encoder["sam2_outputs"])] if "sam2_outputs" in encoder else []),
        ("Parameters", scaled(encoder["parameters"], "")),
    ]
    return pairs + [(name.replace("_", " "), str(value)) for name, value in (encoder.get("config") or {}).items()]


def environment(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine and its software, name by name."""
    told = machine["environment"]
    pairs = [("Processor", told["processor"]), ("Cores", str(told["cores"] or NOTHING))]
    pairs += [("Memory", scaled(told["memory_bytes"], "B"))] if told.get("memory_bytes") else []
    pairs += _gpu(told["gpu"])
    pairs += [(name.capitalize(), str(told[name])) for name in ("system", "python") if told.get(name)]
    pairs += [(name, version or "not installed") for name, version in told["versions"].items()]
    roof = machine["roofline"]
    if roof:
        rates = [(name.upper(), rate) for name, rate in roof["flops_per_s"].items()]
        pairs += [(f"Matrix rate, {name}", scaled(rate, "FLOP/s") if rate else "not measured") for name, rate in rates]
        pairs.append(("Copy rate", scaled(roof["copy_bytes_per_s"], "B/s")))
    known = {"processor", "cores", "memory_bytes", "gpu", "system", "python", "versions"}
    return pairs + [(_name(key), _flat(value)) for key, value in told.items() if key not in known]


def _gpu(gpu: dict[str, Any] | None) -> list[tuple[str, str]]:
    if gpu is None:
        return [("GPU", "none")]
    shown = {**gpu, "memory_bytes": scaled(gpu.get("memory_bytes"), "B")}
    pairs = [("GPU", gpu["name"])]
    return pairs + [(f"GPU {_name(key, False)}", _flat(value)) for key, value in shown.items() if key != "name"]


def _name(key: str, capital: bool = True) -> str:
    words = key.removesuffix("_bytes").replace("_", " ")
    return words.capitalize() if capital else words


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_name(key, False)} {_flat(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_flat(entry) for entry in value)
    return NOTHING if value is None else str(value)
