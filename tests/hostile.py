"""Pickles that want to run code, or to cost time and memory; and the process that reads each under a guard.

`python tests/hostile.py FOLDER [SCALE]` writes them there, reads each as `--checkpoint` would, and prints a JSON line
for each: what came of it, seconds, peak memory, and every audit event that reading may not raise. SCALE 1 is the size
at which seconds and memory are worth a look; the tests take a smaller one.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401 - zipfile's, for names of entries; imported now, since nothing may be imported later
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CPU_SECONDS = 120
SPARE_BYTES = 4 << 30
"""Guards against a hang and a full machine; what is measured is printed."""

FORBIDDEN = ("pickle.find_class", "import", "exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "shutil.")
"""Audit events, by their beginnings, that reading a file never raises."""

P, END = b"\x80\x04", b"."
CANARY = "canary"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.made_by = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.made_by


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def storage(count: int, key: str = "0", kind: bytes = named("torch", "FloatStorage")) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + whole(count) + b"tQ"


def tensor(size: bytes, stride: bytes, count: int = 4, offset: int = 0, key: str = "0") -> bytes:
    made_of = (
        storage(count, key) + whole(offset) + size + stride + b"\x89" + named("collections", "OrderedDict") + b")R"
    )
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + made_of + b"tR"


FOUR = tensor(whole(4) + b"\x85", whole(1) + b"\x85")


def entry(key: str, value: bytes) -> bytes:
    return text(key) + value + b"s"


def module(parameters: bytes = b"}", modules: bytes = b"}", kind: bytes = named("torch.nn", "Module")) -> bytes:
    """An object with the three dicts of a torch.nn.Module."""
    parts = entry("_parameters", parameters) + entry("_buffers", b"}") + entry("_modules", modules)
    return kind + b")\x81}" + parts + b"b"


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def bodies(canary: str, scale: float) -> Iterator[tuple[str, bytes]]:
    """Name and data.pkl of each hostile file; `canary` is the file that running any of them would write."""
    for found in (_that_run(canary), _that_confuse(), _that_grow(lambda count: int(count * scale)), _that_claim()):
        yield from ((name, (b"" if body.startswith(b"\x80") else P) + body + END) for name, body in found)


def _that_run(canary: str) -> Iterator[tuple[str, bytes]]:
    touch, code = text(f"touch {canary}"), text(f"open({canary!r}, 'w')")
    system = named("os", "system")
    yield "os.system", call(system, touch)
    yield "os.system in a state dict", b"}" + entry("model", b"}" + entry("x", call(system, touch)))
    yield "posix.system", call(named("posix", "system"), touch)
    yield "eval", call(named("builtins", "eval"), code)
    yield "exec of Python 2", call(named("__builtin__", "exec"), code)
    yield "subprocess", call(named("subprocess", "getoutput"), touch)
    module_os = call(named("importlib", "import_module"), text("os"))
    yield "getattr chain", call(call(named("builtins", "getattr"), module_os, text("system")), touch)
    yield "dotted name", text("os") + text("path.os.system") + b"\x93(" + touch + b"tR"
    yield "__reduce__", pickle.dumps(Calls(os.system, f"touch {canary}"))[:-1]
    yield "torch function", call(named("torch.hub", "load"), text("/nowhere"), text("x"))
    yield "torch.load inside", call(named("torch.storage", "_load_from_bytes"), b"B" + struct.pack("<I", 3) + b"abc")
    yield "torch attribute", call(named("torch", "ops.load_library"), text("/nowhere.so"))
    yield "numpy reader", call(named("numpy", "load"), text("/etc/passwd"))
    yield "INST", b"(" + touch + b"ios\nsystem\n"
    yield "OBJ", b"(" + system + touch + b"o"
    yield "NEWOBJ", system + touch + b"\x85\x81"
    yield "NEWOBJ_EX", system + touch + b"\x85}\x92"
    yield "BUILD of a class", named("builtins", "str") + b"}" + entry("__init__", system) + b"b"
    yield (
        "BUILD with __setstate__",
        system + b")\x81}" + entry("__setstate__", system) + b"b}" + entry("a", touch) + b"b",
    )
    yield "BUILD of a tensor", FOUR + system + b"b"
    yield "fake as a callable", call(call(call(system, touch), touch), touch)
    yield "append to a fake", call(system, touch) + b"(" + touch + b"e" + touch + b"a" + touch + touch + b"s"
    yield "persistent id of text", b"Pos.system\n"
    yield "persistent id of a call", call(system, touch) + b"Q"
    yield "storage of another class", storage(4, kind=system)
    yield "class of a persistent id", b"(" + text("module") + system + text("a.py") + code + b"tQ(" + touch + b"tR"


def _that_confuse() -> Iterator[tuple[str, bytes]]:
    yield "string as a callable", call(text("os.system"), text("x"))
    yield "tensor as a callable", call(FOUR, text("x"))
    yield "append to a tuple", b")" + text("x") + b"a"
    yield "extension", b"\x80\x02\x82\x01"
    yield "outside buffer", b"\x80\x05\x97\x98"
    yield "name of numbers", whole(1) + whole(2) + b"\x93"
    yield "storage of a file", b"}" + entry("a", tensor(whole(4) + b"\x85", whole(1) + b"\x85", key="../data.pkl"))
    yield "itself inside", b"}\x94" + entry("model", b"h\x00") + entry("list", b"]\x94h\x01a")
    parts = entry("_parameters", b"}") + entry("_buffers", b"}") + entry("_modules", b"}" + entry("a", b"h\x00"))
    yield "module inside itself", named("m", "M") + b")\x81\x94}" + parts + b"b"
    yield "tensor outside its storage", b"}" + entry("a", tensor(whole(4) + b"\x85", whole(1) + b"\x85", offset=1))
    yield "negative offset", b"}" + entry("a", tensor(whole(4) + b"\x85", whole(1) + b"\x85", offset=-1))
    yield "negative stride", b"}" + entry("a", tensor(whole(4) + b"\x85", whole(-1) + b"\x85"))
    sides = b"(" + whole(1) * 100 + b"t"
    yield "tensor of 100 dimensions", b"}" + entry("a", tensor(sides, sides))


def _that_grow(many: Callable[[int], int]) -> Iterator[tuple[str, bytes]]:
    yield "subclass of itself", _nested_subclasses(many(50_000))
    yield "deep lists", b"]" * many(500_000) + b"a" * (many(500_000) - 1)
    yield "deep tuples", b")" + b"\x85" * many(900_000)
    yield "deep dicts", (b"}" + text("a")) * many(300_000) + b"N" + b"s" * many(300_000)
    yield "deep fakes", named("a", "b") + b")R" + b")R" * many(500_000)
    yield "deep modules", _deep_modules(many(20_000))
    yield "marks without end", b"(" * many(1_900_000)
    yield "too many operations", b"}" * many(2_000_000)
    yield "many memos", b"}" + b"\x94" * many(1_900_000)
    yield "key that hashes forever", b"})" + b"2\x86" * 60 + b"Ns"
    collide = b"".join(whole(k * (2**61 - 1)) + b"N" for k in range(1, many(300_000)))
    yield "keys that collide", b"}(" + collide + b"u"
    yield "one list in itself", b"]\x94" + (b"(" + b"h\x00" * 100 + b"e") * many(9_000)
    yield "copies of one list", _copies(many(100_000))
    yield "module of 2**40 parts", _doubled_modules(40, "a")
    yield "module with long names", _doubled_modules(12, "a" * many(5_000_000))
    yield "one state of many objects", _shared_state(many(20_000))
    yield "many trunks", b"}(" + _trunks(many(30_000)) + b"u"


def _that_claim() -> Iterator[tuple[str, bytes]]:
    yield "huge string", b"\x8d" + struct.pack("<Q", 2**60) + b"abc"
    yield "huge bytes", b"\x8e" + struct.pack("<Q", 2**40) + b"abc"
    yield "huge bytearray", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc"
    yield "huge integer", b"\x8b" + struct.pack("<i", 20_000_000) + b"\x7f" * 20_000_000
    yield "huge decimal", b"L" + b"9" * 5_000_000 + b"L\n"
    yield "huge memo index", b"Nr" + struct.pack("<I", 2**32 - 1)
    yield "huge frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N"
    yield "huge storage", b"}" + entry("a", tensor(whole(2**61) + b"\x85", whole(1) + b"\x85", count=2**61))
    expanded = tensor(whole(2**40) + whole(2**20) + b"\x86", whole(0) * 2 + b"\x86")
    yield "huge expanded tensor", b"}" + entry("a", expanded)
    empty = tensor(whole(2**62) + whole(0) + whole(2**62) + b"\x87", whole(1) * 3 + b"\x87")
    yield "huge empty tensor", b"}" + entry("a", empty)


def _nested_subclasses(depth: int) -> bytes:
    """_rebuild_from_type_v2 called with itself, with itself, ..."""
    made = named("torch._tensor", "_rebuild_from_type_v2") + b"\x940)\x94"
    for index in range(depth):
        made += b"0h\x00Nj" + struct.pack("<I", 1 + index) + b"\x87\x94"
    return made + b"0h\x00j" + struct.pack("<I", depth) + b"R"


def _deep_modules(depth: int) -> bytes:
    dicts = entry("_parameters", b"}") + entry("_buffers", b"}") + text("_modules") + b"}" + text("a")
    start = named("m", "M") + b")\x81}" + dicts
    return start * depth + b"N" + b"ssb" * depth


def _doubled_modules(depth: int, name: str) -> bytes:
    """Each module holds the next twice, under one memoized name."""
    made = text(name) + b"\x940" + module() + b"\x94"
    for index in range(depth):
        inner = b"j" + struct.pack("<I", 1 + index)
        names = b"}h\x00" + inner + b"s" + text("b") + inner + b"s"
        made += b"0" + module(modules=names) + b"\x94"
    return made


def _copies(count: int) -> bytes:
    """One long list that as many calls would copy."""
    makers = named("collections", "OrderedDict") + b"\x940" + named("builtins", "set") + b"\x940"
    made = b"](" + b"(NNt" * count + b"e\x940" + makers
    return made + b"(" + b"h\x01h\x00\x85R" * count + b"h\x02h\x00\x85R" * count + b"t"


def _shared_state(count: int) -> bytes:
    """Many objects whose state is one dict of as many entries."""
    state = b"}(" + b"".join(text(f"k{index}") + b"N" for index in range(count)) + b"u\x940"
    objects = b"".join(text(f"o{index}") + b"h\x01)\x81h\x00b" for index in range(count))
    return state + named("a", "b") + b"\x940" + b"}(" + objects + b"u"


def _trunks(count: int) -> bytes:
    trunks = b"".join(text(f"a{index}.trunk.pos_embed") + b"h\x00" for index in range(count))
    return text("x") + FOUR + b"\x94" + trunks


def write_all(folder: Path, canary: Path, scale: float) -> dict[str, Path]:
    """Writes every file: each body as the data.pkl of a zip with one storage, and some whole files."""
    files = {}
    for index, (name, body) in enumerate(bodies(str(canary), scale)):
        files[name] = folder / f"{index:02}.pt"
        with zipfile.ZipFile(files[name], "w") as archive:
            archive.writestr("archive/data.pkl", body)
            archive.writestr("archive/data/0", bytes(16))
    state = P + b"}" + entry("a", tensor(whole(2**28) + b"\x85", whole(1) + b"\x85", count=2**28)) + END
    for name, sizes in (("packed pickle", (40 << 20, 16)), ("packed storage", (0, int(scale * (1 << 30))))):
        files[name] = folder / f"{name.replace(' ', '-')}.pt"
        with zipfile.ZipFile(files[name], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for entry_name, start, size in (("data.pkl", state, sizes[0]), ("data/0", b"", sizes[1])):
                with archive.open(f"archive/{entry_name}", "w", force_zip64=True) as target:
                    target.write(start)
                    for _ in range(size >> 20):
                        target.write(bytes(1 << 20))
    old = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    files["old: code"] = folder / "old-code.pt"
    files["old: code"].write_bytes(old + pickle.dumps(Calls(os.system, f"touch {canary}")) + pickle.dumps([]))
    files["old: storage of negative size"] = folder / "old-negative.pt"
    body = P + b"}" + entry("a", FOUR.replace(b"tQ", b"NtQ")) + END
    files["old: storage of negative size"].write_bytes(old + body + pickle.dumps(["0"]) + struct.pack("<q", -(2**40)))
    files["old: storage unheard of"] = folder / "old-unknown.pt"
    files["old: storage unheard of"].write_bytes(old + body + pickle.dumps(["7"]) + struct.pack("<q", 4) + bytes(16))
    files["bare pickle"] = folder / "bare.pt"
    files["bare pickle"].write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}")))
    return files


def read_guarded(path: Path) -> dict[str, object]:
    """Reads a file in a process of its own, split off this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _limit()
        answer = json.dumps(_read(path)).encode()
        os.write(writing, answer[: 1 << 16])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    found = json.loads(answer) if answer else {"result": f"died, status {status}", "events": []}
    return {**found, "peak_mb": round(usage.ru_maxrss / 1e3), "seconds": round(usage.ru_utime + usage.ru_stime, 2)}


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))


