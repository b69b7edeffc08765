"""What the manifest of an export says besides its files and weights."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.contract.manifest import seen
from export.contract.options import ExportOptions
from export.contract.signature import Signature
from export.contract.targets import Target
from export.lowering.resolve_target import Form
from export.verification.fidelity import Verdict
from export.verification.target_check import Needs, targets_entry
from export.weights_origin import encoder_config, package_versions, tool_version
from neck.checkpoint_keys import NECK_MODULES
from neck.necks import Sam3DualViTDetNeck
from neck.weights.fingerprint import fingerprints


def export_facts(
    options: ExportOptions, form: Form, encoder: Sam3DualViTDetNeck, signature: Signature
) -> dict[str, Any]:
    """What was exported, with which versions and in which forms."""
    parts = {"trunk", *(NECK_MODULES[neck] for neck in signature.necks)}
    parts |= {"sam2_head"} if signature.sam2_outputs == "head" else set()
    return {
        "versions": {"neck-export": tool_version(), **package_versions()},
        "encoder": encoder_config(encoder).to_dict(),
        "signature": signature.to_dict(),
        "weights_sha256": fingerprints(
            (name, tensor) for name, tensor in encoder.state_dict().items() if name.split(".")[0] in parts
        ),
        "precision": options.precision,
        "attention": options.attention,
        "attention_form": form.attention,
        "attention_spelling": form.spelling if form.attention == "fp32acc" else "matmul",
        "upsampling": options.upsampling,
        "keep_fp32": list(options.keep_fp32),
        "rewrites": dataclasses.asdict(options.rewrites),
    }


def graph_facts(model: ir.Model, needs: Needs, targets: Sequence[Target]) -> dict[str, Any]:
    """What was written and which runtimes can load it; `targets` are the requested ones."""
    operators = collections.Counter(node.op_type for node in model.graph)
    return {
        "targets": targets_entry(needs, targets),
        "opset": model.opset_imports[""],
        "graph": {"nodes": sum(operators.values()), "operators": dict(operators.most_common())},
    }


def verification(verdict: Verdict | None, files: Iterable[Path]) -> dict[str, Any]:
    """The verdict, and the bytes that it refers to."""
    if verdict is None:
        return {"verified": False, "reason": "not asked: --no-verify"}
    return verdict.to_dict() | {"files": seen(files)}
