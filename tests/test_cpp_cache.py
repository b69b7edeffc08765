"""One runtime cache for both: what the C++ library wrote is read from Python, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpp_build import PLAN, RTX, Programs, why_missing, write_plan
from test_cpp_rtx import COMPILED, start_rtx
from test_session import L4, fake

from engines.run.loaded_plan import cache_key
from engines.run.runtime_cache import RuntimeCache
from export.contract.manifest import manifest_path, read_manifest

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def test_one_file_serves_both(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    assert COMPILED in start_rtx(programs, plan).out
    manifest = read_manifest(manifest_path(plan), "plan")
    flavor = fake(gpu=type(L4)(L4.name, L4.compute_capability, L4.driver, "13.0"))
    path, key = plan.with_name("x.plan.cache"), cache_key(manifest, plan, flavor)
    theirs = path.read_bytes()
    content, why_not = RuntimeCache(path, key).read()
    assert content and why_not is None
    path.unlink()
    assert RuntimeCache(path, key).write(content) is None and path.read_bytes() == theirs
    warm = start_rtx(programs, plan)
    assert (
        "; warm start with kernels from the runtime cache\n" in warm.out and COMPILED not in warm.out and warm.err == ""
    )
    assert RuntimeCache(path, key.replace("13.0", "12.8")).write(content) is None  # the control
    assert "is for TensorRT-RTX 1.7.1.116 on NVIDIA L4" in start_rtx(programs, plan).err
