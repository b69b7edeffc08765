"""A file inside Meta's or Ultralytics' own SAM 3, run with .families on PYTHONPATH: tiny models, their own classes.

python tests/family_models.py meta|ultralytics SNIPPET.py...   in a folder with sam3.pt, build/sam3-encoder.onnx,
build/other.onnx (other weights), image.png and frames/; writes found.json: largest errors, what `masks` tells, the
snippets' masks.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch.overrides import TorchFunctionMode

from benchmarks.masks.checkpoint_models import load_checkpoint_segmenter
from benchmarks.masks.compare import compare_masks
from benchmarks.masks.options import MasksError, MasksOptions, Prompts
from engines.attach import attach, detach

SIZE = 112
FILE, OTHER = "build/sam3-encoder.onnx", "build/other.onnx"
TRUNK = {"embed_dim": 32, "depth": 4, "num_heads": 2, "global_att_blocks": (1, 3), "window_size": 4}
TRUNK |= {"img_size": SIZE, "pretrain_img_size": 56}
TEXT = {"width": 32, "heads": 2, "layers": 1}
ONE_LAYER = ("TransformerEncoderFusion", "SequenceGeometryEncoder")
NARROW = ("TransformerEncoderLayer", "TransformerDecoderLayer")


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what Meta's modules make on `cuda` whatever machine they are on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("cuda", "pin_memory"):
            return args[0]
        given = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "conv2d":  # in BF16 it takes ten times as long here
            with torch.autocast("cpu", enabled=False):
                return func(*(one.float() if isinstance(one, Tensor) else one for one in map(_cpu, args)), **given)
        return func(*map(_cpu, args), **given)


def _cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and torch.device("cpu") != value and str(value).startswith("cuda")
    return "cpu" if is_cuda else value


def smaller(module: Any, name: str, **changes: Any) -> None:
    """Lets a package's builder make one of its classes with other sizes."""
    real = getattr(module, name)

    def make(*args: Any, **given: Any) -> Any:
        made = real(*args, **{**given, **changes})
        if name == "VETextEncoder":  # it leaves what a checkpoint fills as the memory happens to be
            for parameter in made.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        return made

    setattr(module, name, make)


def smaller_behind(module: Any) -> None:
    """Lets a package's builder make little of what reads the features."""
    smaller(module, "TransformerDecoder", num_queries=3, num_layers=1)
    for name in ONE_LAYER:
        smaller(module, name, num_layers=1)
    for name in NARROW:
        smaller(module, name, dim_feedforward=64)


def regions(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Connected regions of masks (B, 1, H, W) and their sizes; Meta's own on a CPU stops where there is no mask."""
    import cv2

    labels, counts = (torch.zeros(masks.shape, dtype=torch.int32) for _ in range(2))
    for index, mask in enumerate(masks[:, 0]):
        _, found, figures, _ = cv2.connectedComponentsWithStats(mask.numpy().astype("uint8"))
        figures[0, cv2.CC_STAT_AREA] = 0  # the background
        labels[index, 0] = torch.from_numpy(found)
        counts[index, 0] = torch.from_numpy(figures[:, cv2.CC_STAT_AREA][found])
    return labels, counts


def surer(scoring: Any) -> None:
    """Lifts the scores of a package's class, so that random weights find objects."""
    real = scoring.forward
    scoring.forward = lambda self, *given: real(self, *given) + 8


def fake(name: str, **attributes: Any) -> None:
    """A module in the place of a package that is imported and not used, or that brings data."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(attributes)
    sys.modules[name] = module


class Letters:
    """A tokenizer by letters, in the place of those with a downloaded vocabulary."""

    def __init__(self, **_: object) -> None:
        pass

    def __call__(self, texts: list[str], context_length: int) -> Tensor:
        """Numbers (texts, context_length), 0 after the end."""
        rows = [[49406, *map(ord, text), 49407] for text in texts]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def load_torchvision() -> None:
    """Of a build for CUDA, whose operators do not load beside torch's CPU build, the part in Python."""
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        # every box is kept: what is compared has gone through the same
        torchvision.ops.nms = lambda boxes, scores, iou_threshold: scores.argsort(descending=True)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: found for key, inner in pairs for path, found in tensors(inner, f"{name}.{key}").items()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of any output, relative to its largest value."""
    assert found.keys() == expected.keys()
    errors = [(found[name] - want).abs().max() / want.abs().max() for name, want in expected.items()]
    return float(torch.stack(errors).max())


def compare(model: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """What a model reads of its backbone: its own, the file's, another file's, and after detach."""
    with torch.no_grad():
        expected, found = tensors(run()), []
        for file, check in ((FILE, True), (OTHER, False)):
            attach(model, file, check=check)
            found.append(worst(tensors(run()), expected))
            detach(model)
        again = tensors(run())
    same = all(torch.equal(again[name], want) for name, want in expected.items())
    return {"outputs": sorted(expected), "error": found[0], "other": found[1], "same_after": same}


def judged() -> dict[str, Any]:
    """What `masks` finds: a file by texts, another seed's by boxes, and the lines of what it refuses."""
    box, cup, frames, one = Prompts(boxes=((0.1, 0.2, 0.6, 0.7),)), Prompts(("a cup",)), Path("frames"), Path("one")
    one.mkdir()
    shutil.copy(frames / "0.png", one)
    told: dict[str, Any] = {
        "same": compare_masks(MasksOptions(Path(FILE), Path("sam3.pt"), frames, cup)),
        "boxes": compare_masks(MasksOptions(Path(FILE), Path("sam3.pt"), one, box)),
        "other": compare_masks(MasksOptions(Path(OTHER), Path("sam3.pt"), one, cup, check=False)),
        "refused": [],
    }
    for file, prompts in (("sam3.pt", Prompts(points=((0.5, 0.5),))), ("encoder.pt", cup), ("image.png", cup)):
        try:
            load_checkpoint_segmenter(Path(file), prompts, "cpu", 0.5, (SIZE, SIZE))
        except MasksError as error:
            told["refused"].append(str(error))
    return told


def images() -> Tensor:
    """(1, 3, SIZE, SIZE) with coarse shapes."""
    coarse = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=SIZE)


