"""The Triton client without a server: pictures, what it tells of a server that is none, and that it stands alone."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install 'neck-export[triton]'")

from tritonclient.utils import InferenceServerException

import engines.service.triton_client
from engines.service.triton_client.__main__ import main
from engines.service.triton_client.client import TritonClient
from engines.service.triton_client.errors import ClientError
from engines.service.triton_client.model import Model, Tensor, describe
from engines.service.triton_client.pictures import normalise, read_pixels
from engines.service.triton_client.shared import SharedMemory
from neck import pictures

CHELSEA = Path(__file__).parent / "data" / "pictures" / "chelsea.png"


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


def picture(mode: str) -> Image.Image:
    """A small picture of a mode, with something in every channel."""
    image = Image.open(CHELSEA).convert("RGB").resize((56, 42))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpg")],
)
def test_pixels_are_neck_pictures_own(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    picture(mode).save(path)
    assert np.array_equal(read_pixels(path, (42, 56)), pictures.read_picture(path))


def test_a_palette_with_transparency_and_a_turned_photo(tmp_path: Path) -> None:
    picture("P").save(tmp_path / "palette.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert np.array_equal(
        read_pixels(tmp_path / "palette.png", (42, 56)), pictures.read_picture(tmp_path / "palette.png")
    )
    turned = read_pixels(tmp_path / "turned.jpg", (56, 42))
    assert np.array_equal(turned, pictures.read_picture(tmp_path / "turned.jpg"))
    assert not np.array_equal(turned, read_pixels(tmp_path / "turned.jpg", (42, 56)).transpose(1, 0, 2))  # the control


@pytest.mark.parametrize("size", [(112, 112), (70, 154), (600, 800), (1008, 1008)])
def test_the_resize_is_one_level_off_at_most_here_and_there(size: tuple[int, int]) -> None:
    ours, theirs = read_pixels(CHELSEA, size), pictures.load_pictures([CHELSEA], size)[0]
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 5e-3
    assert np.abs(ours[:, ::-1].astype(int) - theirs).max() > 1  # the control


def test_normalised_values_have_the_bits_of_neck_pictures() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    theirs = pictures.normalise(every).numpy()
    assert normalise(every).dtype == np.float32 and np.array_equal(normalise(every), theirs)
    assert not np.array_equal(every.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1, theirs)


def test_what_is_no_picture_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(CHELSEA.read_bytes()[:2000])
    cases = {"deep.png": "more than 8 bits", "text.png": "cannot identify", "cut.png": "cannot be read as a picture"}
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
def test_a_server_that_does_not_answer(protocol: Any) -> None:  # noqa: ANN401
    with silent() as url, pytest.raises(ClientError, match=r"no answer.*longer --timeout"):
        TritonClient(url, protocol=protocol, timeout_s=0.3)


class Page(http.server.BaseHTTPRequestHandler):
    """Answers everything with a web page."""

    status = 200

    def do_GET(self) -> None:
        body = b"<html>hello</html>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_server_that_is_no_triton(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(Page, "status", status)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(ClientError, match=f"127.0.0.1:{other.server_port}: "):
                TritonClient(f"127.0.0.1:{other.server_port}", timeout_s=600)
        finally:
            other.shutdown()
            thread.join()


@pytest.mark.parametrize("url", ["http://localhost:8000", ""])
def test_a_url_has_no_scheme(url: str) -> None:
    with pytest.raises(ClientError, match="expected host:port without a scheme, such as localhost:8000"):
        TritonClient(url)


def test_a_port_is_added() -> None:
    for protocol, port in (("http", 8000), ("grpc", 8001)):
        with pytest.raises(ClientError, match=f"nowhere.invalid:{port}: no answer"):
            TritonClient("nowhere.invalid", protocol=protocol, timeout_s=5)  # type: ignore[arg-type]


IMAGE = {"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
FEATURE = {"name": "sam3_feat_0", "datatype": "FP16", "shape": [-1, 4, 2, 2]}


def stand_in(ready: bool = True, index: Any = (), most: int = 8, **metadata: Any) -> Any:  # noqa: ANN401
    """What `describe` asks of tritonclient."""
    told = {"inputs": [IMAGE], "outputs": [FEATURE], **metadata}
    return SimpleNamespace(
        is_model_ready=lambda name, version, **limit: ready,
        get_model_metadata=lambda name, version, **asked: told,
        get_model_config=lambda name, version, **asked: (
            {"config": {"max_batch_size": most}} if asked else {"max_batch_size": most}
        ),
        get_model_repository_index=lambda **asked: {"models": list(index)} if asked else list(index),
    )


@pytest.mark.parametrize("timeout_s", [None, 7.0])
def test_a_model_is_described(timeout_s: float | None) -> None:
    image, feature = Tensor("image", "FP32", (-1, 3, 8, 8)), Tensor("sam3_feat_0", "FP16", (-1, 4, 2, 2))
    found = describe(stand_in(), "m", "", ["sam3_*"], timeout_s)
    assert found == Model(image, (feature,), max_batch=8, fixed=False)
    assert feature.bytes_of(3) == 3 * 16 * 2
    fixed = describe(stand_in(most=0, inputs=[IMAGE | {"shape": ["4", "3", "8", "8"]}]), "m", "", [], timeout_s)
    assert fixed.max_batch == 4 and fixed.fixed
    assert describe(stand_in(most=0), "m", "", [], timeout_s).max_batch == 1  # a batch that Triton knows nothing of


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (
            stand_in(outputs=[FEATURE | {"datatype": "BF16"}]),
            "sam3_feat_0 is BF16, which numpy lacks; .*--output-dtype fp32",
        ),
        (stand_in(inputs=[IMAGE, IMAGE]), "m has 2 inputs"),
        (stand_in(inputs=[]), "m has 0 inputs"),
        (stand_in(outputs=[FEATURE | {"name": "other"}]), r"m has no output sam3_\*; it has other"),
        (stand_in(False), "the server has no model m; ready are none"),
        (stand_in(False, [{"name": "x", "version": "1", "state": "READY"}]), "no model m; ready are x"),
        (
            stand_in(False, [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "no such plan"}]),
            "m is not ready; the server has version 1 UNAVAILABLE no such plan",
        ),
        (stand_in(False, [{"name": "m"}]), "m is not ready; the server has version ?"),
    ],
)
@pytest.mark.parametrize("timeout_s", [None, 7.0])
def test_a_model_that_cannot_be_used_is_told(client: Any, words: str, timeout_s: float | None) -> None:  # noqa: ANN401
    with pytest.raises(ClientError, match=words):
        describe(client, "m", "", ["sam3_*"], timeout_s)


class Regions:
    """What `SharedMemory` asks of a tritonclient, whose server refuses some times to forget a region."""

    def __init__(self, refusals: list[str]) -> None:
        self.refusals, self.known, self.calls = refusals, set[str](), 0

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
    memory = SharedMemory(client, "system")
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
        memory = SharedMemory(client := Regions(refusals), "system")
        names = [memory.reserve(tensor, 8)[0] for tensor in "ab"]
        with pytest.raises(InferenceServerException):
            memory.close()
        assert client.calls == calls and not any(Path("/dev/shm", name).exists() for name in names)
