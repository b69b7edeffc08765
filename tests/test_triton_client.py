"""The Triton client without a server: images, what it tells of a server that is none, and that it stands alone."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

import engines.service.triton_client
from engines.service.triton_client import shared
from engines.service.triton_client.__main__ import main
from engines.service.triton_client.address import read_address
from engines.service.triton_client.client import TritonClient
from engines.service.triton_client.errors import ClientError, told
from engines.service.triton_client.images import normalize, read_pixels
from engines.service.triton_client.model import Model, Tensor, describe
from engines.service.triton_client.shared import SharedMemory
from neck import images

CHELSEA = Path(__file__).parent / "data" / "images" / "chelsea.png"


def test_a_copy_of_the_folder_works_alone(tmp_path: Path) -> None:
    """Where neither torch nor this project is: the copy's folder is the only one beside the libraries."""
    shutil.copytree(Path(engines.service.triton_client.__file__).parent, tmp_path / "triton_client")
    code = (
        "import sys, triton_client.__main__ as m\n"
        "assert m.main(['x.png', '--url', '127.0.0.1:1']) == 1\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = ran.stdout
    assert "'tritonclient'" in loaded and "'PIL'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("torch", "neck", "export", "engines", "onnx"))
    assert "127.0.0.1:1: no answer" in ran.stderr and len(ran.stderr.splitlines()) == 1


def image(mode: str) -> Image.Image:
    """A small image of a mode, with something in every channel."""
    image = Image.open(CHELSEA).convert("RGB").resize((56, 42))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "transparent palette", "turned"])
def test_pixels_are_neck_images_own(tmp_path: Path, mode: str) -> None:
    path, options, exif = tmp_path / ("x.jpg" if mode in ("CMYK", "turned") else "x.png"), {}, Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    options = {"transparent palette": {"transparency": 3}, "turned": {"exif": exif}}.get(mode, {})
    image({"transparent palette": "P", "turned": "RGB"}.get(mode, mode)).save(path, **options)  # type: ignore[arg-type]
    theirs = images.read_image(path)
    assert theirs.shape == ((56, 42, 3) if mode == "turned" else (42, 56, 3))
    assert np.array_equal(read_pixels(path, theirs.shape[:2]), theirs)


@pytest.mark.parametrize("size", [(112, 112), (70, 154), (600, 800), (1008, 1008)])
def test_the_resize_is_one_level_off_at_most_here_and_there(size: tuple[int, int]) -> None:
    ours, theirs = read_pixels(CHELSEA, size), images.load_images([CHELSEA], size)[0]
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 5e-3
    assert np.abs(ours[:, ::-1].astype(int) - theirs).max() > 1  # the control


def test_normalized_values_have_the_bits_of_neck_images() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    theirs = images.normalize(every).numpy()
    assert normalize(every).dtype == np.float32 and np.array_equal(normalize(every), theirs)
    assert not np.array_equal(every.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1, theirs)


def test_what_is_no_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(CHELSEA.read_bytes()[:2000])
    cases = {"deep.png": "more than 8 bits", "text.png": "cannot identify", "cut.png": "cannot be read as an image"}
    for name, words in {**cases, "missing.png": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(ClientError, match=words):
            read_pixels(tmp_path / name, (8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ClientError, match="decompression bomb"):
        read_pixels(CHELSEA, (8, 8))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CHELSEA), "--url", "127.0.0.1:1", "--protocol", protocol]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: 127.0.0.1:1: no answer") and "start tritonserver" in told
    assert len(told.splitlines()) == 1


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_does_not_answer(protocol: Any) -> None:
    with silent() as url, pytest.raises(ClientError, match=r"no answer.*longer --timeout"):
        TritonClient(url, protocol=protocol, timeout_s=0.3)


