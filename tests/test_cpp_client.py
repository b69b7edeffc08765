"""neck-triton: the C++ client against the real tritonserver, and against servers that misbehave."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from cpp_build import Programs, why_missing
from PIL import Image

if why_missing() is not None:
    pytest.skip(str(why_missing()), allow_module_level=True)
pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")

import triton_server
from serving import expected, pixels
from triton_server import fake_plan, fake_repository, running

from engines.service.triton_client.client import TritonClient
from export.verification.reference import write_reference as save_reference
from neck.images import load_images

PHOTO = Path(__file__).parent.parent / "export" / "images" / "astronaut.jpg"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with meta-dual, float (1:4:8) and uint8 (fixed at 2) inputs."""
    if triton_server.why_missing():
        pytest.skip(str(triton_server.why_missing()))
    from export.contract.signature import BatchRange

    folder = tmp_path_factory.mktemp("cpp-server")
    repository = fake_repository(folder, fake_plan(folder))
    raw = fake_plan(folder, "raw", input_kind="uint8", batch=BatchRange(2, 2, 2))
    fake_repository(folder, raw, name="raw-encoder")
    with running(repository) as server:
        yield server.http_url


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Twelve images and what plain PyTorch gives for them."""
    return write_reference(tmp_path / "reference.safetensors", 12)


def write_reference(path: Path, count: int, first: int = 0) -> Path:
    outputs = {name: value[first : first + count] for name, value in expected().items()}
    save_reference(path, pixels()[:count], outputs)
    return path


@pytest.mark.parametrize("options", [[], ["--batch", 1], ["--batch", 5], ["--model", "raw-encoder", "--batch", 2]])
def test_answers_are_pytorchs(programs: Programs, url: str, reference: Path, options: list[Any]) -> None:
    ran = programs.run("neck-triton", url, "--compare", reference, "--runs", 2, *options)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("  ok\n") == 16
    shape = (12, *expected()["sam3_feat_0"].shape[1:])
    assert " ".join(["sam3_feat_0", "float32", str(shape)]) in " ".join(ran.out.split())
    assert "one request, batch" in ran.out


def test_answers_to_other_images_fail(programs: Programs, url: str, tmp_path: Path) -> None:
    """The control: the outputs of images 4 to 7 for images 0 to 3."""
    other = write_reference(tmp_path / "other.safetensors", 4, first=4)
    ran = programs.run("neck-triton", url, "--compare", other)
    assert ran.code == 3
    assert ran.out.count("FAILED") >= 8


def test_a_image_is_sent(programs: Programs, url: str, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(pixels()[0]).save(image)
    one = write_reference(tmp_path / "one.safetensors", 1)
    ran = programs.run("neck-triton", f"http://{url}/", image, "--compare", one, "--runs", 1, "--model-version", 1)
    assert ran.code == 0
    assert ran.out.startswith(f"sam3-encoder in Triton at http://{url} (tensorrt_plan)\n")
    Image.fromarray(pixels()[1]).save(image)
    assert programs.run("neck-triton", url, image, "--compare", one).code == 3


def test_a_image_of_any_size_is_answered_as_the_python_client(programs: Programs, url: str, tmp_path: Path) -> None:
    """A JPEG of odd sides, turned by its EXIF; the control is the same image upside down."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(PHOTO) as photo:
        turned = photo.crop((0, 0, 350, 211))
    turned.save(tmp_path / "a.jpg", exif=exif)
    turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.jpg", exif=exif)
    size = pixels().shape[1:3]
    image = load_images([tmp_path / "a.jpg"], size)
    with TritonClient(url) as client:
        outputs = client.features([tmp_path / "a.jpg"])
    save_reference(tmp_path / "a.safetensors", image, outputs)
    told = tmp_path / "a.safetensors"
    ran = programs.run("neck-triton", url, tmp_path / "a.jpg", "--compare", told, "--precision", "fp16")
    assert ran.code == 0, ran.out
    assert (
        "350 x 211 pixels (height x width); one pixel of the model input covers 3.125000 x 1.883929 pixels of the image"
        in ran.out
    )
    assert programs.run("neck-triton", url, tmp_path / "b.jpg", "--compare", told).code == 3


