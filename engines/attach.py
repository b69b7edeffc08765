"""An exported file in the place of a live SAM 3's encoder, and out again.

from engines.attach import attach, detach

attach(model, "build/sam3-encoder.plan")   # Meta's, Ultralytics' or transformers' model
...
detach(model)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engines.live.encoder import DeployedEncoder
from engines.live.found import AttachError, LiveEncoder, Slot, find_encoder
from engines.live.stand_ins import FpnStandIn, Record, TrackerNeckStandIn, VitdetStandIn
from export.contract.manifest import manifest_path
from neck.config import EncoderConfig
from neck.weights.fingerprint import differing

__all__ = ["AttachError", "attach", "detach"]


def attach(
    model: Any,  # noqa: ANN401 - a module, or a predictor that has one
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    necks: Sequence[str] | None = None,
    check: bool = True,
    free: bool = False,
    runtime: Literal["auto", "openvino"] = "auto",
    simulated: bool = False,
) -> DeployedEncoder:
    """Lets a file of ours compute what a live SAM 3's own encoder computes.

    Args:
        model: SAM 3 of Meta's `sam3`, Ultralytics or transformers, image or video; or a predictor with it as `.model`.
        path: the file, its manifest beside it.
        device: where the file runs; by default where the model is, on the same GPU.
        necks: the necks that will be read, where those are not all that the model has.
        check: whether to refuse a file of other weights than the model's encoder has.
        free: whether to free the memory of the model's own encoder; then it cannot be detached.
        runtime, simulated: as in DeployedEncoder.

    Returns:
        The encoder that the model now has; detach closes it.

    Raises:
        AttachError: they do not go together, or something is attached; the model is as it was.
        EncoderError, ManifestError, SessionError, RuntimeFileError: the file cannot be used here.
    """
    model = _module(model)
    if record := _record(model):
        raise AttachError(f"{type(model).__name__}: {record.encoder.path} is attached already; detach it first")
    live = find_encoder(model)
    asked = tuple(necks or live.necks)
    home = next(live.parameters()).device
    encoder = DeployedEncoder(path, device or home, runtime=runtime, simulated=simulated, levels=live.read)
    try:
        _check_fit(live, encoder, asked)
        if check:
            _check_weights(live, encoder, asked)
        if device is None and encoder.device != home:
            raise AttachError(
                f"{path} runs on {encoder.device}, the model is on {home}; move it: model.to('{encoder.device}')"
            )
        replacements = _replacements(live, encoder, asked)
    except Exception:
        encoder.close()
        raise
    originals = [(slot, slot.module) for slot, _ in replacements]
    for slot, replacement in replacements:
        setattr(slot.parent, slot.name, replacement)
    rest = next(model.parameters(), None)
    record = Record(encoder, originals, free, *((rest.device, rest.dtype) if rest is not None else (None, None)))
    for _, replacement in replacements:
        object.__setattr__(replacement, "record", record)
    if free:
        for _, original in record.originals:
            original.to("meta")
    return encoder


def detach(model: Any) -> None:  # noqa: ANN401 - as in attach
    """Gives a model its own encoder back, at the model's present device and in its type, and closes the file.

    Raises:
        AttachError: nothing is attached, or the encoder's memory was freed.
    """
    model = _module(model)
    record = _record(model)
    if record is None:
        raise AttachError(f"{type(model).__name__}: nothing is attached")
    if record.freed:
        raise AttachError(f"{type(model).__name__}: its own encoder was freed (free=True); load the model again")
    now = next(model.parameters(), None)
    if now is not None and (now.device, now.dtype) != (record.device, record.dtype):  # .half(), .to("cuda") meanwhile
        for _, original in record.originals:
            original._apply(lambda value: value.to(now.device, now.dtype if value.is_floating_point() else None))
    for slot, original in record.originals:
        setattr(slot.parent, slot.name, original)
    record.encoder.close()


def _module(model: Any) -> nn.Module:  # noqa: ANN401 - as in attach
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        remedy = "it has no model yet; set it up first" if hasattr(model, "model") else "give a module or a predictor"
        raise AttachError(f"{type(model).__name__} is no model of PyTorch: {remedy}")
    return inner


def _record(model: nn.Module) -> Record | None:
    stand_ins = (part for part in model.modules() if isinstance(part, VitdetStandIn | FpnStandIn))
    return next((part.record for part in stand_ins), None)


def _replacements(live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> list[tuple[Slot, nn.Module]]:
    kind = VitdetStandIn if live.kind == "vitdet" else FpnStandIn
    stand_in = kind(live, encoder, necks)
    replacements: list[tuple[Slot, nn.Module]] = [(slot, stand_in) for slot in live.slots]
    if live.tracker_neck and isinstance(stand_in, FpnStandIn):
        replacements.append((live.tracker_neck, TrackerNeckStandIn(stand_in)))
    if "sam2" in necks and encoder.signature.has_head("sam2"):
        replacements += [(slot, nn.Identity()) for slot in live.head]
    return replacements


def _check_fit(live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
    where = f"{encoder.path}: "
    if lacking := [neck for neck in necks if neck not in encoder.necks]:
        also = "; or say which the model reads: attach(..., necks=('sam3',))" if "sam3" in encoder.necks else ""
        both = ",".join([*encoder.necks, *lacking])
        raise AttachError(
            f"{where}has no neck {', '.join(lacking)}, which the model at {live.slots[0].path} has; export it by "
            f"{encoder.export_again(neck=both)}{also}"
        )
    if unknown := [neck for neck in necks if neck not in live.necks]:
        raise AttachError(f"neck {', '.join(unknown)} is not in the model, which has {', '.join(live.necks)}")
    if "sam2" in necks and encoder.signature.has_head("sam2") and len(live.head) != 2:
        raise AttachError(
            f"{where}its sam2 outputs are the mask decoder's, of which the model has {len(live.head) // 2}; "
            f"export it by {encoder.export_again(sam2_outputs='features')}"
        )
    levels = len(encoder.signature.level_sizes)
    if levels != live.levels:
        raise AttachError(f"{where}is of an encoder with {levels} levels, the model's has {live.levels}")
    if live.image_size not in (None, encoder.signature.image_size):
        raise encoder.wrong_size(live.image_size or (0, 0))


def _check_weights(live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
    source = encoder.onnx_manifest
    if not source or "weights_sha256" not in source:
        raise AttachError(
            f"{manifest_path(encoder.path)}: has no SHA-256 of the weights (earlier versions did not write it), "
            "so they cannot be compared with the model's; export the file again, or attach(..., check=False)"
        )
    if any(parameter.is_meta for parameter in live.parameters()):
        raise AttachError(
            f"the model at {live.slots[0].path} has no weights (meta device); load them, or attach(..., check=False)"
        )
    head = "sam2" in necks and encoder.signature.has_head("sam2")
    config = dataclasses.replace(EncoderConfig.from_dict(source["encoder"]), necks=tuple(necks), sam2_head=head)
    others = differing(source["weights_sha256"], live.fingerprints(config))
    if others:
        raise AttachError(
            f"{encoder.path}: holds other weights than the model's encoder at {live.slots[0].path} "
            f"({', '.join(others)}); export the model's own checkpoint, or attach(..., check=False)"
        )
