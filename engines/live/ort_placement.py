"""Which operators of a session ONNX Runtime computes on the CPU beside a GPU: told by its own profile of a first run.

Consumers of Shape go there by design, and a dynamic batch has them, so `session.disable_cpu_ep_fallback` refuses sound
files; an Attention, however, may go there without a word (onnxruntime #28025).
"""

from __future__ import annotations

import collections
import json
import re
import tempfile
from pathlib import Path
from typing import Any

HEAVY = re.compile(r"Attention|MatMul|Conv|Gemm")
"""Operators that must not be on the CPU, also as ONNX Runtime's fusions name them: FusedMatMul, MultiHeadAttention."""

CPU_PROVIDER = "CPUExecutionProvider"


class FirstRun:
    """Profiles a session from its making to the end of its first run; `asked` are the options to make it with."""

    def __init__(self, asked: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="neck-export-")
        asked.enable_profiling = True
        asked.profile_file_prefix = str(Path(self._folder.name) / "first")

    def heavy_on_cpu(self, session: Any) -> str | None:
        """Ends the profile, and names what of HEAVY ran on the CPU: `Attention (32 nodes)`; None if nothing did."""
        with self._folder:
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return heavy_on_cpu(events)


def heavy_on_cpu(events: list[dict[str, Any]]) -> str | None:
    """The same of the events of a profile."""
    nodes: dict[str, set[str]] = collections.defaultdict(set)
    for event in events:
        about = event.get("args") or {}
        if event.get("cat") == "Node" and about.get("provider") == CPU_PROVIDER and HEAVY.search(about["op_name"]):
            nodes[about["op_name"]].add(str(event["name"]))
    return ", ".join(f"{kind} ({len(names)} nodes)" for kind, names in sorted(nodes.items())) or None
