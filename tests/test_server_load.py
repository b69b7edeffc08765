"""A real tritonserver under load, and while new versions of its model come: no failed, wrong or mixed-up answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")

import tritonclient.http
from conftest import load_golden, named_outputs
from exporting import PREFIX, save_state
from serving import (
    IMAGES,
    Answers,
    Arrays,
    Load,
    client_of,
    expected,
    files,
    images,
    one_answer,
    part,
    same,
    statistics_of,
)
from torch import Tensor, from_numpy
from triton_server import (
    ROOT,
    Server,
    decoders,
    fake_plan,
    fake_repository,
    free_ports,
    running,
    why_missing,
    write_plan_manifest,
)
from tritonclient.utils import InferenceServerException

from engines.service.activation import activate_version
from engines.service.triton_client.client import TritonClient
from engines.service.triton_client.errors import ClientError
from export.contract.manifest import manifest_path, read_manifest
from neck.checkpoint import load_encoder

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

CANARY = ROOT / "engines" / "service" / "canary.py"

LOAD_S = float(os.environ.get("NECK_LOAD_SECONDS", "1"))
"""How long the server is kept under load."""

CONTROL = {
    "explicit": ("--model-control-mode=explicit", "--load-model=*"),
    "poll": ("--model-control-mode=poll", "--repository-poll-secs=1", "--strict-readiness=false"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


VERIFIED = {"verified": True, "method": "the tests' own", "outputs": []}


def verify(plan: Path) -> Path:
    """Has the manifest say that the plan was run, as `neck-export trt` does on a GPU: such a one is served at once."""
    manifest = read_manifest(manifest_path(plan), "plan")
    return write_plan_manifest(plan, manifest["onnx_manifest"], verification=VERIFIED)


@pytest.fixture(scope="module")
def plan(folder: Path) -> Path:
    return verify(fake_plan(folder))


def changed(state: dict[str, Tensor]) -> None:
    """Another encoder of the same architecture, as a fine-tune is."""
    state[PREFIX + "trunk.pos_embed"] *= 1.5


@pytest.fixture(scope="module")
def tuned(folder: Path) -> tuple[Path, Arrays]:
    """The plan of another encoder, and what PyTorch gives with it."""
    checkpoint = save_state(folder / "tuned.pt", changed)
    encoder = load_encoder(checkpoint, load_golden("meta-dual").config)
    encoder.set_imgsz((112, 112))
    outputs = {name: value.numpy() for name, value in named_outputs(encoder, from_numpy(images())).items()}
    return verify(fake_plan(folder, "tuned", checkpoint=checkpoint)), outputs


@pytest.fixture(scope="module")
def broken(folder: Path, plan: Path) -> Path:
    """A plan that its server cannot load and that nobody verified, with a manifest that speaks of it."""
    path = folder / "broken.plan"
    path.write_bytes(b"\x00" * 4096)
    return write_plan_manifest(path, read_manifest(manifest_path(plan), "plan")["onnx_manifest"])


@pytest.fixture(scope="module")
def server(folder: Path, plan: Path) -> Iterator[Server]:
    with running(fake_repository(folder, plan)) as one:
        yield one


def test_every_image_is_told_from_every_other() -> None:
    """The control of all that follows."""
    for one in range(IMAGES):
        assert [other for other in range(IMAGES) if same(part([one]), part([other]))] == [one]


def test_eight_clients_at_once(server: Server) -> None:
    before = statistics_of(server, "sam3-encoder")

    def since() -> tuple[int, int]:
        now = statistics_of(server, "sam3-encoder")
        return now[0] - before[0], now[1] - before[1]

    with Load(server, [expected()]) as load:
        load.wait(LOAD_S)
        until(lambda: since()[1] < since()[0], load)  # batches are formed
    assert load.faults == []
    answered = sum(answers.count for answers in load.answers)
    until(lambda: since()[0] >= answered, load)  # Triton answers before it counts
    requests, executions = since()
    assert requests == answered
    print(f"{LOAD_S:g} s, 8 clients: {requests} requests in {executions} executions")


def test_a_mixed_up_answer_would_be_seen(server: Server) -> None:
    """The control: the same clients, told that each image's answer is its neighbor's."""
    with Load(server, [{name: np.roll(value, 1, axis=0) for name, value in expected().items()}], clients=2) as load:
        load.wait(0)
    assert load.faults and "fits versions []" in load.faults[0]


def load_model(server: Server) -> str:
    """Asks for what is new in the repository; empty, or why the server refuses."""
    with tritonclient.http.InferenceServerClient(server.http_url) as control:
        try:
            control.load_model("sam3-encoder")
        except InferenceServerException as error:
            return str(error)
    return ""


def until(done: Callable[[], bool], load: Load, seconds: float = 600) -> None:
    """Waits for something to happen under load."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end and load.faults == []
        time.sleep(0.05)


