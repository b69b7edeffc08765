"""A plan against PyTorch: ONNX Runtime stands in for the engine; the real one runs where a GPU is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Save, run_onnx, shared_encoder, tiny_config, traced
from test_session import L4, facts, fake, write_plan

from engines.builder.build import build_plan
from engines.builder.flavor import Flavor
from engines.builder.options import BuildOptions
from engines.run import verify
from engines.run.inputs import Port, SessionError
from engines.run.verify import (
    Runner,
    VerifyError,
    describe,
    plan_signature,
    verify_plan,
    verify_runner,
)
from export.contract.manifest import manifest_path, write_manifest
from export.contract.signature import BatchRange, Signature
from export.lowering.precision import lower
from export.verification.fidelity import FidelityError
from export.verification.verify import image_count, make_reference

CONFIG = tiny_config(num_heads=1)
"""One head of 16: RTX fuses attention from 16 on."""


def runner(path: Path) -> Runner:
    """ONNX Runtime in the place of the engine."""

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in run_onnx(path, torch.from_numpy(image)).items()}

    return run


def export(save: Save, precision: str = "fp32", **asked: Any) -> tuple[Path, Signature]:
    graph = traced(shared_encoder(CONFIG), CONFIG, **{"batch": "1:2:3", **asked})
    lower(graph.model, precision)  # type: ignore[arg-type]
    return save(graph.model), graph.signature


@pytest.mark.parametrize("asked", [{}, {"input_kind": "uint8", "positions": "file", "batch": "2"}], ids=str)
def test_a_true_candidate_passes_and_a_false_one_does_not(save: Save, asked: dict[str, Any]) -> None:
    path, signature = export(save, **asked)
    reference = make_reference(shared_encoder(CONFIG), signature, 2)
    run, seen = runner(path), []

    def watched(image: np.ndarray) -> Mapping[str, np.ndarray]:
        seen.append((image.dtype.name, image.shape))
        return run(image)

    verdict = verify_runner(watched, signature, reference, "fp32", "ONNX Runtime")
    assert verdict.passed
    assert verdict.method == "PyTorch FP32 on cpu compared with ONNX Runtime, 2 images"
    assert [row.name for row in verdict.comparisons] == [spec.name for spec in signature.outputs]
    assert any("_pos_" in row.name for row in verdict.comparisons) == (asked.get("positions") != "file")
    assert seen == [("uint8", (2, 112, 112, 3)) if asked.get("input_kind") else ("float32", (2, 3, 112, 112))]

    def swapped(image: np.ndarray) -> dict[str, np.ndarray]:
        """The images of the batch mixed up, as a broken dynamic batch would."""
        return {name: value[::-1] for name, value in run(image).items()}

    false = verify_runner(swapped, signature, reference, "fp32", "ONNX Runtime")
    assert false.failed_names == [spec.name for spec in signature.outputs if "_feat_" in spec.name]
    forgiven = verify_runner(swapped, signature, reference, "fp32", "ONNX Runtime", {"*": 2.0})
    assert forgiven.passed


def test_a_value_that_is_not_finite_fails(save: Save) -> None:
    path, signature = export(save)
    reference = make_reference(shared_encoder(CONFIG), signature, 1)

    def broken(image: np.ndarray) -> dict[str, np.ndarray]:
        outputs = runner(path)(image)
        outputs["sam3_feat_1"][0, 0, 0, 0] = np.inf
        return outputs

    assert verify_runner(broken, signature, reference, "fp32", "x").failed_names == ["sam3_feat_1"]


def test_other_outputs_than_the_signatures_are_no_verdict(save: Save) -> None:
    path, signature = export(save)
    reference = make_reference(shared_encoder(CONFIG), signature, 1)
    outputs = runner(path)(np.zeros((1, 3, 112, 112), np.float32))
    missing = {name: value for name, value in outputs.items() if name != "sam3_pos_3"}
    with pytest.raises(VerifyError, match=r"sam3_pos_2, but .*sam3_pos_3"):
        verify_runner(lambda image: missing, signature, reference, "fp32", "x")
    with pytest.raises(VerifyError, match=r"returns the outputs \(none\), but"):
        verify_runner(lambda image: {}, signature, reference, "fp32", "x")


def test_an_override_that_fits_nothing_is_told_before_the_run() -> None:
    signature = traced(shared_encoder(CONFIG), CONFIG, batch="1:2:3").signature

    def never(image: np.ndarray) -> dict[str, np.ndarray]:
        pytest.fail("ran")

    reference = make_reference(shared_encoder(CONFIG), signature, 1)
    with pytest.raises(FidelityError, match="'sam9_feat_0' matches no output"):
        verify_runner(never, signature, reference, "fp32", "x", {"sam9_feat_0": 0.1})


def test_the_reference_alone_is_computed_in_full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = traced(shared_encoder(CONFIG), CONFIG, batch="1:2:3").signature
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("medium")  # BF16 on a CPU that has it, TF32 on a GPU
    seen = []

    def fails(*args: object) -> None:
        products = torch.get_float32_matmul_precision()
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, products))
        raise MemoryError

    monkeypatch.setattr("export.verification.verify.forward_necks", fails)
    try:
        with pytest.raises(MemoryError):
            make_reference(shared_encoder(CONFIG), signature, 1)
        assert seen == [(False, False, "highest")]
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("batch", "count"), [((1, 1), 1), ((4, 4), 4), ((1, 8), 2), ((3, 8), 3), ((1, 2), 2)])
def test_how_many_images(batch: tuple[int, int], count: int) -> None:
    assert image_count(BatchRange(batch[0], *batch)) == count


def test_the_method_names_gpu_and_version() -> None:
    assert describe(fake()) == "TensorRT-RTX 1.7.1.116 on NVIDIA L4 (compute capability 8.9, driver 570.86)"
    assert describe(fake(name="tensorrt", version="11.4.0.106", gpu=None)) == "TensorRT 11.4.0.106"


def test_a_foreign_onnx_file_cannot_be_verified() -> None:
    signature = traced(shared_encoder(CONFIG), CONFIG, batch="1:2:3").signature
    told = {"signature": signature.to_dict(), "onnx_manifest": {"encoder": {}}}
    assert plan_signature(Path("x.plan"), told, known=False) == signature
    assert plan_signature(Path("x.plan"), {**told, "onnx_manifest": None}, known=True) == signature
    for manifest, known in (({**told, "onnx_manifest": None}, False), ({**told, "signature": None}, True)):
        with pytest.raises(VerifyError, match="neck-export did not write, so it is unknown which PyTorch encoder"):
            plan_signature(Path("x.plan"), manifest, known=known)


def source() -> dict[str, Any]:
    """What an ONNX file's manifest says of its encoder."""
    return {"encoder": CONFIG.to_dict(), "weights": {"random": True, "seed": 0}}


