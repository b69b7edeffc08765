"""Python's Session and Pool on real torch.cuda, TensorRT being a fake: what only asynchronous streams can show."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch_engine import BATCHES, SIDE

from engines.run.inputs import SessionError
from engines.run.pool import Pool
from engines.run.session import Session

Opened = Callable[..., list[Session]]
"""As torch_engine.open_session, its folder chosen."""

TURNS, THREADS, CONTEXTS, MANY = 20, 8, 3, 40
GUARD_S = 60.0


class CheckError(AssertionError):
    """Something is not as it should be."""


def expect(holds: bool, what: str) -> None:
    """Raises CheckError where it does not hold."""
    if not holds:
        raise CheckError(f"not so: {what}")


def streams_are_asynchronous(opened: Opened) -> None:
    """The control of all others: who does not wait reads what was there before."""
    (session,) = opened()
    with session:
        image = torch.ones(1, SIDE, device=session.device)
        outputs = session.bind({"image": image})
        outputs["twice"].zero_()
        torch.cuda.synchronize()
        session.enqueue()
        early = outputs["twice"].clone()
        torch.cuda.current_stream().synchronize()
        assert session.finished is not None
        torch.cuda.current_stream().wait_event(session.finished)
        expect(bool((early == 0).all()), "a read without a wait comes before the run")
        expect(bool((outputs["twice"] == 2).all()), "a read behind `finished` sees the run")


def host_memory(opened: Opened) -> None:
    """numpy in and out, every batch size."""
    (session,) = opened()
    with session:
        for turn in range(TURNS):
            value = np.full((BATCHES[turn % len(BATCHES)], SIDE), turn, np.float32)
            expect(bool((session.infer({"image": value})["twice"] == 2 * turn).all()), f"numpy, run {turn}")


def tensors_of_other_streams(opened: Opened, cuda_graph: bool = False) -> None:
    """Inputs that the caller's stream has not made yet, outputs that it reads at once."""
    (session,) = opened(cuda_graph=cuda_graph)
    with session:
        for turn in range(1, TURNS):
            with torch.cuda.stream(torch.cuda.Stream()):
                image = torch.zeros(BATCHES[turn % len(BATCHES)], SIDE, device=session.device)
                torch.cuda._sleep(1_000_000)
                image += turn
                found = session.infer({"image": image})["twice"]
                expect(bool((found == 2 * turn).all()), f"a tensor of another stream, run {turn}")
                del image  # its memory may be given to others at once


def graphs(opened: Opened) -> None:
    """A CUDA graph for each batch size, none captured twice; a captured run is replayed on the session's stream."""
    tensors_of_other_streams(opened, cuda_graph=True)
    (session,) = opened(cuda_graph=True)
    with session:
        for turn in range(TURNS):
            value = np.full((BATCHES[turn % len(BATCHES)], SIDE), turn, np.float32)
            expect(bool((session.infer({"image": value})["twice"] == 2 * turn).all()), f"by a graph, run {turn}")
        expect(len(session._captured) == len(BATCHES), "one graph for each batch size")
    (session,) = opened()
    with session:
        image = torch.ones(1, SIDE, device=session.device)
        torch.cuda.synchronize()
        captured = session.capture({"image": image})
        image.fill_(5)
        torch.cuda.synchronize()
        with torch.cuda.stream(session.stream):
            captured.graph.replay()
        torch.cuda.synchronize()
        expect(bool((captured.outputs["twice"] == 10).all()), "a replay reads what its input holds now")


def failed_capture(opened: Opened) -> None:
    """Its cause is told, and the caller's stream is the current one again; then a capture works."""
    (session,) = opened()
    with session, torch.cuda.stream(torch.cuda.Stream()):
        before = torch.cuda.current_stream()
        image = torch.ones(1, SIDE, device=session.device)
        torch.cuda.synchronize()
        session.context.fails = "capturing"
        told = ""
        try:
            session.capture({"image": image})
        except SessionError as error:
            told = str(error)
        expect("planted while capturing" in told, f"the cause of a failed capture ({told or 'none'})")
        expect(torch.cuda.current_stream() == before, "the caller's stream after a failed capture")
        session.context.fails = ""
        expect(session.capture({"image": image}).graph is not None, "a capture after a failed one")


