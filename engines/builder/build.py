"""ONNX file -> TensorRT plan, strongly typed, with its layer sheet."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import time
from pathlib import Path
from typing import Any, Literal

from engines.builder.flavor import Flavor, Gpu, choose_flavor
from engines.builder.onnx_graph import BuildError, Graph, read_graph
from engines.builder.plan_stream import Progress, Watch, disk_errors, new_monitor, run_builder, temporary
from engines.sheet.layer_sheet import LayerSheet
from engines.sheet.read_layers import read_accumulations, sheet_from_log
from export.contract.signature import BATCH, BatchRange, TensorSpec

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
}
DEFAULT_BATCH = BatchRange(1, 4, 8)
"""Optimization profile of a dynamic batch whose range nobody said."""

SCORES = "*.attn/scores*"
"""The matrix product that the attention form `unfused` keeps in FP32."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        precision: type that the graph's matrix products and convolutions must have.
        batch: optimization profile of a file with dynamic batch; by default from 1 through 4 to 8.
        compute_capabilities: GPUs to build for (RTX), such as ("8.9", "12.0"); empty is the flavour's default.
        keep_fp32: paths of modules that are in FP32 all the same, with wildcards.
        optimization_level: 0 (fast build) to 5; None is TensorRT's default.
        workspace_bytes: limit of scratch memory on the GPU; None is no limit.
        version_compatible: the plan loads in later TensorRT versions too.
        hardware_compatible: `none`, `ampere+` (8.0 and later) or `same` (GPUs of this one's compute capability).
        timing_cache: file that keeps measured kernels between builds; flavour, version and GPU enter its name.
    """

    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    batch: BatchRange | None = None
    compute_capabilities: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["none", "ampere+", "same"] = "none"
    timing_cache: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; two builds are alike where these are (the timing cache's place aside)."""
        values = dataclasses.asdict(self)
        values["batch"] = None if self.batch is None else str(self.batch)
        values["compute_capabilities"], values["keep_fp32"] = list(self.compute_capabilities), list(self.keep_fp32)
        del values["timing_cache"]
        return values


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """What was built, for the manifest.

    Attributes:
        plan, onnx: the files.
        options: as asked.
        flavor, version: which TensorRT.
        compute_capabilities: GPUs that the plan is for; empty is the flavour's default.
        gpu: the GPU at hand, or None.
        inputs, outputs: tensors of the engine, the batch `batch` where it is dynamic.
        seconds: of parsing and building; plan_bytes: size of the plan.
        sheet: the layer sheet, None where the builder's log does not list the engine (TensorRT: ask the inspector).
    """

    plan: Path
    onnx: Path
    options: BuildOptions
    flavor: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: Gpu | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    seconds: float
    plan_bytes: int
    sheet: LayerSheet | None


def build_plan(
    onnx: Path,
    plan: Path,
    options: BuildOptions,
    *,
    flavor: Flavor | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Builds a plan, strongly typed, and reads its layer sheet.

    The plan is written under a temporary name and renamed: until then an old plan stays whole. Of two builds of one
    plan the last to finish wins. Ctrl-C stops the builder at its next step and leaves no file.

    Args:
        onnx: the file; typed as it shall run.
        plan: the file to write.
        options: how to build.
        flavor: which TensorRT; by default the one that `choose_flavor` chooses.
        progress: called as the build goes on.

    Raises:
        BuildError: a bad file, a graph that is not typed as asked, a builder that gave up, a full disk.
        FlavorError: no TensorRT, or options that it does not have.
    """
    flavor = flavor or choose_flavor()
    graph = read_graph(onnx, (options.batch or DEFAULT_BATCH).optimum)
    _check_attentions(onnx, graph, options)
    targets = flavor.check_targets(options.compute_capabilities)
    flavor.refuse(
        timing_cache=options.timing_cache is not None,
        hardware_compatible=options.hardware_compatible != "none",
        version_compatible=options.version_compatible,
    )
    started, watch = time.perf_counter(), Watch()
    builder, network, keep = _parse(onnx, flavor, watch)
    check_types(onnx, flavor.trt, network, options)
    common = _common_options(onnx, flavor, network, options, new_monitor(flavor.trt, watch, progress))
    config = flavor.create_config(builder, network, targets, common)
    with disk_errors(plan), temporary(plan) as (file, path):
        run_builder(flavor.trt, builder, network, config, file, watch)
        file.flush()
        os.fsync(file.fileno())
        seconds, size = time.perf_counter() - started, os.fstat(file.fileno()).st_size
        sheet = None
        if watch.engine:
            sheet = sheet_from_log(watch.engine, read_accumulations(path), graph.attentions, graph.operations)
        os.replace(path, plan)
    _save_timing_cache(config, flavor, options)
    inputs = tuple(_spec(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_spec(network.get_output(index)) for index in range(network.num_outputs))
    del keep  # the parser owns the weights that the network refers to
    about = (flavor.name, flavor.version, targets, flavor.gpu, inputs, outputs)
    return BuildResult(plan, onnx, options, *about, seconds=seconds, plan_bytes=size, sheet=sheet)


def _check_attentions(onnx: Path, graph: Graph, options: BuildOptions) -> None:
    if graph.fp32_attentions:
        raise BuildError(
            f"{onnx}: {graph.fp32_attentions[0]} is an opset-23 Attention in FP32, which TensorRT does not build; "
            f"export again with --attention {'auto' if options.precision == 'fp32' else 'scores32'}"
        )


def _parse(onnx: Path, flavor: Flavor, watch: Watch) -> tuple[Any, Any, Any]:
    """Returns builder, network and what must outlive them."""
    trt = flavor.trt
    logger = flavor.new_logger(watch.take)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = []
        for index in range(parser.num_errors):
            parser_error = parser.get_error(index)
            name, kind = parser_error.node_name(), parser_error.node_operator()
            reasons.append((f"node {name} ({kind}): " if name else "") + " ".join(parser_error.desc().split())[:400])
        reason = reasons[0] if reasons else watch.reason
        raise BuildError(
            f"{onnx}: TensorRT {flavor.version} cannot parse it: {reason}\nexport it again with --opset auto"
        )
    return builder, network, (logger, parser)


def check_types(onnx: Path, trt: Any, network: Any, options: BuildOptions) -> None:  # noqa: ANN401
    """Checks that the parsed graph computes in the type that was asked: a strongly typed engine is what its graph is.

    Raises:
        BuildError: naming the first matrix product or convolution that does not, or saying that there is none.
    """
    kinds = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    wanted = getattr(trt.DataType, TYPES[options.precision])
    fp32 = [SCORES, *(f"{pattern}{end}" for pattern in options.keep_fp32 for end in ("/*", ".*"))]
    seen = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in kinds:
            continue
        tensor = layer.get_output(0)
        seen += tensor.dtype == wanted
        kept = tensor.dtype == trt.DataType.FLOAT and any(fnmatch.fnmatchcase(layer.name, name) for name in fp32)
        if tensor.dtype != wanted and not kept:
            raise BuildError(
                f"{onnx}: {layer.name} computes in {tensor.dtype.name}, asked was {options.precision}; "
                f"export again with --precision {options.precision}, or name what may stay by --keep-fp32"
            )
    if not seen:
        raise BuildError(f"{onnx}: no matrix product or convolution in {options.precision}; not an image encoder")


def _common_options(onnx: Path, flavor: Flavor, network: Any, options: BuildOptions, monitor: Any) -> dict[str, Any]:  # noqa: ANN401
    """Arguments that both of Polygraphy's config classes take."""
    trt = flavor.trt
    values: dict[str, Any] = {"progress_monitor": monitor, "profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    profile = _profile(onnx, network, options)
    if profile is not None:
        values["profiles"] = [profile]
    if options.optimization_level is not None:
        if not 0 <= options.optimization_level <= 5:
            raise BuildError(f"optimization level {options.optimization_level}: expected 0 to 5")
        values["builder_optimization_level"] = options.optimization_level
    if options.workspace_bytes is not None:
        values["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    if options.version_compatible:
        values["version_compatible"] = True
    if options.hardware_compatible != "none":
        levels = {
            "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
            "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        }
        values["hardware_compatibility_level"] = levels[options.hardware_compatible]
    cache = timing_cache_path(flavor, options)
    if cache is not None and cache.exists():
        values["load_timing_cache"] = str(cache)
    return values


def _profile(onnx: Path, network: Any, options: BuildOptions) -> Any:  # noqa: ANN401
    """The optimization profile of a dynamic batch, or None for a fixed one."""
    image = network.get_input(0)
    if network.num_inputs != 1:
        raise BuildError(f"{onnx}: has {network.num_inputs} inputs, expected the image alone; export it again")
    shape = tuple(image.shape)
    if -1 in shape[1:]:
        raise BuildError(f"{onnx}: input {image.name} is {shape}; only the batch may be dynamic, so fix the image size")
    if shape[0] != -1:
        if options.batch is not None and str(options.batch) != str(shape[0]):
            raise BuildError(
                f"{onnx}: its batch is {shape[0]}, asked was {options.batch}; export again with --batch {options.batch}"
            )
        return None
    from polygraphy.backend.trt import Profile

    batch = options.batch or DEFAULT_BATCH
    sizes = ((size, *shape[1:]) for size in (batch.minimum, batch.optimum, batch.maximum))
    return Profile().add(image.name, *sizes)


def timing_cache_path(flavor: Flavor, options: BuildOptions) -> Path | None:
    """The timing cache's file, with flavour, version and GPU in its name: times of another would mislead."""
    if options.timing_cache is None:
        return None
    gpu = flavor.gpu.name.replace(" ", "-").replace("/", "-") if flavor.gpu else "none"
    path = options.timing_cache
    return path.with_name(f"{path.stem}.{flavor.name}-{flavor.version}-{gpu}{path.suffix}")


def _save_timing_cache(config: Any, flavor: Flavor, options: BuildOptions) -> None:  # noqa: ANN401
    path = timing_cache_path(flavor, options)
    if path is None:
        return
    cache = config.get_timing_cache()
    with disk_errors(path), temporary(path) as (file, unfinished):
        file.write(cache.serialize())
        file.flush()
        os.replace(unfinished, path)


def _spec(tensor: Any) -> TensorSpec:  # noqa: ANN401
    kind = NUMPY.get(tensor.dtype.name, tensor.dtype.name)
    return TensorSpec(tensor.name, kind, tuple(BATCH if side == -1 else int(side) for side in tensor.shape))
