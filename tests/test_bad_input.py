"""Bad input at the front door: one or two clear lines, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from exporting import (
    DATA,
    PREFIX,
    Ran,
    checkpoint_of,
    config_of,
    golden_options,
    listing,
    neck_export_cli,
    quick_trace,
    save_state,
    trace_quickly,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import export.pipeline
from engines.bisect import bisect
from engines.builder.options import PlanOptions
from engines.plan import make_plan
from export.contract.errors import ExportError
from export.graph.deployed_module import DeployEncoder
from export.inspect import inspect_onnx
from export.pipeline import export_onnx, verify_file
from export.verification.verify import run_model

CONFIG = config_of("meta-dual")
GOOD = checkpoint_of("meta-dual")
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


def run_export(folder: Path, *arguments: str | Path, checkpoint: str | Path = GOOD) -> Ran:
    """Exports into `folder`/out; later arguments win."""
    given = ("--checkpoint", checkpoint, "--config", CONFIG, "--output", folder / "out" / "x.onnx")
    return neck_export_cli("onnx", *given, *arguments)


def refused(ran: Ran, *words: str, code: int = 1) -> None:
    """Checks that a command failed as one should."""
    assert ran.code == code, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


def nothing_written(folder: Path) -> None:
    assert not folder.exists() or listing(folder) == {}


# --- checkpoints


class Malice:
    """A pickle that makes a file where it is loaded with pickle's own loader."""

    marker = Path("/tmp/neck-export-test-malice")

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def bad_text(path: Path) -> Path:
    path.write_text("checkpoint")
    return path


def bad_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return path


def bad_empty(path: Path) -> Path:
    path.touch()
    return path


def bad_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"model": Malice()}))
    return path


def bad_zip_pickle(path: Path) -> Path:
    torch.save({"model": Malice()}, path)
    return path


