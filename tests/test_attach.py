"""A file in the place of the encoder of each SAM 3 of transformers: tiny models, one export for all."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import trace_quickly
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.attach import AttachError, attach, detach
from engines.live.adapter import MARK
from engines.live.encoder import DeployedEncoder, EncoderError
from engines.live.file_runtimes import RuntimeFileError
from engines.live.locate_encoder import find_encoder
from engines.live.not_computed import NotComputed
from export.contract.manifest import ManifestError
from export.contract.options import ExportOptions, QuantizeOptions
from export.pipeline import export_onnx
from export.verification.fidelity import TOLERANCES
from neck.checkpoint import load_encoder

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[sam3]'")

from tiny_sam3 import SIZE, frames, load_model, make_sure, save_model, save_tokenizer, text_ids  # noqa: E402 - it imports transformers

TOLERANCE = 1e-4
"""Of an output's largest value; found are up to 2e-6."""

Run = Callable[[Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all models load from."""
    return save_model(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its encoder with both necks, batch 1 or 2."""
    output = tmp_path_factory.mktemp("file") / "x.onnx"
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        export_onnx(ExportOptions(output, checkpoint, necks="both", verify=False))
    return output


@functools.cache
def load_once(kind: str, checkpoint: Path) -> Any:
    return load_model(getattr(transformers, kind), checkpoint)


def copy_of(kind: str, checkpoint: Path) -> Any:
    """One of the four models, the test's own: a copy takes a fifth of the time."""
    return copy.deepcopy(load_once(kind, checkpoint))


@pytest.fixture
def model(checkpoint: Path) -> Any:
    """Sam3Model."""
    return copy_of("Sam3Model", checkpoint)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of an output, by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    pairs = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: found for key, inner in pairs for path, found in tensors(inner, f"{name}.{key}").items()}


def run_image(model: Any) -> dict[str, Tensor]:
    ids, mask = text_ids("cat")
    return tensors(model(pixel_values=frames(1), input_ids=ids, attention_mask=mask))


def run_points(model: Any) -> dict[str, Tensor]:
    points = torch.tensor([[[[40.0, 50.0]], [[80.0, 20.0]]]])
    return tensors(
        model(pixel_values=frames(1), input_points=points, input_labels=torch.ones(1, 2, 1, dtype=torch.int32))
    )


def run_tracker_video(model: Any) -> dict[str, Tensor]:
    session = transformers.Sam3TrackerVideoInferenceSession(frames(3), SIZE, SIZE, dtype=torch.float32)
    for name, point in ((1, (40.0, 50.0)), (7, (80.0, 20.0))):
        given = {"point_coords": torch.tensor([[[point]]]), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
        session.add_point_inputs(session.obj_id_to_idx(name), 0, given)
    session.obj_with_new_inputs = [1, 7]
    first = model(session, frame_idx=0)
    return tensors([dict(one) for one in (first, *model.propagate_in_video_iterator(session, start_frame_idx=0))])


def run_video(model: Any, texts: Sequence[str] = ("cat", "a cup"), images: Tensor | None = None) -> dict[str, Tensor]:
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    images = frames(3) if images is None else images
    session = Sam3VideoInferenceSession(images, SIZE, SIZE, dtype=torch.float32)
    for text in texts:
        prompt = session.add_prompt(text)
        session.prompt_input_ids[prompt], session.prompt_attention_masks[prompt] = text_ids(text)
    found = tensors([dict(one) for one in model.propagate_in_video_iterator(session)])
    # what the tracker reads, whether it found an object or not
    kept = session.cache.get_vision_features(len(images) - 1)
    return found | tensors(kept, "tracker")


RUNS = {
    "Sam3Model": run_image,
    "Sam3TrackerModel": run_points,
    "Sam3TrackerVideoModel": run_tracker_video,
    "Sam3VideoModel": run_video,
}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of every output, relative to its largest value."""
    assert found.keys() == expected.keys() and found
    return {
        name: float((found[name].double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-12))
        for name, want in expected.items()
    }


@pytest.mark.parametrize("kind", RUNS)
def test_every_output_of_the_whole_model(kind: str, checkpoint: Path, file: Path) -> None:
    """FP32 file attached; to the bit after detach; a file that is a hundredth off is seen."""
    model, run = copy_of(kind, checkpoint), RUNS[kind]
    if "Video" in kind:
        make_sure(model)
    with torch.no_grad():
        expected = run(model)
        encoder = attach(model, file)
        found = run(model)
        assert max(differences(found, expected).values()) < TOLERANCE
        whole = encoder._infer
        encoder._infer = lambda image, wanted: {name: value * 1.01 for name, value in whole(image, wanted).items()}
        found = run(model)  # other objects perhaps, too
        assert found.keys() != expected.keys() or max(differences(found, expected).values()) > TOLERANCE
        detach(model)
        assert all(torch.equal(value, expected[name]) for name, value in run(model).items())
    with pytest.raises(EncoderError, match="the encoder was closed"):
        encoder(frames(1))
    assert not any(MARK in vars(part) for part in model.modules())


@pytest.mark.parametrize("pattern", ["*.mlp.fc2", "*.attn.attention"])
def test_a_quantized_file(
    model: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """The features err by what the export's gate lets pass, more or less: of other images."""
    trace_quickly(monkeypatch)
    path, limit, asked = tmp_path / "x.onnx", TOLERANCES["fp8"].relative_l2, QuantizeOptions((pattern,))
    export_onnx(ExportOptions(path, checkpoint, necks="both", precision="fp8", quantize=asked))
    with torch.no_grad():
        exact = model.vision_encoder(frames(1)).fpn_hidden_states
        attach(model, path, simulated=True)
        found = model.vision_encoder(frames(1)).fpn_hidden_states
        detach(model)
    errors = [float((one - want).norm() / want.norm()) for one, want in zip(found, exact, strict=True)]
    assert 1e-3 < max(errors) < 1.5 * limit, errors


@pytest.fixture(scope="module")
def head_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both necks, and what the mask decoder reads of sam2."""
    output = tmp_path_factory.mktemp("head") / "x.onnx"
    export_onnx(ExportOptions(output, checkpoint, necks="both", sam2_outputs="head", verify=False))
    return output


@pytest.mark.parametrize("kind", ["Sam3TrackerModel", "Sam3TrackerVideoModel", "Sam3VideoModel"])
def test_a_file_with_the_trackers_head(kind: str, checkpoint: Path, head_file: Path) -> None:
    """The decoder's conv_s0 and conv_s1 are in the file; other weights in them are known."""
    model, run = copy_of(kind, checkpoint), RUNS[kind]
    decoder = getattr(model, "tracker_model", model).mask_decoder
    if "Video" in kind:
        make_sure(model)
    with torch.no_grad():
        expected = run(model)
        attach(model, head_file)
        passed = torch.ones(1, 2, 3, 3)
        assert decoder.conv_s0(passed) is passed and decoder.conv_s1(passed) is passed
        assert max(differences(run(model), expected).values()) < TOLERANCE
        detach(model)
        assert all(torch.equal(value, expected[name]) for name, value in run(model).items())
        decoder.conv_s1.bias += 0.01
        with pytest.raises(AttachError, match=r"sam2_head"):
            attach(model, head_file)
    assert "forward" not in vars(decoder.conv_s0)


def test_a_head_needs_a_tracker(model: Any, head_file: Path) -> None:
    """A detector reads sam3 of such a file; its sam2 outputs are nobody's."""
    with torch.no_grad():
        expected = run_image(model)
        attach(model, head_file)
        assert max(differences(run_image(model), expected).values()) < TOLERANCE
    detach(model)


def test_a_file_without_the_last_level(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    """None of the four reads it; whoever does gets an error."""
    short = with_signature(file, tmp_path, levels=[0, 1, 2])
    for kind in ("Sam3Model", "Sam3TrackerModel"):
        model, run = copy_of(kind, checkpoint), RUNS[kind]
        with torch.no_grad():
            expected = run(model)
            attach(model, short)
            assert max(differences(run(model), expected).values()) < TOLERANCE
            last = model.vision_encoder(frames(1)).fpn_hidden_states[3]
        assert last.shape == (1, 128, 4, 4)
        with pytest.raises(AttachError, match="level 3 of the features"):
            last.isnan()
        detach(model)


def with_signature(file: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a file whose manifest has another signature; its graph gives more than that says."""
    for path in file.parent.iterdir():
        shutil.copy(path, folder / path.name)
    where = folder / "x.json"
    manifest = json.loads(where.read_text())
    manifest["signature"] |= changes
    where.write_text(json.dumps(manifest))
    return folder / file.name


def assert_as_it_was(model: nn.Module, before: dict[str, nn.Module]) -> None:
    assert dict(model.named_modules()) == before
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_other_weights_are_refused(model: Any, checkpoint: Path, file: Path) -> None:
    before = dict(model.named_modules())
    weight = model.vision_encoder.backbone.layers[2].mlp.fc1.weight
    with torch.no_grad():
        weight += 1e-4 * torch.randn_like(weight)  # a light fine-tune of one tensor
    with pytest.raises(AttachError, match=r"weights .* \(trunk\); export the model's own checkpoint"):
        attach(model, file)
    assert_as_it_was(model, before)
    attach(model, file, check=False)
    detach(model)
    with torch.no_grad():
        model.vision_encoder.neck.fpn_layers[1].proj1.bias += 1e-3
    with pytest.raises(AttachError, match=r"\(trunk, sam3\)"):
        attach(model, file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model(dtype: torch.dtype, model: Any, file: Path) -> None:
    """Its rounded weights are known again; the outputs are cast, which is said once."""
    model.to(dtype)
    encoder = attach(model, file)
    with pytest.warns(UserWarning, match=r"computes in float32, so its outputs are cast to the model's torch") as said:
        for _ in range(2):
            found = model.vision_encoder(frames(1).to(dtype))
    assert len(said) == 1
    assert {one.dtype for one in (*found.fpn_hidden_states, *found.fpn_position_encoding)} == {dtype}
    assert encoder.device.type == "cpu"
    detach(model)


def test_under_autocast(model: Any, file: Path) -> None:
    """Features have autocast's type, as the model's own have, whatever the images' is."""
    with torch.autocast("cpu", torch.bfloat16):
        own = model.vision_encoder(frames(1)).fpn_hidden_states
        attach(model, file)
        with pytest.warns(UserWarning, match=r"its outputs are cast to the model's torch\.bfloat16"):
            found = model.vision_encoder(frames(1)).fpn_hidden_states
        detach(model)
    assert {one.dtype for one in found} == {one.dtype for one in own} == {torch.bfloat16}


def test_a_model_on_another_device(model: Any, file: Path) -> None:
    """Where no runtime is, where no weights are, and elsewhere than the file: refused, the model as it was."""
    before = dict(model.named_modules())
    model.to("meta")
    with pytest.raises(EncoderError, match=r"x\.onnx: ONNX Runtime cannot run the file on the device meta"):
        attach(model, file)
    with pytest.raises(AttachError, match=r"encoder at vision_encoder is on the meta device and has no weights yet"):
        attach(model, file, device="cpu")
    assert dict(model.named_modules()) == before
    attach(model, file, device="cpu", check=False)
    detach(model)


def test_a_file_that_runs_elsewhere_than_the_model(
    model: Any,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a plan, which runs on the GPU whatever is said, beside a model on the CPU; the file is closed."""
    before, opened = dict(model.named_modules()), []

    class Elsewhere(DeployedEncoder):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.device = torch.device("cuda")
            opened.append(self)

    monkeypatch.setattr("engines.attach.DeployedEncoder", Elsewhere)
    with pytest.raises(
        AttachError, match=r"runs on cuda, but the model is on cpu; move the model: model\.to\('cuda'\)"
    ):
        attach(model, file)
    assert_as_it_was(model, before)
    with pytest.raises(EncoderError, match="closed; open"):
        opened[0](frames(1))


def test_an_attachment_that_breaks_off(model: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is as it was, and can be attached."""

    def broken(*given: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("engines.live.adapter.LoadGuard", broken)
        attach(model, file)
    parts = [part for part in model.modules() if MARK in vars(part) or "forward" in vars(part)]
    assert parts == []
    attach(model, file)
    detach(model)


def test_detach_follows_the_model(model: Any, file: Path) -> None:
    attach(model, file)
    model.half()
    detach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_free(model: Any, file: Path, tmp_path: Path) -> None:
    """The weights' memory is given back; the model runs on the file alone and cannot be detached, saved or loaded."""
    own, state = model.vision_encoder, model.state_dict()
    with torch.no_grad():
        expected = run_image(model)
        attach(model, file, free=True)
        assert max(differences(run_image(model), expected).values()) < TOLERANCE
    assert [*own.parameters()] == [] and model.device.type == "cpu" and model.half().dtype == torch.float16
    for call in (model.state_dict, own.state_dict, lambda: model.save_pretrained(tmp_path), lambda: detach(model)):
        with pytest.raises(AttachError, match=r"free=True"):
            call()
    with pytest.raises(AttachError, match=r"load_state_dict\(\) would change the encoder weights vision_encoder\."):
        model.load_state_dict(state)
    assert not [*tmp_path.glob("*.safetensors")]
    with torch.no_grad(), pytest.warns(UserWarning, match="computes in float32"):
        assert own(frames(1)).fpn_hidden_states[0].dtype == torch.float16


def test_a_neck_that_is_not_asked_for_stays(checkpoint: Path, file: Path) -> None:
    """The tracker's own neck is neither freed nor guarded where the file does not stand in for it."""
    model = copy_of("Sam3VideoModel", checkpoint)
    state = {name: value + 1 for name, value in model.tracker_neck.state_dict().items()}
    attach(model, file, necks=("sam3",), free=True)
    model.tracker_neck.load_state_dict(state)
    assert [*model.tracker_neck.parameters()] and not [*model.detector_model.vision_encoder.parameters()]
    with torch.no_grad():
        embeds = model.detector_model.get_vision_features(pixel_values=frames(1))
        with pytest.raises(
            AttachError, match=r"last_hidden_state .*is not among the values that the attached file computes"
        ):
            model.get_vision_features_for_tracker(embeds)


def test_what_does_not_fit_is_refused(model: Any, file: Path, tmp_path: Path) -> None:
    before = dict(model.named_modules())
    sizes = [[36, 36], [18, 18], [9, 9], [4, 4]]
    for changes, words in (
        (
            {"necks": ["sam2"]},
            r"the model's encoder at vision_encoder, .* of the neck sam3\. .*--neck sam2,sam3",
        ),
        ({"levels": [0, 2]}, r"not contain level 1 .*neck-export onnx .*--levels 0,1,2"),
        (
            {"image_size": [126, 126], "level_sizes": sizes},
            r"126x126 pixels, .* 112x112 pixels\. .*--image-size 112x112",
        ),
        ({"level_sizes": sizes[:3], "levels": [0, 1, 2]}, r"with 3 levels, but the model's encoder has 4"),
    ):
        folder = tmp_path / str(len(words))
        folder.mkdir()
        with pytest.raises((AttachError, EncoderError), match=words):
            attach(model, with_signature(file, folder, **changes))
        assert_as_it_was(model, before)
    where = tmp_path / "old" / "x.json"
    where.parent.mkdir()
    with_signature(file, where.parent)
    manifest = json.loads(where.read_text())
    del manifest["weights_sha256"]
    where.write_text(json.dumps(manifest))
    with pytest.raises(AttachError, match=r"x\.json: the manifest contains no SHA-256 of the weights"):
        attach(model, where.with_name("x.onnx"))
    with pytest.raises(AttachError, match="the model has no neck sam2; choose from sam3"):
        attach(model, file, necks=("sam3", "sam2"))
    with pytest.raises(RuntimeFileError, match="no CUDA provider; run pip install onnxruntime-gpu"):
        attach(model, file, device="cuda")
    with pytest.raises(ManifestError, match=r"x\.plan\.json: the manifest is missing"):
        attach(model, file.with_name("x.plan"))
    assert_as_it_was(model, before)


def test_attached_twice_and_not_at_all(model: Any, file: Path) -> None:
    with pytest.raises(AttachError, match="is attached"):
        detach(model)
    attach(model, file)
    before = dict(model.named_modules())
    with pytest.raises(AttachError, match=r"x\.onnx is already attached"):
        attach(model, file)
    assert dict(model.named_modules()) == before
    detach(model)


def test_images_that_the_file_does_not_take(model: Any, file: Path) -> None:
    attach(model, file)
    with pytest.raises(EncoderError, match=r"batch size 1, but 3 images were passed\. .*--batch 1:3:3"):
        model.vision_encoder(frames(3))
    with pytest.raises(
        EncoderError, match=r"112x112 pixels, but the images .* have 126x112 pixels\. .*--image-size 126x112"
    ):
        model.vision_encoder(torch.zeros(1, 3, 126, 112))
    detach(model)


def test_models_without_an_encoder(model: Any, file: Path) -> None:
    with pytest.raises(AttachError, match=r"Linear contains no SAM 3 image encoder.* are: nothing"):
        attach(nn.Linear(2, 2), file)
    with pytest.raises(AttachError, match=r"submodules of the given model are: detr \(Sam3DetrEncoder\)"):
        attach(nn.ModuleDict({"detr": model.detr_encoder}), file)
    with pytest.raises(AttachError, match="Sam3VisionModel is the image encoder itself"):
        attach(model.vision_encoder, file)
    with pytest.raises(AttachError, match="str: this object is neither a PyTorch module nor a predictor"):
        attach("model.pt", file)
    twice = nn.ModuleDict({"a": model, "b": load_same(model)})
    with pytest.raises(AttachError, match=r"contains 2 encoders \(a\.vision_encoder, b\.vision_encoder\)"):
        attach(twice, file)


def load_same(model: Any) -> nn.Module:
    return type(model)(model.config)


def test_the_tracker_gets_the_features_of_its_own_images(checkpoint: Path, file: Path) -> None:
    """In any order, from each call's own hidden states; a view of another tensor is refused."""
    model = copy_of("Sam3VideoModel", checkpoint)
    with torch.no_grad():
        embeds = [model.detector_model.get_vision_features(pixel_values=frames(2)[turn : turn + 1]) for turn in (0, 1)]
        want = [model.get_vision_features_for_tracker(one)[0] for one in embeds]
        attach(model, file)
        with pytest.raises(AttachError, match="the attached"):
            model.get_vision_features_for_tracker(embeds[0])
        embeds = [model.detector_model.get_vision_features(pixel_values=frames(2)[turn : turn + 1]) for turn in (0, 1)]
        for turn in (1, 0, 1):
            found = model.get_vision_features_for_tracker(embeds[turn])[0]
            errors = [
                float((one - own).abs().max() / own.abs().max()) for one, own in zip(found, want[turn], strict=True)
            ]
            others = [
                float((one - own).abs().max() / own.abs().max()) for one, own in zip(found, want[1 - turn], strict=True)
            ]
            assert max(errors) < TOLERANCE < min(others)
    detach(model)


def test_what_the_file_does_not_compute_is_passed_on_and_not_read() -> None:
    """Every reader gets an error that names it; views, moves and copies do not read."""
    there = NotComputed("the map", (1, 6, 4), torch.float32, torch.device("cpu"), source="run")
    view = there.contiguous().view(1, 2, 3, -1).permute(0, 3, 1, 2).to(torch.float16)
    assert (view.shape, view.dtype, view.source) == ((1, 4, 2, 3), torch.float16, "run")
    assert len(there) == 1 and there.dim() == 3 and there.size(1) == 6 and hasattr(there, "view")
    assert (there + torch.ones(1, 1, 4)).shape == (torch.ones(1, 1, 4) + there).shape == there.shape
    assert copy.deepcopy(there) is there and pickle.loads(pickle.dumps(there)).source is None
    targets: list[Callable[[], Any]] = [
        *(lambda name=name: getattr(there, name)() for name in ("mean", "isnan", "numpy", "tolist", "clone")),
        *(lambda call=call: call(there) for call in (bool, float, list, np.asarray, torch.isnan, torch.sum)),
        *(lambda call=call: call([there]) for call in (torch.cat, torch.stack)),
        lambda: there[0],
        lambda: there == 1,
        lambda: nn.Linear(4, 2)(there),  # type: ignore[arg-type]
    ]
    for read in targets:
        with pytest.raises(AttachError, match=r"the map .*is not among the values that the attached file computes"):
            read()


def test_every_level_of_the_file_is_handed_out(model: Any, file: Path) -> None:
    """Features that are kept and used again, on disk too; hidden states keep their place and are not read."""
    ids, mask = text_ids("cat")
    with torch.no_grad():
        own = model.get_vision_features(pixel_values=frames(1))
        want = model(pixel_values=frames(1), input_ids=ids, attention_mask=mask, output_hidden_states=True)
        attach(model, file)
        kept = model.get_vision_features(pixel_values=frames(1))
        kept = pickle.loads(pickle.dumps(kept))
        found = model(vision_embeds=kept, input_ids=ids, attention_mask=mask)
        whole = model(pixel_values=frames(1), input_ids=ids, attention_mask=mask, output_hidden_states=True)
        pair = model.vision_encoder(frames(1), return_dict=False)
        detach(model)
    for name in ("fpn_hidden_states", "fpn_position_encoding"):
        assert len(kept[name]) == 4
        errors = differences(tensors(kept[name]), tensors(own[name]))
        assert max(errors.values()) < TOLERANCE
    assert max(differences({"masks": found.pred_masks}, {"masks": want.pred_masks}).values()) < TOLERANCE
    assert kept.last_hidden_state.shape == own.last_hidden_state.shape and len(pair) == 3
    assert whole.keys() == want.keys()
    assert [one.shape for one in whole.vision_hidden_states] == [one.shape for one in want.vision_hidden_states]
    for unread in (kept.last_hidden_state, whole.vision_hidden_states[2]):
        with pytest.raises(
            AttachError, match=r"(last_hidden_state|hidden_states\[2\]) .*is not among the values that the attached"
        ):
            unread.mean()


def test_the_state_is_the_models_own(model: Any, file: Path, tmp_path: Path) -> None:
    """What is saved, loaded, trained or frozen while a file is attached is the encoder that detach gives back."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    attach(model, file)
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    model.load_state_dict(state)
    own = {name for name in state if name.startswith("vision_encoder.")}
    assert len(own) == 90
    changed = {
        name: value + 1 if name == "vision_encoder.neck.fpn_layers.3.proj1.bias" else value
        for name, value in state.items()
    }
    with pytest.raises(
        AttachError, match=r"would change the encoder weights vision_encoder\.neck\.fpn_layers\.3\.proj1\.bias\. "
    ):
        model.load_state_dict(
            {name: value + 1 if name not in own else changed[name] for name, value in changed.items()}, strict=False
        )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    rest = {name: value + 1 for name, value in state.items() if name not in own}
    model.load_state_dict(rest, strict=False)
    assert torch.equal(
        model.detr_encoder.layers[0].layer_norm1.weight, rest["detr_encoder.layers.0.layer_norm1.weight"]
    )
    model.eval().requires_grad_(False)
    detach(model)
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.load_state_dict(changed)


def test_copies_open_the_file_again(checkpoint: Path, file: Path) -> None:
    """deepcopy and torch.save of an attached model and of a DeployedEncoder; the copy is apart from the first."""
    model = copy_of("Sam3VideoModel", checkpoint)
    attach(model, file)
    stored = io.BytesIO()
    with torch.no_grad():
        want = run_features(model)
        torch.save(model, stored)
        copied = copy.deepcopy(model)
        detach(model)
        loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
        for other in (copied, loaded):
            assert torch.equal(run_features(other), want)
            with pytest.raises(AttachError, match=r"would change the encoder weights .*layers\.0\.mlp\.fc1\.weight\. "):
                other.detector_model.load_state_dict(
                    {f"{VISION}.layers.0.mlp.fc1.weight": torch.zeros(64, 16)}, strict=False
                )
            detach(other)
            assert torch.equal(run_features(other), run_features(model)) and not torch.equal(run_features(other), want)
    with DeployedEncoder(file, levels=(0, 2)) as first:
        second = pickle.loads(pickle.dumps(first))
        assert second.levels == (0, 2) and torch.equal(second(frames(1))[0][1], first(frames(1))[0][1])
    assert len(second(frames(1))[0]) == 2
    with pytest.raises(EncoderError, match="was closed, so it cannot be copied"):
        copy.deepcopy(first)


VISION = "vision_encoder.backbone"


def run_features(model: Any) -> Tensor:
    """The finest features of the tracker."""
    return model.get_vision_features_for_tracker(model.detector_model.get_vision_features(pixel_values=frames(1)))[0][0]


def test_gradients_and_hooks_are_told(model: Any, file: Path) -> None:
    """An error of the images' gradient, one warning of the encoder's own; one of hooks that nobody calls."""
    attach(model, file)
    encoder = model.vision_encoder
    with pytest.raises(EncoderError, match="computes no gradients"):
        encoder(frames(1).requires_grad_()).fpn_hidden_states[0].sum().backward()
    with pytest.raises(EncoderError, match="computes no gradients"), DeployedEncoder(file) as alone:
        alone(frames(1).requires_grad_())[0][3].sum().backward()
    weight = torch.ones(1, requires_grad=True)  # of what reads the features
    with pytest.warns(UserWarning, match="weights") as said:
        for _ in range(2):
            (encoder(frames(1)).fpn_hidden_states[0].sum() * weight).backward()
    assert len(said) == 1 and weight.grad is not None
    called: list[str] = []
    encoder.register_forward_hook(lambda *given: called.append("encoder"))
    encoder.backbone.layers[1].register_forward_hook(lambda *given: called.append("layer"))
    encoder.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"hooks on .* backbone\.layers\.1 are not called") as said:
        for _ in range(2):
            assert not encoder(frames(1)).fpn_hidden_states[0].requires_grad
    assert len(said) == 1 and called == ["encoder", "encoder"]
    detach(model)
    encoder(frames(1))
    assert called[2:] == ["layer", "encoder"]


@pytest.mark.parametrize("how", ["encoder", "model", "in place"])
def test_compiled_before(how: str, model: Any, file: Path) -> None:
    """The file computes, in the place of what was compiled and ran; the wrapper is there again after detach."""
    whole = model
    if how == "encoder":
        model.vision_encoder = torch.compile(model.vision_encoder, backend="eager")
    elif how == "model":
        whole = torch.compile(model, backend="eager")
    else:
        model.vision_encoder.compile(backend="eager")
    kind, run = (
        type(model.vision_encoder),
        (lambda: whole.get_vision_features(pixel_values=frames(1)).fpn_hidden_states[0]),
    )
    with torch.no_grad():
        own = run()
        encoder = attach(model, file)
        first = encoder._infer
        encoder._infer = lambda image, wanted: {name: value + 1 for name, value in first(image, wanted).items()}  # type: ignore[method-assign]
        assert torch.allclose(run(), own + 1, atol=1e-3)
        detach(model)
        assert torch.allclose(run(), own, atol=1e-5) and type(model.vision_encoder) is kind


def change_window(encoder: Any) -> None:
    encoder.backbone.layers[0].window_size = 2


def change_global_block(encoder: Any) -> None:
    encoder.backbone.layers[2].window_size = 0


def change_activation(encoder: Any) -> None:
    encoder.backbone.layers[3].mlp.activation_fn = nn.ReLU()


def change_approximation(encoder: Any) -> None:
    encoder.backbone.layers[3].mlp.activation_fn = nn.GELU("tanh")


def change_eps(encoder: Any) -> None:
    encoder.backbone.layers[1].layer_norm2.eps = 1e-5


def change_heads(encoder: Any) -> None:
    encoder.backbone.layers[1].attention.num_attention_heads = 4


def change_theta(encoder: Any) -> None:
    encoder.backbone.layers[1].rotary_emb.inv_freq *= 1.01


def change_grid(encoder: Any) -> None:
    encoder.backbone.layers[1].position_ids *= 2


def change_stride(encoder: Any) -> None:
    encoder.neck.fpn_layers[0].proj2.padding_mode = "reflect"


def change_neck_activation(encoder: Any) -> None:
    encoder.neck.fpn_layers[0].scale_layers[1] = nn.ReLU()


def change_pooling(encoder: Any) -> None:
    encoder.neck.fpn_layers[3].scale_layers = nn.ModuleList()


def change_temperature(encoder: Any) -> None:
    encoder.neck.position_encoding.temperature = 1000


def add_tensor(encoder: Any) -> None:
    encoder.backbone.layers[1].lambda1 = nn.Parameter(torch.ones(16))


def drop_block(encoder: Any) -> None:
    encoder.backbone.layers = encoder.backbone.layers[:3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_window, r"window_size of .*backbone\.layers\.0 is 4 in the file, but 2 in the model"),
        (change_global_block, r"window_size of .*layers\.2 is 4 in the file, but 0 in the model"),
        (change_activation, r"the activation function of .*layers\.3 is the exact GELU in the file, but ReLU"),
        (
            change_approximation,
            r"the activation function of .*layers\.3 is the exact GELU in the file, but GELU\(approximate",
        ),
        (change_eps, r"eps of .*layers\.1\.layer_norm2 is 1e-06 in the file, but 1e-05 in the model"),
        (change_heads, r"the number of attention heads of .*layers\.1 is 2 in the file, but 4 in the model"),
        (change_theta, r"layers\.1\.rotary_emb\.inv_freq"),
        (change_grid, r"layers\.1\.position_ids"),
        (change_stride, r"padding_mode of .*fpn_layers\.0\.proj2 is zeros in the file, but reflect in the model"),
        (
            change_neck_activation,
            r"fpn_layers\.0 is the exact GELU \(erf\) in the file, but ReLU\(\) in the model",
        ),
        (change_pooling, r"fpn_layers\.3 scales the feature map by 0\.5 in the file, but by 1 in the model"),
        (change_temperature, r"the position encoding of the model differs"),
        (add_tensor, r".*layers\.1\.lambda1"),
        (drop_block, r"depth is 4 in the file, but 3 in the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_architecture_with_the_same_tensors(
    change: Callable[[Any], None],
    words: str,
    model: Any,
    file: Path,
) -> None:
    """Field by field; the same weights are no proof of the same function."""
    with torch.no_grad():
        change(model.vision_encoder)
    with pytest.raises(AttachError, match=words):
        attach(model, file)
    assert not any(MARK in vars(part) for part in model.modules())
    attach(model, file, check=False)


class Adapted(nn.Module):
    """A layer as PEFT's LoRA leaves it, by the names of its tensors."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})


def test_an_adapter_of_peft_is_told(model: Any, file: Path) -> None:
    attention = model.vision_encoder.backbone.layers[0].attention
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(
        AttachError,
        match=r"the tensor .*q_proj.* of a PEFT adapter that was not merged.*model\.merge_and_unload",
    ):
        attach(model, file)


@pytest.mark.parametrize(("kind", "dtype"), [("Sam3Model", torch.bfloat16), ("Sam3TrackerModel", torch.float16)])
def test_float32_images_of_a_half_precision_model(kind: str, dtype: torch.dtype, checkpoint: Path, file: Path) -> None:
    """As a processor gives them: features have the type of the model's weights."""
    model = copy_of(kind, checkpoint).to(dtype)
    given = {"input_points": torch.tensor([[[[50.0, 60.0]]]], dtype=dtype), "input_labels": torch.tensor([[[1]]])}
    if kind == "Sam3Model":
        given = dict(zip(("input_ids", "attention_mask"), text_ids("cat"), strict=True))
    with torch.no_grad():
        own = model(pixel_values=frames(1), **given).pred_masks
        attach(model, file)
        with pytest.warns(UserWarning, match="computes in float32"):
            found = model(pixel_values=frames(1), **given).pred_masks
    assert found.dtype == own.dtype == dtype
    assert float((found - own).float().norm() / own.float().norm()) < 0.2  # rounding of a random model


def test_three_threads_with_a_session_each(checkpoint: Path, file: Path) -> None:
    """One attached Sam3VideoModel: every thread gets what its own images give alone."""
    model = make_sure(copy_of("Sam3VideoModel", checkpoint))

    def run_threads() -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}

        def run(turn: int) -> None:
            with torch.no_grad():
                found[turn] = run_video(model, ("cat",), frames(3).roll(turn, dims=0)[:2])

        threads = [threading.Thread(target=run, args=(turn,)) for turn in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    expected = run_threads()
    attach(model, file)
    found = run_threads()
    assert found.keys() == expected.keys() == {0, 1, 2}
    assert all(max(differences(found[turn], expected[turn]).values()) < TOLERANCE for turn in range(3))
    other = found[0].keys() != expected[1].keys()  # of other objects, perhaps
    assert other or max(differences(found[0], expected[1]).values()) > TOLERANCE
    detach(model)


def test_a_files_fingerprint_is_the_checkpoints(checkpoint: Path, file: Path) -> None:
    """The same from our module as from the live one; the manifest has each part once."""
    told = json.loads(file.with_suffix(".json").read_text())["weights_sha256"]
    assert list(told) == ["trunk", "sam3", "sam2"]
    from neck.weights.fingerprint import fingerprints

    assert fingerprints(load_encoder(checkpoint).state_dict().items()) == told
    model = copy_of("Sam3VideoModel", checkpoint)
    live = find_encoder(model)
    assert live.necks == ("sam3", "sam2") and live.read == (0, 1, 2)
    assert live.tracker_neck is not None and live.tracker_neck.path == "tracker_neck"


def test_deployed_encoder_is_shared_by_nobody_else(file: Path) -> None:
    """Two encoders of one file, each with its own lists; in a context it is closed at the end."""
    with DeployedEncoder(file) as one, torch.no_grad():
        first, second = one(frames(1)), one(frames(1))
        first[0].clear()
        assert len(second[0]) == 4
    with pytest.raises(EncoderError, match="closed; open"):
        one(frames(1))


def test_what_the_module_takes_around_its_session_is_told(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet of docs/attach.md that times a run."""
    text = (Path(__file__).parent.parent / "docs" / "attach.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "build").symlink_to(file.parent)
    monkeypatch.chdir(tmp_path)
    session = pytest.importorskip(
        "onnxruntime", reason="ONNX Runtime is missing: pip install '.[cpu]'"
    ).InferenceSession
    monkeypatch.setattr(session, "run_with_iobinding", session.run_with_iobinding)  # put back at the end
    exec(compile(snippet.replace("sam3-encoder", "x").replace("1008", str(SIZE)), "attach.md", "exec"), {})
    total, outside = map(float, re.findall(r"(\d+\.\d+) s, of which (\d+\.\d+) ms", capsys.readouterr().out)[0])
    assert 0 < outside <= 1000 * total + 1


@pytest.mark.parametrize("index", [0, 1], ids=["image", "video"])
def test_the_snippets_of_the_docs(
    index: int, checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/attach.md, run in a folder with a model, its file (under the name x.onnx) and images."""
    text = (Path(__file__).parent.parent / "docs" / "attach.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[index]
    shutil.copytree(checkpoint, tmp_path / "sam3")
    save_tokenizer(tmp_path / "sam3")
    (tmp_path / "build").mkdir()
    for path in file.parent.iterdir():
        shutil.copy(path, tmp_path / "build" / path.name)
    (tmp_path / "frames").mkdir()
    image = Path(__file__).parent / "data" / "preprocess" / "image_0.png"
    for name in ("image.png", "frames/0.png", "frames/1.png"):
        shutil.copy(image, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(compile(snippet.replace("sam3-encoder", "x"), "attach.md", "exec"), names)
    masks = names["masks"]
    assert masks.shape == (1, 4, 32, 32) if index == 0 else len(masks) == 2
