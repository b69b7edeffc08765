"""A pool of contexts: who may use one, in which order, and what comes of exceptions; the engine is a fake.

NECK_POOL_SECONDS=60 makes the stress test that long; by default it ends after a fixed number of requests.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu.play import play
from test_session import Context, at, build_convolution, facts, fake, open_fake, write_plan

from engines.builder.flavor import Flavor, choose_flavor
from engines.run.inputs import SessionError
from engines.run.loaded_plan import LoadedPlan
from engines.run.open_plan import open_plan
from engines.run.plan_checks import check_plan
from engines.run.pool import MOST_CONTEXTS, Pool, check_memory
from engines.run.session import Session

GUARD_S = 120.0
"""No test waits so long, unless it would wait for ever."""

THREADS, CONTEXTS, REQUESTS = 16, 4, 20


class GuardedContext(Context):
    """Notes where two threads are between binding and the end of a run at the same time."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.owner: int | None = None
        self.trespasses: list[str] = []
        self.work: Callable[[], object] = lambda: time.sleep(random.random() / 2000)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.owner not in (None, threading.get_ident()):
            self.trespasses.append("bound while another thread's run was under way")
        self.owner = threading.get_ident()
        return super().set_input_shape(name, shape)

    def execute_async_v3(self, stream: int) -> bool:
        self.work()
        if self.owner != threading.get_ident():
            self.trespasses.append("run with what another thread had bound")
            return True  # the memory may be freed by now: nothing is written
        done = super().execute_async_v3(stream)
        self.owner = None
        return done


class GuardedFlavor(type(fake())):  # type: ignore[misc]
    """A flavor whose contexts are guarded."""

    def create_context(self, engine: Any, made_with: Any) -> GuardedContext:
        return GuardedContext(engine)


def sessions_of(folder: Path, count: int = CONTEXTS) -> list[Session]:
    """Sessions over one loaded plan."""
    base = fake(output=torch.float32)
    plan = write_plan(folder, outputs=[facts()["inputs"][0] | {"name": "twice"}])
    flavor, manifest = check_plan(plan, GuardedFlavor(**vars(base)))
    loaded = LoadedPlan(plan, manifest, flavor, torch.device("cpu"))
    return [Session(loaded, stream=None) for _ in range(count)]


def trespasses(sessions: list[Session], contexts: list[Any]) -> list[str]:
    return [line for context in contexts for line in context.trespasses]


def request(pool: Pool, value: float) -> float:
    """One request; the answer is twice the value."""
    with pool.acquire(GUARD_S) as session:
        found = session.infer({"image": np.full((1, 2, 3), value, np.float32)})["twice"]
    assert (found == found.flat[0]).all()
    return float(found.flat[0])


class PlannedError(Exception):
    """A request that fails while it holds a context."""


def test_sixteen_threads_over_a_pool_of_four(tmp_path: Path) -> None:
    """No wrong, no lost, no starved request; every fifth one fails and gives its context back all the same."""
    sessions = sessions_of(tmp_path)
    contexts = [session.context for session in sessions]
    pool, seconds = Pool(sessions), float(os.environ.get("NECK_POOL_SECONDS", 0))
    ends, answered = time.monotonic() + seconds, [0] * THREADS

    def worker(number: int) -> None:
        count = 0
        while count < REQUESTS or time.monotonic() < ends:
            value = number * 1000.0 + count % 1000
            if count % 5 == 4:
                with contextlib.suppress(PlannedError), pool.acquire(GUARD_S):
                    raise PlannedError
            else:
                assert request(pool, value) == 2 * value
            count += 1
        answered[number] = count

    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(worker, number) for number in range(THREADS)]:
            done.result()
    assert trespasses(sessions, contexts) == [] and min(answered) >= REQUESTS and pool.waiting == 0
    if seconds:
        print(f"{sum(answered)} requests in {seconds:g} s, of a thread {min(answered)} to {max(answered)}")
    with contextlib.ExitStack() as lent:  # all came back, each once
        assert len({id(lent.enter_context(pool.acquire(0))) for _ in range(CONTEXTS)}) == CONTEXTS


class BrokenPool(Pool):
    """Lends its first context to everybody."""

    def __init__(self, sessions: list[Session]) -> None:
        super().__init__(sessions)
        self.first = sessions[0]

    def _take(self, timeout: float) -> Session:
        return self.first

    def _give_back(self, session: Session) -> None:
        pass


