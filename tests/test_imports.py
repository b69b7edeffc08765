"""The floors of the house: imports run one way, down; importing is cheap where it must be, and does nothing."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("neck", "export", "engines", "benchmarks", "neck_export")
"""Bottom first: each may import those before it."""

STAIRS = {
    "neck": ("weights",),
    "export": ("contract", "graph", "lowering", "verification", "quantization", "foreign"),
    "engines": ("layers", "builder", "run", "live", "service"),
    "benchmarks": ("measure", "results", "report", "masks", "gpu"),
}
"""The folders of a floor, lowest first: each may import those before it. Files beside them may import any."""

CPP = ROOT / "engines" / "cpp" / "src"
CPP_STAIR = ("files", "tensors", "images", "gpu", "plan", "engine", "client", "commands")
"""The folders of the C++ library, likewise; what is public is in include/neck."""


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py")) or [path for path in (ROOT / f"{floor}.py",) if path.exists()]


@functools.cache
def imported(path: Path, text: str) -> tuple[str, ...]:
    """Every module that a file imports, at any depth; relative imports by their full name."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(".".join(filter(None, (package if node.level else "", node.module))))
    return tuple(names)


def upward(path: Path, text: str, floor: str) -> list[str]:
    """The imports of a file that go up, or out of the packages into the tests."""
    above = (*FLOORS[FLOORS.index(floor) + 1 :], "tests", "conftest")
    return [name for name in imported(path, text) if name.partition(".")[0] in above]


FILES = [(floor, path) for floor in FLOORS for path in sources(floor)]


def test_imports_run_down() -> None:
    found = {str(path): upward(path, path.read_text(encoding="utf-8"), floor) for floor, path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import export.graph.trace",
        "from engines import build",
        "def f():\n    from neck_export import main",
        "import conftest",
    ],
)
def test_an_upward_import_is_seen(text: str) -> None:
    """The control."""
    assert upward(ROOT / "neck" / "trunk.py", text, "neck")
    assert not upward(ROOT / "neck" / "trunk.py", "from neck.rope import Rotary\nimport torch", "neck")


def up_the_stair(path: Path, text: str, floor: str) -> list[str]:
    """The imports of a file in a folder of a floor that go to a folder above its own."""
    stair = STAIRS.get(floor, ())
    own = (*path.relative_to(ROOT).parts, "")[1]
    above = stair[stair.index(own) + 1 :] if own in stair else ()
    return [name for name in imported(path, text) if name.startswith(tuple(f"{floor}.{folder}" for folder in above))]


