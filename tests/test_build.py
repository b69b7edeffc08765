"""ONNX file -> plan by NVIDIA's own parser and builder (TensorRT-RTX, which needs no GPU), and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from conftest import Golden, Save, load_golden, traced
from listening import listening

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

from engines.builder import plan_stream as stream
from engines.builder.build import BuildResult, build_plan
from engines.builder.flavor import Flavor, FlavorError, choose_flavor
from engines.builder.onnx_graph import BuildError, RefusedError, read_graph
from engines.builder.options import BuildOptions
from export.contract.options import AttentionForm, Precision
from export.contract.signature import BatchRange, TensorSpec
from export.lowering.precision import lower
from neck.progress import Count

ROOT = Path(__file__).parent.parent
CAPABILITIES = ("8.6", "8.9", "12.0")
FORMS: list[tuple[Precision, AttentionForm]] = [
    ("fp32", "fused"),
    *(("fp16", form) for form in ("fp32acc", "fused", "unfused")),
    *(("bf16", form) for form in ("fp32acc", "fused", "unfused")),
]
NECKS = (("meta-padded", "sam3"), ("meta-dual", "both"), ("meta-tri", "all"))
"""One, two and three necks; the first has windows that do not divide its grid."""

BATCHES = ("fixed", "1:2:3")
"""Fixed: as many images as the golden case has, so that the graph is the one of test_trace.py."""
POSITIONS = ("none", "graph")
PRODUCT = list(itertools.product(range(len(FORMS)), range(len(NECKS)), range(2), range(2)))
ROWS = [(0, 0, 0, 1), (1, 1, 1, 1), (2, 2, 0, 1), (3, 0, 1, 0), (4, 1, 0, 1), (5, 1, 1, 1), (6, 0, 0, 1)]
"""7 of the 84, of graphs that other tests trace, too: every choice is in one of them; the others are built by
`make test-slow`."""


def test_every_choice_is_built() -> None:
    for place in range(4):
        assert {row[place] for row in ROWS} == {row[place] for row in PRODUCT}


def typed_file(
    save: Save,
    precision: Precision = "fp16",
    case: str = "meta-dual",
    batch: str = "1",
    **asked: Any,
) -> Path:
    """A golden encoder's file: one neck, no positions, unless `signature` asks otherwise."""
    golden = load_golden(case)
    signature = {"necks": "sam3", "positions": "none", **asked.pop("signature", {})}
    model = traced(golden.encoder, golden.config, batch=batch, **signature).model
    lower(model, precision, **asked)
    return save(model)


@pytest.fixture
def small(save: Save) -> Path:
    """An FP16 file of one neck."""
    return typed_file(save)


def _build_matrix(save: Save, row: tuple[int, int, int, int]) -> None:
    (precision, form), (case, necks) = FORMS[row[0]], NECKS[row[1]]
    batch, positions = BATCHES[row[2]], POSITIONS[row[3]]
    signature = {"necks": necks, "positions": positions}
    batch = str(len(load_golden(case).image)) if batch == "fixed" else batch
    path = typed_file(save, precision, case, batch, attention=form, signature=signature)
    parsed = BatchRange.parse(batch)
    options = BuildOptions(precision, parsed if parsed.dynamic else None, CAPABILITIES)
    result = build_plan(path, path.with_suffix(".plan"), options)
    config = load_golden(case).config
    assert result.compute_capabilities == CAPABILITIES and result.plan_bytes == path.with_suffix(".plan").stat().st_size
    assert result.inputs == (TensorSpec("image", "float32", (parsed.dim, 3, *config.image_size)),)
    counted = {"sam3": 1, "both": 2, "all": 3}[necks] * len(config.scale_factors) * (1 + (positions == "graph"))
    assert len(result.outputs) == counted
    assert {spec.dtype for spec in result.outputs} == {
        {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    }
    assert result.layers is not None and result.layers.attentions == config.depth


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_choices_build(save: Save, row: tuple[int, int, int, int]) -> None:
    """Form x necks x batch x positions, for three GPUs each; build_plan itself checks the types."""
    _build_matrix(save, row)


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(set(PRODUCT) - set(ROWS)), ids=lambda row: "-".join(map(str, row)))
def test_all_other_choices_build(save: Save, row: tuple[int, int, int, int]) -> None:
    _build_matrix(save, row)


PIXELS = {"necks": "sam2", "levels": "0,3", "input_kind": "uint8"}
"""Of test_trace.py, too."""


