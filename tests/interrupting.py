"""Runs `onnx` and `trt` in one process and, at each moment of a list, forks: the copy gets a signal just there.

A copy ends as the whole process would, so one run shows every moment, and none depends on when a signal comes. What a
copy removes is put back before the run goes on. Run by test_interrupt.py: WORK RESULTS CHECKPOINT CONFIG [bare].
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a signal comes: at the first such audit event of the command (https://docs.python.org/3/library/audit_events).

    Attributes:
        argument: how the event's path or module ends.
        where: "here", in a "destructor", a "weakref" callback, the "collector", or later, in a thread: while ONNX
            Runtime ("ort") or the builder ("builder") is at work.
    """

    command: str
    event: str
    argument: str
    where: str = "here"
    signal: str = "SIGINT"

    def __str__(self) -> str:
        return f"{self.command}-{self.signal}-{self.event}-{self.argument}-{self.where}"


STAGED = [Moment("onnx", "os.mkdir", ".staging", signal=name) for name in ("SIGINT", "SIGTERM", "SIGKILL")]
MOMENTS = (
    *(Moment("onnx", "import", name) for name in ("typer", "neck.config", "torch", "numpy", "onnx_ir")),
    *(Moment("onnx", "import", name) for name in ("torch.fx", "onnxscript", "onnxruntime")),
    *(Moment("onnx", "import", "typer", where) for where in ("destructor", "weakref", "collector")),
    *(Moment("onnx", "import", "torch.nn", where, "SIGTERM") for where in ("here", "destructor")),
    *STAGED,
    *(Moment("onnx", "open", name) for name in ("checkpoint.pt", "x.onnx.data", "x.json")),
    *(Moment("onnx", "open", "x.onnx.data", where) for where in ("destructor", "ort")),
    Moment("onnx", "open", "x.onnx.data", signal="SIGTERM"),
    Moment("onnx", "open", "x.onnx.data", signal="SIGKILL"),
    *(Moment("onnx", event, name) for event, name in (("os.remove", "x.onnx"), ("os.rename", "x.onnx.data"))),
    *(Moment("onnx", "os.rename", name) for name in ("x.json", "x.onnx")),
    Moment("onnx", "os.rename", "x.onnx", signal="SIGTERM"),
    *(Moment("trt", "import", name) for name in ("polygraphy", "engines.plan")),
    *(Moment("trt", "os.mkdir", ".staging", where) for where in ("here", "builder")),
    *(Moment("trt", "open", name) for name in ("x.fp16.onnx.data", "x.plan", "x.plan.json")),
    *(Moment("trt", event, name) for event, name in (("os.remove", "x.plan"), ("os.rename", "x.plan.json"))),
    Moment("trt", "os.rename", "x.plan", signal="SIGTERM"),
)


def hashes(folder: Path) -> dict[str, str]:
    """Every file under a folder with its hash, and every folder."""
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


