"""A session: every stage in a process of its own, within the time, whatever hangs; a second call goes on.

python -m benchmarks.gpu.session (benchmarks.gpu.start makes its environment and calls it)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.gpu.archive import archive_path, unpack_archive, write_archive
from benchmarks.gpu.child_process import adopt_orphans, run_limited
from benchmarks.gpu.page import page_lines
from benchmarks.gpu.time_plan import FOLDER, MINUTES, REPORT, Device, Stage, fitting, plan, table, time_limit
from benchmarks.measure.environment import package_versions, processor
from benchmarks.measure.work_folder import digest, sources_digest
from engines.doctor import driver_version
from export.contract.manifest import to_json

LEAST_SECONDS = 5.0
"""A stage is not begun for less."""

LATE_SECONDS = 6.0
"""So long before a stage is ended it should end by itself, its workers' peaks noted."""

RESERVE_BYTES = 16 << 20
"""Kept in a file until the report is written: on a full disk, too, it finds room."""


class Session:
    """The stages of one machine.

    Args:
        output: the folder of everything; another call with the same goes on there.
        device: where the encoder runs.
        ends: when it is over, in `time.time` seconds.
        config: another encoder than the full one.
        kit: the pinned requirements of the environment.
    """

    def __init__(self, output: Path, device: Device, ends: float, config: Path | None, kit: str) -> None:
        self.output, self.device, self.ends, self.config = output, device, ends, config
        self.scale = max(1.0, self._left() / 60 / MINUTES)
        told = config.read_text(encoding="utf-8") if config else None
        machine = [processor(), driver_version(), package_versions()]  # as the samples' own key: they go on together
        self.key = digest(
            {"device": device, "config": told, "kit": kit, "sources": sources_digest(), "machine": machine}
        )
        self.stages: dict[str, dict[str, Any]] = self._read()

    def run(self) -> int:
        """Runs the stages that an earlier call has not finished; the exit code says whether all are done."""
        adopt_orphans()
        wanted = [one for one in plan(self.device) if not self._done(one)]
        news = True  # that no report has yet
        with self._reserve():
            for place, stage in enumerate(wanted):
                if stage == REPORT:
                    if place > 1:  # more than the doctor went before
                        self._stage(REPORT)
                        self._archive()
                        news = False
                elif stage not in fitting(wanted[place:], self._left() / 60):
                    self._note(
                        stage,
                        "left out",
                        "too little time was left for this stage; run the command again to run this stage",
                    )
                elif not self._stage(stage):
                    return self._end()
                else:
                    news = True
        if news:
            self._stage(REPORT)
        return self._end()

    def _stage(self, stage: Stage) -> bool:
        """Runs one stage; False where nothing can be measured here."""
        limit = time_limit(stage, self._left(), self.scale)
        if limit < LEAST_SECONDS:
            self._note(
                stage,
                "left out",
                "the time limit was reached before this stage; run the command again to run this stage",
            )
            return True
        print(f"{stage.name}: {stage.what} (at most {limit:.0f} s)", flush=True)
        found_at, started = self._found(stage.name), time.monotonic()
        with contextlib.suppress(OSError):
            found_at.unlink()
        command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, "--output", str(self.output)]
        command += ["--device", self.device, "--ends", repr(time.time() + limit - LATE_SECONDS)]
        command += ["--config", str(self.config)] if self.config else []
        problem = run_limited(command, limit, found_at.with_suffix(".log"), os.environ)
        found = _json(found_at)
        outcome, reason = found.get("outcome", "failed"), found.get("reason")
        if problem:
            outcome, reason = "failed", problem
        self._note(stage, outcome, found.get("fatal") or reason, time.monotonic() - started)
        return not found.get("fatal")

    def _note(self, stage: Stage, outcome: str, reason: str | None, seconds: float = 0.0) -> None:
        self.stages[stage.name] = {"outcome": outcome, "reason": reason, "seconds": round(seconds, 1)}
        told = f": {reason}" if reason else ""
        print(f"{stage.name}: {outcome} after {seconds:.0f} s{told}", flush=True)
        with contextlib.suppress(OSError):  # a full disk; the exit code tells
            staged = self.output / ".session.json"
            staged.write_text(to_json({"key": self.key, "stages": self.stages}), encoding="utf-8")
            staged.replace(self.output / "session.json")

    def _end(self) -> int:
        """Writes and prints the page."""
        fatal = next(filter(None, (_json(self._found(name)).get("fatal") for name in self.stages)), None)
        if fatal:
            print(f"error: {fatal}", file=sys.stderr, flush=True)
            return 1
        lines = self._page()
        print("\n".join(["", *lines]), flush=True)
        self._archive()
        return exit_code(self.stages)

    def _page(self) -> list[str]:
        found = (_json(self.output / "report.json"), _json(self._found("doctor")), _json(self._found("rates")))
        lines = page_lines(self.stages, *found)
        with contextlib.suppress(OSError):
            (self.output / "page.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return lines

    def _archive(self) -> None:
        """Writes what can be carried off; on a full disk that is said, and costs nothing else."""
        self._page()
        try:
            path, left_out = write_archive(self.output)
        except OSError as error:
            print(
                f"{archive_path(self.output)}: the archive of the results cannot be written ({error}); free disk space "
                "and run the command again",
                flush=True,
            )
            return
        told = f" The archive omits these files, which are too large: {', '.join(left_out)}." if left_out else ""
        print(
            f"{path} is an archive of the results; its size is {path.stat().st_size / 2**20:.1f} MiB.{told} To "
            "continue the measurements on another machine, copy the archive to the same path on that machine, and run "
            f"the same command there. The command unpacks the archive into the folder {self.output.name}, unless that "
            "folder already contains the file session.json.",
            flush=True,
        )

    def _done(self, stage: Stage) -> bool:
        """Whether an earlier call has it; the machine may be another one, so that it is looked at again."""
        told = self.stages.get(stage.name, {})
        return stage.name != "doctor" and stage != REPORT and told.get("outcome") in ("done", "unavailable")

    def _found(self, name: str) -> Path:
        return self.output / FOLDER / f"{name}.json"

    def _left(self) -> float:
        return self.ends - time.time()

    def _read(self) -> dict[str, dict[str, Any]]:
        found = _json(self.output / "session.json")
        return found["stages"] if found.get("key") == self.key else {}

    @contextlib.contextmanager
    def _reserve(self) -> Any:
        path = self.output / ".reserve"
        try:
            with contextlib.suppress(OSError):
                path.write_bytes(os.urandom(RESERVE_BYTES))
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def exit_code(stages: dict[str, dict[str, Any]]) -> int:
    """0 where every stage is done or cannot be done here, else 1."""
    return int(any(one["outcome"] not in ("done", "unavailable") for one in stages.values()))


def unmet(requirements: Sequence[str]) -> list[str]:
    """The requirements that this environment does not fulfill, with the installed versions."""
    found = []
    for line in requirements:
        asked = Requirement(line)
        try:
            version = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not asked.specifier.contains(version, prereleases=True):
            found.append(f"{line} (installed: {version or 'none'})")
    return found


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {}


def main() -> None:
    """Runs the session that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ends", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--fresh", action="store_true")
    asked = parser.parse_args()
    pinned = (asked.kit / "requirements.txt").read_text(encoding="utf-8")
    if lacks := unmet(_json(asked.kit / "kit.json")["requirements"]):
        sys.exit(
            f"error: these packages are missing: {', '.join(lacks)}. They are neither installed in the Python "
            f"environment of {sys.executable} nor contained in the folder {asked.kit}. `make gpu-kit` leaves out "
            "packages that benchmarks/gpu/there.json lists as installed on the GPU machine; remove the missing "
            "packages from benchmarks/gpu/there.json and run `make gpu-kit` again"
        )
    if asked.fresh:
        for name in ("work", "session.json"):
            path = asked.output / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    (asked.output / FOLDER).mkdir(parents=True, exist_ok=True)
    if not asked.fresh:
        try:
            if unpack_archive(asked.output):
                print(f"{archive_path(asked.output)}: continuing from the results in this archive", flush=True)
        except (OSError, EOFError, tarfile.TarError) as error:
            sys.exit(
                f"error: {archive_path(asked.output)}: the archive is incomplete or damaged ({error}); copy the "
                "archive again, or delete the archive to start without earlier results"
            )
    print("\n".join(table(asked.device)), flush=True)
    sys.exit(Session(asked.output, asked.device, asked.ends, asked.config, pinned).run())


if __name__ == "__main__":
    main()
