"""What a command reads, hashes and computes, counted: each file once, and each set of images once through PyTorch."""

from __future__ import annotations

import collections
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import shared_encoder, tiny_config
from exporting import (
    checkpoint_of,
    config_of,
    golden_options,
    neck_export_cli,
    plant_in_trunk,
    save_state,
    trace_quickly,
)
from fake_gpu.play import play
from torch import nn

import engines.bisect
import engines.plan
import engines.run.verify
import engines.tune
from export.contract.manifest import sha256
from export.contract.signature import BatchRange
from export.pipeline import export_onnx
from export.verification.verify import reference_outputs
from neck.checkpoint import save_meta_checkpoint
from neck.necks import Sam3DualViTDetNeck
from neck.weights.torchfile import TorchFile

IMAGES = Path(__file__).parent / "data" / "images"
CONFIG = tiny_config(embed_dim=32, d_model=16, depth=2, global_blocks=(1,))
"""meta-dual's with half of its blocks, so that its trace serves."""


class Counts(collections.Counter[tuple[str, str]]):
    """How often something was done with a file (by its name) or with a set of images (by its digest)."""

    def of(self, what: str) -> dict[str, int]:
        """The counts of one kind of work."""
        return {name: count for (kind, name), count in self.items() if kind == what}


def replace_everywhere(patch: pytest.MonkeyPatch, function: Callable[..., Any], double: Callable[..., Any]) -> None:
    """Puts a double in the place of a function in every module that has imported it."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
            if value is function:
                patch.setattr(module, name, double)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts pickles that are opened, files that are hashed, ONNX files that are parsed, references that are run."""
    found = Counts()
    opened, parse = TorchFile.__init__, onnx.load
    hashes, refer = sha256, reference_outputs  # the names themselves are replaced here, too

    def open_counted(self: TorchFile, path: Path) -> None:
        found["opened", path.name] += 1
        opened(self, path)

    def hash_counted(path: Path) -> str:
        found["hashed", path.name] += 1
        return hashes(path)

    def parse_counted(path: Any, *more: Any, **options: Any) -> onnx.ModelProto:
        if isinstance(path, str | Path):
            found["parsed", Path(path).name] += 1
        return parse(path, *more, **options)

    def run_counted(encoder: Sam3DualViTDetNeck, pixels: np.ndarray, *more: Any) -> dict[str, np.ndarray]:
        hooked = any(
            one._forward_pre_hooks or one._forward_hooks for one in encoder.modules() if isinstance(one, nn.Linear)
        )
        if not hooked and not any("forward" in vars(one) for one in encoder.modules()):
            found["referred", f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()[:8]}"] += 1
        return refer(encoder, pixels, *more)  # else a trial, with rounded layers or attentions

    monkeypatch.setattr(TorchFile, "__init__", open_counted)
    monkeypatch.setattr(onnx, "load", parse_counted)
    replace_everywhere(monkeypatch, hashes, hash_counted)
    replace_everywhere(monkeypatch, refer, run_counted)
    return found


