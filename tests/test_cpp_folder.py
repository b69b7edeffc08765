"""neck-engine --serve-folder: features of a folder of images, resumed after kills."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_build import (
    PLAN,
    Programs,
    fake_outputs,
    settings,
    why_missing,
    write_plan,
)
from cpp_images import cut, noise
from safetensors import safe_open
from safetensors.numpy import load_file

from neck.images import load_images, read_image

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def serve(programs: Programs, folder: Path, *options: Any, **environment: str) -> Any:
    arguments = (folder / "plan" / "x.plan", "--serve-folder", folder / "in", folder / "out", *options)
    return programs.run("neck-engine", *arguments, **environment)


def folder_of(folder: Path, count: int) -> list[Path]:
    """A plan and images of it, every tenth damaged."""
    write_plan(folder / "plan")
    (folder / "in").mkdir()
    kinds = ("png", "jpg", "jfif", "jpe")
    paths = [noise(folder / "in" / f"{index:03}.{kinds[index % 4]}", 20, 16 + index) for index in range(count)]
    for path in paths[::10]:
        cut(path)
    (folder / "in" / "notes.txt").touch()
    (folder / "in" / ".hidden.png").touch()
    return paths


def check_features(folder: Path, paths: list[Path]) -> None:
    """Every image that can be read has its own features, whole, with its size; nothing else is there."""
    good = [path for index, path in enumerate(paths) if index % 10]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [f"{path.name}.safetensors" for path in good]
    wanted = fake_outputs(load_images(good, (16, 16)))
    for index, path in enumerate(good):
        with safe_open(folder / "out" / f"{path.name}.safetensors", "np") as stored:
            told = stored.metadata()
            assert (told["height"], told["width"]) == ("20", str(read_image(path).shape[1]))
            assert float(told["scale_y"]) == 1.25
            for name, values in wanted.items():
                found = stored.get_tensor(name)
                assert found.shape == (1, 8, 4, 4)
                assert (
                    np.abs(found - values[index]).max() < 4.3 / 255
                )  # one level of 2 / 255, doubled, and a half's step


MOMENTS = ["enqueueV3:1", "cudaMemcpyAsync:4", "cudaStreamSynchronize:2", "enqueueV3:3", "cudaEventRecord:9"]


@pytest.mark.parametrize(
    ("count", "moments"), [(61, MOMENTS), pytest.param(500, [*MOMENTS, *MOMENTS], marks=pytest.mark.slow)]
)
def test_a_folder_is_served_and_resumed_after_kills(
    programs: Programs, tmp_path: Path, count: int, moments: list[str]
) -> None:
    paths = folder_of(tmp_path, count)
    before: dict[Path, int] = {}
    for moment in moments:
        assert serve(programs, tmp_path, STAND_IN_KILL=moment).code == -9
        found = list((tmp_path / "out").glob("*.safetensors"))
        assert all(len(load_file(path)) == 2 for path in found)  # whole
        now = {path: path.stat().st_ino for path in found}
        assert now.items() >= before.items()  # what was done is not done again
        before = now
    ran = serve(programs, tmp_path)
    bad = (count + 9) // 10
    assert ran.code == 1
    assert ran.out == (
        f"{tmp_path / 'out'}: features of {count - bad - len(before)} images written, {len(before)} existed already, "
        f"{bad} failed\n"
    )
    assert len(ran.err.splitlines()) == bad
    assert all(line.startswith(f"neck-engine: image skipped: {tmp_path / 'in'}") for line in ran.err.splitlines())
    check_features(tmp_path, paths)
    assert {path: path.stat().st_ino for path in before} == before


def test_a_folder_that_cannot_be_served_is_told(programs: Programs, tmp_path: Path) -> None:
    paths = folder_of(tmp_path, 3)
    assert serve(programs, tmp_path, "--batch", 3).code == 1  # two images that can be read: not filled
    check_features(tmp_path, paths)
    wrong = serve(programs, tmp_path, "--batch", 5)
    assert wrong.code == 1
    last = wrong.err.splitlines()[-1]
    assert "the batch size is 5" in last and "the plan's largest batch size is 4" in last
    write_plan(tmp_path / "plan", PLAN + b"scratch 2000\n")
    ran = serve(programs, tmp_path)
    assert (ran.code, ran.out) == (1, "")
    assert ".safetensors: these features were computed with another plan" in ran.error
    for path in paths:
        path.unlink()
    assert serve(programs, tmp_path).error.startswith(f"{tmp_path / 'in'}: the folder contains no images")
    assert (
        "the folder cannot be listed" in programs.run("neck-engine", tmp_path, "--serve-folder", "none", tmp_path).error
    )
    assert programs.run("neck-engine", tmp_path, "--serve-folder", tmp_path).code == 2


def test_one_odd_file_costs_itself_alone(programs: Programs, tmp_path: Path) -> None:
    """A link to itself, one to nothing, a name that leaves no room for that of its features; a folder is none."""
    paths = folder_of(tmp_path, 3)
    paths[0].unlink()
    source = tmp_path / "in"
    (source / "loop.png").symlink_to("loop.png")
    (source / "nothing.jpg").symlink_to("none")
    longest = noise(source / f"{'x' * 232}.png", 20, 16)
    (source / f"{'y' * 251}.png").write_bytes(longest.read_bytes())
    (source / "folder.png").mkdir()
    ran = serve(programs, tmp_path)
    assert ran.code == 1
    assert ran.out.endswith("features of 3 images written, 0 existed already, 3 failed\n")
    lines = sorted(ran.err.splitlines())
    assert [line.split(" ")[3].rpartition("/")[2][:7] for line in lines] == ["loop.pn", "nothing", "y" * 7]
    assert all(line.startswith("neck-engine: image skipped: ") for line in lines)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{path.name}.safetensors" for path in (*paths[1:], longest)
    }


def test_features_are_repaired_and_follow_their_image(programs: Programs, tmp_path: Path) -> None:
    """Damaged features, a changed image, one that was only touched; the others are left alone."""
    paths = folder_of(tmp_path, 7)
    paths.pop(0).unlink()
    assert serve(programs, tmp_path).code == 0
    features = [tmp_path / "out" / f"{path.name}.safetensors" for path in paths]
    whole = [path.read_bytes() for path in features]
    features[0].write_bytes(whole[0][:-1])
    features[1].write_bytes(b"")
    deep = b'{"__metadata__": {"plan": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    features[2].write_bytes(len(deep).to_bytes(8, "little") + deep)
    noise(paths[3], 28, 30)  # another image under the same name
    os.utime(paths[4])
    inodes = [path.stat().st_ino for path in features]
    ran = serve(programs, tmp_path)
    assert ran.code == 0, ran.err
    assert ran.out.endswith("features of 4 images written, 2 existed already, 0 failed\n")
    assert len(ran.err.splitlines()) == 4
    assert [path.read_bytes() for path in features[:3]] == whole[:3]
    assert [path.stat().st_ino == inode for path, inode in zip(features, inodes, strict=True)] == [False] * 4 + [
        True
    ] * 2
    with safe_open(features[3], "np") as stored:
        assert (stored.metadata()["height"], stored.metadata()["width"]) == ("28", "30")
    assert serve(programs, tmp_path).out.endswith("features of 0 images written, 6 existed already, 0 failed\n")


OUTPUT_TYPES = {"sam3_feat_0": "float16", "sam3_pos_0": "float32"}


def test_a_plan_of_a_fixed_batch_serves_fewer(programs: Programs, tmp_path: Path) -> None:
    """One image for a plan that takes two."""
    paths = folder_of(tmp_path, 2)
    text = PLAN.replace(b"-1,3,16,16 1,2,4", b"2,3,16,16 2,2,2").replace(b"-1,8", b"2,8")
    facts = {"inputs": [{"name": "image", "dtype": "float32", "shape": [2, 3, 16, 16]}]}
    shapes = [{"name": name, "dtype": kind, "shape": [2, 8, 4, 4]} for name, kind in OUTPUT_TYPES.items()]
    write_plan(tmp_path / "plan", text, **facts, outputs=shapes, batch="2")
    ran = serve(programs, tmp_path)
    assert ran.code == 1, ran.err  # the first of the two is damaged
    check_features(tmp_path, paths)


def test_a_terminal_is_shown_how_far_it_is(programs: Programs, tmp_path: Path) -> None:
    folder_of(tmp_path, 3)  # the first is damaged
    mine, its = os.openpty()
    command = [programs.path("neck-engine"), tmp_path / "plan" / "x.plan"]
    command += ["--serve-folder", tmp_path / "in", tmp_path / "out"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=its, env=settings({}), timeout=600)
    os.close(its)
    shown = os.read(mine, 65536).decode()
    os.close(mine)
    assert ended.returncode == 1
    assert "\r3 of 3 images" in shown.replace("\r\n", "\n")
