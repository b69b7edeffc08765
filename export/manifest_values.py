"""What the manifest of an export says besides its files and weights."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import onnx_ir as ir

from export.contract.signature import Signature
from export.lowering.attention import AUTO
from export.lowering.precision import Residual
from export.options import ExportOptions, asked_readers, form_of
from export.proof.fidelity import Verdict
from export.proof.reader_check import graph_needs, readers_entry
from export.weights_origin import encoder_config, package_versions, tool_version
from neck.checkpoint_keys import NECK_MODULES
from neck.necks import Sam3DualViTDetNeck
from neck.weights.fingerprint import fingerprints


def export_facts(
    options: ExportOptions,
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    model: ir.Model,
    residual: Residual,
    verdict: Verdict | None,
) -> dict[str, Any]:
    """The facts: versions, encoder, contract, forms, readers, graph, verdict."""
    operators = collections.Counter(node.op_type for node in model.graph)
    form = form_of(options).attention
    fp16 = options.precision == "fp16"
    parts = {"trunk", *(NECK_MODULES[neck] for neck in signature.necks)}
    return {
        "versions": {"neck-export": tool_version(), **package_versions()},
        "encoder": encoder_config(encoder).to_dict(),
        "signature": signature.to_dict(),
        "fingerprints": fingerprints(
            (name, tensor) for name, tensor in encoder.state_dict().items() if name.split(".")[0] in parts
        ),
        "precision": options.precision,
        "attention": options.attention,
        "attention_form": AUTO[options.precision] if form == "auto" else form,
        "residual": "fp16" if fp16 and residual == "auto" else residual,
        "readers": readers_entry(graph_needs(model), asked_readers(options)),
        "upsampling": options.upsampling,
        "keep_fp32": list(options.keep_fp32),
        "opset": model.opset_imports[""],
        "rewrites": dataclasses.asdict(options.rewrites),
        "graph": {"nodes": sum(operators.values()), "operators": dict(operators.most_common())},
        "verification": verdict.to_dict() if verdict else {"verified": False, "reason": "not asked: --no-verify"},
    }