def truncated(suffix: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path = path.with_suffix(suffix)
        if suffix == ".pt":
            save_state(path)
        else:
            save_file(torch.load(GOOD, weights_only=True)["model"], path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        return path

    return make


def other_model(path: Path) -> Path:
    torch.save({"layer1.0.conv1.weight": torch.zeros(8, 3, 3, 3), "fc.bias": torch.zeros(10)}, path)
    return path


def changed(change: Callable[[State], Any]) -> Callable[[Path], Path]:
    return lambda path: save_state(path, change)


QKV = f"{PREFIX}trunk.blocks.3.attn.qkv.weight"
CONV = f"{PREFIX}convs.1.conv_3x3.bias"


def set_value(key: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key].view(-1)[5] = value

    return change


def misshape(state: State) -> None:
    state[QKV] = state[QKV][:, :-1].clone()


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda path: path, ("this file does not exist",)),
    "folder": (lambda path: path.parent, ("contains no",)),
    "empty": (bad_empty, ("is empty",)),
    "text": (bad_text, ("checkpoint",)),
    "zip": (bad_zip, ("zip archive",)),
    "truncated-pt": (truncated(".pt"), ("truncated or damaged",)),
    "truncated-safetensors": (truncated(".safetensors"), ("truncated or damaged",)),
    "pickle": (bad_pickle, ("refused", "torch.save")),
    "zip-pickle": (bad_zip_pickle, ("no tensors", "'model'")),
    "other-model": (other_model, ("no SAM 3 image encoder", "layer1.0.conv1.weight")),
    "missing-key": (changed(lambda state: state.pop(QKV)), ("missing", QKV)),
    "misshapen": (changed(misshape), ("shape", QKV, "(96, 31)", "(96, 32)")),
    "nan": (changed(set_value(QKV, np.nan)), ("NaN or infinity", QKV)),
    "inf": (changed(set_value(CONV, np.inf)), ("NaN or infinity", CONV)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoint(kind: str, tmp_path: Path) -> None:
    make, words = CHECKPOINTS[kind]
    Malice.marker.unlink(missing_ok=True)
    path = make(tmp_path / "bad.pt")
    ran = run_export(tmp_path, checkpoint=path)
    refused(ran, str(path), *words)
    assert not Malice.marker.exists()
    nothing_written(tmp_path / "out")


def test_the_malice_would_run(tmp_path: Path) -> None:
    """The control."""
    pickle.loads(bad_pickle(tmp_path / "bad.pt").read_bytes())
    assert Malice.marker.exists()
    Malice.marker.unlink()


def test_half_precision_checkpoints_are_fine(tmp_path: Path) -> None:
    def halve(state: State) -> None:
        for index, (name, tensor) in enumerate(state.items()):
            if tensor.is_floating_point():
                state[name] = tensor.to((torch.float16, torch.bfloat16)[index % 2])

    ran = run_export(tmp_path, checkpoint=save_state(tmp_path / "half.pt", halve))
    assert ran.code == 0, ran
    assert ran.err == ""


# --- options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image-size", "1000"), ("not a multiple of the patch size 14; use the nearest multiple: 994 and 1008",)),
        (("--image-size", "112x100"), ("nearest multiple: 98 and 112",)),
        (("--image-size", "5"), ("nearest multiple: 14",)),
        (("--image-size", "0"), ("image size 0", "14 pixels")),
        (("--image-size", "-14"), ("image size -14", "14 pixels")),
        (("--image-size", "14"), ("level 3 of the feature pyramid would be empty at an image size of 14x14 pixels",)),
        (("--image-size", "140000"), ("limit of 8064 pixels per side", "GB")),
        (("--image-size", "8064", "--batch", "64"), ("verification at 8064x8064 pixels needs", "GB", "--no-verify")),
        (("--neck", "sam4"), ("there is no neck 'sam4'", "choose one or more of sam3, sam2, interactive, propagation")),
        (("--neck", ""), ("there is no neck ''",)),
        (("--neck", "interactive"), ("neck interactive was requested, but the checkpoint contains only sam3, sam2",)),
        (("--levels", "4"), ("level 4 does not exist, because the encoder has levels 0 to 3",)),
        (("--levels", "x"), ("levels 'x'",)),
        (("--levels", ""), ("levels ''",)),
        (("--opset", "16"), ("opset 16 is not supported; use an opset from 17 to 24, or auto",)),
        (("--opset", "99"), ("opset 99 is not supported; use an opset from 17 to 24, or auto",)),
        (("--batch", "0"), ("write it as minimum:optimum:maximum",)),
        (("--batch", "4:1"), ("write it as one number, or as minimum:optimum:maximum",)),
        (("--tolerance", "sam4=1"), ("matches no output",)),
        (("--tolerance", "sam3_feat_0=-1"), ("above 0",)),
        (("--keep-fp32", "trunk.bocks.1", "--precision", "fp16"), ("matches no module of the graph",)),
        (("--attention", "fp32acc"), ("--attention fp32acc", "--attention auto")),
        (("--attention", "fp32acc", "--precision", "fp16", "--opset", "16"), ("opset 16 is not supported",)),
        (("--attention", "fp32acc", "--precision", "bf16", "--opset", "20"), ("--opset 22", "--precision fp16")),
        (
            ("--attention", "fp32acc", "--precision", "bf16", "--target", "tensorrt-10.3"),
            ("TensorRT 10.3 is only known to support opsets up to 20",),
        ),
        (("--config", "/no/such.json"), ("/no/such.json", "JSON")),
        (("--config", str(DATA / "meta-dual" / "case.json")), ("case.json: the configuration contains keys",)),
        (("--images", "/no/such/folder"), ("/no/such/folder cannot be read",)),
        (("--images", str(DATA / "meta-dual")), ("no image",)),
    ],
)
def test_bad_option(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    refused(run_export(tmp_path, *arguments), *words)
    nothing_written(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--precision", "fp4"),
        ("--precision", ""),
        ("--attention", "fast"),
        ("--positions", "graphs"),
        ("--input", "int8"),
        ("--image-size", "big"),
        ("--image-size", "1x2x3"),
        ("--image-size", "112x"),
        ("--opset", "new"),
        ("--tolerance", "sam3_feat_0"),
        ("--tolerance", "sam3_feat_0=small"),
        ("--seed", "-1"),
        ("--seed", "99999999999"),
        ("--no-such-option",),
    ],
)
def test_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ran = run_export(tmp_path, *arguments)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("Usage: ")
    assert "Traceback" not in ran.err
    if len(arguments) > 1:
        assert arguments[0].strip("-").replace("-", "_") in ran.err.replace("-", "_")
    nothing_written(tmp_path / "out")


def test_sam2_asked_of_a_checkpoint_without(tmp_path: Path) -> None:
    ran = run_export(tmp_path, "--neck", "both", checkpoint=checkpoint_of("meta-padded"))
    refused(ran, "neck sam2 was requested, but the checkpoint contains only sam3")
    nothing_written(tmp_path / "out")


# --- images


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(COLORS).save(path.with_suffix(".jpg"), exif=exif)