def test_the_servers_own_words_are_shown(programs: Programs, url: str, reference: Path) -> None:
    ran = programs.run("neck-triton", url, "--compare", reference, "--model", "nothing")
    assert ran.code == 1
    assert "HTTP 4" in ran.error
    assert "unknown model: 'nothing' is not found" in ran.error
    ran = programs.run("neck-triton", url, "--compare", reference, "--model-version", 7)
    assert ran.code == 1
    assert "is not found" in ran.error or "is not available" in ran.error or "is not at ready" in ran.error
    ran = programs.run("neck-triton", url, "--compare", reference, "--batch", 9)
    assert (ran.code, "the model's largest batch size is 8" in ran.error) == (1, True)


Answer = tuple[int, dict[str, str], bytes]
Request = tuple[dict[str, str], bytes]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test's `answers` say: by the end of the path, (status, headers, body)."""

    answers: dict[str, Answer]
    seen: ClassVar[list[Request]]
    stall: threading.Event
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.seen.append((dict(self.headers), b""))
        self.reply()

    def do_POST(self) -> None:
        self.seen.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.reply()

    def reply(self) -> None:
        status, headers, body = self.answers[self.path.rpartition("/")[2]]
        if status == 0:  # no answer at all
            self.stall.wait(30)
            return
        self.send_response(status)
        # closing without a word races with the client's next request on this connection
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serving(
    answers: dict[str, Answer],
    seen: list[Request] | None = None,
    tls: ssl.SSLContext | None = None,
    handler: type[Handler] = Handler,
) -> Iterator[str]:
    """A server of these answers, whose address is given; `seen` gets each request's headers and body."""
    stall = threading.Event()
    kind = type("Answers", (handler,), {"answers": answers, "stall": stall, "seen": [] if seen is None else seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            stall.set()
            server.shutdown()
            thread.join()


def tensor(name: str, *shape: int, datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **more}


def model_of(*outputs: dict[str, Any]) -> dict[str, Any]:
    image = tensor("image", -1, 16, 16, 3, datatype="UINT8")
    return {"name": "m", "versions": ["1"], "platform": "p", "inputs": [image], "outputs": list(outputs)}


def answer(header: Any, body: bytes = b"", status: int = 200, length: int | None = None) -> Answer:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    told = len(text) if length is None else length
    return status, {"Inference-Header-Content-Length": str(told)}, text + body


FEAT = np.arange(4, dtype=np.float32)
FEAT_BYTES = {"parameters": {"binary_data_size": 16}}
GOOD: dict[str, Answer] = {
    "config": answer({"max_batch_size": 4}),
    "m": answer(model_of(tensor("feat", -1, 4))),
    "infer": answer({"outputs": [tensor("feat", 1, 4, **FEAT_BYTES)]}, FEAT.tobytes()),
}


def ask(programs: Programs, folder: Path, answers: dict[str, Answer], *options: Any) -> Any:
    """Sends a reference of one image to a server of these answers."""
    reference = folder / "reference.safetensors"
    save_reference(reference, np.zeros((1, 16, 16, 3), np.uint8), {"feat": FEAT[None]})
    with serving(answers) as url:
        return programs.run("neck-triton", url, "--compare", reference, "--model", "m", "--runs", 1, *options)


def infer(header: Any, body: bytes = FEAT.tobytes(), **more: Any) -> dict[str, Answer]:
    return {**GOOD, "infer": answer(header, body, **more)}


def outputs(*specs: dict[str, Any]) -> dict[str, Any]:
    return {"outputs": list(specs)}


def test_a_server_that_behaves_is_understood(programs: Programs, tmp_path: Path) -> None:
    """The control of all below."""
    ran = ask(programs, tmp_path, GOOD)
    assert (ran.code, ran.err) == (0, "")
    wrong = infer(outputs(tensor("feat", 1, 4, **FEAT_BYTES)), (FEAT + 1).tobytes())
    assert ask(programs, tmp_path, wrong).code == 3


def huge(side: int) -> dict[str, Any]:
    return tensor("feat", side, side, side, parameters={"binary_data_size": 16})


def two_outputs(header: Any) -> dict[str, Answer]:
    """A model of two outputs that answers with what is given."""
    return {**infer(header), "m": answer(model_of(tensor("feat", -1, 4), tensor("more", -1, 4)))}


def two_rows() -> dict[str, Answer]:
    return infer(outputs(tensor("feat", 2, 4, parameters={"binary_data_size": 32})), FEAT.tobytes() * 2)


BAD: list[tuple[str, dict[str, Answer], str]] = [
    (
        "404",
        {**GOOD, "config": (404, {}, b'{"error": "no model m"}')},
        r"the server refused the request \(HTTP 404\): no model m",
    ),
    ("500", {**GOOD, "infer": (500, {}, b"<html>\n broken\xff </html>")}, r"HTTP 500\): <html> broken\\xff </html>"),
    ("503 without a word", {**GOOD, "infer": (503, {}, b"")}, r"the server refused the request \(HTTP 503\): "),
    ("302", {**GOOD, "m": (302, {"Location": "/v2/other"}, b"")}, r"the server refused the request \(HTTP 302\)"),
    ("no JSON", {**GOOD, "m": answer(b"hello")}, "the answer is not a JSON object"),
    ("deep JSON", {**GOOD, "m": answer(b"[" * 100_000)}, "the answer is not a JSON object"),
    ("no inputs", {**GOOD, "m": answer({"name": "m"})}, "the answer does not contain the list 'inputs'"),
    (
        "odd inputs",
        {**GOOD, "m": answer({"name": "m", "inputs": [3]})},
        "the list 'inputs' in the answer contains entries that are not JSON objects",
    ),
    (
        "text",
        {**GOOD, "m": answer(model_of(tensor("t", 1, datatype="BYTES")))},
        "tensor 't' has type 'BYTES', but only FP32",
    ),
    ("lacks one", two_outputs(outputs(tensor("feat", 1, 4, **FEAT_BYTES))), "does not contain the output 'more'"),
    (
        "twice",
        infer(outputs(*[tensor("feat", 1, 4, **FEAT_BYTES)] * 2), FEAT.tobytes() * 2),
        "the server's answer contains the output 'feat' more than once",
    ),
    (
        "one more",
        infer(outputs(tensor("feat", 1, 4, **FEAT_BYTES), tensor("x", 1, 4, **FEAT_BYTES)), FEAT.tobytes() * 2),
        "the server's answer contains the outputs feat, x, but the requested outputs are feat",
    ),
    (
        "other type",
        infer(outputs(tensor("feat", 1, 4, datatype="INT32", **FEAT_BYTES))),
        "returned output feat as int32",
    ),
    (
        "other shape",
        infer(outputs(tensor("feat", 1, 2, 2, **FEAT_BYTES))),
        r"returned output feat as float32 \(1, 2, 2\)",
    ),
    (
        "odd name",
        {**GOOD, "m": answer(model_of(tensor("\x1b[2J", 1)))},
        r"model or tensor the invalid name '\\x1b\[2J'",
    ),
    (
        "odd shape",
        {**GOOD, "m": answer(model_of({**tensor("t"), "shape": ["x"]}))},
        "the shape of tensor 't' does not consist of integers",
    ),
    (
        "odd version",
        {**GOOD, "m": answer({**model_of(), "versions": 3})},
        "the answer does not contain the list 'versions'",
    ),
    (
        "no image",
        {**GOOD, "m": answer({**model_of(), "inputs": [tensor("x", 4)]})},
        "input is x: float32 .4., which is not an image",
    ),
    ("two inputs", {**GOOD, "m": answer({**model_of(), "inputs": [tensor("x", 4)] * 2})}, "the model m has 2 inputs"),
    (
        "too few bytes",
        infer(outputs(tensor("feat", 1, 4, **FEAT_BYTES)), b"123"),
        r"\(1, 4\), but its data have 3 bytes",
    ),
    (
        "too many bytes",
        infer(outputs(tensor("feat", 1, 4, **FEAT_BYTES)), FEAT.tobytes() + b"12"),
        "the answer contains 2 bytes after the last output",
    ),
    ("wrong size", infer(outputs(tensor("feat", 1, 5, **FEAT_BYTES))), r"\(1, 5\), but its data have 16 bytes"),
    ("wrong batch", two_rows(), r"output feat as float32 \(2, 4\) for a batch of 1"),
    ("no outputs", infer(outputs(), b""), "the server's answer does not contain the output 'feat'"),
    ("huge shape", infer(outputs(huge(2**40))), "a float32 tensor cannot have the shape"),
    ("negative shape", infer(outputs(huge(-1))), "a float32 tensor cannot have the shape"),
    ("beyond int64", infer(outputs(huge(2**64))), "the shape of tensor 'feat'"),
    (
        "JSON data",
        infer(outputs(tensor("feat", 1, 4, data=[0, 1, 2, 3]))),
        "the server's answer gives no valid binary_data_size for the output 'feat'",
    ),
    ("no header length", {**GOOD, "infer": (200, {}, GOOD["infer"][2])}, "Inference-Header-Content-Length"),
    ("long header", infer(outputs(), length=10**6), "Inference-Header-Content-Length"),
    ("negative header", infer(outputs(), length=-5), "Inference-Header-Content-Length"),
    ("cut header", infer(outputs(tensor("feat", 1, 4, **FEAT_BYTES)), length=9), "the answer is not a JSON object"),
    ("other output", infer(outputs(tensor("other", 1, 4, **FEAT_BYTES))), "does not contain the output 'feat'"),
    (
        "half an answer",
        {**GOOD, "infer": (200, {"Content-Length": "99999"}, b"{")},
        "check that the server address is the address of Triton's HTTP port",
    ),
]


@pytest.mark.parametrize(("name", "answers", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_a_server_that_misbehaves_is_refused(
    programs: Programs, tmp_path: Path, name: str, answers: dict[str, Answer], message: str
) -> None:
    ran = ask(programs, tmp_path, answers)
    assert ran.code == 1
    assert re.search(message, ran.error), ran.error


LARGE = 1024
"""Side of an image whose request does not fit into a socket's buffers: 3 MB."""


class ClosingHandler(Handler):
    """Keeps its connections, and closes those of `closed` (1 is the first) when their POST has begun, or has come."""

    closed: ClassVar[set[int]]
    how: ClassVar[str]
    posts: ClassVar[list[int]]

    def setup(self) -> None:
        super().setup()
        self.server.connections = self.number = getattr(self.server, "connections", 0) + 1

    def do_POST(self) -> None:
        self.posts.append(self.number)
        if self.how == "late":
            time.sleep(2)
        if self.number not in self.closed:
            super().do_POST()
            return
        if self.how in ("at its end", "in its answer"):
            self.rfile.read(int(self.headers["Content-Length"]))
        if self.how == "in its answer":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        reset = struct.pack("ii", 1, 0)  # closing sends a reset, as the kernel does if bytes have not been read
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self.rfile.close()
        self.connection.close()
        self.close_connection = True


@pytest.mark.parametrize(
    ("how", "closed", "code", "posts"),
    [
        ("at the beginning", {1}, 0, [1, 2, 2]),
        ("at its end", {1}, 0, [1, 2, 2]),
        ("at the beginning", {1, 2}, 1, [1, 2]),
        ("at its end", {1, 2}, 1, [1, 2]),
        ("in its answer", {1}, 1, [1]),
        ("late", {1}, 1, [1, 2]),
    ],
)
def test_a_kept_connection_that_was_closed_is_opened_once_more(
    programs: Programs, tmp_path: Path, how: str, closed: set[int], code: int, posts: list[int]
) -> None:
    """A request is sent again if nothing of its answer has come, on a new connection, and no third time.

    One timeout bounds both: the two waits of the late server are together longer than it.
    """
    reference = tmp_path / "reference.safetensors"
    save_reference(reference, np.zeros((1, LARGE, LARGE, 3), np.uint8), {"feat": FEAT[None]})
    image = tensor("image", -1, LARGE, LARGE, 3, datatype="UINT8")
    answers = {**GOOD, "m": answer({**model_of(tensor("feat", -1, 4)), "inputs": [image]})}
    kept = {
        name: (status, {**headers, "Connection": "keep-alive"}, body)
        for name, (status, headers, body) in answers.items()
    }
    more = {"closed": closed, "how": how, "posts": []}
    with serving(kept, handler=type("Closing", (ClosingHandler,), more)) as url:
        arguments = (
            url,
            "--compare",
            reference,
            "--model",
            "m",
            "--runs",
            1,
            "--timeout",
            20000 if how != "late" else 3000,
        )
        ran = programs.run("neck-triton", *arguments)
    assert (ran.code, more["posts"]) == (code, posts), ran.err
    assert code == 0 or f"http://{url}/v2/models/m/infer" in ran.error


SECRET = "s3cret"


def test_credentials_are_sent_and_never_printed(programs: Programs, tmp_path: Path) -> None:
    """A part of the URL, options, or in the environment; also where the server cannot be reached."""
    reference = tmp_path / "reference.safetensors"
    save_reference(reference, np.zeros((1, 16, 16, 3), np.uint8), {"feat": FEAT[None]})
    seen: list[Request] = []
    options = ("--compare", reference, "--model", "m", "--runs", 1)
    basic = "Basic " + base64.b64encode(f"me@x:{SECRET}/".encode()).decode()
    with serving(GOOD, seen) as url:
        ran = programs.run("neck-triton", f"http://me%40x:{SECRET}%2F@{url}/", *options)
        assert ran.code == 0 and SECRET not in ran.out + ran.err and f"http://{url} " in ran.out
        assert {headers["Authorization"] for headers, _ in seen} == {basic} and len(seen) == 4
        seen.clear()
        ran = programs.run("neck-triton", url, *options, "--user", "me@x", NECK_TRITON_PASSWORD=f"{SECRET}/")
        assert ran.code == 0 and {headers["Authorization"] for headers, _ in seen} == {basic}
        seen.clear()
        more = ("--header", "X-Tenant: a: b", "--header", "X-Empty:")
        ran = programs.run("neck-triton", url, *options, *more, NECK_TRITON_TOKEN=SECRET)
        assert ran.code == 0 and {headers["Authorization"] for headers, _ in seen} == {f"Bearer {SECRET}"}
        assert all(headers["X-Tenant"] == "a: b" and headers["X-Empty"] == "" for headers, _ in seen)
        refused = {**GOOD, "config": (401, {}, b"")}
    with serving(refused) as url:
        unauthorized = programs.run("neck-triton", f"me:{SECRET}@{url}", *options)
    nowhere = [f"me:{SECRET}@127.0.0.1:1", f"http://{SECRET}@[", f"127.0.0.1:1/?token={SECRET}", f"ftp://a:{SECRET}@b"]
    nowhere += [f"me:{SECRET}/x@127.0.0.1:1", f"http://me:{SECRET}?x@127.0.0.1:1"]  # not what a URL allows
    for ran in [unauthorized, *(programs.run("neck-triton", address, *options) for address in nowhere)]:
        assert ran.code == 1 and ran.err
        assert SECRET not in ran.out + ran.err
    wrong = programs.run("neck-triton", url, *options, "--header", f"a b: {SECRET}")
    assert (wrong.code, SECRET in wrong.err) == (1, False)
    assert programs.run("neck-triton", url, *options, "--header", "nothing").code == 2


def test_a_private_authority_is_trusted_when_it_is_given(programs: Programs, tmp_path: Path) -> None:
    """By --ca or SSL_CERT_FILE; the control is without either, and with another authority."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl; apt install openssl")
    for name in ("mine", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(
            [*command, "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"],
            check=True,
            capture_output=True,
        )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "mine.pem", tmp_path / "mine.key")
    reference = tmp_path / "reference.safetensors"
    save_reference(reference, np.zeros((1, 16, 16, 3), np.uint8), {"feat": FEAT[None]})
    with serving(GOOD, tls=tls) as url:

        def ask_over_tls(*options: Any, **environment: str) -> Any:
            arguments = (f"https://{url}", "--compare", reference, "--model", "m", "--runs", 1, *options)
            return programs.run("neck-triton", *arguments, **environment)

        assert ask_over_tls("--ca", tmp_path / "mine.pem").code == 0
        assert ask_over_tls(SSL_CERT_FILE=str(tmp_path / "mine.pem")).code == 0
        for ran in (
            ask_over_tls(SSL_CERT_FILE=""),
            ask_over_tls("--ca", tmp_path / "other.pem", SSL_CERT_FILE=str(tmp_path / "mine.pem")),
            ask_over_tls("--ca", tmp_path / "none.pem"),
        ):
            assert ran.code == 1
            assert "--ca FILE" in ran.error


def test_an_answer_that_is_too_long_is_refused(programs: Programs, tmp_path: Path) -> None:
    """The answer of 4 MB is taken by default and with a limit above it."""
    long = np.zeros(1_000_000, np.float32)
    header = outputs(tensor("feat", 1, len(long), parameters={"binary_data_size": long.nbytes}))
    answers = {**infer(header, long.tobytes()), "m": answer(model_of(tensor("feat", -1, len(long))))}
    reference = tmp_path / "reference.safetensors"
    save_reference(reference, np.zeros((1, 16, 16, 3), np.uint8), {"feat": long[None]})
    with serving(answers) as url:
        arguments = (url, "--compare", reference, "--model", "m", "--runs", 1)
        assert programs.run("neck-triton", *arguments).code == 0
        assert programs.run("neck-triton", *arguments, "--largest-answer", 5).code == 0
        ran = programs.run("neck-triton", *arguments, "--largest-answer", 3)
    assert ran.code == 1
    assert "the server's answer is longer than the limit of 3000000 bytes" in ran.error
    assert "--largest-answer" in ran.error
    described = {**GOOD, "m": answer({**model_of(tensor("feat", -1, 4)), "platform": "x" * (1 << 24)})}
    assert "the server's answer is longer than 16777216 bytes" in ask(programs, tmp_path, described).error


def test_an_ensemble_gets_the_file_itself(programs: Programs, tmp_path: Path) -> None:
    """An input of type BYTES: each image after its length, as it is on the disk."""
    image = {**tensor("image", -1, 1, datatype="BYTES")}
    answers = {
        **GOOD,
        "m": answer({**model_of(tensor("feat", -1, 4)), "inputs": [image]}),
        "infer": two_rows()["infer"],
    }
    path = tmp_path / "a.jpg"
    path.write_bytes(b"any bytes\0\xff")
    seen: list[Request] = []
    with serving(answers, seen) as url:
        ran = programs.run("neck-triton", url, path, "--model", "m", "--batch", 2, "--runs", 1)
        assert (ran.code, ran.err) == (0, "")
        assert "no IMAGE" not in ran.err
        assert programs.run("neck-triton", url, tmp_path / "none.jpg", "--model", "m").code == 1
        assert (
            "the model m accepts only image files"
            in programs.run("neck-triton", url, "--compare", write_reference_of_one(tmp_path), "--model", "m").error
        )
    headers, body = next(request for request in seen if request[1])
    length = int(headers["Inference-Header-Content-Length"])
    (sent,) = json.loads(body[:length])["inputs"]
    assert (sent["name"], sent["datatype"], sent["shape"]) == ("image", "BYTES", [2, 1])
    element = struct.pack("<I", 11) + path.read_bytes()
    assert body[length:] == element * 2


def write_reference_of_one(folder: Path) -> Path:
    path = folder / "one.safetensors"
    save_reference(path, np.zeros((1, 16, 16, 3), np.uint8), {"feat": FEAT[None]})
    return path


@pytest.fixture(scope="module")
def ensemble_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with the ensemble that decodes images."""
    if triton_server.why_missing():
        pytest.skip(str(triton_server.why_missing()))
    folder = tmp_path_factory.mktemp("cpp-ensemble")
    with running(fake_repository(folder, fake_plan(folder), ensemble=True)) as server:
        yield server.http_url


def test_the_real_ensemble_answers_as_the_encoder(programs: Programs, ensemble_url: str, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(pixels()[0]).save(image)
    one = write_reference(tmp_path / "one.safetensors", 1)
    arguments = (ensemble_url, image, "--model", "sam3-encoder-images", "--compare", one, "--runs", 1)
    ran = programs.run("neck-triton", *arguments, "--precision", "fp32")
    assert (ran.code, ran.err) == (0, ""), ran.out
    Image.fromarray(pixels()[1]).save(image)
    assert programs.run("neck-triton", *arguments, "--precision", "fp32").code == 3
    image.write_bytes(b"no image")
    ran = programs.run("neck-triton", *arguments)
    assert ran.code == 1
    assert "image 1 of 1 is damaged or not a JPEG or PNG file" in ran.error


def test_a_server_that_says_nothing_is_given_up(programs: Programs, tmp_path: Path) -> None:
    for silent in ("config", "infer"):
        ran = ask(programs, tmp_path, {**GOOD, silent: (0, {}, b"")}, "--timeout", 300)
        assert ran.code == 1
        assert "300 ms for the whole request" in ran.error and "--timeout" in ran.error


def test_no_server(programs: Programs, tmp_path: Path) -> None:
    def ask_at(url: str) -> Any:
        return programs.run("neck-triton", url, "--compare", tmp_path / "reference.safetensors")

    assert "cannot be read (No such file or directory)" in ask_at("localhost:1").error
    save_reference(tmp_path / "reference.safetensors", np.zeros((1, 16, 16, 3), np.uint8), {"feat": FEAT[None]})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        ran = ask_at(f"127.0.0.1:{taken.getsockname()[1]}")
    assert ran.code == 1
    assert ran.error.endswith("check that the server is running and that the address is correct")
    for address in ("file:///etc/passwd", "gopher://x", "http://[", ""):
        ran = ask_at(address)
        assert ran.code == 1, address
        assert "; " in ran.error
    assert programs.run("neck-triton").code == 2
    assert programs.run("neck-triton", "localhost:1").code == 2
    assert programs.run("neck-triton", "x", "y", "--precision", "int4").code == 2
    assert programs.run("neck-triton", "--help").out.startswith("Usage: neck-triton URL")
