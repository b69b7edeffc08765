"""A real tritonserver with the shipped config, ONNX Runtime for its GPU backends: right answers, bad requests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")

import tritonclient.http
from serving import (
    as_file,
    client_of,
    expected,
    files,
    images,
    images_of,
    part,
    passes,
    pixels,
    reference,
    still_right,
)
from triton_server import ROOT, Server, ask, fake_plan, fake_repository, running, why_missing

from engines.builder.find_gpu import find_gpu
from engines.service.triton_client.__main__ import main
from engines.service.triton_client.errors import ClientError
from export.contract.signature import BatchRange
from export.verification.fidelity import compare
from neck.images import load_images, normalize

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def plan(folder: Path) -> Path:
    """The fake plan of meta-dual: float input, batch 1:4:8; its ONNX file lies beside it."""
    return fake_plan(folder)


@pytest.fixture(scope="module")
def server(folder: Path, plan: Path) -> Iterator[Server]:
    """Serves the plan, its ONNX file, a uint8 plan, and an FP16 plan with a fixed batch of 2."""
    fake_repository(folder, plan, ensemble=True)
    fake_repository(folder, plan.with_suffix(".onnx"), name="onnx-encoder")
    raw = fake_plan(folder, "raw", input_kind="uint8")
    fake_repository(folder, raw, name="raw-encoder", ensemble=True)
    pair = fake_plan(folder, "pair", batch=BatchRange(2, 2, 2), precision="fp16", positions="none")
    with running(fake_repository(folder, pair, name="pair-encoder")) as one:
        yield one


WAYS = [("http", "none"), ("grpc", "none"), ("http", "system"), ("grpc", "system")]


@pytest.mark.parametrize(("protocol", "memory"), WAYS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_are_pytorchs(server: Server, protocol: str, memory: Any, batch: int) -> None:
    wanted, others = list(range(batch)), list(range(batch, 2 * batch))
    with client_of(server, protocol, memory=memory) as client:
        for indices in (wanted, others, wanted):  # the same regions of memory with other content
            found = client.infer(images()[indices])
            assert passes(part(indices), found)
    assert not passes(part(others), found)  # the control: other images have other features


def test_shared_memory_is_given_back(server: Server) -> None:
    with tritonclient.http.InferenceServerClient(server.http_url) as control:
        with client_of(server, memory="system") as client:
            client.infer(images()[:2])
            held = [region["name"] for region in control.get_system_shared_memory_status()]
            assert len(held) == 1 + len(expected()) and all(Path("/dev/shm", name).exists() for name in held)
        assert control.get_system_shared_memory_status() == []
    assert not any(Path("/dev/shm", name).exists() for name in held)


HANGS = """
import sys
import numpy as np
from engines.service.triton_client.client import TritonClient
client = TritonClient(sys.argv[1], protocol=sys.argv[2], memory="system", timeout_s=600)
client.infer(np.zeros((2, 3, 112, 112), np.float32))
print("answered", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_a_killed_client_left_is_removed_by_the_next(server: Server, protocol: str) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    client = subprocess.Popen(
        [sys.executable, "-c", HANGS, url, protocol],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert client.stdout is not None and client.stdout.readline() == b"answered\n"
    with tritonclient.http.InferenceServerClient(server.http_url) as control:
        left = [region["name"] for region in control.get_system_shared_memory_status()]
        assert len(left) == 1 + len(expected()) and all(f"-{client.pid}-" in name for name in left)
        client.kill()
        client.communicate()
        with client_of(server, protocol, memory="system") as other:
            assert passes(part([7]), other.infer(images()[[7]]))
            held = {region["name"] for region in control.get_system_shared_memory_status()}
            assert len(held) == 1 + len(expected()) and held.isdisjoint(left)
        assert control.get_system_shared_memory_status() == []
    assert not any(Path("/dev/shm", name).exists() for name in left)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_client_goes_on_after_its_server_was_started_again(folder: Path, plan: Path, protocol: str) -> None:
    """The new server knows none of the client's regions, and answers 404 until they are registered again."""
    (folder / protocol).mkdir()
    repository = fake_repository(folder / protocol, plan)
    with running(repository) as first:
        memory, plain = client_of(first, protocol, memory="system"), client_of(first, protocol)
        clients = (memory, plain)
        for client in clients:
            assert passes(part([1]), client.infer(images()[[1]]))
    with running(repository, ports=[int(url.rpartition(":")[2]) for url in (first.http_url, first.grpc_url)]) as second:
        for client in clients:
            assert passes(part([2]), client.infer(images()[[2]]))
            assert not passes(part([1]), client.infer(images()[[2]]))  # the control
            client.close()
        with tritonclient.http.InferenceServerClient(second.http_url) as control:
            assert control.get_system_shared_memory_status() == []


def test_the_onnx_file_and_the_uint8_plan_answer_the_same(server: Server) -> None:
    with client_of(server, model="onnx-encoder") as client:
        assert passes(part([5, 6]), client.infer(images()[[5, 6]]))
    for memory in ("none", "system"):
        with client_of(server, model="raw-encoder", memory=memory) as client:
            found = client.infer(pixels()[[5, 6]])
        assert passes(part([5, 6]), found) and not passes(part([6, 5]), found)


def test_a_fixed_batch_in_fp16(server: Server, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, one in zip(paths, pixels(), strict=False):
        path.write_bytes(as_file(one))
    wanted = {name: value for name, value in part([0, 1, 2, 3]).items() if "_feat_" in name}
    for memory in ("none", "system"):
        with client_of(server, model="pair-encoder", memory=memory) as client:
            found = client.features(paths)
            assert {value.dtype for value in found.values()} == {np.dtype(np.float16)}
            assert sorted(found) == sorted(wanted) and compare(wanted, found, "fp16", "test").passed
            assert not compare(wanted, client.features(paths[::-1]), "fp16", "test").passed
            with pytest.raises(
                ClientError, match="3 images were given, but pair-encoder accepts exactly 2 images in each request"
            ):
                client.features(paths[:3])
            with pytest.raises(ClientError, match=r"unexpected shape.*Expected \[2,3,112,112\], got \[1,"):
                client.infer(images()[:1])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    """More images than one batch holds, some of the outputs, saved."""
    paths = [tmp_path / f"{index:02}.png" for index in range(11)]
    for path, one in zip(paths, pixels(), strict=False):
        path.write_bytes(as_file(one))
    url = server.http_url if protocol == "http" else server.grpc_url
    options = ["--url", url, "--protocol", protocol, "--shared-memory", "system", "--runs", "2"]
    saved = tmp_path / "features.npz"
    assert main([*map(str, paths), *options, "--outputs", "sam3_feat_*,sam2_pos_1", "--save", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sam3_feat_0: float32 (11, 16, 32, 32)" and lines[-1].startswith("4 requests, median ")
    with np.load(saved) as file:
        found = dict(file)
    assert sorted(found) == ["sam2_pos_1", *(f"sam3_feat_{level}" for level in range(4))]
    assert passes({name: part(list(range(11)))[name] for name in found}, found)
    for more, words in (
        (["--outputs", "sam4_*"], "no output sam4_*; choose from sam3_feat_0"),
        (["--save", "/no/f.npz"], "cannot be"),
    ):
        assert main([str(paths[0]), *options, *more]) == 1
        told = capsys.readouterr().err
        assert words in told
        assert len(told.splitlines()) == 1


def test_image_files_have_no_place_in_shared_memory(server: Server) -> None:
    refused = pytest.raises(ClientError, match="no fixed size, so they cannot be sent through shared memory")
    with client_of(server, model="sam3-encoder-images", memory="system") as client, refused:
        client.infer(files()[:1])


def test_cuda_shared_memory_without_its_library(server: Server) -> None:
    if importlib.util.find_spec("cuda"):
        pytest.skip("CUDA's Python bindings are installed")
    with pytest.raises(ClientError, match=r"cuda_shared_memory cannot be imported.*pip install 'tritonclient\[cuda\]'"):
        client_of(server, memory="cuda")


@pytest.mark.gpu
def test_answers_through_cuda_shared_memory(server: Server) -> None:
    """The fake copies to the CPU and back; the memory, its handles and their way are the real ones."""
    if find_gpu() is None or not importlib.util.find_spec("cuda"):
        pytest.skip("needs an NVIDIA GPU with its driver, and tritonclient[cuda]")
    with client_of(server, memory="cuda") as client:
        found = client.infer(images()[:3])
    assert passes(part([0, 1, 2]), found) and not passes(part([3, 4, 5]), found)


def test_a_server_that_dies(folder: Path, plan: Path) -> None:
    """The next request is an error in words, and no shared memory is left."""
    fake_repository(folder / "other", plan)
    with running(folder / "other" / "model_repository") as other:
        client = client_of(other, memory="system")
        before = set(Path("/dev/shm").glob("neck-*"))
        client.infer(images()[:1])
        held = set(Path("/dev/shm").glob("neck-*")) - before
        assert len(held) == 1 + len(expected())
        other.process.terminate()
        other.process.wait(timeout=600)
        with pytest.raises(ClientError, match="no answer"):
            client.infer(images()[:1])
        with pytest.raises(ClientError, match="no answer"):
            client.close()
    assert not any(path.exists() for path in held)


@pytest.mark.parametrize("model", ["sam3-encoder-images", "raw-encoder-images"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_ensemble_takes_image_files(server: Server, tmp_path: Path, model: str, protocol: str) -> None:
    """JPEG and PNG of the encoder's size, so that no resize stands between them and neck.images."""
    paths = []
    for index, kind in enumerate(["JPEG", "PNG", "JPEG"]):
        paths.append(tmp_path / f"{index}.{kind.lower()}")
        paths[-1].write_bytes(as_file(pixels()[index], kind))
    wanted = reference(normalize(load_images(paths, (112, 112))).numpy())
    with client_of(server, protocol, model=model) as client:
        found = client.features(paths)
        assert passes(wanted, found)
        assert not passes(wanted, client.features([paths[1], paths[0], paths[2]]))


def test_the_ensemble_resizes_as_neck_images_does(server: Server, tmp_path: Path) -> None:
    """Its Pillow differs from torch by a level in 1 of 100 to 1000 values: FP16's tolerance, not FP32's."""
    path = tmp_path / "large.png"
    path.write_bytes(as_file(images_of(7, 1, 301)[0]))
    wanted = reference(normalize(load_images([path], (112, 112))).numpy())
    with client_of(server, model="sam3-encoder-images") as client:
        found = client.features([path])
    assert compare(wanted, found, "fp16", "test").passed
    assert not compare(part([0]), found, "fp16", "test").passed


def test_a_bad_image_is_told_and_spoils_no_other(server: Server) -> None:
    with client_of(server, model="sam3-encoder-images") as client:
        for data in (b"", b"no image", as_file(pixels()[0])[:200]):
            with pytest.raises(ClientError, match=r"refused.*image 2 of 2"):
                client.infer(np.array([[as_file(pixels()[0])], [data]], dtype=np.object_))
        good = client.infer(np.array([[as_file(pixels()[0])]], dtype=np.object_))
    assert passes(part([0]), good)


IMAGE_BYTES = 3 * 112 * 112 * 4


def request(
    shape: list[int],
    data: bytes,
    name: str = "image",
    datatype: str = "FP32",
    **more: Any,
) -> tuple[bytes, int]:
    """Body of an HTTP request with a binary tensor, and the length of its JSON."""
    tensor = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor], **more}).encode()
    return header + data, len(header)


def post(server: Server, body: bytes, header: int | None = None, model: str = "sam3-encoder") -> tuple[int, str]:
    """Status and text of an answer to a raw request."""
    headers = {} if header is None else {"Inference_Header_Content_Length": str(header)}
    status, answer = ask(server.http_url, f"/v2/models/{model}/infer", body, **headers)
    return status, answer.decode(errors="replace")


SHAPE = [1, 3, 112, 112]
ZEROS = bytes(IMAGE_BYTES)
BAD = {
    "height": (request([1, 3, 100, 112], bytes(3 * 100 * 112 * 4)), r"unexpected shape.*Expected \[-1,3,112,112\]"),
    "no batch": (request([3, 112, 112], ZEROS), "unexpected shape"),
    "huge side": (request([1, 3, 112, 2**40], ZEROS), "unexpected shape"),
    "dtype": (request(SHAPE, ZEROS[::2], datatype="FP16"), "data-type is 'FP16'.*expects 'FP32'"),
    "no dtype": (request(SHAPE, ZEROS, datatype="FP99"), "data-type is '<invalid>'.*expects 'FP32'"),
    "input name": (request(SHAPE, ZEROS, name="pixels"), "unexpected inference input 'pixels'"),
    "output name": (request(SHAPE, ZEROS, outputs=[{"name": "sam4_feat_0"}]), "output 'sam4_feat_0'"),
    "batch": (request([9, 3, 112, 112], 9 * ZEROS), "batch-size must be <= 8"),
    "batch of a million": (request([10**6, 3, 112, 112], ZEROS), "batch-size must be <= 8"),
    "too few bytes": (request(SHAPE, ZEROS[4:]), "size mismatch.*Expected 150528, got 150524"),
    "too many bytes": (request(SHAPE, ZEROS + bytes(4)), "size mismatch.*Expected 150528, got 150532"),
    "64 MiB": (request(SHAPE, bytes(1 << 26)), "size mismatch.*Expected 150528, got 67108864"),
    "64 MiB after it": ((request(SHAPE, ZEROS)[0] + bytes(1 << 26), request(SHAPE, ZEROS)[1]), "unexpected additional"),
    "cut off": ((request(SHAPE, ZEROS)[0][:-10], request(SHAPE, ZEROS)[1]), "expecting 150528|additional bytes"),
    "no input": ((b'{"inputs": []}', None), "expected 1 inputs but got 0"),
    "header length": ((b"{}", 10**11), "inference header size should be in range"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_in_words(server: Server, case: str) -> None:
    (body, header), words = BAD[case]
    status, text = post(server, body, header)
    assert 400 <= status < 500
    assert re.search(words, text)
    assert still_right(server)


def test_a_good_request_by_the_same_means(server: Server) -> None:
    """The control."""
    assert post(server, *request(SHAPE, images()[:1].tobytes()))[0] == 200


@pytest.mark.parametrize("model", ["sam4-encoder", "sam3-encoder/versions/9", "sam3-encoder/versions/x"])
def test_an_unknown_model_or_version_is_not_found(server: Server, model: str) -> None:
    assert post(server, *request(SHAPE, ZEROS), model=model)[0] == 404
    assert still_right(server)


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"inputs": 7}', bytes(range(256)) * 64, b'{"inputs": [{"name": "image"}]}']
)
def test_what_is_no_request_is_refused(server: Server, body: bytes) -> None:
    """Triton 2.51 answers some of these with 500."""
    status, text = post(server, body, len(body))
    assert 400 <= status <= 500 and "error" in json.loads(text)
    assert still_right(server)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_client_tells_what_the_server_refuses(server: Server, protocol: str) -> None:
    cases = [
        (images()[:, :, :100], "batch-size must be <= 8|unexpected shape"),
        (images()[:1, :, :100], "unexpected shape"),
        (images()[:1].astype(np.float16), "data-type is 'FP16'"),
        (images()[:9], "batch-size must be <= 8"),
        (np.repeat(images(), 20, axis=0), "batch-size must be <= 8"),  # 72 MB
    ]
    with client_of(server, protocol) as client:
        for value, words in cases:
            with pytest.raises(ClientError, match=f"server refused.*({words})"):
                client.infer(value)
        assert passes(part([0]), client.infer(images()[:1]))


def hurl(url: str, data: bytes, reset: bool = False) -> None:
    """Sends bytes and closes the connection at once, politely or with a reset; the server may close it first."""
    host, port = url.split(":")
    with socket.create_connection((host, int(port)), timeout=600) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)


def head(length: int, header: int) -> bytes:
    lines = f"POST /v2/models/sam3-encoder/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    return f"{lines}Inference-Header-Content-Length: {header}\r\n\r\n".encode()


@pytest.mark.parametrize("reset", [False, True])
def test_half_sent_requests(server: Server, reset: bool) -> None:
    body, header = request(SHAPE, ZEROS)
    whole = head(len(body), header) + body
    for sent in (1, 40, len(whole) - len(body), len(whole) - len(body) + header // 2, len(whole) // 2, len(whole) - 1):
        hurl(server.http_url, whole[:sent], reset)
        hurl(server.grpc_url, (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9) + b"\x00\xff\xff\x01")[:sent], reset)
    hurl(server.http_url, head(1 << 40, header) + body, reset)  # says that a terabyte follows
    hurl(server.http_url, bytes(1 << 20), reset)
    assert still_right(server)


def test_a_thousand_connections_opened_and_dropped(server: Server) -> None:
    for url in (server.http_url, server.grpc_url):
        host, port = url.split(":")
        for lot in range(4):
            many = [socket.create_connection((host, int(port)), timeout=600) for _ in range(250)]
            for number, connection in enumerate(many):
                if number % 2:
                    connection.sendall(b"POST /v2/models/sam3-enc"[: number % 24])
            if lot == 2:
                assert still_right(server)  # while they are open
            for connection in many:
                connection.close()
        assert still_right(server)
