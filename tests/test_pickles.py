"""A pickle is data: what torch wrote comes back as torch reads it, and nothing that a file names is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hostile import CANARY, FOUR, bodies
from mapped import MAPS, are_mapped
from torch import Tensor, nn

from neck.checkpoint import load_encoder
from neck.weightfile import CheckpointError, read_state
from neck.weights import pickles, state_dicts, torchfile
from neck.weights.pickles import read_pickle
from neck.weights.records import Name, OpaqueObject, PickleError

# -- hostile files --

SCALE = 0.02
"""Small enough for seconds in all; `python tests/hostile.py FOLDER` is the full size, whose cost is a measurement."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every hostile file, each read in a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(folder), str(SCALE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder / CANARY).exists()  # what each of them wants to write
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


NAMES = (
    *(name for name, _ in bodies("x", 0)),
    *("packed pickle", "packed storage", "bare pickle"),
    *("old: code", "old: storage of negative size", "old: storage unheard of"),
)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_file_is_refused_and_nothing_runs(name: str, hostile: dict[str, dict[str, Any]]) -> None:
    found = hostile[name]
    assert found["events"] == []
    # the file has no encoder, so what is read as inert data is refused, too: for that, in one or two lines
    assert found["result"].startswith("refused: ")
    assert len(found["result"].splitlines()) <= 2


def test_there_are_enough_of_them(hostile: dict[str, dict[str, Any]]) -> None:
    assert sorted(hostile) == sorted(NAMES)
    assert len(NAMES) > 60


def test_what_runs_is_heard(tmp_path: Path) -> None:
    """The control: the same file read by pickle itself raises the events that are listened for, and runs."""
    code = (
        "import pickle, sys; events = []; sys.addaudithook(lambda event, args: events.append(event))\n"
        "pickle.loads(bytes.fromhex(sys.argv[1])); print(*events)"
    )
    body = dict(bodies(str(tmp_path / CANARY), 0))["os.system"]
    done = subprocess.run([sys.executable, "-c", code, body.hex()], capture_output=True, text=True, timeout=60)
    assert {"pickle.find_class", "os.system"} <= set(done.stdout.split())
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("module", "limit", "content", "says"),
    [
        (pickles, "MOST_OPERATIONS", {"a": list(range(100))}, "operations"),
        (state_dicts, "MOST_VISITED", {str(index): {} for index in range(20)}, "entries"),
        (
            state_dicts,
            "MOST_PARTS",
            nn.Sequential(*(nn.ReLU() for _ in range(20))),
            "more than 10 submodules and tensors",
        ),
        (state_dicts, "LONGEST", nn.ModuleDict({"a" * 20: nn.ReLU()}), "a name of more than 10 characters"),
    ],
)
def test_limits(
    module: ModuleType, limit: str, content: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"no tensors|no SAM 3"):  # the control
        load_encoder(path)
    monkeypatch.setattr(module, limit, 10)
    with pytest.raises(CheckpointError, match=f"refused, .*{says}"):
        load_encoder(path)


# -- plain containers --


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_of_every_protocol(protocol: int) -> None:
    value = {"a": [1, -2, 2**70, 1.5, None, True, False], "b": ("x", ("y",), ("u", "v"), (1, 2, 3, 4)), "é\n": {}}
    value |= {"long": "z" * 300, "list": list(range(1200)), "dict": {str(index): index for index in range(1200)}}
    shared = [0]
    value["shared"] = (shared, shared)
    found = read_pickle(io.BytesIO(pickle.dumps(value, protocol)))
    assert found == value
    assert isinstance(found, dict) and found["shared"][0] is found["shared"][1]