@pytest.mark.parametrize("mode", ["poll", pytest.param("explicit", marks=pytest.mark.slow)])
def test_versions_change_under_load(
    tmp_path: Path, plan: Path, tuned: tuple[Path, Arrays], broken: Path, mode: str
) -> None:
    repository = fake_repository(tmp_path, plan, ensemble=True)
    explicit = mode == "explicit"
    with (
        running(repository, *CONTROL[mode]) as server,
        Load(server, [expected(), tuned[1]], clients=2, ensemble=1, pause_s=0.03) as load,
    ):
        load.wait(0.5)
        assert load.newest() == {1}

        fake_repository(tmp_path, tuned[0], ensemble=True)  # version 2
        assert not explicit or load_model(server) == ""
        until(lambda: load.newest() == {2}, load)

        fake_repository(tmp_path, broken, ensemble=True)  # version 3, which is not served
        assert not explicit or load_model(server) == ""
        load.wait(0.5 if explicit else 1.5)
        assert load.newest() == {2} and "version 3" not in server.log.read_text()

        activate_version(repository, "sam3-encoder", 3)
        if explicit:
            assert "version 3 is at UNAVAILABLE" in load_model(server)
        until(lambda: "failed to load 'sam3-encoder' version 3" in server.log.read_text(), load)
        load.wait(0.5)
        assert load.newest() == {2}
        # what a probe of the server is told, unless readiness is not strict: a pod would go that serves
        assert server.get("/v2/health/ready")[0] == (400 if explicit else 200)
        assert server.get("/v2/models/sam3-encoder/ready")[0] == 200

        config = repository / "sam3-encoder" / "config.pbtxt"
        good = config.read_text()
        config.write_text(good.replace("max_batch_size: 8", "max_batch_size: many"))
        if explicit:
            assert "failed to load" in load_model(server)
        until(lambda: "Poll failed for model directory 'sam3-encoder'" in server.log.read_text(), load)
        load.wait(0.5)
        assert load.newest() == {2}

        config.write_text(good)
        activate_version(repository, "sam3-encoder", 1)  # the rollback
        assert not explicit or load_model(server) == ""
        until(lambda: load.newest() == {1}, load)
    assert load.faults == []
    for answers in load.answers:
        assert [fits for fits, _ in groupby(answers.versions)] == [1, 2, 1]


def test_a_server_starts_with_the_last_version_that_loads(
    tmp_path: Path, plan: Path, tuned: tuple[Path, Arrays], broken: Path
) -> None:
    """A new pod: the newest version is broken, and was never verified, so the one before is served."""
    fake_repository(tmp_path, tuned[0])
    repository = fake_repository(tmp_path, broken)
    with running(repository) as server, client_of(server) as client:
        assert same({name: value[[3]] for name, value in tuned[1].items()}, client.infer(images()[[3]]))
    activate_version(repository, "sam3-encoder", 2)  # the control: whoever insists has no server
    with pytest.raises(RuntimeError, match="failed to load 'sam3-encoder' version 2"), running(repository):
        pass


