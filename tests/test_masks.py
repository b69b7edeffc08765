"""The whole model twice: a sound file passes, and every kind of wrong file is seen in the masks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from exporting import neck_export_cli
from onnx import helper
from PIL import Image
from synthetic import synthetic_result

from benchmarks.bench import read_masks, run_bench
from benchmarks.errors import BenchError
from benchmarks.masks.objects import (
    SAME_OBJECT,
    Objects,
    best_pairs,
    box_iou,
    differ,
    figures,
    lines,
    mask_ious,
    worst_lines,
)
from benchmarks.options import BenchOptions
from benchmarks.results.result_files import check_result
from export.contract.manifest import file_entry
from export.contract.options import ExportOptions
from export.pipeline import export_onnx

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[sam3]'")

from tiny_sam3 import save_model, save_tokenizer  # noqa: E402 - it imports transformers

IMAGES = Path(__file__).parent / "data" / "preprocess"
TEXTS = ("--prompt", "cat", "--prompt", "a cup", "--threshold", "0.2")
"""Scores of the tiny model lie between 0.3 and 0.7."""
PLACES = ("--points", "0.4,0.5", "--boxes", "0.1,0.2,0.6,0.7")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x.onnx, and half.onnx of the same trace."""
    folder = tmp_path_factory.mktemp("files")
    for name, precision in (("x", "fp32"), ("half", "fp16")):
        export_onnx(ExportOptions(folder / f"{name}.onnx", model, necks="both", precision=precision, verify=False))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("image_0.png", "image_1.png"):
        shutil.copy(IMAGES / name, folder)
    return folder


@pytest.fixture(scope="module")
def one(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one image."""
    folder = tmp_path_factory.mktemp("one")
    shutil.copy(images / "image_0.png", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded_once(model: Path) -> Iterator[None]:
    """Lets transformers load each model once: a third of a second in every run."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (transformers.Sam3Model, transformers.Sam3TrackerVideoModel):
            patch.setattr(kind, "from_pretrained", remembered(kind.from_pretrained, model))
        yield


def remembered(load: Callable[..., Any], model: Path) -> Callable[..., Any]:
    known: list[Any] = []

    def again(folder: Path, **asked: Any) -> Any:
        if folder != model:
            return load(folder, **asked)
        if not known:
            known.append(load(folder, **asked))
        return copy.deepcopy(known[0])

    return again


def copied(files: Path, folder: Path, name: str = "x") -> Path:
    for path in files.glob(f"{name}.*"):
        shutil.copy(path, folder)
    return folder / f"{name}.onnx"


def changed(files: Path, folder: Path, change: Any) -> Path:
    """A copy with another graph, whose manifest knows its new hash."""
    path = copied(files, folder)
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest["files"] = [file_entry(path.with_name(entry["name"])) for entry in manifest["files"]]
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


def run(file: Path, model: Path, images: Path, *more: str | Path) -> Any:
    return neck_export_cli("masks", file, "--model", model, "--images", images, *more)


@pytest.mark.parametrize("asked", [TEXTS, PLACES], ids=["texts", "places"])
def test_an_fp32_file_gives_the_same_masks(
    asked: tuple[str, ...], files: Path, model: Path, images: Path, tmp_path: Path
) -> None:
    file = copied(files, tmp_path)
    ran = run(file, model, images, *asked, "--save", tmp_path / "drawn")
    assert ran.code == 0, ran
    assert "2 images; " in ran.out and "0 only with the exported encoder" in ran.out
    assert "mask IoU: mean 1.000" in ran.out
    told = json.loads(file.with_suffix(".json").read_text())["masks"]
    assert told["passed"] and told["objects"] >= 4 and told["mean_iou"] > 0.9995 and told["largest_score_error"] < 1e-4
    assert "simulated" not in told["method"]
    assert "1.000" in neck_export_cli("inspect", file).out
    check_result(synthetic_result() | {"masks": read_masks([file])}, "a report's")
    drawn = Image.open(tmp_path / "drawn" / "image_0.png.masks.png")
    assert drawn.size == (3 * 112, 112) and len(list((tmp_path / "drawn").iterdir())) == 2
    third = np.asarray(drawn)[:, 224:]
    shown = np.asarray(drawn)[:, :112]
    assert (shown != np.asarray(drawn)[:, 112:224]).any()  # two colors
    assert not (third == [255 // 2, 0, 96 // 2]).all(-1).any()


def test_an_fp16_file_by_its_simulation(files: Path, model: Path, images: Path, tmp_path: Path) -> None:
    """FP16 through 4 blocks moves masks of a random model by a few pixels; the figures are shown."""
    file = copied(files, tmp_path, "half")
    ran = run(file, model, images, *TEXTS, "--gate", "0.9")
    assert ran.code == 0, ran
    told = json.loads(file.with_suffix(".json").read_text())["masks"]
    assert (
        0.9 < told["mean_iou"] <= 1
        and "simulated: ONNX Runtime computes in FP32" in told["method"]
        and told["method"] in ran.out
    )
    assert 1e-6 < told["largest_score_error"] < 0.1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda file: None,
            "x.onnx: the manifest .* no comparison of masks yet; first run `neck-export masks .*x.onnx --model MODEL",
        ),
        (lambda file: file.with_suffix(".json").unlink(), "the manifest is missing"),
        (lambda file: file.with_name("x.onnx.data").write_bytes(b""), "x.onnx.data"),
        (lambda file: file.unlink(), "x.onnx"),
    ],
)
def test_a_report_takes_no_file_without_a_verdict(spoil: Any, told: str, files: Path, tmp_path: Path) -> None:
    file = copied(files, tmp_path)
    spoil(file)
    with pytest.raises(BenchError, match=f"--masks .*{told}"):
        run_bench(BenchOptions(tmp_path / "report", masks=(file,)))


