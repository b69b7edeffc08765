"""config.pbtxt of the models in a repository, made and read with Triton's own protobuf schema (tritonclient)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.service.served_model import DATA_TYPES, Source, TritonError
from export.contract.signature import BatchRange, TensorSpec

MOST_CUDA_GRAPHS = 16
"""Each keeps memory of its own: where the batch may be larger, only the profile's three sizes are captured."""


def schema() -> Any:
    """Triton's protobuf module.

    Raises:
        TritonError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise TritonError(
            f"tritonclient is not installed ({error}); run pip install 'tritonclient[http,grpc]'"
        ) from None
    return model_config_pb2


def new_config(source: Source, name: str) -> Any:
    """A config with the entries that all models of a repository share."""
    config = schema().ModelConfig(name=name, max_batch_size=source.batch.maximum if source.batch.dynamic else 0)
    config.version_policy.latest.num_versions = 1
    return config


def engine_config(
    source: Source,
    name: str,
    outputs: Sequence[TensorSpec],
    plans: Mapping[str, str] | None = None,
    *,
    queue_delay_us: int,
    cuda_graphs: bool,
) -> Any:
    """The config of the model that runs the plan or ONNX file.

    A fixed batch B keeps its dimension: max_batch_size 0, dims with B. dims are always written, because auto-complete
    would take max_batch_size from the plan. No instance_group: Triton's default is one instance per visible GPU, and
    KIND_GPU is refused where there is none. Only fields that Triton 2.51 knows are used.

    Args:
        source: the file.
        name: the model's.
        outputs: what the config lists.
        plans: file name by compute capability where there are several plans.
        queue_delay_us: how long a request waits for others, where the batch is dynamic.
        cuda_graphs: whether the tensorrt backend captures them.
    """
    config = new_config(source, name)
    if source.kind == "plan":
        config.platform = "tensorrt_plan"
    else:
        config.backend = "onnxruntime"
    config.cc_model_filenames.update(plans or {})
    add_tensors(config.input, [source.image], source.batch)
    add_tensors(config.output, outputs, source.batch)
    if source.batch.dynamic:
        config.dynamic_batching.preferred_batch_size.extend(_preferred(source.batch))
        config.dynamic_batching.max_queue_delay_microseconds = queue_delay_us
    if cuda_graphs and takes_graphs(source):
        _add_cuda_graphs(config, source)
    for size in profile_sizes(source.batch):
        warm_up = config.model_warmup.add(name=f"batch-{size}", batch_size=size if source.batch.dynamic else 1)
        value = warm_up.inputs[source.image.name]
        value.data_type, value.zero_data = _data_type(source.image), True
        value.dims.extend(dims(source.image, source.batch))
    return config


def add_tensors(target: Any, specs: Sequence[TensorSpec], batch: BatchRange) -> None:
    """Lists inputs or outputs in a config."""
    for spec in specs:
        target.add(name=spec.name, data_type=_data_type(spec), dims=dims(spec, batch))


def dims(spec: TensorSpec, batch: BatchRange) -> list[int]:
    """A tensor's dims in a config: without the batch where it is dynamic, with it where it is fixed."""
    return [side for side in spec.shape if isinstance(side, int)] if not batch.dynamic else list(spec.shape[1:])  # type: ignore[arg-type]


def profile_sizes(batch: BatchRange) -> list[int]:
    """Minimum, optimum and maximum, each once."""
    return sorted({batch.minimum, batch.optimum, batch.maximum})


def to_text(config: Any) -> str:
    """The config as config.pbtxt has it."""
    from google.protobuf import text_format  # type: ignore[import-untyped]

    return "# Written by neck-export triton.\n" + text_format.MessageToString(config)


def read_config(path: Path) -> Any | None:
    """The config of a model that is there, or None.

    Raises:
        TritonError: it is none.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), schema().ModelConfig())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise TritonError(
            f"{path}: the file cannot be read as a Triton config ({error}); fix the file, or move the model's "
            "folder out of the repository"
        ) from None


def _preferred(batch: BatchRange) -> list[int]:
    return [size for size in profile_sizes(batch) if size > 1]


def _data_type(spec: TensorSpec) -> int:
    return int(schema().DataType.Value(DATA_TYPES[spec.dtype]))


def takes_graphs(source: Source) -> bool:
    """Whether the tensorrt backend would launch the CUDA graphs that it captures of a file.

    Not for a fixed batch, whose max_batch_size is 0: a graph is then kept under batch size 0, but the lookup begins
    with the number of requests, 1 (`SetCudaGraphShape` and `FindClosestCudaGraph` in src/instance_state.cc of
    triton-inference-server/tensorrt_backend, read at e2ef6d7 of July 2026). Such graphs would cost memory and start-up
    time for nothing.
    """
    return source.kind == "plan" and source.batch.dynamic


def _add_cuda_graphs(config: Any, source: Source) -> None:
    """One graph for each batch size."""
    config.optimization.cuda.graphs = True
    every = range(source.batch.minimum, source.batch.maximum + 1)
    for size in list(every) if len(every) <= MOST_CUDA_GRAPHS else profile_sizes(source.batch):
        graph = config.optimization.cuda.graph_spec.add(batch_size=size)
        graph.input[source.image.name].dim.extend(dims(source.image, source.batch))