STORM_S = float(os.environ.get("NECK_STORM_SECONDS", "60"))
"""How long everything happens at once."""

STALL_S = 3.0
"""How long a decoder gets no processor; Triton's Python backend takes it for dead after one second."""

KINDS = {
    "no answer": "the server is gone or starts again",
    "not healthy": "a decoder is dead or stalls",
    "is not ready": "the model is not loaded yet",
}
"""Words of the errors that clients may be told, and what each means."""

SHARING = """
import sys, time
import numpy as np
from serving import images, same
from engines.service.triton_client.client import TritonClient
from engines.service.triton_client.errors import ClientError
references = [{name: value[:2] for name, value in np.load(path).items()} for path in sys.argv[2:]]
while True:
    try:
        with TritonClient(sys.argv[1], memory="system", timeout_s=120) as client:
            while True:
                found = client.infer(images()[:2])
                print("right" if any(same(one, found) for one in references) else "wrong", flush=True)
    except ClientError:
        time.sleep(0.2)
"""


class Kubelet:
    """Plays Kubernetes: starts the server again, on its ports, where it ended or where three probes in a row failed."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.ports = repository, free_ports(2)
        self.server: Server | None = None
        self.text, self.restarts = "", [""]
        self.stop, self.thread = threading.Event(), threading.Thread(target=self._run)

    def __enter__(self) -> Kubelet:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _run(self) -> None:
        probe = [sys.executable, "-I", str(CANARY), str(self.ports[0]), "sam3-encoder-preprocess", "2"]
        while not self.stop.is_set():
            try:
                with running(self.repository, *CONTROL["poll"], ports=self.ports) as server:
                    self.server, failures = server, 0
                    while failures < 3 and server.process.poll() is None and not self.stop.wait(1):
                        self.text += server.log.read_text(errors="replace")[len(self.text) :]
                        words = [*probe, str(server.process.pid)]
                        failed = subprocess.run(words, capture_output=True, check=False).returncode != 0
                        failures = failures + 1 if failed else 0
                    self.server, code = None, server.process.poll()
                    self.restarts.append("three probes failed" if code is None else f"ended with {code}")
            except RuntimeError as error:  # the broken version was the active one
                self.restarts.append(str(error))

    def decoders(self) -> list[int]:
        return decoders(self.server) if self.server else []


def stubborn(
    ports: list[int], number: int, stop: threading.Event, references: list[Arrays], answers: Answers, told: list[str]
) -> None:
    """A client that goes on after an error, with a new connection; a third of them send image files."""
    chance, grpc = np.random.default_rng(number), number % 2 == 0
    model, inputs = ("sam3-encoder-images", files()) if number % 3 == 0 else ("sam3-encoder", images())
    options: dict[str, Any] = {"memory": "system" if number % 6 == 1 else "none", "timeout_s": 120}
    while not stop.is_set():
        try:
            with TritonClient(
                f"127.0.0.1:{ports[grpc]}", model, protocol="grpc" if grpc else "http", **options
            ) as client:
                while not stop.is_set():
                    one_answer(client, inputs, chance, references, answers, number)
        except ClientError as error:
            told.append(str(error))
            time.sleep(0.2)
        except Exception as error:  # a thread's error would be lost
            answers.failed.append(f"client {number}: {error!r}")
            return


@pytest.mark.slow
def test_a_minute_of_everything_at_once(tmp_path: Path, plan: Path, tuned: tuple[Path, Arrays], broken: Path) -> None:
    """16 clients, 4 of which are killed; two versions, one of them broken; one decoder stalls, another is killed."""
    repository = fake_repository(tmp_path, plan, ensemble=True)
    (repository / "sam3-encoder-preprocess" / "1" / "__pycache__").write_text("")  # as on a volume that is read-only
    references = [expected(), tuned[1]]
    paths = [tmp_path / f"version{number}.npz" for number in (1, 2)]
    for path, arrays in zip(paths, references, strict=True):
        np.savez(path, **arrays)  # type: ignore[arg-type]
    stop, answers = threading.Event(), [Answers() for _ in range(12)]
    told: list[list[str]] = [[] for _ in answers]
    start = time.monotonic()

    def until(done: Callable[[], object], seconds: float = 1200) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert [text for each in answers for text in (*each.wrong, *each.failed)] == []
            assert time.monotonic() < end
            time.sleep(0.1)

    def until_all_are_answered(version: int) -> None:
        before = [each.count for each in answers]
        until(lambda: all(now.count > was + 4 for now, was in zip(answers, before, strict=True)))
        until(lambda: {each.versions[-1] for each in answers} == {version})

    with contextlib.ExitStack() as stack:
        kubelet = stack.enter_context(Kubelet(repository))
        threads = [
            threading.Thread(target=stubborn, args=(kubelet.ports, number, stop, references, answers[number], one))
            for number, one in enumerate(told)
        ]
        stack.callback(lambda: [thread.join(timeout=600) for thread in threads])
        stack.callback(stop.set)
        for thread in threads:
            thread.start()
        words = [sys.executable, "-c", SHARING, f"127.0.0.1:{kubelet.ports[0]}", *map(str, paths)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
        sharing = [subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) for _ in range(4)]
        for process in sharing:
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == b"right\n"
        until_all_are_answered(1)

        fake_repository(tmp_path, tuned[0], ensemble=True)
        until_all_are_answered(2)
        fake_repository(tmp_path, broken, ensemble=True)
        activate_version(repository, "sam3-encoder", 3)
        until(lambda: "failed to load 'sam3-encoder' version 3" in kubelet.text + kubelet.restarts[-1])
        activate_version(repository, "sam3-encoder", 2)
        until_all_are_answered(2)

        for process in sharing:
            process.kill()
            assert set(process.communicate()[0].split()) == {b"right"}
        until_all_are_answered(2)
        until(lambda: kubelet.server)
        with TritonClient(f"127.0.0.1:{kubelet.ports[0]}", memory="system", timeout_s=120) as client:
            assert same({name: value[[3]] for name, value in tuned[1].items()}, client.infer(images()[[3]]))
        left = [path.name for path in Path("/dev/shm").glob("neck-client-*")] + registered(kubelet)
        assert not [name for name in left if any(f"-{process.pid}-" in name for process in sharing)]

        until(lambda: len(kubelet.decoders()) == 2)
        os.kill(kubelet.decoders()[0], signal.SIGKILL)
        count = len(kubelet.restarts)
        until(lambda: len(kubelet.restarts) > count)
        until_all_are_answered(2)

        until(lambda: len(kubelet.decoders()) == 2)
        stalls = kubelet.decoders()[0]
        os.kill(stalls, signal.SIGSTOP)
        time.sleep(STALL_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(stalls, signal.SIGCONT)
        until_all_are_answered(2)
        until(lambda: time.monotonic() > start + STORM_S)
        until_all_are_answered(2)
        stop.set()
        for thread in threads:
            thread.join(timeout=600)
        seconds = time.monotonic() - start
        until(lambda: kubelet.server)
        assert registered(kubelet) == []
    kinds = Counter(next((word for word in KINDS if word in text), text) for each in told for text in each)
    assert kinds and set(kinds) <= set(KINDS)
    told_of = ", ".join(f"{count} '{kind}'" for kind, count in kinds.items())
    print(f"{seconds:.0f} s, 16 clients: {sum(each.count for each in answers)} answers, all right; errors: {told_of}")
    print(f"the server was started again: {kubelet.restarts[1:-1]}")


def registered(kubelet: Kubelet) -> list[str]:
    """The regions of shared memory that the server knows."""
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{kubelet.ports[0]}") as control:
        return [region["name"] for region in control.get_system_shared_memory_status()]