def other_weights(graph: onnx.GraphProto) -> None:
    """Another neck: its outputs are taken from the other's."""
    for level in range(4):
        swap_names(graph, f"sam3_feat_{level}", f"sam2_feat_{level}")


def swapped_levels(graph: onnx.GraphProto) -> None:
    """Level 0 is level 1 enlarged, level 1 is level 0 thinned out."""
    rename(graph, "sam3_feat_0", "fine")
    rename(graph, "sam3_feat_1", "coarse")
    for source, target, factor in (("coarse", "sam3_feat_0", 2.0), ("fine", "sam3_feat_1", 0.5)):
        scales = helper.make_tensor(f"{target}.scales", onnx.TensorProto.FLOAT, [4], [1, 1, factor, factor])
        graph.initializer.append(scales)
        graph.node.append(helper.make_node("Resize", [source, "", scales.name], [target], mode="nearest"))


def without_positions(graph: onnx.GraphProto) -> None:
    for level in range(4):
        rename(graph, f"sam3_pos_{level}", f"pos_{level}")
        graph.node.append(helper.make_node("Sub", [f"pos_{level}", f"pos_{level}"], [f"sam3_pos_{level}"]))


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Gives a value inside the graph another name; the graph's output keeps its own."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def swap_names(graph: onnx.GraphProto, first: str, second: str) -> None:
    rename(graph, first, "between")
    rename(graph, second, first)
    rename(graph, "between", second)


@pytest.mark.parametrize("wrong", [other_weights, swapped_levels, without_positions], ids=lambda one: one.__name__)
def test_a_wrong_file_is_seen(wrong: Any, files: Path, model: Path, one: Path, tmp_path: Path) -> None:
    file = changed(files, tmp_path, wrong)
    ran = run(file, model, one, *TEXTS, "--no-check")
    assert ran.code == 3, ran
    assert (
        "error: " in ran.err
        and f"{file}: the encoder in this file failed the mask comparison" in ran.err
        and "image_" in ran.err
    )
    told = json.loads(file.with_suffix(".json").read_text())["masks"]
    assert not told["passed"] and told["below_gate"]
    assert "own encoder, and" in neck_export_cli("inspect", file).out


def test_other_weights_are_refused_before(files: Path, model: Path, images: Path, tmp_path: Path) -> None:
    file = copied(files, tmp_path)
    where = file.with_suffix(".json")
    manifest = json.loads(where.read_text())
    manifest["weights_sha256"]["sam3"]["float32"] = "0" * 64
    where.write_text(json.dumps(manifest))
    ran = run(file, model, images, *TEXTS)
    assert (
        ran.code == 1
        and "the weights of the file differ from those of the model's encoder at vision_encoder (sam3)" in ran.err
    )
    assert "masks" not in json.loads(where.read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--points X,Y and --boxes X0,Y0,X1,Y1"),
        ((*TEXTS, "--points", "0.5,0.5"), "--prompt TEXT, or"),
        (("--points", "0.5,1.5"), "width and height"),
        (("--boxes", "0.5,0.5,0.4,0.6"), "--boxes: the box (0.5, 0.5, 0.4, 0.6) has no area"),
        (("--prompt", "cat", "--threshold", "0.99"), "the score threshold in any image"),
    ],
)
def test_prompts_that_cannot_be(words: tuple[str, ...], message: str, files: Path, model: Path, images: Path) -> None:
    ran = run(files / "x.onnx", model, images, *words)
    assert ran.code == 1 and message in ran.err and len(ran.err.splitlines()) <= 2


