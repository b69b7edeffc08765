"""`make gpu`: installs the wheels that `make gpu-kit` downloaded, and runs all tests and benchmarks that need a GPU.

Nothing but Python itself is needed for this.

python -m benchmarks.gpu.start [--kit build/gpu-kit] [--output build/gpu] [--minutes 9] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
INSTALL_SECONDS = 90.0
MANIFEST, PINNED = "kit.json", "requirements.txt"


def main() -> None:
    """Makes the environment and becomes the session; it does not return."""
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, default=Path("build/gpu-kit"))
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--config",
        type=Path,
        help="Measure an encoder with the architecture in this JSON file: encoder.json, or the manifest that "
        "`neck-export onnx` wrote beside an ONNX file. [default: the architecture of SAM 3]",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="Delete the results of earlier runs in the --output folder and measure everything again. Without this "
        "option, an interrupted run is continued.",
    )
    asked = parser.parse_args()
    try:
        read_kit(asked.kit)
        site = install(asked.kit, asked.output)
    except (KitError, OSError) as error:
        sys.exit(f"error: {error}")
    path = os.pathsep.join(filter(None, (str(site), str(ROOT), os.environ.get("PYTHONPATH"))))
    command = ["-m", "benchmarks.gpu.session", "--kit", str(asked.kit.resolve()), "--output", str(asked.output)]
    command += ["--ends", repr(started + 60 * asked.minutes), "--device", asked.device]
    command += ["--config", str(asked.config)] if asked.config else []
    command += ["--fresh"] if asked.fresh else []
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, "PYTHONPATH": path})


class KitError(RuntimeError):
    """A kit that does not fit this machine, or is not whole."""


MAKE = (
    "on a machine with network access, run `make gpu-kit` to create the folder build/gpu-kit; then copy the folder "
    "build/gpu-kit to this machine"
)


def read_kit(folder: Path) -> dict[str, Any]:
    """The kit's manifest.

    Raises:
        KitError: no kit, or one for another Python or system.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        python = manifest["python"]
    except FileNotFoundError:
        raise KitError(f"{folder}: the file {MANIFEST} is missing in this folder; {MAKE}") from None
    except (ValueError, KeyError, TypeError):
        raise KitError(
            f"{folder}/{MANIFEST}: the file is damaged, or `make gpu-kit` did not write this file; {MAKE}"
        ) from None
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != here:
        raise KitError(
            f"{folder}: the wheels in this folder are for Python {python}, but {sys.executable} is Python {here}. If "
            f"Python {python} is installed on this machine, run `make gpu PYTHON=python{python}`. Otherwise, on a "
            f"machine with network access, set `python` to {here} in benchmarks/gpu/there.json and run `make gpu-kit`; "
            "then copy the folder build/gpu-kit to this machine"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise KitError(
            f"{folder}: the wheels in this folder are for Linux x86-64, but this machine is {platform.system()} "
            f"{platform.machine()}; use a machine with Linux on x86-64"
        )
    return manifest


def install(kit: Path, output: Path) -> Path:
    """Installs the wheels into a folder of their own, once, and returns it; it stands before this Python's packages.

    No virtual environment: one made by a Python that is itself of one does not see that one's packages.

    Raises:
        KitError: pip cannot, hangs, or finds that the kit is not whole.
    """
    site, mark = output / "site", output / "site" / PINNED
    pins = kit / PINNED
    if mark.is_file() and mark.read_bytes() == pins.read_bytes():
        return site.resolve()
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    options += ["--find-links", str(kit), "--require-hashes", "--requirement", str(pins)]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise KitError(
            f"{site}: pip was stopped after {INSTALL_SECONDS:g} s, before all wheels of the folder {kit} were "
            "installed; check whether the disk is full or slow, and try again"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise KitError(
            f"{kit}: pip cannot install the wheels in this folder ({lines[0][:300]}). To download the wheels again: "
            f"{MAKE}"
        )
    shutil.copy(pins, mark)
    return site.resolve()


if __name__ == "__main__":
    main()
