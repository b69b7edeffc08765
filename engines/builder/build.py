"""ONNX file -> TensorRT plan, strongly typed, with its layer report."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.builder.config import common_options
from engines.builder.find_gpu import Gpu
from engines.builder.flavor import Flavor, choose_flavor
from engines.builder.onnx_graph import BuildError, Graph, RefusedError, read_graph
from engines.builder.options import DEFAULT_BATCH, BuildOptions
from engines.builder.parsed_network import check_types, keep_attentions_whole
from engines.builder.plan_stream import Watch, new_monitor, run_builder
from engines.builder.timing_cache import missed, read_replayed, replay_timing, replayed, save_timing_cache
from engines.layers.layer_report import LayerReport
from engines.layers.read_layers import LayerReportError, layers_from_inspector, layers_from_log, read_families
from export.contract.atomic import disk_errors, replacing
from export.contract.dtypes import BY_TENSORRT
from export.contract.export_command import export_again
from export.contract.onnx_file import OnnxFile
from export.contract.signature import BATCH, TensorSpec
from export.contract.targets import has_fp8


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """The result of a build, which goes into the manifest.

    Attributes:
        plan, onnx: the plan and the ONNX file.
        options: the options of the build.
        flavor, version: the TensorRT that built the plan.
        compute_capabilities: the compute capabilities that the plan is for; empty means the flavor's default.
        gpu: the GPU of this machine, or None.
        inputs, outputs: the tensors of the engine; a dynamic batch dimension is `batch`.
        seconds, plan_bytes: the time for parsing and building in seconds, and the size of the plan in bytes.
        layers: the layer report; None if neither the builder's log nor the engine inspector lists the kernels.
        no_layers: why there is no layer report.
        timing_cache: file name and SHA-256 of the timing cache that was saved or replayed; None without one.
        notes: requests that could not be carried out although the plan is complete.
        memory: device memory of weights and activations in bytes, as far as the builder's log contains it.
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
    layers: LayerReport | None
    no_layers: str | None = None
    timing_cache: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)


