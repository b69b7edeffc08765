"""A real tritonserver under load, and while new versions of its model come: no failed, wrong or mixed-up answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install 'neck-export[triton]'")

import tritonclient.http
from conftest import load_golden, named_outputs
from exporting import PREFIX, save_state
from serving import PICTURES, Arrays, Load, client_of, expected, images, part, same, statistics_of
from torch import Tensor, from_numpy
from triton_server import Server, running, stand_in_plan, stand_in_repository, why_missing, write_plan_manifest
from tritonclient.utils import InferenceServerException

from engines.service.activation import activate_version
from export.contract.manifest import manifest_path, read_manifest
from neck.checkpoint import load_encoder

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

LOAD_S = float(os.environ.get("NECK_LOAD_SECONDS", "5"))
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
    return verify(stand_in_plan(folder))


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
    return verify(stand_in_plan(folder, "tuned", checkpoint=checkpoint)), outputs


@pytest.fixture(scope="module")
def broken(folder: Path, plan: Path) -> Path:
    """A plan that its server cannot load and that nobody verified, with a manifest that speaks of it."""
    path = folder / "broken.plan"
    path.write_bytes(b"\x00" * 4096)
    return write_plan_manifest(path, read_manifest(manifest_path(plan), "plan")["onnx_manifest"])


@pytest.fixture(scope="module")
def server(folder: Path, plan: Path) -> Iterator[Server]:
    with running(stand_in_repository(folder, plan)) as one:
        yield one


def test_every_picture_is_told_from_every_other() -> None:
    """The control of all that follows."""
    for one in range(PICTURES):
        assert [other for other in range(PICTURES) if same(part([one]), part([other]))] == [one]


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
    """The control: the same clients, told that each picture's answer is its neighbour's."""
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


@pytest.mark.parametrize("mode", CONTROL)
def test_versions_change_under_load(
    tmp_path: Path, plan: Path, tuned: tuple[Path, Arrays], broken: Path, mode: str
) -> None:
    repository = stand_in_repository(tmp_path, plan, ensemble=True)
    explicit = mode == "explicit"
    with (
        running(repository, *CONTROL[mode]) as server,
        Load(server, [expected(), tuned[1]], clients=4, ensemble=1) as load,
    ):
        load.wait(0.5)
        assert load.newest() == {1}

        stand_in_repository(tmp_path, tuned[0], ensemble=True)  # version 2
        assert not explicit or load_model(server) == ""
        until(lambda: load.newest() == {2}, load)

        stand_in_repository(tmp_path, broken, ensemble=True)  # version 3, which is not served
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
    stand_in_repository(tmp_path, tuned[0])
    repository = stand_in_repository(tmp_path, broken)
    with running(repository) as server, client_of(server) as client:
        assert same({name: value[[3]] for name, value in tuned[1].items()}, client.infer(images()[[3]]))
    activate_version(repository, "sam3-encoder", 2)  # the control: whoever insists has no server
    with pytest.raises(RuntimeError, match="failed to load 'sam3-encoder' version 2"), running(repository):
        pass
    activate_version(repository, "sam3-encoder", 1)
    with running(repository) as server:
        assert server.ready