@pytest.mark.parametrize(
    ("precision", "asked"),
    [
        ("fp16", {"keep_fp32": ["trunk.blocks.1", "convs.0"], "opset": 24}),
        ("fp16", {"keep_fp32": ["trunk.blocks.*.attn"], "upsampling": "conv", "opset": 17}),
        ("bf16", {"keep_fp32": ["trunk.blocks.1"], "attention": "fp32acc", "opset": 23}),
        ("fp16", {"output_precision": "fp32", "signature": PIXELS}),
    ],
    ids=str,
)
def test_other_exports_build(save: Save, precision: Precision, asked: dict[str, Any]) -> None:
    path = typed_file(save, precision, **asked)
    options = BuildOptions(precision, keep_fp32=tuple(asked.get("keep_fp32", ())), compute_capabilities=("8.9",))
    result = build_plan(path, path.with_suffix(".plan"), options)
    assert {spec.dtype for spec in result.outputs} == {
        "float32" if "output_precision" in asked else {"fp16": "float16", "bf16": "bfloat16"}[precision]
    }
    assert result.inputs[0].dtype == ("uint8" if "signature" in asked else "float32")


@pytest.mark.parametrize(
    ("held", "asked", "keep", "says"),
    [
        (
            "fp32",
            "fp16",
            (),
            r"trunk\.patch_embed\.proj/Conv computes in FLOAT, but fp16 was requested.*--precision fp16",
        ),
        ("fp16", "fp32", (), "computes in HALF, but fp32 was requested"),
        ("bf16", "fp16", (), "computes in BF16, but fp16 was requested"),
        ("fp32", "fp16", ("trunk", "convs.0"), r"convs\.1\..* computes in FLOAT"),
        ("fp32", "fp16", ("trunk", "convs.*"), "no matrix multiplication or convolution in fp16"),
    ],
)
def test_types_other_than_asked_are_refused(
    save: Save, held: Precision, asked: Precision, keep: tuple[str, ...], says: str
) -> None:
    path = typed_file(save, held)
    with pytest.raises(BuildError, match=says):
        build_plan(path, path.with_suffix(".plan"), BuildOptions(asked, keep_fp32=keep))
    assert not path.with_suffix(".plan").exists()


def _unrounded(model: ir.Model) -> str:
    """Lets block 2's second product of attention read FP32 probabilities that were never rounded."""
    (product,) = [node for node in model.graph if node.name == "trunk.blocks.2.attn/mixed"]
    (softmax,) = [node for node in model.graph if node.name == "trunk.blocks.2.attn/softmax"]
    product.replace_input_with(0, softmax.outputs[0])
    return "trunk.blocks.2.attn/mixed"


def _widened(model: ir.Model) -> str:
    """Puts another product of block 2 between casts to and from FP32."""
    product = next(
        node for node in model.graph if node.op_type == "MatMul" and (node.name or "").startswith("trunk.blocks.2.mlp.")
    )
    for position, value in enumerate(list(product.inputs)):
        assert value is not None
        up = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"up{position}")
        up.outputs[0].type, up.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        model.graph.insert_before(product, up)
        product.replace_input_with(position, up.outputs[0])
    result = product.outputs[0]
    down = ir.node("Cast", [result], {"to": ir.DataType.FLOAT16.value}, name="down")
    down.outputs[0].type, down.outputs[0].shape = result.type, result.shape
    result.type = ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_all_uses_with(result, down.outputs[0])
    down.replace_input_with(0, result)
    model.graph.insert_after(product, down)
    return str(product.name)


@pytest.mark.parametrize("plant", [_unrounded, _widened])
def test_no_other_product_may_be_fp32(small: Path, plant: Any) -> None:
    """The second product of attention is, between casts: the default file builds (above)."""
    model = ir.load(small)
    name = plant(model)
    small.write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(BuildError, match=f"{re.escape(name)} computes in FLOAT, but fp16 was requested"):
        build_plan(small, small.with_suffix(".plan"), BuildOptions())