COLORS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
IMAGES: dict[str, Callable[[Path], object]] = {
    "16-bit": lambda path: shutil.copy(DATA / "images" / "rgb16.png", path),
    "exif": exif_rotated,
}
"""Others are test_images.py's."""


@pytest.mark.parametrize("kind", IMAGES)
def test_odd_images_work(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    IMAGES[kind](tmp_path / "images" / "odd.png")
    ran = run_export(tmp_path, "--images", tmp_path / "images")
    assert ran.code == 0, ran
    assert ran.err == ""


@pytest.mark.parametrize("content", [b"", b"not an image", (DATA / "images" / "chelsea.png").read_bytes()[:5000]])
def test_corrupt_images_are_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(content)
    refused(run_export(tmp_path, "--images", tmp_path / "images"), "bad.png")
    nothing_written(tmp_path / "out")


# --- the output's place


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    assert run_export(tmp_path, "--output", tmp_path / "a" / "b" / "x.onnx").code == 0
    assert sorted(listing(tmp_path / "a" / "b")) == ["x.json", "x.onnx", "x.onnx.data"]


def test_a_folder_that_was_made_for_nothing_goes(mount: Callable[[str], Path], tmp_path: Path) -> None:
    place = mount("size=64k")
    assert run_export(tmp_path, "--output", place / "a" / "b" / "x.onnx").code == 1
    assert listing(place) == {}


def test_a_path_that_is_not_utf_8_is_blamed(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ExportError, match="UTF-8"):
        export_onnx(golden_options("meta-dual", folder / "x.onnx"))
    assert not folder.exists()
    assert run_export(tmp_path, "--output", tmp_path / "x.onnx", "--no-verify").code == 0
    folder.mkdir()
    for file in ("x.onnx", "x.json", "x.onnx.data"):
        (tmp_path / file).rename(folder / file)
    works: list[Callable[[], object]] = [
        lambda: verify_file(folder / "x.onnx"),
        lambda: bisect(folder / "x.onnx"),
        lambda: make_plan(PlanOptions(folder / "x.onnx", tmp_path / "x.plan")),
        lambda: make_plan(PlanOptions(tmp_path / "x.onnx", folder / "x.plan")),
    ]
    for work in works:
        with pytest.raises(ExportError, match="UTF-8"):
            work()
    assert inspect_onnx(folder / "x.onnx")["manifest"]  # the control: nothing but the path is wrong


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "x.onnx", tmp_path / "file" / "deeper" / "x.onnx"):
        refused(
            run_export(tmp_path, "--output", output),
            str(tmp_path / "file"),
            "but a folder is needed there; choose another --output",
        )
    refused(run_export(tmp_path, "--output", "/proc/no/x.onnx"), "/proc/no", "choose another --output")
    refused(run_export(tmp_path, "--output", tmp_path / ("x" * 300)), "File name too long")
    refused(run_export(tmp_path, "--output", tmp_path), "is a folder")
    assert listing(tmp_path) == {"file": b"mine"}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory with given options."""
    places: list[Path] = []

    def small(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        places.append(place)
        return place

    yield small
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_cannot_be_written(mount: Callable[[str], Path], tmp_path: Path) -> None:
    place = mount("ro,size=4m")
    refused(run_export(tmp_path, "--output", place / "x.onnx"), str(place), "Read-only file system; choose another")


def test_too_small_a_disk_is_seen_before_the_work(
    mount: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mount("size=64k")
    monkeypatch.setattr(export.pipeline, "trace", lambda module: pytest.fail("traced"))
    ran = run_export(tmp_path, "--output", place / "x.onnx")
    refused(
        ran,
        f"{place}: the disk has 65.5 kB of free space, but the export needs 363 kB; free some space",
        "--output",
    )
    nothing_written(place)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an FP16 file, to be left as it is."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        ran = run_export(folder, "--output", folder / "x.onnx", "--no-verify", "--precision", "fp16")
    assert ran.code == 0, ran
    return folder


@pytest.mark.parametrize("room", [4096, 100_000, 400_000])
@pytest.mark.parametrize("positions", ["graph", "file"])
def test_a_disk_that_fills_while_it_is_written(
    mount: Callable[[str], Path],
    positions: str,
    room: int,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program takes all but `room` bytes after the check: the weights do not fit, or what comes after them."""
    place = mount("size=2m")
    shutil.copytree(sound, place, dirs_exist_ok=True)
    before = listing(place)

    def fill(module: DeployEncoder) -> ir.Model:
        free = shutil.disk_usage(place).free
        with open(place / "filler", "wb") as file:
            file.write(bytes(max(0, free - room)))
        return quick_trace(module)

    monkeypatch.setattr(export.pipeline, "trace", fill)
    ran = run_export(tmp_path, "--output", place / "x.onnx", "--positions", positions)
    if ran.code == 0:
        pytest.skip(f"{room} bytes hold the file")
    refused(ran, f"{place}: the disk is full; free some space or choose another --output")
    (place / "filler").unlink()
    assert listing(place) == before


