"""The machine and its software as a report tells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.findings import NOTHING, scaled


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
