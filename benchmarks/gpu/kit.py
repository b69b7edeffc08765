"""Downloads the wheels that `make gpu` needs on a GPU machine without network access, into one folder, the kit.

python -m benchmarks.gpu.kit [--output build/gpu-kit] [--there FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

THERE = Path(__file__).with_name("there.json")
PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"

EXTRAS = ("cpu", "gpu", "bench", "dev")
"""The extras that a GPU machine is asked for, beside what neck-export itself needs."""

LEFT_OUT = {
    "hatchling",  # only needed to build the package, on a machine with network access
    "kubernetes-validate",  # only needed for tests that do not depend on a GPU
    "mypy",  # only checks source code, which needs no GPU
    "onnxruntime-gpu",  # too large (255 MB); the CPU build of ONNX Runtime is included
    "openvino",  # runs on CPUs only
    "pyyaml",  # only needed for tests that do not depend on a GPU
    "ruff",  # only checks source code, which needs no GPU
    "selenium",  # only needed to test the report in a browser
    "tensorrt",  # too large: its libraries, 4 GB, come from NVIDIA's own package index
    "uv",  # only needed to resolve package versions, on a machine with network access
}
"""What of them stays out, and why."""

MOST_BYTES = 60 << 20
SECONDS = 170.0
"""For everything: the kit is to be made in three minutes."""

MANIFEST, PINNED = "kit.json", "requirements.txt"
"""What the kit is for, and what pip installs from it, each with its SHA-256."""


class KitError(RuntimeError):
    """A kit that cannot be made."""


@dataclasses.dataclass(frozen=True)
class There:
    """The packages and Python version of the GPU machine.

    Attributes:
        python: its version, such as 3.12.
        wheels: the platform tags that it takes.
        packages: distribution -> version, as far as it is known.
    """

    python: str
    wheels: tuple[str, ...]
    packages: Mapping[str, str | None]

    @classmethod
    def read(cls, path: Path) -> There:
        """Reads the file that says it."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["python"], tuple(found["wheels"]), found["packages"])

    def satisfies(self, requirement: Requirement) -> bool:
        """Whether the machine fulfills a requirement; an unknown version is assumed to."""
        name = canonicalize_name(requirement.name)
        if name not in self.packages:
            return False
        version = self.packages[name]
        return version is None or requirement.specifier.contains(version, prereleases=True)


def requirements(project: Path = PROJECT) -> list[Requirement]:
    """The packages that pyproject requires on a GPU machine, each once, without LEFT_OUT."""
    told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    lines = [*told["dependencies"], *(line for extra in EXTRAS for line in told["optional-dependencies"][extra])]
    asked = [Requirement(line) for line in dict.fromkeys(lines)]
    return [one for one in asked if canonicalize_name(one.name) not in LEFT_OUT]


def lacking(asked: Sequence[Requirement], there: There) -> list[Requirement]:
    """The requirements that the machine does not fulfill."""
    return [one for one in asked if not there.satisfies(one)]


def chosen(report: Mapping[str, Any], asked: Sequence[Requirement], there: There) -> list[str]:
    """The wheels of the kit as pip pins them: requirements, and dependencies that are missing or too old.

    Args:
        report: pip's `--report` of a dry run.
        asked: what pip was asked for.
        there: what the machine has.
    """
    found = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in report["install"]}
    hashes = {
        canonicalize_name(one["metadata"]["name"]): one["download_info"]["archive_info"]["hashes"]["sha256"]
        for one in report["install"]
    }
    wanted = [canonicalize_name(one.name) for one in asked]
    for name in wanted:  # grows
        for line in found[name].get("requires_dist", []):
            needed = Requirement(line)
            into = canonicalize_name(needed.name)
            here = needed.marker is None or needed.marker.evaluate({"python_version": there.python, "extra": ""})
            if here and into in found and into not in wanted and not there.satisfies(needed):
                wanted.append(into)
    return [f"{name}=={found[name]['version']} --hash=sha256:{hashes[name]}" for name in sorted(set(wanted))]


def make_kit(folder: Path, there: There, project: Path = PROJECT) -> dict[str, Any]:
    """Makes the kit, whole or not at all; returns its manifest.

    Raises:
        KitError: pip fails, or the kit is too large.
    """
    asked = requirements(project)
    pinned = lacking(asked, there)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-kit") as made:
        staged, report = Path(made, "kit"), Path(made, "report.json")
        staged.mkdir()
        pins = staged / PINNED
        pins.touch()
        if pinned:
            dry = ["install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", str(staged)]
            _pip([*dry, *_platform(there), *map(str, pinned)])
            wheels = chosen(json.loads(report.read_text(encoding="utf-8")), pinned, there)
            pins.write_text("\n".join(wheels) + "\n", encoding="utf-8")
            kept = ["--no-deps", "--require-hashes", "--requirement", str(pins), "--dest", str(staged)]
            _pip(["download", *kept, *_platform(there)])
        manifest = describe(staged, asked, there)
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    return manifest


def describe(folder: Path, asked: Sequence[Requirement], there: There) -> dict[str, Any]:
    """The manifest of a folder of wheels.

    Raises:
        KitError: they are too large.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise KitError(
            f"the wheels for the GPU machine have a size of {sum(sizes.values()) / 2**20:.1f} MiB, but the limit is "
            f"{MOST_BYTES >> 20} MiB. The largest wheel is {largest}. If the package of this wheel is already "
            f"installed on the GPU machine, list the package in benchmarks/gpu/{THERE.name}. If nothing on the GPU "
            "machine needs the package, add the package to LEFT_OUT in benchmarks/gpu/kit.py"
        )
    return {"python": there.python, "requirements": [str(one) for one in asked], "wheels": sizes}


def _platform(there: There) -> list[str]:
    tags = [part for tag in there.wheels for part in ("--platform", tag)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", there.python, *tags]


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise KitError(
            f"`pip {arguments[0]}` did not finish within {SECONDS:g} s; check the network connection and try again"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.match(r"ERROR", line)] or [done.stderr.strip()]
        raise KitError(
            f"`pip {arguments[0]}` failed ({' '.join(lines[-1].split())[:300]}); check the network connection and the "
            "packages in pyproject.toml"
        )


def main() -> None:
    """Makes the kit and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu-kit"))
    parser.add_argument(
        "--there",
        type=Path,
        default=THERE,
        help="Read from this JSON file which Python version, platform and packages the GPU machine has. Only packages "
        "that the machine does not have in a suitable version are downloaded. [default: benchmarks/gpu/there.json]",
    )
    arguments = parser.parse_args()
    try:
        manifest = make_kit(arguments.output, There.read(arguments.there))
    except (KitError, OSError) as error:
        sys.exit(f"error: {error}")
    for name in manifest["wheels"]:
        print(name)
    size = sum(manifest["wheels"].values()) / 2**20
    print(
        f"{arguments.output}: this folder contains the wheels for a GPU machine with Python {manifest['python']}; "
        f"their size is {size:.1f} MiB. Copy the folder to the GPU machine and run `make gpu` there"
    )


if __name__ == "__main__":
    main()