def build_plan(
    file: Path | OnnxFile,
    plan: Path,
    options: BuildOptions,
    *,
    flavor: Flavor | None = None,
) -> BuildResult:
    """Builds a strongly typed plan and reads its layer report.

    The plan is written under a temporary name and then renamed, so an old plan stays intact until then. If two
    builds write the same plan, the last one to finish wins. Ctrl-C stops the builder at its next step without a file.

    Args:
        file: the ONNX file, already in the precision of the plan.
        plan: the plan file to write.
        options: the options of the build.
        flavor: the TensorRT to build with; by default the one that `choose_flavor` chooses.

    Raises:
        BuildError: the file is invalid or has another precision, the builder failed, or the disk is full.
        FlavorError: TensorRT is missing or does not support an option.
    """
    flavor = flavor or choose_flavor()
    onnx = OnnxFile.of(file).path
    graph = read_graph(file, (options.batch or DEFAULT_BATCH).optimum)
    _check_attentions(onnx, graph, options)
    capabilities = check_request(flavor, onnx, options)
    timing = read_replayed(flavor, options)
    started, watch = time.perf_counter(), Watch()
    builder, network, keep = _parse(onnx, flavor, watch)
    check_types(onnx, flavor.trt, network, options.precision, options.keep_fp32)
    common = common_options(onnx, flavor, network, options, new_monitor(flavor.trt, watch))
    config = flavor.create_config(builder, network, capabilities, common)
    if options.replay_timing and timing:
        keep = (keep, replay_timing(flavor.trt, config, options.replay_timing, timing))
    with disk_errors(BuildError, plan), replacing(plan) as path, path.open("xb") as stream:
        try:
            run_builder(flavor.trt, builder, network, config, stream, watch)
        except RefusedError as error:
            raise missed(error, options.replay_timing) if options.replay_timing else error from None
        stream.flush()
        seconds, size = time.perf_counter() - started, os.fstat(stream.fileno()).st_size
        layers, no_layers = _read_layers(flavor, watch.engine, path, graph, options.version_compatible)
    used, unsaved = save_timing_cache(config, flavor, options)
    inputs = tuple(_spec(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_spec(network.get_output(index)) for index in range(network.num_outputs))
    del keep  # the parser owns the weights that the network refers to
    about = (flavor.name, flavor.version, capabilities, flavor.gpu, inputs, outputs)
    notes = (unsaved,) if unsaved else ()
    return BuildResult(
        plan,
        onnx,
        options,
        *about,
        seconds,
        size,
        layers,
        no_layers,
        used or replayed(options, timing),
        notes,
        watch.memory,
    )


def _read_layers(
    flavor: Flavor, log: str, plan: Path, graph: Graph, host_code: bool
) -> tuple[LayerReport | None, str | None]:
    """Reads the layer report from the builder's log, else from the engine inspector; returns None and why if both fail.

    What cannot be read must not cost the plan, which took minutes: every version lists its kernels in another way.
    """
    reasons = []
    for source, read in (("builder log", layers_from_log), ("engine inspector", layers_from_inspector)):
        try:
            text = log if read is layers_from_log else flavor.inspect(plan, host_code=host_code)
            if not text:
                raise LayerReportError(
                    f"TensorRT's {source} gave no information about the layers of the plan, so neck-export cannot "
                    f"write a layer report from the {source}. No action is needed, because the plan itself is complete"
                )
            counted = (graph.attentions, graph.node_operations, graph.quantized, graph.fusable, graph.fp8_attentions)
            return read(text, read_families(plan), *counted), None
        except LayerReportError as error:
            reasons.append(str(error))
        except Exception as error:
            reasons.append(f"the {source} cannot be read ({type(error).__name__}: {error})")
    return None, "; ".join(reasons)


def _check_attentions(onnx: Path, graph: Graph, options: BuildOptions) -> None:
    if graph.fp32_attentions:
        raise BuildError(
            f"{onnx}: the node {graph.fp32_attentions[0]} is an FP32 Attention operator (opset 23), which "
            "TensorRT cannot build; export the file again: "
            f"{export_again(onnx, attention='auto', opset='auto')}"
        )


def check_request(flavor: Flavor, onnx: Path, options: BuildOptions) -> tuple[str, ...]:
    """Refuses options that a TensorRT does not support, before anything is read or built.

    Returns:
        The compute capabilities to build for.

    Raises:
        BuildError, FlavorError: an option is not supported; the message names it.
    """
    capabilities = flavor.check_targets(options.compute_capabilities)
    _check_fp8(onnx, options, capabilities or ((flavor.gpu.compute_capability,) if flavor.gpu else ()))
    flavor.refuse(
        timing_cache=options.timing_cache is not None,
        hardware_compatible=options.hardware_compatible != "none",
        version_compatible=options.version_compatible,
    )
    return capabilities


def _check_fp8(onnx: Path, options: BuildOptions, capabilities: Sequence[str]) -> None:
    small = [target for target in capabilities if target != "none" and not has_fp8(target)]
    if options.precision == "fp8" and small:
        raise BuildError(
            f"{onnx}: the plan would be built for compute capability {', '.join(small)}, but matrix multiplication in "
            f"FP8 requires 8.9 or later; leave {', '.join(small)} out of --compute-capability, or export the file in "
            f"INT8: {export_again(onnx, precision='int8')}"
        )


def _parse(onnx: Path, flavor: Flavor, watch: Watch) -> tuple[Any, Any, Any]:
    """Returns the builder, the network and the objects that must outlive them."""
    trt = flavor.trt
    logger = flavor.new_logger(watch.take)
    builder = flavor.new_builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons, kinds = [], set()
        for index in range(parser.num_errors):
            parser_error = parser.get_error(index)
            name, kind = parser_error.node_name(), parser_error.node_operator()
            kinds.add(kind)
            reasons.append((f"node {name} ({kind}): " if name else "") + " ".join(parser_error.desc().split())[:400])
        reason = reasons[0] if reasons else watch.reason
        remedy = export_again(onnx, attention="auto", opset="auto", target=flavor.target)
        raise RefusedError(
            f"{onnx}: {flavor.title} cannot parse the file: {reason}\nexport the file again: {remedy}",
            reason,
            by_form="Attention" in kinds,
        )
    keep_attentions_whole(trt, network)
    return builder, network, (logger, parser)


def _spec(tensor: Any) -> TensorSpec:
    kind, known = tensor.dtype.name, BY_TENSORRT.get(tensor.dtype.name)
    return TensorSpec(
        tensor.name, known.name if known else kind, tuple(BATCH if side == -1 else int(side) for side in tensor.shape)
    )