def test_points_that_are_no_numbers(files: Path, model: Path, images: Path) -> None:
    for words in (("--points", "a,b"), ("--points", "0.1,0.2,0.3"), ("--boxes", "0.1,0.2")):
        assert run(files / "x.onnx", model, images, *words).code == 2


def test_models_that_cannot_be(files: Path, model: Path, images: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for kind, asked, message in (
        (
            "sam3_tracker_video",
            TEXTS,
            "a model of type 'sam3_tracker_video' accepts --points and --boxes, but these prompts need",
        ),
        (
            "sam3",
            PLACES,
            "a model of type 'sam3' accepts --prompt, but these prompts need a model of type sam3_tracker_video",
        ),
        ("clip", TEXTS, "does not support models of type 'clip'. The given prompts need a model of type sam3"),
        ("sam3_video", TEXTS, "transformers cannot load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        ran = run(files / "x.onnx", tmp_path, images, *asked)
        assert ran.code == 1 and message in ran.err and len(ran.err.splitlines()) <= 2, ran
    ran = run(files / "x.onnx", images, images, *TEXTS)
    assert ran.code == 1 and "no config.json" in ran.err, ran
    empty = tmp_path / "empty"
    empty.mkdir()
    ran = run(files / "x.onnx", model, empty, *TEXTS)
    assert ran.code == 1 and "no image" in ran.err


def test_a_checkpoint_without_a_package(
    files: Path, model: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("sam3", "ultralytics"):
        monkeypatch.setitem(sys.modules, package, None)
    ran = run(files / "x.onnx", model / "model.safetensors", images, *TEXTS)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1, ran
    assert "needs the package sam3 or ultralytics (sam3: " in ran.err and "or set --model to a Hugging Face" in ran.err


def objects(*squares: tuple[int, int], side: int = 4, presence: float = 1.0) -> Objects:
    """Squares by their upper left corners in an image of 16 x 16."""
    masks = np.zeros((len(squares), 16, 16), bool)
    for mask, (top, left) in zip(masks, squares, strict=True):
        mask[top : top + side, left : left + side] = True
    boxes = np.array([(left, top, left + side, top + side) for top, left in squares], np.float32).reshape(-1, 4)
    return Objects(masks, boxes, np.linspace(0.9, 0.6, len(squares), dtype=np.float32), presence)


def test_objects_are_paired_by_their_masks() -> None:
    one = differ("a", "cat", objects((0, 0), (8, 8)), objects((8, 9), (0, 0), presence=0.75))
    assert (
        one.ious == (1.0, 12 / 20) and one.box_ious == (1.0, pytest.approx(12 / 20)) and (one.lost, one.found) == (0, 0)
    )
    assert one.score_errors == (pytest.approx(0.3), pytest.approx(0.3)) and one.presence_error == 0.25
    gone = differ("b", "cat", objects((0, 0), (8, 8)), objects((0, 3)))
    assert (gone.ious, gone.lost, gone.found, gone.worst) == ((), 2, 1, 0.0)
    none = differ("c", "cat", objects(), objects())
    assert (none.ious, none.lost, none.found, none.worst) == ((), 0, 0, 1.0)
    assert mask_ious(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), bool))[0, 0] == 1
    assert box_iou(np.zeros(4, np.float32), np.zeros(4, np.float32)) == 1


def test_as_many_objects_are_paired_as_can_be() -> None:
    """Random overlaps against all assignments; taking the most alike first finds fewer in some of them."""
    generator, fewer = np.random.default_rng(0), 0
    for _ in range(300):
        ious = generator.random(generator.integers(1, 5, 2))
        pairs = best_pairs(ious)
        rows, columns = ([pair[side] for pair in pairs] for side in (0, 1))
        assert len({*rows}) == len({*columns}) == len(pairs) and all(ious[pair] > SAME_OBJECT for pair in pairs)
        wide = ious if ious.shape[0] <= ious.shape[1] else ious.T
        sums = [
            [iou for row, column in enumerate(order) if (iou := wide[row, column]) > SAME_OBJECT]
            for order in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        ]
        count, best = max((len(values), sum(values)) for values in sums)
        assert len(pairs) == count and sum(ious[pair] for pair in pairs) == pytest.approx(best)
        fewer += len(pairs_by_likeness(ious)) < count
    assert fewer > 5
    assert (
        best_pairs(np.zeros((0, 3))) == best_pairs(np.zeros((2, 0))) == best_pairs(np.full((2, 2), SAME_OBJECT)) == []
    )


def pairs_by_likeness(ious: np.ndarray) -> list[tuple[int, int]]:
    """The most alike first, which is not the most pairs."""
    pairs: list[tuple[int, int]] = []
    for index in np.argsort(-ious, axis=None):
        row, column = divmod(int(index), ious.shape[1])
        if ious[row, column] > SAME_OBJECT and all(row != pair[0] and column != pair[1] for pair in pairs):
            pairs.append((row, column))
    return pairs


def test_what_is_not_finite_fails() -> None:
    """In a presence, in masks of objects below the threshold, in a box; whichever encoder gave it."""
    same, nothing = objects((0, 0)), objects()
    sick = dataclasses.replace(nothing, presence=math.nan, non_finite=1)
    for own, other, counts in (
        (nothing, sick, (0, 1)),
        (sick, nothing, (1, 0)),
        (same, dataclasses.replace(same, non_finite=3), (0, 3)),
    ):
        one = differ("a", "cat", own, other)
        found = figures([differ("b", "cat", same, same), one], 0.1)
        assert not found["passed"] and found["worst_image"] == "a" and one.worst == 0
        assert found["non_finite"] == dict(zip(("own", "file"), counts, strict=True))
        assert any(f", {sum(counts)} of the model" in line for line in lines(found | {"method": ""})) and worst_lines(
            found
        )
        json.dumps(found, allow_nan=False)
    assert not figures([differ("a", "cat", nothing, sick)], 0.1)["passed"]
    assert figures([differ("b", "cat", same, same)], 0.1)["passed"]
    assert box_iou(np.array([0, 0, math.nan, 1], np.float32), np.array([0, 0, 1, 1], np.float32)) == 0


def with_nan(graph: onnx.GraphProto, at: int | None) -> None:
    """NaN in every value of the finest features, or in one."""
    rename(graph, "sam3_feat_0", "sound")
    rename(graph, "sam2_feat_0", "sound2")
    for name, source in (("sam3_feat_0", "sound"), ("sam2_feat_0", "sound2")):
        value = np.zeros((1, 128, 32, 32), np.float32)
        value.reshape(-1)[slice(None) if at is None else at] = math.nan
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}.nan"))
        graph.node.append(helper.make_node("Add", [source, f"{name}.nan"], [name]))


@pytest.mark.parametrize(
    ("asked", "at"), [((*TEXTS[:4], "--threshold", "0.99"), None), (PLACES, 5)], ids=["no object", "one pixel"]
)
def test_a_file_with_nan_fails(
    asked: tuple[str, ...], at: int | None, files: Path, model: Path, one: Path, tmp_path: Path
) -> None:
    file = changed(files, tmp_path, lambda graph: with_nan(graph, at))
    ran = run(file, model, one, *asked)
    said = r"with the exported encoder, \d+ of the model's output values are NaN or infinite"
    assert ran.code == 3 and re.search(said, ran.out), ran
    told = json.loads(file.with_suffix(".json").read_text(), parse_constant=pytest.fail)["masks"]
    assert not told["passed"] and told["non_finite"]["file"] > 0 and told["non_finite"]["own"] == 0


def test_the_verdict() -> None:
    same, near = (
        differ("a", "cat", objects((0, 0)), objects((0, 0))),
        differ("b", "cat", objects((8, 8)), objects((8, 9))),
    )
    assert figures([same], 0.99)["passed"] and not figures([same, near], 0.99)["passed"]
    found = figures([same, near], 0.8)
    assert found["passed"] and found["mean_iou"] == 0.8 and found["worst_iou"] == 0.6 and found["worst_image"] == "b"
    lost = differ("c", "cat", objects((0, 0)), objects())
    assert not figures([same, lost], 0.1)["passed"]
    assert figures([same, lost], 0.1)["worst_image"] == "c"
