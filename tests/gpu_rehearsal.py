"""A bare machine out of this one: a Python that has what there.json names and nothing else, and no network.

Used by tests/test_gpu_session.py; it needs Linux, util-linux's `unshare` and leave to make namespaces.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.kit import THERE

ROOT = Path(__file__).parent.parent
BROUGHT = ("onnx-ir", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "polygraphy")
"""What the base must not have: the kit brings it."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The bare machine's Python, and the file that says what it has."""

    python: Path
    there: Path


def make_base(folder: Path) -> Base:
    """A virtual environment whose packages are links to this one's, as far as there.json names them or they need it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "base")], check=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "base" / "lib" / f"python{version}" / "site-packages"
    told = json.loads(THERE.read_text(encoding="utf-8"))
    packages: dict[str, str | None] = {"onnx-ir": "1.0"}
    names = [name for name in told["packages"] if name not in ("pip", *BROUGHT)]
    for name in names:  # grows
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        packages[canonicalize_name(name)] = found.version
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            target = Path(str(found.locate_file(top))).resolve()
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
        for line in found.requires or []:
            asked = Requirement(line)
            wanted = asked.marker is None or asked.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(asked.name) not in (*names, *BROUGHT):
                names.append(canonicalize_name(asked.name))
    there = folder / "there.json"
    there.write_text(json.dumps({**told, "python": version, "packages": {**packages, "pip": None}}), encoding="utf-8")
    return Base(folder / "base" / "bin" / "python", there)


def run_session(
    base: Base,
    kit: Path,
    output: Path,
    *arguments: str,
    fault: str = "",
    disk: int | None = None,
    seconds: float = 900.0,
) -> subprocess.CompletedProcess[str]:
    """`make gpu` on the base in a namespace without network.

    Args:
        base, kit, output: the Python, its kit, the session's folder.
        arguments: further ones of benchmarks.gpu.start.
        fault: Python that every process of the session runs first; it may look at sys.argv and patch what it imports.
        disk: bytes of a disk of its own that `output` lies on; what it holds then is copied to OUTPUT.kept.
        seconds: a hang would else hold the tests.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(output.parent), "OMP_NUM_THREADS": "1"}
    if fault:
        folder = output.parent / f"{output.name}-fault"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(fault, encoding="utf-8")
        environment["PYTHONPATH"] = str(folder)
    start = [str(base.python), "-m", "benchmarks.gpu.start", "--kit", str(kit), "--output", str(output)]
    command = [*start, "--device", "cpu", *arguments]
    if disk is None:
        inside = ["unshare", "--map-root-user", "--net", *command]
    else:
        output.mkdir(parents=True, exist_ok=True)
        script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift && place="$1" && shift && { "$@"; code=$?; '
        script += 'cp -r "$place" "$place.kept"; exit $code; }'
        inside = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", script, "sh", str(disk), str(output)]
        inside += command
    return subprocess.run(inside, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def can_unshare() -> bool:
    """Whether this machine lets a namespace be made."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--map-root-user", "--net", "--mount", "true"], check=False).returncode == 0