def write_video() -> None:
    """The frames as video.mp4."""
    import cv2

    images = [cv2.imread(str(path)) for path in sorted(Path("frames").iterdir())]
    writer = cv2.VideoWriter("video.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, images[0].shape[1::-1])
    for image in images:
        writer.write(image)
    writer.release()


@contextlib.contextmanager
def meta() -> Iterator[dict[str, Any]]:
    """Meta's modules; everything that they put on a GPU stays on the CPU."""
    fake("triton", jit=lambda kernel: kernel)  # its kernels are for GPUs
    fake("triton.language", constexpr=int)
    import sam3.model_builder as builder
    import sam3.perflib.connected_components

    del sys.modules["triton"], sys.modules["triton.language"]  # torch would take it for the real one
    surer(builder.DotProductScoring)
    smaller(builder, "ViT", **TRUNK)
    smaller(builder, "VETextEncoder", **TEXT)
    smaller_behind(builder)
    smaller(builder, "PositionEmbeddingSine", precompute_resolution=None)
    smaller(builder, "SimpleMaskDownSampler", interpol_size=[SIZE // 14 * 16] * 2)
    smaller(builder, "Sam3TrackerPredictor", image_size=SIZE)
    smaller(builder, "Sam3VideoInferenceWithInstanceInteractivity", image_size=SIZE)
    builder.SimpleTokenizer = Letters
    sam3.perflib.connected_components.connected_components_cpu = regions
    cuda = {"current_device": lambda: 0, "device_count": lambda: 1, "set_device": lambda device: None}
    cuda["get_device_properties"] = lambda device: None
    with OnCpu(), mock.patch.multiple(torch.cuda, **cuda):
        torch.manual_seed(0)
        whole = builder.build_sam3_video_model(load_from_HF=False, device="cpu").eval()
        encoder = torch.load("sam3.pt", weights_only=True)["model"]
        whole.load_state_dict(encoder, strict=False)
        torch.nn.init.constant_(whole.detector.transformer.decoder.presence_token_head.layers[-1].bias, 4.0)
        torch.save({"model": whole.state_dict()}, "sam3.pt")  # the video model takes a whole checkpoint only
        found = {"video": compare(whole, lambda: whole.detector.backbone.forward_image(images()))}
        image = builder.build_sam3_image_model(checkpoint_path="sam3.pt", enable_inst_interactivity=True)
        found["image"] = compare(image, lambda: image.backbone.forward_image(images()))
        found["judged"] = judged()
        with torch.autocast("cpu", torch.bfloat16):  # as it does by itself on `cuda`
            yield found


@contextlib.contextmanager
def ultralytics() -> Iterator[dict[str, Any]]:
    """Ultralytics' modules; its tokenizer's package would be downloaded."""
    fake("clip", simple_tokenizer=types.SimpleNamespace(SimpleTokenizer=Letters))
    import ultralytics.models.sam.build_sam3 as builder
    import ultralytics.utils

    ultralytics.utils.SETTINGS["runs_dir"] = "runs"  # else it saves images in this repository
    surer(builder.DotProductScoring)
    smaller(builder, "ViT", **TRUNK)
    smaller(builder, "VETextEncoder", **TEXT)
    smaller_behind(builder)
    torch.manual_seed(0)
    write_video()
    semantic = builder.build_sam3_image_model("sam3.pt")
    semantic.set_imgsz([SIZE, SIZE])
    torch.nn.init.constant_(semantic.transformer.decoder.presence_token_head.layers[-1].bias, 4.0)
    interactive = builder.build_interactive_sam3("sam3.pt")
    torch.save({"model": {f"detector.{name}": value for name, value in semantic.state_dict().items()}}, "sam3.pt")
    found = {"judged": judged()}
    found["image"] = compare(semantic, lambda: semantic.backbone.forward_image(images()))
    interactive.set_imgsz([SIZE, SIZE])
    found["interactive"] = compare(interactive, lambda: interactive.forward_image(images()))
    yield found


def run_snippet(path: str) -> list[list[int]]:
    """Runs one, its images smaller, and tells the shapes of its masks."""
    names: dict[str, Any] = {}
    code = Path(path).read_text(encoding="utf-8").replace("1008", str(SIZE))
    exec(compile(code, path, "exec"), names)
    return [list(masks.shape) for masks in names["masks"]]


if __name__ == "__main__":
    load_torchvision()
    shutil.copy("sam3.pt", "encoder.pt")  # without the rest of SAM 3, which sam3.pt gets
    with {"meta": meta, "ultralytics": ultralytics}[sys.argv[1]]() as told:
        for snippet in sys.argv[2:]:
            told[Path(snippet).stem] = run_snippet(snippet)
    Path("found.json").write_text(json.dumps(told), encoding="utf-8")