def test_verification_on_a_disk_that_cannot_be_written(mount: Callable[[str], Path], sound: Path) -> None:
    """Full, then read-only: the figures are printed, then one line says that the manifest was not updated."""
    place = mount("size=2m")
    shutil.copytree(sound, place, dirs_exist_ok=True)
    before = listing(place)
    with open(place / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(place).free))
    for reason in ("No space left on device", "Read-only file system"):
        ran = neck_export_cli("verify", place / "x.onnx")
        assert ran.code == 0 and "sam3_feat_0" in ran.out, ran
        assert ran.err == f"note: {place / 'x.json'}: the manifest was not updated ({reason})\n"
        failed = neck_export_cli("verify", place / "x.onnx", "--tolerance", "sam3_feat_0=1e-9")
        assert failed.code == 3 and "FAILED" in failed.err and failed.err.endswith(ran.err), failed
        found = neck_export_cli("bisect", place / "x.onnx")
        assert found.code == 0 and "trunk.blocks.0" in found.out, found
        assert listing(place) == before | {name: data for name, data in listing(place).items() if name == "filler"}
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    refused(
        neck_export_cli("verify", place / "x.onnx", "--save-reference", place / "r.safetensors"),
        str(place / "r.safetensors"),
    )
    refused(neck_export_cli("trt", place / "x.onnx"), str(place), "Read-only file system", "choose another --output")


# --- interrupted


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (MemoryError, 1)])
def test_interrupted_while_writing(
    error: type[BaseException], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ir.save has written some of the weights."""
    assert run_export(tmp_path, "--no-verify").code == 0
    before = listing(tmp_path / "out")
    save = ir.save
    written: list[str] = []

    def stop(tensor: ir.TensorProtocol, _: object) -> None:
        written.append(str(tensor.name))
        if len(written) == 10:
            raise error

    monkeypatch.setattr(ir, "save", lambda model, path, **more: save(model, path, **more | {"callback": stop}))
    refused(run_export(tmp_path, "--precision", "fp16"), code=code)
    assert len(written) == 10
    assert listing(tmp_path / "out") == before


def test_out_of_memory_of_torch_and_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for message in ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", "std::bad_alloc"):

        def fail(module: DeployEncoder, message: str = message) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(export.pipeline, "trace", fail)
        refused(run_export(tmp_path), "too little free host memory (RAM) for this command; close other programs, or")
        nothing_written(tmp_path / "out")


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: DeployEncoder) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(export.pipeline, "trace", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_export(tmp_path)
    nothing_written(tmp_path / "out")


LOOPS = 2 * 10**8
"""Ten minutes on a quiet core: an interrupt that did not reach the run would be seen, not waited for without end."""


def test_onnx_runtime_is_interrupted_in_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is one long call; here of a loop. The signal is sent once the run is begun, from its thread."""
    ends: list[str] = []
    run = ort.InferenceSession.run

    def signalled(session: ort.InferenceSession, *arguments: Any) -> Any:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            return run(session, *arguments)
        except Exception as error:
            ends.append(str(error))
            raise

    monkeypatch.setattr(ort.InferenceSession, "run", signalled)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a script has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_model(looping(LOOPS), Path(), np.zeros(1, np.float32))
    finally:
        signal.signal(signal.SIGINT, before)
    (said,) = ends
    assert "terminate" in said


def test_a_loop_that_is_not_interrupted_ends() -> None:
    """The control."""
    (value,) = run_model(looping(3), Path(), np.zeros(1, np.float32))
    assert value == [3.0]


def looping(count: int) -> ir.Model:
    """A model that adds 1 to its input so many times, one node at a time."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    loop (float[1] image) => (float[1] y) {{
        most = Constant <value = int64 {{{count}}}> ()
        y = Loop <body = step (int64 i, bool more, float[1] before) => (bool again, float[1] after) {{
            one = Constant <value = float {{1.0}}> ()
            after = Add (before, one)
            again = Identity (more)
        }}> (most, , image)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))