def captures_in_threads(opened: Opened) -> None:
    """Two plans are captured in two threads at once: torch allows one capture in a process."""
    sessions, barrier = [opened()[0], opened()[0]], threading.Barrier(2)

    def capture(session: Session) -> bool:
        image = torch.ones(1, SIDE, device=session.device)
        torch.cuda.synchronize()
        barrier.wait(GUARD_S)
        return all(session.capture({"image": image}).graph is not None for _ in range(5))

    with ThreadPoolExecutor(2) as threads:
        expect(all(threads.map(capture, sessions)), "captures in two threads")
    for session in sessions:
        session.close()


def pool(opened: Opened) -> None:
    """More threads than contexts, host memory and tensors of streams of the threads' own, with graphs and without."""
    for cuda_graph in (False, True):
        with Pool(opened(count=CONTEXTS, cuda_graph=cuda_graph)) as lent:

            def request(number: int, lent: Pool = lent) -> bool:
                good = True
                for turn in range(TURNS // 2):
                    value = float(number * 100 + turn)
                    with lent.acquire(GUARD_S) as session, torch.cuda.stream(torch.cuda.Stream()):
                        image = torch.full((2, SIDE), value, device=session.device)
                        good &= bool((session.infer({"image": image})["twice"] == 2 * value).all())
                    with lent.acquire(GUARD_S) as session:
                        found = session.infer({"image": np.full((1, SIDE), value, np.float32)})["twice"]
                        good &= bool((found == 2 * value).all())
                return good

            with ThreadPoolExecutor(THREADS) as threads:
                expect(all(threads.map(request, range(THREADS))), f"a pool over threads, graphs {cuda_graph}")


def streams_of_their_own(opened: Opened) -> None:
    """Also with more contexts than torch has streams."""
    theirs = {torch.cuda.Stream().cuda_stream for _ in range(64)}
    sessions = opened(count=MANY)
    ours = {session.stream.cuda_stream for session in sessions if session.stream}
    expect(len(ours) == MANY and not ours & theirs, f"{MANY} contexts have {len(ours)} streams, none of torch's")
    for session in sessions:
        session.close()


def handed_over(opened: Opened) -> None:
    """By DLPack on another stream, and into the caller's memory."""
    (session,) = opened()
    with session:
        session.infer({"image": torch.full((2, SIDE), 3.0, device=session.device)})
        with torch.cuda.stream(torch.cuda.Stream()):
            expect(bool((torch.from_dlpack(session.to_dlpack("twice")) == 6).all()), "an output by DLPack")
        memory = torch.zeros(max(BATCHES), SIDE, device=session.device)
        session.bind_output("twice", memory)
        session.infer({"image": torch.full((2, SIDE), 4.0, device=session.device)})
        expect(bool((memory[:2] == 8).all()) and bool((memory[2:] == 0).all()), "the caller's memory is written")
        session.unbind_outputs()
        session.infer({"image": torch.full((2, SIDE), 5.0, device=session.device)})
        expect(bool((memory[:2] == 8).all()), "memory that is unbound is left alone")


def another_gpu(opened: Opened) -> None:
    """A thread whose current GPU is the first one runs on the last one."""
    index = torch.cuda.device_count() - 1
    (session,) = opened(device=index)
    with session:
        expect(bool((session.infer({"image": np.ones((1, SIDE), np.float32)})["twice"] == 2).all()), f"GPU {index}")
        image = torch.ones(1, SIDE, device=session.device)
        expect(bool((session.infer({"image": image})["twice"] == 2).all()), f"tensors of GPU {index}")
        expect(torch.cuda.current_device() == 0, "the thread's own GPU afterwards")


CHECKS = (
    *(streams_are_asynchronous, host_memory, tensors_of_other_streams, graphs, failed_capture, captures_in_threads),
    *(pool, streams_of_their_own, handed_over, another_gpu),
)