@pytest.fixture(scope="module", autouse=True)
def _quick_traces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch, engines.bisect)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An FP32 file, an FP16 one, and an FP32 one whose plan needs FP32 residual sums."""
    folder = tmp_path_factory.mktemp("counted")
    save_meta_checkpoint(shared_encoder(CONFIG), folder / "checkpoint.pt")
    same: dict[str, Any] = {"necks": "sam3", "verify": False, "batch": BatchRange(1, 2, 3)}
    small: dict[str, Any] = {"checkpoint": folder / "checkpoint.pt", "config": CONFIG}
    return {
        name: export_onnx(golden_options("meta-dual", folder / f"{name}.onnx", **{**same, **more})).path
        for name, more in {
            "single": small,
            "half": {**small, "precision": "fp16"},
            "faulty": {"checkpoint": save_state(folder / "faulty.pt", plant_in_trunk), "precision": "fp16"},
        }.items()
    }


def run(*words: str | Path, code: int = 0) -> None:
    """Runs a command that must end with a code."""
    ran = neck_export_cli(*words)
    assert ran.code == code, (ran.out, ran.err)


def once(counts: Counts, *, opened: str = "checkpoint.pt", hashed: tuple[str, ...] = ()) -> None:
    """The checkpoint is opened and hashed once, the named files too, and each set of images is computed once."""
    assert counts.of("opened") == {opened: 1}
    assert counts.of("hashed").items() >= {name: 1 for name in (opened, *hashed)}.items()
    assert max(counts.of("hashed").values()) == 1
    assert set(counts.of("referred").values()) == {1}


WORDS = ("--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"), "--image-size", "112")
TIGHT = ("--tolerance", "sam3_feat_*=1e-5")
"""What FP16 never keeps, so that a build is tried again with FP32 residual sums and fails then."""


@pytest.mark.parametrize(
    ("more", "images"),
    [
        (("--precision", "fp16"), 1),
        (("--precision", "fp16", *TIGHT), 1),
        (("--precision", "fp8", "--quantize", "auto", "--budget", "0.02"), 1),
        (("--precision", "int8", "--quantize", "auto", "--batch", "1:1:2"), 2),  # chosen on one, verified on two
    ],
    ids=["fp16", "retry", "fp8", "dynamic"],
)
def test_onnx(tmp_path: Path, counts: Counts, more: tuple[str, ...], images: int) -> None:
    run("onnx", *WORDS, *more, "--output", tmp_path / "e.onnx", code=3 if TIGHT[0] in more else 0)
    once(counts, hashed=() if TIGHT[0] in more else ("e.onnx", "e.onnx.data"))
    assert len(counts.of("referred")) == images


@pytest.mark.parametrize("more", [(), TIGHT, ("--tune",)], ids=["plain", "retry", "tune"])
def test_trt(files: dict[str, Path], tmp_path: Path, counts: Counts, more: tuple[str, ...]) -> None:
    """On a GPU that is played: the plan is verified, with `retry` two, with `tune` six."""
    with play("11.4") as state:
        words = ("trt", files["single"], "--fp16", *more, "--output", tmp_path / "e.plan")
        run(*words, code=3 if more == TIGHT else 0)
        assert len(state.configs) == {(): 1, TIGHT: 2, ("--tune",): 6}[more]
    assert counts.of("opened") == {"checkpoint.pt": 1}
    assert list(counts.of("referred").values()) == [1]
    hashed = counts.of("hashed")
    plans = hashed.pop("e.plan", 0) + hashed.pop("e.plan.rejected", 0)
    layers = hashed.pop("e.plan.layers.json", 0)
    assert plans == layers == (6 if more == ("--tune",) else 1)
    assert hashed == {"checkpoint.pt": 1, "single.onnx": 1, "single.onnx.data": 1}
    assert counts.of("parsed")["single.onnx"] == 1


def test_verify_onnx(files: dict[str, Path], counts: Counts) -> None:
    run("verify", files["half"])
    once(counts, hashed=("half.onnx", "half.onnx.data"))
    assert counts.of("parsed") == {"half.onnx": 1}


def test_inspect(files: dict[str, Path], counts: Counts) -> None:
    run("inspect", files["half"], "--check")
    assert counts.of("parsed") == {"half.onnx": 1}
    assert counts.of("hashed") == {"half.onnx": 1, "half.onnx.data": 1}


def test_a_file_that_is_built_as_it_is_is_parsed_once(
    files: dict[str, Path], tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the graph is verified, here on other images than its export was."""
    with play("rtx-1.7", gpu=False):
        run("trt", files["half"], "--images", IMAGES, "--output", tmp_path / "e.plan")
    once(counts, hashed=("half.onnx", "half.onnx.data", "e.plan"))
    assert counts.of("parsed")["half.onnx"] == 2  # the second time by the builder that is played


def test_verify_plan(files: dict[str, Path], tmp_path: Path, counts: Counts) -> None:
    with play("11.4"):
        run("trt", files["half"], "--no-verify", "--output", tmp_path / "e.plan")
        counts.clear()
        run("verify", tmp_path / "e.plan", "--save-reference", tmp_path / "r.safetensors")
    once(counts, hashed=("e.plan", "e.plan.layers.json"))


def test_bisect(files: dict[str, Path], counts: Counts) -> None:
    run("bisect", files["faulty"])
    assert counts.of("opened") == {"faulty.pt": 1}
    assert counts.of("hashed") == {"faulty.onnx": 1, "faulty.onnx.data": 1, "faulty.pt": 1}
    assert counts.of("parsed")["faulty.onnx"] == 1