@pytest.mark.parametrize("kind", [Pool, BrokenPool])
def test_a_context_that_two_threads_have_is_seen(tmp_path: Path, kind: type[Pool]) -> None:
    """The control of the one above: while one thread runs, another asks; a pool that lends what is lent is caught."""
    sessions = sessions_of(tmp_path, 2)
    contexts: list[Any] = [session.context for session in sessions]
    pool, inside, other = kind(sessions), threading.Event(), threading.Event()

    def hold() -> None:  # the first run waits until the other thread's has ended
        for context in contexts:
            context.work = lambda: None
        inside.set()
        assert other.wait(GUARD_S)

    for context in contexts:
        context.work = hold
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(request, pool, 1.0)
        assert inside.wait(GUARD_S)
        try:
            request(pool, 2.0)
        finally:
            other.set()
        with contextlib.suppress(*([AssertionError] if kind is BrokenPool else [])):  # a wrong answer
            first.result()
    assert (trespasses(sessions, contexts) == []) == (kind is Pool)


@contextlib.contextmanager
def waiting_threads(pool: Pool, count: int, act: Callable[[int], object]) -> Iterator[list[Future[Any]]]:
    """Threads that ask for a context one after the other, each when the one before waits."""
    with ThreadPoolExecutor(count) as threads:
        futures: list[Future[Any]] = []
        for number in range(count):
            futures.append(threads.submit(act, number))
            until = time.monotonic() + GUARD_S
            while pool.waiting <= number and not futures[-1].done() and time.monotonic() < until:
                time.sleep(0.001)
        yield futures


def test_who_asks_first_is_served_first(tmp_path: Path) -> None:
    pool, served = Pool(sessions_of(tmp_path, 1)), []

    def ask(number: int) -> None:
        with pool.acquire(GUARD_S):
            served.append(number)

    with contextlib.ExitStack() as stack:
        with pool.acquire(0):
            futures = stack.enter_context(waiting_threads(pool, 6, ask))
            assert pool.waiting == 6
        for future in futures:
            future.result()
    assert served == list(range(6))


def test_waiting_is_bounded_in_time_and_number(tmp_path: Path) -> None:
    sessions = sessions_of(tmp_path, 1)
    pool = Pool(sessions, most_waiting=1)
    with pool.acquire(0):
        for timeout in (0, 0.01, -1):
            with pytest.raises(SessionError, match=r"none of 1 contexts became free within .* s; wait longer, or open"):
                request_within(pool, timeout)
        with waiting_threads(pool, 1, lambda number: request_within(pool, GUARD_S)) as futures:
            with pytest.raises(SessionError, match="1 threads already wait for one of 1 contexts"):
                request_within(pool, GUARD_S)
            pool.close()
        with pytest.raises(SessionError, match="the pool of contexts is closed; open the plan again"):
            futures[0].result()


def request_within(pool: Pool, timeout: float) -> None:
    with pool.acquire(timeout):
        pass


def test_a_pool_that_is_closed_with_requests_in_flight(tmp_path: Path) -> None:
    sessions = sessions_of(tmp_path, 2)
    with Pool(sessions) as pool, pool.acquire(0) as session:
        pool.close()
        assert [one.context is None for one in sessions] == [
            one is not session for one in sessions
        ]  # the free one went
        found = session.infer({"image": np.ones((1, 2, 3), np.float32)})  # the lent one stays good
        assert (found["twice"] == 2).all()
        with pytest.raises(SessionError, match="closed"):
            request_within(pool, 0)
    assert all(one.context is None and one.loaded is None for one in sessions)