def _read(path: Path) -> dict[str, object]:
    from neck.checkpoint import CheckpointError, load_encoder

    events: list[str] = []
    watched = [True]

    def hear(event: str, args: tuple[object, ...]) -> None:
        if watched[0] and event.startswith(FORBIDDEN):
            events.append(f"{event} {str(args[:1])[:80]}")

    sys.addaudithook(hear)
    modules = set(sys.modules)
    try:
        load_encoder(path)
        result = "loaded"
    except CheckpointError as error:
        result = f"refused: {error}"
    except BaseException as error:
        result = f"{type(error).__name__}: {str(error)[:200]}"
    watched[0] = False
    return {"result": result, "events": events + sorted(set(sys.modules) - modules)}


def main() -> None:
    folder, scale = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    sys.path.insert(0, str(ROOT))
    from neck.checkpoint import load_encoder
    from neck.config import EncoderConfig

    golden = ROOT / "tests" / "data" / "meta-dual"
    load_encoder(golden / "checkpoint.pt", EncoderConfig.from_file(golden / "encoder.json"))  # what torch imports late
    start = time.perf_counter()
    for name, path in write_all(folder, folder / CANARY, scale).items():
        print(json.dumps({"name": name, **read_guarded(path)}), flush=True)
    print(json.dumps({"name": "all", "seconds": round(time.perf_counter() - start, 1)}), file=sys.stderr)


if __name__ == "__main__":
    main()