class Forks:
    """The audit hook and what its copies came to."""

    def __init__(self, work: Path, results: Path) -> None:
        self.work, self.results = work, results
        self.command, self.at_work = "", True
        self.waiting = list(MOMENTS)
        self.found: dict[str, Any] = {}

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.at_work or threading.current_thread() is not threading.main_thread() or not arguments:
            return
        self.at_work = True  # for what the moments themselves do
        due = [moment for moment in self.waiting if self.is_due(moment, event, arguments)]
        for moment in due:
            self.waiting.remove(moment)
            if self.copy(moment):
                return
        self.at_work = False

    def is_due(self, moment: Moment, event: str, arguments: tuple[Any, ...]) -> bool:
        if (moment.command, moment.event) != (self.command, event):
            return False
        if event == "import":
            return bool(arguments[0] == moment.argument)
        # a rename is known by its target; a staging folder by its name without the random end
        path = str(arguments[1 if event == "os.rename" else 0])
        writes = event != "open" or moment.argument == "checkpoint.pt" or "r" not in (arguments[1] or "r")
        ours = path.startswith(str(self.work)) or moment.argument == "checkpoint.pt"
        if event == "os.rename" and Path(path).parent != self.work:
            return False
        name = Path(path).name.rpartition("-")[0] if event == "os.mkdir" else Path(path).name
        matches = name == moment.argument if moment.argument[0] != "." else name.endswith(moment.argument)
        return ours and writes and matches

    def copy(self, moment: Moment) -> bool:
        """Forks; True in the copy, where the signal has been sent or will be."""
        kept, name = self.results / "kept", str(moment)
        shutil.copytree(self.work, kept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 and later: other threads are not copied, which is meant
            child = os.fork()
        if not child:
            for number in (1, 2):
                os.dup2(os.open(self.results / f"{name}.{number}", os.O_WRONLY | os.O_CREAT), number)
            signal.alarm(120)  # a hang would end in this signal
            WHERE[moment.where](lambda: os.kill(os.getpid(), getattr(signal, moment.signal)))
            return True
        _, status = os.waitpid(child, 0)
        out, err = ((self.results / f"{name}.{number}").read_text() for number in (1, 2))
        code = os.waitstatus_to_exitcode(status)
        self.found[name] = {"code": code, "out": out, "err": err, "files": hashes(self.work)}
        if moment.signal == "SIGKILL":
            shutil.copytree(self.work, self.results / name)
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(kept, self.work, dirs_exist_ok=True)
        shutil.rmtree(kept)
        return False

    def run(self, command: str, arguments: list[str]) -> None:
        """Runs a command to its end, as `python neck_export.py`."""
        self.found[command] = {"before": hashes(self.work)}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.command, self.at_work = command, False
        sys.argv = ["neck_export.py", command, *arguments]
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "neck_export.py"), run_name="__main__")
        self.at_work = True
        self.found[command]["after"] = hashes(self.work)


class _Dying:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def _destructor(act: Callable[[], None]) -> None:
    _Dying(act)


def _weakref(act: Callable[[], None]) -> None:
    thing = _Dying(lambda: None)
    reference = weakref.ref(thing, lambda _: act())
    del thing
    del reference


def _collector(act: Callable[[], None]) -> None:
    gc.callbacks.append(lambda *_: act())
    gc.collect()


def _ort(act: Callable[[], None]) -> None:
    import onnxruntime

    run = onnxruntime.InferenceSession.run

    def signalled(*arguments: Any) -> Any:
        act()
        return run(*arguments)

    onnxruntime.InferenceSession.run = signalled


def _builder(act: Callable[[], None]) -> None:
    from engines.builder.plan_stream import Watch

    take = Watch.take

    def signalled(self: Any, *arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            act()
        take(self, *arguments)

    Watch.take = signalled  # type: ignore[method-assign]


WHERE: dict[str, Callable[[Callable[[], None]], None]] = {
    "here": lambda act: act(),
    "destructor": _destructor,
    "weakref": _weakref,
    "collector": _collector,
    "ort": _ort,
    "builder": _builder,
}


def main() -> None:
    """Runs both commands and writes found.json; with `bare` only as far as typer, by Python's own handler."""
    work, results, checkpoint, config = map(Path, sys.argv[1:5])
    bare = sys.argv[5:] == ["bare"]
    sys.path.insert(0, str(ROOT))
    forks = Forks(work, results)
    if bare:
        import export.contract.interrupt

        export.contract.interrupt.take_over_signals = lambda: None
        forks.waiting = [moment for moment in MOMENTS if moment.argument == "typer"]
    sys.addaudithook(forks.hook)
    onnx = work / "x.onnx"
    given = ["--checkpoint", str(checkpoint), "--config", str(config), "--output", str(onnx)]
    forks.run("onnx", ["--help"] if bare else given)
    if not bare:
        forks.run("trt", [str(onnx), "--fp16"])
    (results / "found.json").write_text(json.dumps(forks.found, indent=1))


if __name__ == "__main__":
    main()
