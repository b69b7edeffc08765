"""A planted fault is found in its block, and the proposed command mends the file."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import DATA
from exporting import plant_in_trunk, save_state
from typer.testing import CliRunner

from engines.bisect import BisectError, bisect, finding_lines
from engines.bisect_trials import run_simulated
from engines.builder.flavor import Flavor
from engines.builder.options import PlanOptions
from engines.plan import make_plan
from export.contract.manifest import manifest_path
from export.contract.options import ExportOptions, QuantizeOptions
from export.pipeline import export_onnx
from neck.config import EncoderConfig
from neck_export import app

FAULTY = 2
"""The block that plant_in_trunk makes overflow in FP16, its function in FP32 unchanged."""

CASE = DATA / "meta-dual"


@pytest.fixture(scope="module")
def config() -> EncoderConfig:
    return EncoderConfig.from_file(CASE / "encoder.json")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, config: EncoderConfig) -> Path:
    """An FP16 file, not verified, one of whose blocks overflows in its attention's values; of two states the second."""
    folder = tmp_path_factory.mktemp("faulty")
    states = [torch.load(save_state(folder / "faulty.pt", change))["model"] for change in (None, plant_in_trunk)]
    torch.save(dict(zip(("model", "ema"), states, strict=True)), folder / "faulty.pt")
    options = ExportOptions(
        output=folder / "faulty.onnx",
        checkpoint=folder / "faulty.pt",
        state="ema",
        config=config,
        precision="fp16",
        verify=False,
    )
    return export_onnx(options).path


def test_names_the_planted_block_and_its_command_passes(faulty: Path) -> None:
    finding = bisect(faulty)
    assert finding.first_bad == f"trunk.blocks.{FAULTY}"
    assert finding.keep_fp32 == (f"trunk.blocks.{FAULTY}.attn",)  # the smallest: its MLP is sound
    before = {row.name: row.passed for row in finding.figures}
    assert all(before[f"trunk.blocks.{index}"] for index in range(FAULTY))
    assert not before["convs.0"]
    assert finding.command is not None
    words = shlex.split(finding.command)
    assert words[0] == "neck-export"
    assert words[words.index("--state") + 1] == "ema"  # the manifest told it to the search, too
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    mended = Path(words[words.index("--output") + 1])
    assert json.loads(manifest_path(mended).read_text())["verification"]["verified"]
    assert "trunk.blocks.2.attn" in "\n".join(finding_lines(finding))


def test_without_the_island_the_same_command_is_refused(faulty: Path, tmp_path: Path, config: EncoderConfig) -> None:
    weights = ["--checkpoint", str(faulty.with_name("faulty.pt")), "--state", "ema"]
    words = ["onnx", *weights, "--config", str(CASE / "encoder.json")]
    result = CliRunner().invoke(app, [*words, "--precision", "fp16", "--output", str(tmp_path / "bad.onnx")])
    assert result.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_a_sound_file_has_nothing_to_mend(tmp_path: Path, config: EncoderConfig) -> None:
    options = ExportOptions(
        output=tmp_path / "sound.onnx",
        checkpoint=CASE / "checkpoint.pt",
        config=config,
        precision="fp16",
        verify=False,
    )
    finding = bisect(export_onnx(options).path)
    assert finding.first_bad is None and finding.command is None
    assert "within tolerance" in finding_lines(finding)[-1]
    fp32 = dataclasses.replace(options, output=tmp_path / "fp32.onnx", precision="fp32")
    with pytest.raises(BisectError, match="FP32"):
        bisect(export_onnx(fp32).path)


def test_fp8_attentions_are_searched(faulty: Path, tmp_path: Path, config: EncoderConfig) -> None:
    """The same fault in a file whose attentions are FP8; the command that mends it leaves the other three in FP8."""
    options = ExportOptions(
        output=tmp_path / "fp8.onnx",
        checkpoint=faulty.with_name("faulty.pt"),
        state="ema",
        config=config,
        precision="fp8",
        quantize=QuantizeOptions(("*.attn.attention",)),
        verify=False,
    )
    finding = bisect(export_onnx(options).path)
    assert finding.first_bad == f"trunk.blocks.{FAULTY}"
    assert finding.keep_fp32 == (f"trunk.blocks.{FAULTY}.attn",)
    assert finding.command is not None
    words = shlex.split(finding.command)
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    kept = json.loads(manifest_path(Path(words[words.index("--output") + 1])).read_text())["quantization"]["attentions"]
    assert sorted(kept) == [f"trunk.blocks.{index}.attn.attention" for index in (0, 1, 3)]


def test_a_plan_is_searched_as_its_graph_is(faulty: Path, tmp_path: Path) -> None:
    """What a plan needs but a GPU: the same search, the trials in ONNX Runtime instead of on the GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    plan = make_plan(PlanOptions(faulty, tmp_path / "faulty.plan", flavor="rtx", verify=False)).path
    finding = bisect(plan, run=run_simulated)
    assert finding.keep_fp32 == (f"trunk.blocks.{FAULTY}.attn",)
    assert finding.command is not None
    words = shlex.split(finding.command)
    assert EncoderConfig.from_file(Path(words[words.index("--config") + 1])).depth == 4


@pytest.mark.gpu
def test_a_plan_on_a_gpu(request: pytest.FixtureRequest, tmp_path: Path, gpu_flavor: Flavor) -> None:
    faulty = request.getfixturevalue("faulty")  # an export of seconds, made only where it can be used
    plan = make_plan(PlanOptions(faulty, tmp_path / "faulty.plan", verify=False)).path
    assert bisect(plan).first_bad == f"trunk.blocks.{FAULTY}"
