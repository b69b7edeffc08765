"""Progress of long steps: bars on a terminal, plain lines elsewhere, silence where nobody listens."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import load_golden
from exporting import STEP_LINE
from listening import listening
from test_quantize_choice import figures, of_layers

import export.contract.manifest
from export.contract.manifest import sha256
from export.quantization.calibration import calibrate
from export.quantization.choice import Record, measure_products
from neck.progress import LOG, Count, count, counted, step
from neck.progress_display import PlainLines, shown

ENDS_S = 60
"""A guard: a line that has to come comes within milliseconds."""


def calibration(images: int) -> None:
    """A calibration on noise."""
    encoder = load_golden("meta-dual").encoder
    encoder.set_imgsz((112, 112))
    calibrate(encoder, np.random.default_rng(0).integers(0, 256, (images, 112, 112, 3), np.uint8))


def hash_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hashes 9 MB, which here is a lot."""
    monkeypatch.setattr(export.contract.manifest, "TOLD_BYTES", 1 << 20)
    (tmp_path / "x.onnx.data").write_bytes(bytes(9 << 20))
    sha256(tmp_path / "x.onnx.data")
    return 9 << 20


def test_calibration_products_and_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Count] = []
    with listening(found.append):
        calibration(3)
        measure_products(of_layers(), lambda name: figures(0.01), Record(None, {}))
        size = hash_of_a_large_file(tmp_path, monkeypatch)
        sha256(tmp_path / "x.onnx.data")
        monkeypatch.setattr(export.contract.manifest, "TOLD_BYTES", 1 << 30)
        heard = len(found)
        sha256(tmp_path / "x.onnx.data")
    assert len(found) == heard  # the control: a small file is read in no time
    images, products, hashed = ([one for one in found if one.unit == unit] for unit in ("images", "layers", "bytes"))
    assert [(one.done, one.total) for one in images] == [(done, 3) for done in range(4)]
    assert [(one.done, one.total) for one in products] == [(done, 16) for done in range(17)]
    assert {one.total for one in hashed} == {size} and hashed[-1].done == size and len(hashed) >= 4


def lines_of(work: Callable[[], object], every_s: float) -> list[str]:
    """What plain lines show of some work, without their timestamps."""
    stream = io.StringIO()
    handler = PlainLines(stream, every_s)
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        work()
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(logging.NOTSET)
        handler.close()
    lines = stream.getvalue().splitlines()
    assert all(re.match(STEP_LINE, line) for line in lines)
    return [re.sub(STEP_LINE, "", line) for line in lines]


def test_without_a_terminal_a_calibration_writes_lines() -> None:
    """Where an image takes longer than the time between two lines, each is told; else the first and the last."""

    def work() -> None:
        step("trace")
        calibration(3)

    told = [f"calibrating the linear layers: {done} of 3 images" for done in range(4)]
    slow = [line for line in lines_of(work, 0.0) if "running" not in line]
    assert slow == ["trace", *told]
    assert lines_of(work, 1e9) == ["trace", told[0], told[3]]


def test_a_step_that_tells_nothing_is_told_again() -> None:
    """What is inside one long call, such as a run of ONNX Runtime, has lines too, with the last count."""
    stream = io.StringIO()

    def until(text: str) -> None:
        end = time.monotonic() + ENDS_S
        while text not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)

    handler = PlainLines(stream, 0.01)
    handler.handle(logging.makeLogRecord({"msg": "verify"}))
    until("verify (running for")
    handler.handle(logging.makeLogRecord({"msg": "x", "count": Count("calibration", 5, 16, "images")}))
    until("5 of 16 images (running for")
    handler.close()
    assert "verify (running for 0 s)" in stream.getvalue()
    assert "calibration: 5 of 16 images (running for 0 s)" in stream.getvalue()
    heard = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == heard  # it ends with its handler


def on_a_terminal(work: Callable[[], object]) -> str:
    """What a terminal gets."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, shown(terminal):
        work()
    text = ""
    with os.fdopen(master, "rb", buffering=0) as target, contextlib.suppress(OSError):  # its end is EIO
        while piece := target.read(1 << 16):
            text += piece.decode()
    return text


def test_on_a_terminal_there_are_bars() -> None:
    def work() -> None:
        step("step one")
        for _ in counted("abc", "calibration", 3, "images"):
            pass
        count("hash of x.onnx.data", 1 << 30, 1 << 31, "bytes")

    text = on_a_terminal(work)
    assert "step one" in text and "calibration: 3 of 3 images" in text and "━" in text
    assert "hash of x.onnx.data: 1,074 of 2,147 MB" in text
    assert not re.search(STEP_LINE, text)


def test_nobody_listens(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In another program, which imports a stage."""
    work: Any = lambda: [step("trace"), *counted("abc", "calibration", 3, "images")]  # noqa: E731
    work()
    assert capfd.readouterr() == ("", "")
    with shown(sys.stderr):  # the control
        work()
    assert len(capfd.readouterr().err.splitlines()) == 3
    work()
    assert capfd.readouterr() == ("", "")