@pytest.mark.parametrize("url", ["ftp://localhost:8000", "", "localhost:x", "https://", "localhost:8000?x=1", "[::1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ClientError, match=r"the URL .*such as localhost:8000"):
        TritonClient(url)


ADDRESSES = [
    ("triton", "http", "triton:8000", False),
    ("triton", "grpc", "triton:8001", False),
    ("triton:9", "http", "triton:9", False),
    ("http://triton", "http", "triton:80", False),
    ("https://triton", "http", "triton:443", True),
    ("https://triton:9", "grpc", "triton:9", True),
    ("https://triton/models/a/", "http", "triton:443/models/a", True),
    ("[::1]:9", "http", "[::1]:9", False),
]


@pytest.mark.parametrize(("url", "protocol", "host", "tls"), ADDRESSES)
def test_addresses(url: str, protocol: str, host: str, tls: bool) -> None:
    found = read_address(url, protocol)
    assert (found.host, found.tls, found.headers) == (host, tls, {})
    with_user = url.replace("://", "://ann:s%40cret@") if "://" in url else f"ann:s%40cret@{url}"
    found = read_address(with_user, protocol)
    assert (found.host, found.tls) == (host, tls)
    assert found.headers == {"authorization": "Basic " + base64.b64encode(b"ann:s@cret").decode()}


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "options",
    [
        {"url": f"ann:{SECRET}@127.0.0.1:1"},
        {"url": f"https://ann:{SECRET}@127.0.0.1:1"},
        {"url": f"ftp://ann:{SECRET}@127.0.0.1:1"},
        {"url": f"ann:{SECRET}@127.0.0.1:x"},
        {"url": f"ann:{SECRET}@"},
        {"url": f"127.0.0.1:1?token={SECRET}"},
        {"url": "127.0.0.1:1", "user": "ann", "password": SECRET},
        {"url": "127.0.0.1:1", "token": SECRET},
        {"url": "127.0.0.1:1", "token": SECRET, "user": "ann"},
        {"url": "127.0.0.1:1", "headers": {"X-Key": SECRET}},
        {"url": "127.0.0.1:1", "headers": {"X-Key": f"{SECRET}\n"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_secret_is_shown(protocol: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ClientError) as caught:
        TritonClient(protocol=protocol, timeout_s=5, **options)
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text.replace(repr(options), "") and SECRET not in str(caught.value)
    assert SECRET not in repr(read_address("x", "http", "ann", SECRET))


IMAGE = {"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
FEATURE = {"name": "sam3_feat_0", "datatype": "FP16", "shape": [-1, 4, 2, 2]}


def fake_client(ready: bool = True, index: Any = (), most: int = 8, **metadata: Any) -> Any:
    """What `describe` asks of tritonclient."""
    told = {"inputs": [IMAGE], "outputs": [FEATURE], **metadata}
    return SimpleNamespace(
        is_model_ready=lambda name, version, **limit: ready,
        get_model_metadata=lambda name, version, **asked: told,
        get_model_config=lambda name, version, **asked: (
            {"config": {"max_batch_size": most}} if asked.get("as_json") else {"max_batch_size": most}
        ),
        get_model_repository_index=lambda **asked: {"models": list(index)} if asked.get("as_json") else list(index),
    )


def options_of(**more: Any) -> dict[str, Any]:
    """What a gRPC method is given; an HTTP method gets nothing."""
    return {"client_timeout": 7.0, **more}


BOTH = pytest.mark.parametrize("options", [lambda **_: {}, options_of], ids=["http", "grpc"])


@BOTH
def test_a_model_is_described(options: Any) -> None:
    image, feature = Tensor("image", "FP32", (-1, 3, 8, 8)), Tensor("sam3_feat_0", "FP16", (-1, 4, 2, 2))
    found = describe(fake_client(), "m", "", ["sam3_*"], options)
    assert found == Model(image, (feature,), max_batch=8, fixed=False)
    assert feature.bytes_of(3) == 3 * 16 * 2
    fixed = describe(fake_client(most=0, inputs=[IMAGE | {"shape": ["4", "3", "8", "8"]}]), "m", "", [], options)
    assert fixed.max_batch == 4 and fixed.fixed
    assert describe(fake_client(most=0), "m", "", [], options).max_batch == 1  # a batch that Triton knows nothing of


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (
            fake_client(outputs=[FEATURE | {"datatype": "BF16"}]),
            "sam3_feat_0 is BF16, which numpy does not support; .*--output-dtype fp32",
        ),
        (fake_client(inputs=[IMAGE, IMAGE]), "m has 2 inputs"),
        (fake_client(inputs=[]), "m has 0 inputs"),
        (fake_client(outputs=[FEATURE | {"name": "other"}]), r"m has no output sam3_\*; choose from other"),
        (fake_client(False), "the server has no model m; .* ready are: none"),
        (fake_client(False, [{"name": "x", "version": "1", "state": "READY"}]), "no model m; .* ready are: x"),
        (
            fake_client(False, [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "no such plan"}]),
            "m is not ready; the server reports version 1 UNAVAILABLE no such plan",
        ),
        (fake_client(False, [{"name": "m"}]), "m is not ready; the server reports version ?"),
    ],
)
@BOTH
def test_a_model_that_cannot_be_used_is_told(client: Any, words: str, options: Any) -> None:
    with pytest.raises(ClientError, match=words):
        describe(client, "m", "", ["sam3_*"], options)


class Regions:
    """What `SharedMemory` asks of a tritonclient, whose server refuses some times to forget a region."""

    def __init__(self, refusals: list[str]) -> None:
        self.refusals, self.known, self.calls = refusals, set[str](), 0

    def get_system_shared_memory_status(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in sorted(self.known)]

    def register_system_shared_memory(self, name: str, key: str, size: int) -> None:
        self.known.add(name)

    def unregister_system_shared_memory(self, name: str) -> None:
        self.calls += 1
        if self.refusals:
            raise InferenceServerException(self.refusals.pop(0), "StatusCode.INTERNAL")
        self.known.remove(name)


IN_USE = "Cannot unregister shared memory region 'x', it is currently in use."


def test_a_region_in_use_is_given_back_a_little_later() -> None:
    """Seen with Triton 2.51 now and then over gRPC: the answer comes before the region is free."""
    client = Regions([IN_USE] * 2)
    memory = SharedMemory(lambda: client, "system")
    value, tensor = np.arange(6, dtype=np.float32).reshape(2, 3), Tensor("x", "FP32", (-1, 3))
    name, size = memory.put("x", value)
    assert size == 24 and client.known == {name}
    assert np.array_equal(memory.get(tensor, 2), value)
    assert memory.put("x", value + 1) == (name, size)  # the same region again
    other, _ = memory.put("x", value[:1])  # another size, another region
    assert client.known == {other} and client.calls == 3
    memory.close()
    assert client.known == set() and not Path("/dev/shm", name).exists() and not Path("/dev/shm", other).exists()


def test_every_region_is_freed_here_whatever_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.service.triton_client.shared.IN_USE_WAITS_S", (0.0, 0.0))
    for refusals, calls in ((["no such thing"], 2), ([IN_USE] * 3, 4)):
        client = Regions(refusals)
        memory = SharedMemory(lambda client=client: client, "system")
        names = [memory.reserve(tensor, 8)[0] for tensor in "ab"]
        with pytest.raises(InferenceServerException):
            memory.close()
        assert client.calls == calls and not any(Path("/dev/shm", name).exists() for name in names)


def a_dead_process() -> str:
    """A region's name of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = shared._started(process.pid)
    process.communicate(b"\n")
    return f"neck-client-{shared._namespace():x}-{process.pid}-{started}-{16 * 'a'}"


def test_what_a_killed_client_left_is_removed() -> None:
    stale, foreign = a_dead_process(), f"neck-client-1-1-1-{16 * 'b'}"
    client = Regions([])
    memory = SharedMemory(lambda: client, "system")
    mine, _ = memory.reserve("x", 8)
    names = [stale, foreign, mine, "neck-client-odd", "theirs"]
    client.known.update(names)
    for name in (stale, foreign):
        (shared.PLACE / name).write_bytes(b"x")
    try:
        assert [shared.is_stale(name) for name in names] == [True, False, False, False, False]
        SharedMemory(lambda: client, "system")
        assert client.known == set(names) - {stale}
        assert not (shared.PLACE / stale).exists() and (shared.PLACE / foreign).exists()
    finally:
        (shared.PLACE / foreign).unlink()
    memory.close()


class Fake(http.server.BaseHTTPRequestHandler):
    """Speaks Triton's protocol for one model of one output, and answers as its server's `answer` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))  # type: ignore[attr-defined]
        if self.server.status:  # type: ignore[attr-defined]
            return self.reply(b"<html>hello</html>", self.server.status)  # type: ignore[attr-defined]
        metadata = {"name": "m", "inputs": [IMAGE], "outputs": [FEATURE, FEATURE | {"name": "sam3_feat_1"}]}
        bodies = {"/ready": {}, "/config": {"max_batch_size": 8}}
        found = next((body for end, body in bodies.items() if self.path.endswith(end)), metadata)
        self.reply(json.dumps(found).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answer(self)  # type: ignore[attr-defined]

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def tensors(self, values: dict[str, np.ndarray], cut: int = 0) -> None:
        outputs = [
            {
                "name": name,
                "datatype": "FP16",
                "shape": list(value.shape),
                "parameters": {"binary_data_size": value.nbytes},
            }
            for name, value in values.items()
        ]
        header = json.dumps({"model_name": "m", "outputs": outputs}).encode()
        data = b"".join(value.tobytes() for value in values.values())
        self.reply(header + data[: len(data) - cut], Inference_Header_Content_Length=str(len(header)))

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def fake(
    answer: Any = None, context: ssl.SSLContext | None = None, status: int = 0
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The address of a fake server, and the headers of the requests that it has seen; with a status no Triton."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        seen: list[dict[str, str]] = []
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is no error here
        server.answer, server.seen, server.status = answer, seen, status  # type: ignore[attr-defined]
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def halves(batch: int, *side: int) -> np.ndarray:
    return np.arange(batch * 16).reshape(batch, *(side or (4, 2, 2))).astype(np.float16)


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_server_that_is_no_triton(status: int) -> None:
    with fake(status=status) as (url, _), pytest.raises(ClientError, match=f"{url}: "):
        TritonClient(url, timeout_s=600)


PIXELS = np.zeros((2, 3, 8, 8), np.float32)
GOOD = {"sam3_feat_0": halves(2), "sam3_feat_1": halves(2) + 1}
ANSWERS = {
    "one output": ({"sam3_feat_0": halves(2)}, "not contain the outputs sam3_feat_1"),
    "none": ({}, "not contain the outputs sam3_feat_0, sam3_feat_1"),
    "a larger batch": (
        GOOD | {"sam3_feat_1": halves(3)},
        r"sam3_feat_1 in the answer is FP16 \[3, 4, 2, 2\]; expected FP16 \[2, 4",
    ),
    "a smaller batch": ({name: value[:1] for name, value in GOOD.items()}, r"sam3_feat_0 in the answer is FP16 \[1, "),
    "another shape": (GOOD | {"sam3_feat_0": halves(2, 2, 4, 2)}, r"sam3_feat_0 in the answer is FP16 \[2, 2, 4, 2\]"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_incomplete_answer_is_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, words = ANSWERS[case]
    with fake(lambda handler: handler.tensors(values)) as (url, _):
        with TritonClient(url, "m", timeout_s=60) as client, pytest.raises(ClientError, match=words):
            client.infer(PIXELS)
        assert main([str(CHELSEA)] * 2 + ["--url", url, "--model", "m"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_cut_answer_is_refused() -> None:
    cuts = [1, 2, 30, 64, 0]
    with (
        fake(lambda handler: handler.tensors(GOOD, cuts.pop(0))) as (url, _),
        TritonClient(url, "m", timeout_s=60) as client,
    ):
        while len(cuts) > 1:
            with pytest.raises(ClientError):
                client.infer(PIXELS)
        found = client.infer(PIXELS)  # the control, also of the answers above
    assert sorted(found) == sorted(GOOD) and all(np.array_equal(found[name], GOOD[name]) for name in GOOD)


def drip(handler: Fake) -> None:
    """A byte now and then, for as long as the client takes them."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(10000):
            handler.wfile.write(b" ")
            time.sleep(0.02)


def test_a_timeout_bounds_the_whole_call() -> None:
    """Each byte comes in time; the answer would take 200 s. The client is of use again."""
    answers = [drip, lambda handler: handler.tensors(GOOD)]
    with (
        fake(lambda handler: answers.pop(0)(handler)) as (url, _),
        TritonClient(url, "m", timeout_s=3) as client,
    ):
        with pytest.raises(ClientError, match="no answer within 3 s"):
            client.infer(PIXELS)
        assert sorted(client.infer(PIXELS)) == sorted(GOOD)


@pytest.mark.parametrize("seconds", [0.0, -3.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none(seconds: float) -> None:
    with pytest.raises(ClientError, match="timeout"):
        TritonClient("127.0.0.1:1", timeout_s=seconds)


def test_credentials_and_headers_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    basic = "Basic " + base64.b64encode(b"ann:pass word").decode()
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"user": "ann", "password": "pass word"}, "{url}", basic),
        ({}, "http://ann:pass%20word@{url}", basic),
        ({"token": "abc"}, "{url}", "Bearer abc"),
        ({"headers": {"Authorization": "Custom 1", "X-Tenant": "a"}}, "{url}", "Custom 1"),
    ]
    with fake(lambda handler: handler.tensors(GOOD)) as (url, seen):
        for options, form, wanted in cases:
            seen.clear()
            with TritonClient(form.format(url=url), "m", timeout_s=60, **options):
                pass
            sent = [{name.lower(): value for name, value in headers.items()} for headers in seen]
            assert len(sent) >= 3 and {headers.get("authorization") for headers in sent} == {wanted}
            assert {headers.get("x-tenant") for headers in sent} == {options.get("headers", {}).get("X-Tenant")}
        monkeypatch.setenv("NECK_TRITON_PASSWORD", "pass word")
        seen.clear()
        arguments = [str(CHELSEA), str(CHELSEA), "--url", url, "--model", "m"]
        assert main([*arguments, "--user", "ann", "--header", "X-Tenant: b"]) == 0
        assert {headers.get("authorization", headers.get("Authorization")) for headers in seen} == {basic}
        assert {headers.get("x-tenant") for headers in seen} == {"b"}
        monkeypatch.setenv("NECK_TRITON_TOKEN", "xyz")
        seen.clear()
        assert main(arguments) == 0
        assert {headers.get("authorization") for headers in seen} == {"Bearer xyz"}
        assert main([*arguments, "--header", "X-Tenant"]) == 1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private authority `ca.pem`, a server's certificate that it signed, and a stranger, `other.pem`."""
    folder = tmp_path_factory.mktemp("certificates")
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl; apt-get install openssl")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    for name in ("ca", "other"):
        files = ["-addext", "keyUsage=critical,keyCertSign", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*new, "-x509", "-subj", f"/CN={name}", *files], cwd=folder, check=True, capture_output=True)
    files = ["-keyout", "server.key", "-out", "server.csr"]
    subprocess.run([*new[:-2], "-subj", "/CN=x", *files], cwd=folder, check=True, capture_output=True)
    signs = "openssl x509 -req -days 2 -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile san"
    subprocess.run([*signs.split(), "-out", "server.pem"], cwd=folder, check=True, capture_output=True)
    return folder


def test_https_with_a_private_authority(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    ca = certificates / "ca.pem"
    with fake(lambda handler: handler.tensors(GOOD), context) as (url, _):
        with TritonClient(f"https://{url}", "m", timeout_s=60, ca=ca) as client:
            assert sorted(client.infer(PIXELS)) == sorted(GOOD)
        for other in (None, certificates / "other.pem"):
            with pytest.raises(ClientError, match=r"not trusted.*--ca"):
                TritonClient(f"https://{url}", "m", timeout_s=60, ca=other)
        with pytest.raises(ClientError, match=r"missing\.pem: the file of trusted certificates cannot be read"):
            TritonClient(f"https://{url}", "m", timeout_s=60, ca=certificates / "missing.pem")
        with pytest.raises(ClientError):
            TritonClient(f"http://{url}", "m", timeout_s=60)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        TritonClient(f"https://{url}", "m", timeout_s=60).close()


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("CA cert does not include key usage extension", "Python 3.13"),
        ("Missing Authority Key Identifier", "Python 3.13"),
        ("self-signed certificate in certificate chain", "--ca"),
    ],
)
def test_why_a_certificate_is_not_trusted(reason: str, remedy: str) -> None:
    """From Python 3.13 on an authority's certificate may be refused although it was given."""
    with pytest.raises(ClientError) as found, told("https://x"):
        raise ssl.SSLError(1, f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {reason} (_ssl.c:1020)")
    message = str(found.value)
    assert reason in message and [words for words in ("Python 3.13", "--ca") if words in message] == [remedy]


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The same model over gRPC; `names` are the outputs that it answers with."""

    def __init__(self, names: list[str], batch: int = 2) -> None:
        self.names, self.batch, self.seen = names, batch, list[dict[str, str]]()

    def ModelReady(self, request: Any, context: Any) -> Any:
        self.seen.append({key: str(value) for key, value in context.invocation_metadata()})
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        outputs = [FEATURE, FEATURE | {"name": "sam3_feat_1"}]
        return service_pb2.ModelMetadataResponse(name="m", inputs=[IMAGE], outputs=outputs)  # type: ignore[list-item]

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config={"max_batch_size": 8})  # type: ignore[arg-type]

    def ModelInfer(self, request: Any, context: Any) -> Any:
        shape = [self.batch, 4, 2, 2]
        outputs = [{"name": name, "datatype": "FP16", "shape": shape} for name in self.names]
        raw = [halves(self.batch).tobytes()] * len(outputs)
        return service_pb2.ModelInferResponse(model_name="m", outputs=outputs, raw_output_contents=raw)


@contextlib.contextmanager
def grpc_server(servicer: Servicer, certificates: Path) -> Iterator[str]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("names", "batch", "words"),
    [
        (["sam3_feat_0", "sam3_feat_1"], 2, ""),
        (["sam3_feat_1"], 2, "not contain the outputs sam3_feat_0"),
        (["sam3_feat_0", "sam3_feat_1"], 1, r"sam3_feat_0 in the answer is FP16 \[1, 4, 2, 2\]"),
    ],
)
def test_grpc_with_a_private_authority(names: list[str], batch: int, words: str, certificates: Path) -> None:
    servicer, ca = Servicer(names, batch), certificates / "ca.pem"
    with grpc_server(servicer, certificates) as url:
        options: dict[str, Any] = {"protocol": "grpc", "timeout_s": 60, "ca": ca, "token": "abc"}
        with TritonClient(url, "m", **options) as client:
            expected = pytest.raises(ClientError, match=words) if words else contextlib.nullcontext()
            with expected:
                assert sorted(client.infer(PIXELS)) == names
        with pytest.raises(ClientError):
            TritonClient(url, "m", protocol="grpc", timeout_s=5, ca=certificates / "other.pem")
    assert {seen["authorization"] for seen in servicer.seen} == {"Bearer abc"}