def test_result_and_options(small: Path, tmp_path: Path) -> None:
    options = BuildOptions(optimization_level=1, workspace_bytes=1 << 30, compute_capabilities=("8.9",))
    phases: dict[str, tuple[int, int]] = {}

    def take(found: Count) -> None:
        assert 0 <= found.done <= (found.total or 0) and found.unit == "steps"
        phases[found.step] = (found.done, found.total or 0)

    with listening(take):
        result = build_plan(small, tmp_path / "new" / "x.plan", options)
    assert (result.flavor, result.onnx, result.gpu) == ("rtx", small, choose_flavor("rtx").gpu)
    assert result.layers is not None and result.layers.operations and result.seconds > 0
    assert phases["build: Building engine"][0] >= 5 and len(phases) == 1  # not the phases inside it
    assert options.to_dict() == {**BuildOptions().to_dict(), "optimization_level": 1, "workspace_bytes": 1 << 30} | {
        "compute_capabilities": ["8.9"]
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.plan"]
    weights = small.with_name(small.name + ".data").stat().st_size
    assert result.plan_bytes > weights


def test_nvidias_own_config_has_the_flags(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the real object: no TF32, and a plan whose runs allocate nothing, else no CUDA graph takes them."""
    flavor, configs = choose_flavor("rtx"), []

    def watched(trt: Any, builder: Any, network: Any, config: Any, file: Any, watch: Any) -> None:
        configs.append(config)
        raise BuildError("seen")

    monkeypatch.setattr("engines.builder.build.run_builder", watched)
    with pytest.raises(BuildError, match="seen"):
        build_plan(small, small.with_suffix(".plan"), BuildOptions(), flavor=flavor)
    flags = flavor.trt.BuilderFlag
    assert not configs[0].get_flag(flags.TF32) and configs[0].get_flag(flags.REQUIRE_USER_ALLOCATION)


def test_plan_is_readable_by_others_and_building_prints_nothing(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A service under another user loads it: the umask decides, not a private temporary file."""
    plan = build_plan(small, tmp_path / "x.plan", BuildOptions(compute_capabilities=("8.9",))).plan
    assert capfd.readouterr() == ("", "")
    (tmp_path / "plain").touch()
    assert plan.stat().st_mode == (tmp_path / "plain").stat().st_mode


def _without_data(path: Path) -> Path:
    path.with_name(path.name + ".data").unlink()
    return path


def _truncated(path: Path, keep: float) -> Path:
    os.truncate(path, int(path.stat().st_size * keep))
    return path


def _outside(path: Path) -> Path:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.data"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda path: path.with_name("none.onnx"),
            "none.onnx: there is no file with this name; check the path, or write the file with `neck-export onnx`",
        ),
        (
            _without_data,
            "weights file .*onnx.data, which is missing; .*, or export the ONNX file again with neck-export onnx",
        ),
        (lambda path: _truncated(path, 0.5), "incomplete or damaged.*export the ONNX file again"),
        (lambda path: _truncated(path, 0), "no outputs.*export the ONNX file again"),
        (
            lambda path: _truncated(path.with_name(path.name + ".data"), 0.5) and path,
            r"has [\d,]+ bytes, but the ONNX file needs [\d,]+",
        ),
        (_outside, "'../secret.data', which is outside the folder of the ONNX file"),
    ],
)
def test_bad_files_are_told(small: Path, spoil: Any, says: str) -> None:
    plan = small.with_suffix(".plan")
    plan.write_bytes(b"old")
    path = spoil(small)
    if path.name.endswith(".data"):
        path = small
    with pytest.raises(BuildError, match=says) as caught:
        build_plan(path, plan, BuildOptions())
    assert len(str(caught.value).splitlines()) <= 2
    assert plan.read_bytes() == b"old"


def test_what_the_parser_refuses_is_told_with_the_node(small: Path) -> None:
    model = onnx.load(small, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.op_type = "NoSuchOperator"
    onnx.save(model, small)
    with pytest.raises(
        BuildError,
        match=rf"TensorRT-RTX [\d.]+ cannot parse the file: node {node.name} \(NoSuchOperator\).*\n.*--opset auto",
    ):
        build_plan(small, small.with_suffix(".plan"), BuildOptions())


def test_attention_in_fp32_is_told_before_the_builder_fails(golden_trace: ir.Model, save: Save) -> None:
    golden_trace.opset_imports[""] = 23
    path = save(golden_trace)
    assert read_graph(path).fp32_attentions
    with pytest.raises(BuildError, match=r"attn/.* is an FP32 Attention operator .*--attention auto"):
        build_plan(path, path.with_suffix(".plan"), BuildOptions("fp32"))


@pytest.fixture
def golden_trace() -> ir.Model:
    """The canonical graph, not lowered: FP32 with Attention nodes."""
    golden: Golden = load_golden("meta-dual")
    return traced(golden.encoder, golden.config, necks="sam3", positions="none").model


def test_what_the_builder_refuses_is_told(save: Save) -> None:
    """TensorRT-RTX 1.7 has no BF16 ConvTranspose."""
    path = typed_file(save, "bf16", upsampling="deconv")
    with pytest.raises(BuildError, match=r"deconv"):
        build_plan(path, path.with_suffix(".plan"), BuildOptions("bf16"))
    assert not list(path.parent.glob("*.plan*")) and not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (BuildOptions(compute_capabilities=("9.0",)), r"9\.0: TensorRT-RTX .* 7\.5, 8\.0.*Hopper"),
        (BuildOptions(compute_capabilities=("8.9", "nonsense")), "nonsense"),
        (BuildOptions(timing_cache=Path("times.cache")), "--timing-cache"),
        (BuildOptions(hardware_compatible="ampere+"), "--hardware-compatible"),
        (BuildOptions(optimization_level=6), "expected 0 to 5"),
        (
            BuildOptions("fp8", compute_capabilities=("8.6", "8.9")),
            r"compute capability 8\.6, but .* FP8 requires 8\.9",
        ),
        (BuildOptions(batch=BatchRange.parse("1:4:8")), "1:4:8"),
    ],
)
def test_options_that_cannot_be_met_are_refused(small: Path, options: BuildOptions, says: str) -> None:
    with pytest.raises((BuildError, FlavorError), match=says):
        build_plan(small, small.with_suffix(".plan"), options, flavor=choose_flavor("rtx"))