def test_imports_run_down_the_stair() -> None:
    found = {str(path): up_the_stair(path, path.read_text(encoding="utf-8"), floor) for floor, path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_an_import_up_the_stair_is_seen() -> None:
    """The control."""
    build, layers = (
        ROOT / "engines" / "builder" / "build.py",
        "from engines.layers.layer_report import LayerReport",
    )
    assert not up_the_stair(build, layers, "engines")
    assert up_the_stair(build, "from engines.run.session import Session", "engines")


def test_every_folder_of_a_floor_is_on_its_stair() -> None:
    for floor, stair in STAIRS.items():
        folders = {path.parent.relative_to(ROOT).parts[1] for path in sources(floor) if path.parent != ROOT / floor}
        assert folders == set(stair)


def cpp_sources() -> list[Path]:
    return sorted(path for path in (ROOT / "engines" / "cpp").rglob("*") if path.suffix in (".cpp", ".hpp", ".cu"))


def included_from_above(folder: str, text: str) -> list[str]:
    """The folders above a file's own that it includes of."""
    above = CPP_STAIR[CPP_STAIR.index(folder) + 1 :]
    return [name for name in re.findall(r'^#include "([a-z]+)/', text, re.MULTILINE) if name in above]


def test_includes_run_down_the_stair_of_the_cpp_library() -> None:
    inside = [path for path in cpp_sources() if CPP in path.parents]
    assert {path.parent.relative_to(CPP).as_posix() for path in inside} == set(CPP_STAIR)
    assert [path for path in inside if included_from_above(path.parent.name, path.read_text(encoding="utf-8"))] == []


def test_an_include_up_the_stair_is_seen() -> None:
    """The control."""
    assert included_from_above("plan", '#include "files/text.hpp"\n#include "engine/engine_impl.hpp"\n') == ["engine"]


def test_a_package_is_not_imported_through_its_own_init() -> None:
    found = []
    for _, path in FILES:
        own = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        if path.name != "__init__.py" and own != "." and own in imported(path, path.read_text(encoding="utf-8")):
            found.append(str(path))
    assert found == []


HEAVY = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "PIL",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()  # importing prints nothing
    return set(line.split())


@pytest.mark.parametrize("module", ["export.contract.signature", "export.contract.manifest"])
def test_the_contract_does_not_load_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_a_file_is_looked_at_without_torch() -> None:
    """`inspect` and what it takes apart: torch is 3 of 5 seconds."""
    assert "torch" not in loaded_by("import export.inspect, engines.inspect, engines.builder.plan_kind")


def test_the_public_names_of_neck_are_there() -> None:
    import neck

    assert [getattr(neck, name).__name__ for name in neck.__all__] == neck.__all__
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        neck.other  # noqa: B018


def test_a_heavy_import_is_seen() -> None:
    """The control."""
    assert "numpy" in loaded_by("import numpy")


def test_the_front_door_does_not_load_torch() -> None:
    if not (ROOT / "neck_export.py").exists():
        pytest.skip("neck_export.py is not there")
    assert not loaded_by("import neck_export") & HEAVY


def own_warnings(request: pytest.FixtureRequest) -> str:
    """The modules whose warnings pyproject makes errors, as a pattern."""
    (line,) = (one for one in request.config.getini("filterwarnings") if one.startswith("error:::"))
    return line.removeprefix("error:::")


@pytest.mark.parametrize("module", ["neck", "neck_export", "export.options", "engines.run.session", "benchmarks.bench"])
def test_a_warning_of_our_own_is_an_error(module: str, request: pytest.FixtureRequest) -> None:
    assert re.match(own_warnings(request), module)
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("gone in the next release", DeprecationWarning, f"{module}.py", 1, module)


@pytest.mark.parametrize("module", ["typer.main", "torch.export", "exporter", "necks", "neckties.export"])
def test_a_warning_of_another_package_is_not(module: str, request: pytest.FixtureRequest) -> None:
    """The control: a deprecation in another package's next release must not turn the suite red."""
    assert not re.match(own_warnings(request), module)
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("gone in the next release", DeprecationWarning, f"{module}.py", 1, module)


def test_importing_all_is_silent_and_writes_nothing(request: pytest.FixtureRequest) -> None:
    """Every module, our own warnings being errors, and no file or setting left behind.

    No jsonschema is needed, the benchmark's included: a bare GPU machine has none.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for _, path in FILES
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "preprocess"  # runs in Triton
    ]
    before = shown_in_root()
    statement = (
        "import warnings\n"
        f"warnings.filterwarnings('error', module={own_warnings(request)!r})\n"
        "import torch, logging\n"
        "threads, default, level = torch.get_num_threads(), torch.get_default_dtype(), logging.root.level\n"
        f"import {', '.join(modules)}\n"
        "assert (threads, default, level) == (torch.get_num_threads(), torch.get_default_dtype(), logging.root.level)\n"
        "assert torch.is_grad_enabled()"
    )
    loaded = loaded_by(statement)
    assert "torch" in loaded and "jsonschema" not in loaded
    assert shown_in_root() == before


def shown_in_root() -> list[Path]:
    """Without what other tests make meanwhile: build/ and the caches."""
    made = ("build", "__pycache__")
    return sorted(path for path in ROOT.iterdir() if path.name not in made and not path.name.startswith("."))