def test_ctrl_c_while_waiting_loses_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes when the context was handed over already, the moment at which it could be lost."""
    pool = Pool(sessions_of(tmp_path, 1))

    def interrupted(self: threading.Condition, predicate: object, timeout: float) -> None:
        pool._hand_on(pool._free_later.pop())  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    pool._free_later = [pool._free.pop()]  # type: ignore[attr-defined]
    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        request_within(pool, GUARD_S)
    assert pool.waiting == 0 and len(pool._free) == 1
    request_within(pool, 0)


def test_what_was_bound_does_not_outlive_the_lease(tmp_path: Path) -> None:
    pool, memory = Pool(sessions_of(tmp_path, 1)), at(0, torch.zeros(3, 2, 3))
    image = np.ones((1, 2, 3), np.float32)
    with pytest.raises(PlannedError), pool.acquire(0) as session:
        session.bind_output("twice", memory)
        session.infer({"image": image})
        raise PlannedError
    assert (memory[0] == 2).all()
    with pool.acquire(0) as session:
        session.infer({"image": 5 * image})
    assert (memory[0] == 2).all()


@pytest.mark.parametrize("contexts", [0, -1, MOST_CONTEXTS + 1])
def test_a_pool_of_none_is_refused(tmp_path: Path, contexts: int) -> None:
    with pytest.raises(SessionError, match=rf"contexts={contexts} is invalid; expected 1 to 1024"):
        open_plan(tmp_path / "none.plan", contexts=contexts)


def test_more_contexts_than_memory() -> None:
    plan = Path("x.plan")
    check_memory(plan, 4, 250_000_000, 1_000_000_000)
    wanted = (
        "5 contexts need 1250.0 MB of device memory in addition to the weights, but only 1000.0 MB are "
        "free. Open at most 4 contexts"
    )
    with pytest.raises(SessionError, match=wanted):
        check_memory(plan, 5, 250_000_000, 1_000_000_000)
    with pytest.raises(
        SessionError, match=r"Close other programs .*, or build the plan again with a smaller maximum batch"
    ):
        check_memory(plan, 1, 250_000_000, 1000)
    check_memory(plan, 3, 0, 3)


@pytest.mark.parametrize("version", ["10.3", "11.4", "rtx-1.7"])
def test_a_pool_is_opened_and_its_memory_told_before_it_is_taken(tmp_path: Path, version: str) -> None:
    with play(version) as state:
        assert state.device is not None
        plan = build_convolution(tmp_path, choose_flavor())
        with open_plan(plan, contexts=3) as pool:
            assert pool.contexts == len(state.contexts) == 3
            assert len({id(context._engine) for context in state.contexts}) == 1  # the weights once
            largest = 3 * (3 + 1) * 8 * 8 * 4  # batch 3: an input of 3 channels, an output of 1
            assert pool.context_bytes == (1 << 20) + largest
            assert request_sum(pool) == 3.0
            with pool.acquire(0) as session:
                before = len(session.stream.waited)
            assert session.stream.waited[before:] == [torch.cuda.current_stream()]  # who comes next waits for us
        state.device.free_bytes = 2 * pool.context_bytes
        with pytest.raises(
            SessionError,
            match=(
                r"3 contexts need 3\.2 MB .* 2\.1 MB are free\. Open at most 2 contexts, or build the plan again "
                r"with a smaller"
            ),
        ):
            open_plan(plan, contexts=3)
        assert len(state.contexts) == 3  # none was made
        open_plan(plan, contexts=2).close()


def request_sum(pool: Pool) -> float:
    with pool.acquire(GUARD_S) as session:
        found = session.infer({"image": np.ones((2, 3, 8, 8), np.float32)})["sum"]
    return float(found.flat[0])


def test_a_session_is_no_pool(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        assert isinstance(session, Session)


@pytest.mark.gpu
def test_a_pool_on_the_gpu(tmp_path: Path, gpu_flavor: Flavor) -> None:
    plan = build_convolution(tmp_path, gpu_flavor)
    with open_plan(plan, gpu_flavor, contexts=CONTEXTS, use_runtime_cache=False) as pool:
        assert pool.context_bytes > 0

        def worker(number: int) -> None:
            for count in range(REQUESTS):
                value = float(number * 100 + count)
                with pool.acquire(GUARD_S) as session:
                    found = session.infer({"image": np.full((1, 3, 8, 8), value, np.float32)})["sum"]
                    assert (found == 3 * value).all()  # whole numbers below 2^24: exact
                    own = torch.cuda.Stream()
                    with torch.cuda.stream(own):
                        tensor = torch.full((2, 3, 8, 8), value, device="cuda")
                        assert bool((session.infer({"image": tensor})["sum"] == 3 * value).all())

        with ThreadPoolExecutor(THREADS) as threads:
            for done in [threads.submit(worker, number) for number in range(THREADS)]:
                done.result()
    with pytest.raises(SessionError, match="use at most"):
        free = torch.cuda.mem_get_info()[0]
        check_memory(plan, MOST_CONTEXTS, free // 10, free)