def test_a_dynamic_image_size_is_refused(small: Path) -> None:
    model = onnx.load(small, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    del model.graph.value_info[:]
    onnx.save(model, small)
    with pytest.raises(BuildError):
        build_plan(small, small.with_suffix(".plan"), BuildOptions())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_leaves_the_old_plan(small: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    plan = small.with_suffix(".plan")
    plan.write_bytes(b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("engines.builder.build.run_builder", lambda *given: given[4].write(b"new"))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BuildError, match="disk is full" if number == errno.ENOSPC else "Permission denied"):
        build_plan(small, plan, BuildOptions(compute_capabilities=("8.9",)))
    assert plan.read_bytes() == b"old" and not list(plan.parent.glob(".*"))


CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    import engines.builder.build
    from engines.builder.build import build_plan
    from engines.builder.onnx_graph import BuildError
    from engines.builder.options import BuildOptions
    sys.path.append("tests")
    from listening import listening
    onnx, plan, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    watches, made = [], engines.builder.build.Watch
    def watched():
        watches.append(made())
        return watches[-1]
    engines.builder.build.Watch = watched
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a script has it ignored
    def take(found):
        phase, done = found.step.removeprefix("build: "), found.done
        if done >= 1:
            print(phase, done, flush=True)
        if done == 1:
            if step == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
                watches[0].cancelled.wait(600)
            time.sleep(600 if step == "hang" else 0)
    try:
        with listening(take):
            build_plan(onnx, plan, BuildOptions(compute_capabilities=("8.9",)))
    except BuildError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
"""


FIRST_STEP = "Building engine 1\n"
HANGS_S = 600


def _start(onnx_path: Path, plan: Path, step: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(onnx_path), str(plan), step]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_told(small: Path, tmp_path: Path) -> None:
    """The kernel itself refuses to write more than 1 MiB, in the midst of the builder's stream."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BuildError, match="the disk is full"):
            build_plan(small, tmp_path / "x.plan", BuildOptions(compute_capabilities=("8.9",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.plan")) and not list(tmp_path.glob(".*"))


def test_ctrl_c_stops_the_build_and_leaves_the_old_plan(small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"old")
    with _start(small, plan, "interrupted") as child:
        stdout, stderr = child.communicate(timeout=HANGS_S)
    assert child.returncode == 130, stderr
    assert stdout == FIRST_STEP  # the builder took no further step
    assert plan.read_bytes() == b"old" and not list(tmp_path.glob(".*"))


def test_after_kill_9_the_next_build_works_and_cleans_up(small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "x.plan"
    with _start(small, plan, "hang") as child:
        assert child.stdout is not None and child.stdout.readline() == FIRST_STEP
        try:
            living = list(tmp_path.glob(".x.plan.*"))
            build_plan(small, plan, BuildOptions(compute_capabilities=("8.9",)))
            assert len(living) == 1 and living[0].exists()  # the other's file is left alone while it lives
        finally:  # else leaving the block waits for it
            child.kill()
        child.communicate(timeout=HANGS_S)
    assert living[0].exists()
    result = build_plan(small, plan, BuildOptions(compute_capabilities=("8.9",)))
    assert not living[0].exists() and plan.stat().st_size == result.plan_bytes


@pytest.mark.parametrize(
    ("line", "refused", "says"),
    [
        ("Unexpected exception std::bad_alloc", False, "out of host memory"),
        (
            "Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
            True,
            "the GPU has too little free memory",
        ),
        ("Error Code 1: Cuda Runtime (out of memory)", True, "the GPU has too little free memory"),
        ("Error Code 10: no implementation for node fc1", True, "no implementation for node fc1$"),
    ],
)
def test_too_little_memory_is_told(tmp_path: Path, line: str, refused: bool, says: str) -> None:
    """RTX 1.7's words under a limit of address space; under a tighter one it hangs, so its log is played here.

    Too little memory of the device is no end: another form of attention may need less.
    """
    watch = stream.Watch()

    class Builder:
        def build_serialized_network_to_stream(self, *_: object) -> bool:
            watch.take(1, line)
            return False

    with (tmp_path / "plan").open("wb") as file, pytest.raises(BuildError, match=says) as caught:
        stream.run_builder(choose_flavor("rtx").trt, Builder(), None, None, file, watch)
    assert isinstance(caught.value, RefusedError) == refused


def test_a_progress_that_raises_stops_the_build(small: Path) -> None:
    def take(found: Count) -> None:
        raise ZeroDivisionError(found)

    with pytest.raises(ZeroDivisionError), listening(take):
        build_plan(small, small.with_suffix(".plan"), BuildOptions())
    assert not small.with_suffix(".plan").exists()


def test_operations_are_counted(save: Save) -> None:
    """Against the sum written out by hand for this encoder: 64 tokens, C = 32, 4 blocks, levels 32, 16, 8 and 4."""
    tokens, c, hidden, windows = 64, 32, int(32 * 4.625), 4
    block = tokens * (4 * c * c + 2 * c * hidden)
    attention = 2 * c * (2 * tokens**2 + 2 * windows * (tokens // windows) ** 2)
    patches = tokens * 3 * 14 * 14 * c
    convs = sum(side * side * 16 * 16 * 9 for side in (32, 16, 8, 4))
    # level 4.0: two transposed convolutions, level 2.0: one (merged with their 1x1); 1.0 and 0.5: the 1x1
    convs += tokens * c * (c // 2) * 4 + 4 * tokens * (c // 2) * 16 * 4 + tokens * c * 16 * 4 + (64 + 16) * c * 16
    expected = 2 * (4 * block + attention + patches + convs)
    assert read_graph(typed_file(save)).operations == expected
    dynamic = typed_file(save, batch="1:2:3", signature={"positions": "graph"})  # a graph that others trace, too
    assert read_graph(dynamic, batch=3).operations == 3 * expected


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_full_size(save: Save, tmp_path: Path, target: str) -> None:
    """The published encoder in FP16, features only: the bars of the layer report."""
    from export.contract.options import Rewrites
    from export.contract.signature import encoder_signature
    from export.graph.deployed_module import DeployEncoder
    from export.graph.trace import trace
    from neck.checkpoint import random_encoder
    from neck.config import EncoderConfig

    config = EncoderConfig()
    model = trace(DeployEncoder(random_encoder(config), encoder_signature(config, positions="none"), Rewrites()))
    lower(model, "fp16")
    path = save(model)
    result: BuildResult = build_plan(path, tmp_path / "x.plan", BuildOptions(compute_capabilities=(target,)))
    layers = result.layers
    assert layers is not None and layers.bytes_moved is not None
    assert layers.summary().startswith("fused attentions 32 of 32, accumulation FP32, ")
    assert len(layers.kernels) <= 277 and layers.bytes_moved <= 12.82e9
    assert result.plan_bytes <= 1.05 * path.with_name(path.name + ".data").stat().st_size


@pytest.mark.gpu
def test_tensorrt_builds_for_the_gpu_at_hand(small: Path, tmp_path: Path, gpu_flavor: Flavor) -> None:
    """What only a GPU shows: the other flavor, its timing cache, version- and hardware-compatible plans."""
    if gpu_flavor.name != "tensorrt":
        pytest.skip("needs TensorRT; TensorRT-RTX has no timing cache")
    flavor = gpu_flavor
    cache = tmp_path / "times.cache"
    options = BuildOptions(timing_cache=cache, version_compatible=True, hardware_compatible="ampere+")
    first = build_plan(small, tmp_path / "x.plan", options, flavor=flavor)
    assert first.gpu is not None and first.compute_capabilities == (first.gpu.compute_capability,)
    assert len(list(tmp_path.glob("times.tensorrt-*.cache"))) == 1
    cache_bytes = [path.stat().st_size for path in tmp_path.glob("times.*")]
    second = build_plan(small, tmp_path / "x.plan", dataclasses.replace(options), flavor=flavor)
    assert second.plan_bytes == first.plan_bytes
    assert cache_bytes == [path.stat().st_size for path in tmp_path.glob("times.*")]  # nothing new was timed