class OnnxSession:
    """A session whose engine is ONNX Runtime."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.run, self.manifest, self.flavor = runner(path), manifest, fake()
        self.inputs = (Port("image", torch.float32, (-1, 3, 112, 112), (1, 3)),)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.run(inputs["image"])

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_verify_plan_finds_the_encoder_in_the_manifest(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path, signature = export(save)
    manifest = facts(signature=signature.to_dict(), onnx_manifest=source(), precision="fp32")
    monkeypatch.setattr(verify, "open_plan", lambda plan, flavor, **options: OnnxSession(path, manifest))
    steps: list[str] = []
    verdict = verify_plan(Path("x.plan"), report=steps.append)
    assert verdict.passed
    assert verdict.method.startswith("PyTorch FP32 on cpu compared with TensorRT-RTX 1.7.1.116 on NVIDIA L4")
    assert verdict.method.endswith("2 images")
    assert [step.split(":")[0].split(" in ")[0] for step in steps] == [
        "computing the reference outputs",
        "running the plan",
    ]
    manifest["onnx_manifest"]["weights"]["seed"] = 1  # the control: another encoder
    assert not verify_plan(Path("x.plan")).passed


def test_a_reference_serves_many_plans(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path, signature = export(save)
    manifest = facts(signature=signature.to_dict(), precision="fp32")
    monkeypatch.setattr(verify, "open_plan", lambda plan, flavor, **options: OnnxSession(path, manifest))
    reference = make_reference(shared_encoder(CONFIG), signature, 3)
    monkeypatch.setattr(verify, "make_reference", SimpleNamespace())
    assert verify_plan(Path("x.plan"), reference=reference).method.endswith("3 images")


def test_a_plan_that_cannot_run_here_gets_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no NVIDIA GPU"):
        verify_plan(write_plan(tmp_path), flavor=fake(gpu=None))
    with pytest.raises(SessionError, match="No such file"):
        verify_plan(tmp_path / "none.plan", flavor=fake(gpu=L4))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_real_plan_computes_what_pytorch_computes(save: Save, gpu_flavor: Flavor, precision: str) -> None:
    path, signature = export(save, precision)
    options = BuildOptions(precision=precision, batch=BatchRange(1, 2, 3))  # type: ignore[arg-type]
    result = build_plan(path, path.with_suffix(".plan"), options, flavor=gpu_flavor)
    values = facts(
        flavor=result.flavor,
        tensorrt_version=result.version,
        compute_capabilities=list(result.compute_capabilities),
        options=options.to_dict(),
        inputs=[dataclasses.asdict(spec) for spec in result.inputs],
        outputs=[dataclasses.asdict(spec) for spec in result.outputs],
        precision=precision,
        signature=signature.to_dict(),
        onnx_manifest=source(),
    )
    write_manifest(manifest_path(result.plan), "plan", values, [result.plan])
    verdict = verify_plan(result.plan, flavor=gpu_flavor)
    assert verdict.passed, verdict.failed_names
    assert gpu_flavor.gpu is not None
    assert gpu_flavor.gpu.name in verdict.method
    assert not verify_plan(result.plan, flavor=gpu_flavor, overrides={"sam3_feat_*": 1e-12}).passed  # the control
