"""Runs a plan that is loaded (engines/run/open_plan.py), in one context."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engines.run.inputs import Port, SessionError, check_inputs
from engines.run.loaded_plan import LoadedPlan, memory_text
from engines.run.outputs import ALIGNMENT, HandedOutput, caller_memory, view_of
from engines.run.streams import on_device

WARM_UP_RUNS = 3
"""Before a CUDA graph is captured: RTX compiles its kernels in the first run."""

CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: torch allows one capture in a process, and waits for the device before it."""

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclasses.dataclass
class Captured:
    """A run whose tensors stay where they are: its inputs are read and its outputs written by each replay of the graph.

    `graph` is None where TensorRT-RTX captures by itself. `context` is what it was captured from, which must not change
    as long as the graph is replayed.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    graph: Any
    context: Any


class Session:
    """A context of an engine, ready to run; for one thread at a time, on one GPU. `open_plan` makes it.

    Attributes:
        plan, manifest, flavor: what was loaded, by which TensorRT.
        loaded: the engine and its weights, which the sessions of a pool share.
        engine, context: TensorRT's own objects; None once closed.
        inputs, outputs: what the engine takes and gives.
        device, stream: where it runs.
        loaded_bytes: device memory that loading took, the context's scratch memory included.
        warnings: what TensorRT warned of, such as a plan of another GPU model.
        warm: whether TensorRT-RTX took the kernels of an earlier start.
        finished: what marks the end of the last run: `stream.wait_event(session.finished)`; None without a stream.
    """

    def __init__(
        self,
        loaded: LoadedPlan,
        *,
        stream: torch.cuda.Stream | None,
        cuda_graph: bool = False,
        rtx_graphs: bool = False,
    ) -> None:
        self.plan, self.manifest, self.flavor = loaded.plan, loaded.manifest, loaded.flavor
        self.device, self.stream, self.loaded_bytes = loaded.device, stream, 0
        self.inputs, self.outputs = loaded.inputs, loaded.outputs
        self.warnings, self.warm = loaded.warnings, loaded.warm
        self.finished = torch.cuda.Event() if stream else None
        self._cuda_graph, self._rtx_graphs = cuda_graph, rtx_graphs
        self._captured: dict[tuple[torch.Size, ...], Captured] = {}  # of each batch size
        self._bound: dict[str, Tensor] = {}  # of the context, for `enqueue`
        self._results: dict[str, Tensor] = {}  # of the last run, for `to_dlpack`
        self._callers: dict[str, Tensor] = {}  # memory that outputs are written to, flat
        self.loaded: LoadedPlan | None = loaded
        self.engine: Any = loaded.engine
        self.context: Any = self._new_context()

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the engine once.

        Args:
            inputs: arrays by name, of a batch that the plan takes: all numpy, or all contiguous torch tensors on the
                session's GPU, which are read where they are (with a CUDA graph, or at an address that is no multiple of
                256, they are copied first).

        Returns:
            Outputs by name: numpy for numpy, bfloat16 as float32 (numpy has none); torch for torch, at once: work that
            is queued later on the caller's current stream sees them. They are the caller's own, fresh in each run; with
            a CUDA graph they are the session's and the next run of that batch size overwrites them; those of
            `bind_output` are views of the memory that was given.

        Raises:
            SessionError: inputs that the plan does not take, out of device memory, or a run that failed.
        """
        if self.context is None:
            raise SessionError(f"{self.plan}: the session is closed; open the plan again")
        check_inputs(self.plan, self.inputs, self.device, inputs)
        if any(isinstance(value, Tensor) for value in inputs.values()):
            with self._errors():
                tensors = {name: self._to_device(value) for name, value in inputs.items()}
                with on_device(self.stream, self.device, in_order=True):
                    return self._run(tensors)  # type: ignore[return-value]
        # nothing of it leaves this stream, so runs of other sessions overlap, copies included
        with self._errors(), on_device(self.stream, self.device, current=True):
            outputs = self._run({name: self._to_device(value) for name, value in inputs.items()})
            return {name: _to_numpy(value) for name, value in outputs.items()}  # type: ignore[misc]

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes the next runs read these tensors, and returns those that they write: new ones, and the caller's memory.

        The session holds both until others are bound, so a run never writes what somebody else has by now.
        """
        self._bound, self._results = {}, {}
        outputs = self._bind(self.context, inputs)
        self._bound = {**inputs, **outputs}
        return outputs

    def enqueue(self) -> None:
        """Starts inference with the bound input on the session's stream."""
        if not self._bound:
            raise SessionError(
                f"{self.plan}: no input is bound; call bind before enqueue, and again after each bind_output, which "
                "unbinds the inputs"
            )
        self._execute(self.context)
        self._mark({port.name: self._bound[port.name] for port in self.outputs})
        self._keep_kernels(self._bound)

    def capture(self, inputs: Mapping[str, Tensor]) -> Captured:
        """Captures a run that reads these tensors as a CUDA graph; binding others later makes the graph void.

        Raises:
            SessionError: it cannot be captured; these tensors stay bound, for a run without a graph.
        """
        outputs = self.bind(inputs)
        return self._capture(self.context, dict(inputs), outputs)

    def bind_output(self, name: str, memory: Any) -> None:
        """Has an output written to the caller's memory from the next run on, instead of to new memory.

        Args:
            name: of the output.
            memory: a torch tensor, a CuPy array or whatever speaks DLPack: of the output's type, on the session's GPU,
                contiguous, at a multiple of 256 bytes, with room for the largest batch. The session holds it until it
                is unbound. None: new memory again.

        Raises:
            SessionError: no such output, or memory that it cannot be written to.
        """
        port = self._find_output(name)
        if memory is None:
            kept = {other: value for other, value in self._callers.items() if other != name}
        else:
            given = caller_memory(self.plan, port, self.inputs[0].batch[1], self.device, memory)
            kept = {**self._callers, name: given}
        self._wait()
        self._forget(kept)

    def unbind_outputs(self) -> None:
        """Every output goes to new memory again, when the last run has ended."""
        if self._callers:
            self._wait()
            self._forget({})

    def to_dlpack(self, name: str) -> HandedOutput:
        """An output of the last run, for `torch.from_dlpack` or `cupy.from_dlpack`, without a copy.

        It is of that run alone and nobody writes it later; but by a CUDA graph, and in memory of `bind_output`, the
        next run writes to it: let that run wait for whoever reads, by `session.stream.wait_event`.

        Raises:
            SessionError: no such output, or no run yet.
        """
        self._find_output(name)
        if not self._results:
            raise SessionError(f"{self.plan}: there are no outputs before the first run; call infer first")
        return HandedOutput(self._results[name], self.finished)

    def close(self) -> None:
        """Waits for the last run and frees the context, and the engine where no other session has it."""
        self._wait()
        self._forget({})
        self.context = self.engine = self.loaded = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _failure(self) -> str:
        return self.loaded.failure if self.loaded else "the session is closed"

    def _find_output(self, name: str) -> Port:
        if self.context is None:
            raise SessionError(f"{self.plan}: the session is closed; open the plan again")
        for port in self.outputs:
            if port.name == name:
                return port
        there = ", ".join(port.name for port in self.outputs)
        raise SessionError(f"{self.plan}: the plan has no output {name!r}; choose from {there}")

    def _forget(self, callers: dict[str, Tensor]) -> None:
        """What was bound goes, CUDA graphs with it, whose addresses are fixed."""
        self._callers, self._captured, self._bound, self._results = callers, {}, {}, {}

    def _new_context(self) -> Any:
        assert self.loaded
        with on_device(self.stream, self.device):
            return self.loaded.new_context()

    def _bind(
        self,
        context: Any,
        inputs: Mapping[str, Tensor],
        outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Sets shapes and addresses of a context; returns its outputs, which are new memory if none are given."""
        with on_device(self.stream, self.device):
            for name, value in inputs.items():
                shape = tuple(value.shape)
                if not context.set_input_shape(name, shape):
                    raise SessionError(
                        f"{self.plan}: the input {name} cannot have the shape {shape} ({self._failure}); "
                        f"expected {self.inputs[0]}"
                    )
            if outputs is None:
                outputs = {port.name: self._output(context, port.name, port.dtype) for port in self.outputs}
            for name, value in {**inputs, **outputs}.items():
                if not context.set_tensor_address(name, value.data_ptr()):
                    raise SessionError(
                        f"{self.plan}: TensorRT does not accept the address of the tensor {name}: {self._failure}. The "
                        f"tensor is at the address {value.data_ptr():#x}. The address must be in GPU memory and a "
                        f"multiple of {ALIGNMENT} bytes. Pass a copy of the tensor, made with .to('{self.device}', "
                        "copy=True)"
                    )
        return outputs

    def _execute(self, context: Any) -> None:
        with on_device(self.stream, self.device):
            if not context.execute_async_v3(self.stream.cuda_stream if self.stream else 0):
                raise SessionError(f"{self.plan}: the run failed ({self._failure}); {memory_text(self.device)}")

    def _capture(self, context: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Captured:
        """Captures a run of a context that is bound."""
        for _ in range(WARM_UP_RUNS):
            self._execute(context)
        self._keep_kernels(inputs)
        if self.stream and not self.flavor.can_capture(context, self.stream.cuda_stream):
            raise SessionError(
                f"{self.plan}: TensorRT-RTX reports that no CUDA graph of this plan can be captured; run the "
                "plan without a CUDA graph"
            )
        graph, failure = torch.cuda.CUDAGraph(), None  # type: torch.cuda.CUDAGraph, Exception | None
        with CAPTURING, on_device(self.stream, self.device):
            caller = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    try:
                        self._execute(context)
                    except SessionError as error:  # the capture must be ended all the same, which may fail for it
                        failure = error
            except RuntimeError as error:
                failure = failure or error
            finally:  # a capture that does not begin or end leaves this thread on our stream
                torch.cuda.set_stream(caller)
        if failure:
            raise SessionError(
                f"{self.plan}: no CUDA graph of this plan can be captured ({failure}); run the plan "
                "without a CUDA graph"
            ) from None
        return Captured(inputs, outputs, graph, context)

    def _mark(self, results: dict[str, Tensor]) -> None:
        self._results = results
        if self.finished:
            with on_device(self.stream, self.device):
                self.finished.record(self.stream)

    def _keep_kernels(self, inputs: Mapping[str, Tensor]) -> None:
        if self.loaded:
            self.loaded.keep_kernels(len(inputs[self.inputs[0].name]))

    def _wait(self) -> None:
        if self.stream:
            self.stream.synchronize()

    def _output(self, context: Any, name: str, dtype: torch.dtype) -> Tensor:
        shape = tuple(context.get_tensor_shape(name))
        if name in self._callers:
            return view_of(self._callers[name], shape)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not (self._cuda_graph or self._rtx_graphs):
            outputs = self.bind(inputs)
            self.enqueue()
            return outputs
        with on_device(self.stream, self.device, current=True):
            captured = self._prepared(inputs)
            for name, value in inputs.items():
                captured.inputs[name].copy_(value)
            if captured.graph is None:
                self._bind(self.context, captured.inputs, captured.outputs)
                self._bound = {**captured.inputs, **captured.outputs}
                self.enqueue()
            else:
                captured.graph.replay()
                self._mark(captured.outputs)
        return captured.outputs

    def _prepared(self, inputs: Mapping[str, Tensor]) -> Captured:
        """The graph of a batch size, with memory of its own for inputs and outputs; captured at its first run.

        Each has a context of its own, as in the C++ library: what a graph was captured from must not change later.
        """
        shapes = tuple(value.shape for value in inputs.values())
        if shapes not in self._captured:
            own = {name: value.clone() for name, value in inputs.items()}
            context = self._new_context() if self._cuda_graph else self.context
            outputs = self._bind(context, own)
            made = Captured(own, outputs, None, context)
            self._captured[shapes] = self._capture(context, own, outputs) if self._cuda_graph else made
        return self._captured[shapes]

    def _to_device(self, value: np.ndarray | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()  # a view, such as batch[1:2]
        return torch.from_numpy(np.require(value, requirements=["C", "W"])).to(self.device)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise SessionError(f"{self.plan}: out of device memory; {memory_text(self.device)}") from None


def _to_numpy(value: Tensor) -> np.ndarray:
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