def test_bytes_and_sets_and_subclasses() -> None:
    ordered = collections.OrderedDict([("a", 1), ("b", 2)])
    default = collections.defaultdict(list, {"x": 1})
    value = [b"abc", bytearray(b"de"), {1}, frozenset({2}), ordered, default]
    found = read_pickle(io.BytesIO(pickle.dumps(value, 5)))
    assert found == [b"abc", bytearray(b"de"), [1], [2], {"a": 1, "b": 2}, {"x": 1}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects_become_fake(protocol: int) -> None:
    given = argparse.Namespace(rate=0.1, name="a")
    found = read_pickle(io.BytesIO(pickle.dumps({"x": given, "y": datetime.date(2026, 1, 2)}, protocol)))
    assert isinstance(found, dict)
    assert found["x"].kind == "argparse.Namespace" and found["x"].state == {"rate": 0.1, "name": "a"}
    assert isinstance(found["y"], OpaqueObject) and found["y"].kind == "datetime.date"


def test_keys_that_are_not_text_are_kept_apart() -> None:
    found = read_pickle(io.BytesIO(pickle.dumps({(1, (2, 3)): "a", 4: "b", 4.0e300: "c", "d": "e"})))
    assert isinstance(found, dict) and len(found) == 4 and found["d"] == "e"


def test_file_is_left_after_the_pickle() -> None:
    file = io.BytesIO(pickle.dumps([1], 4) + pickle.dumps("next", 2) + b"rest")
    assert read_pickle(file) == [1] and read_pickle(file) == "next"
    assert file.read() == b"rest"


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_cut_pickle(cut: int) -> None:
    with pytest.raises(PickleError, match="damaged"):
        read_pickle(io.BytesIO(pickle.dumps({"a": [1, 2]}, 4)[:cut]))


def test_names_are_fit_for_a_message() -> None:
    name = str(Name("a\x1b[31m\n", "b" * 500))
    assert len(name) <= 80 and name.startswith("a?[31m?.bbb") and name.isprintable()


# -- tensors --


def tensors() -> dict[str, Tensor]:
    """One of every kind that a state dict may hold."""
    base = torch.arange(24, dtype=torch.float32)
    grid = base.reshape(2, 3, 4)
    return {
        "plain": grid,
        "shared": grid,
        "part": base[5:9],
        "transposed": grid.transpose(0, 2),
        "every second": base[::2],
        "expanded": base[:1].expand(3, 4),
        "overlapping": base.as_strided((4, 4), (1, 1)),
        "no dimension": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "conjugated": torch.complex(grid, -grid).conj(),
        "negated": torch._neg_view(grid),
        "parameter": nn.Parameter(torch.ones(2)),
        **{str(dtype): grid.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)},
        **{str(dtype): grid.to(dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)},
        **{str(dtype): grid.to(dtype) for dtype in (torch.bool, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)},
    }


def assert_as_torch(path: Path) -> dict[str, Tensor]:
    """Checks that a file of tensors comes back as torch.load gives it."""
    expected, found = torch.load(path, weights_only=True), read_state(path).tensors
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].stride() == value.stride(), name
        assert not found[name].requires_grad and type(found[name]) is Tensor
        assert torch.equal(found[name].float(), value.detach().float()), name
        if value.is_complex():
            assert torch.equal(found[name], value), name
    return found


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_torchs(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    # torch 2.13 writes the types since 2.3 into an old file, too, and cannot read them there
    kept = {
        name: value for name, value in tensors().items() if not (old and name.startswith(("torch.uint16", "torch.f")))
    }
    torch.save(kept, path, _use_new_zipfile_serialization=not old)
    found = assert_as_torch(path)
    assert found["plain"].data_ptr() == found["shared"].data_ptr()
    assert found["part"].data_ptr() == found["plain"].data_ptr() + 5 * 4


def test_old_files_with_views(tmp_path: Path) -> None:
    """Before PyTorch 0.4 a storage could be a part of another one; the id has a sixth entry then."""
    view = b"(X\x01\x00\x00\x00vK\x02K\x04t"
    body = FOUR.replace(b"\x8a\x01\x04tQ", b"\x8a\x01\x08" + view + b"tQ")
    path = tmp_path / "x.pt"
    head = b"".join(pickle.dumps(value, 2) for value in (torchfile.MAGIC, 1001, {}))
    data = struct.pack("<q8f", 8, *range(8))
    path.write_bytes(head + b"\x80\x02}X\x01\x00\x00\x00a" + body + b"s." + pickle.dumps(["0"], 2) + data)
    assert read_state(path).tensors["a"].tolist() == torch.load(path)["a"].tolist() == [2.0, 3.0, 4.0, 5.0]


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    """A copy of a zip archive, written as archivers do: without alignment."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return target


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_repacked_files(compression: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(10, 10, generator=generator), "b": torch.randn(3, generator=generator).double()}
    torch.save(state, tmp_path / "x.pt")
    path = rewrite(tmp_path / "x.pt", tmp_path / "y.pt", lambda name, data: data, compression)
    found = read_state(path).tensors
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert all(value.data_ptr() % value.itemsize == 0 for value in found.values())


def test_other_byte_order(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int16)}, tmp_path / "x.pt")

    def swap(name: str, data: bytes) -> bytes:
        types = {"data/0": np.dtype("f4"), "data/1": np.dtype("i2")}
        if name in types:
            return np.frombuffer(data, types[name]).byteswap().tobytes()
        return b"big" if name == "byteorder" else data

    found = read_state(rewrite(tmp_path / "x.pt", tmp_path / "big.pt", swap)).tensors
    assert found["a"].tolist() == list(range(6)) and found["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.empty(2, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_named(make: Callable[[], Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"trunk.weight": make(), "b": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match=r"1 tensors of the checkpoint are quantized"):
        read_state(path)


@pytest.mark.skipif(not MAPS.exists(), reason="reads what the process has mapped from /proc")
def test_tensors_beside_objects_stay_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = {"a": torch.ones(100), "b": torch.ones(10, 10)}
    torch.save({"model": state, "args": argparse.Namespace(x=1), "when": datetime.datetime(2026, 1, 1)}, path)
    assert all(are_mapped(read_state(path).tensors.values(), path))
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert not any(are_mapped(read_state(path).tensors.values(), path))  # the control
