"""An exported file in the place of a live SAM 3's encoder, and out again.

from engines.attach import attach, detach

attach(model, "build/sam3-encoder.plan")   # Meta's, Ultralytics' or transformers' model
...
detach(model)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engines.live.adapter import MARK, Attached
from engines.live.encoder import DeployedEncoder
from engines.live.locate_encoder import AttachError, LiveEncoder, find_encoder
from engines.live.matching import check_same
from export.contract.manifest import manifest_path
from neck.config import EncoderConfig

__all__ = ["AttachError", "attach", "detach"]


def attach(
    model: Any,
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
    if there := _attached(model):
        raise AttachError(
            f"{type(model).__name__}: the file {there.encoder.path} is already attached to this model; call "
            "detach(model) first"
        )
    live = find_encoder(model)
    asked = tuple(necks or live.necks)
    home = next(live.parameters()).device
    encoder = DeployedEncoder(path, device or home, runtime=runtime, simulated=simulated, levels=live.read)
    # all that the file has are handed out, whether the model itself reads them or not
    encoder.levels = tuple(one for one in range(live.levels) if one in {*encoder.signature.levels, *live.read})
    try:
        _check_fit(live, encoder, asked)
        if check:
            _check_weights(live, encoder, asked)
        if device is None and encoder.device != home:
            raise AttachError(
                f"{path} runs on {encoder.device}, but the model is on {home}; move the model: "
                f"model.to('{encoder.device}')"
            )
        attached = Attached(live, encoder, asked)
        attached.enter([*_ancestors(model, attached)])
    except Exception:
        encoder.close()
        raise
    if free:
        attached.free()
    return encoder


def detach(model: Any) -> None:
    """Gives a model its own encoder back and closes the file.

    Raises:
        AttachError: nothing is attached, or the encoder's memory was freed.
    """
    model = _module(model)
    attached = _attached(model)
    if attached is None:
        raise AttachError(f"{type(model).__name__}: no file is attached to this model, so there is nothing to detach")
    if attached.freed:
        raise AttachError(
            f"{type(model).__name__}: the model's own encoder cannot be restored, because attach(..., "
            "free=True) freed its weights; load the model again"
        )
    attached.leave()
    attached.encoder.close()


def _module(model: Any) -> nn.Module:
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        remedy = (
            ("the predictor contains no PyTorch model yet; load its model first")
            if hasattr(model, "model")
            else "this object is neither a PyTorch module nor a predictor that contains one; pass one of the two"
        )
        raise AttachError(f"{type(model).__name__}: {remedy}")
    return inner


def _attached(model: nn.Module) -> Attached | None:
    return next((vars(part)[MARK] for part in model.modules() if MARK in vars(part)), None)


def _ancestors(model: nn.Module, attached: Attached) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module that holds a part which the file stands in for, the part's path in it, and the part."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if any(module is part for part in attached.parts):
            names = path.split(".")
            for length in range(len(names) + 1):
                yield modules[".".join(names[:length])], ".".join(names[length:]), module


def _check_fit(live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
    where = f"{encoder.path}: "
    if lacking := [neck for neck in necks if neck not in encoder.necks]:
        needed = [*encoder.necks, *lacking]
        fewer = (
            "If the model only needs the neck sam3, call attach(..., necks=('sam3',)). Otherwise, export"
            if "sam3" in encoder.necks
            else "Export"
        )
        raise AttachError(
            f"{where}the file cannot replace the model's encoder at {live.slots[0].path}, because the file does not "
            f"compute the feature pyramid of the neck {' or of the neck '.join(lacking)}. "
            f"{fewer} the encoder again with the necks {' and '.join(needed)}: "
            f"{encoder.export_again(neck=','.join(needed))}"
        )
    if unknown := [neck for neck in necks if neck not in live.necks]:
        raise AttachError(
            f"necks={tuple(necks)}: the model has no neck {', '.join(unknown)}; choose from {', '.join(live.necks)}"
        )
    if "sam2" in necks and encoder.signature.has_head("sam2") and len(live.head) != 2:
        raise AttachError(
            f"{encoder.path}: the model has {len(live.head) // 2} mask decoders, but the file only fits a model with "
            "exactly one mask decoder. The file computes the convolutions conv_s0 and conv_s1 of a single mask "
            "decoder. Export the file again without the two convolutions: "
            f"{encoder.export_again(sam2_outputs='features')}"
        )
    levels = len(encoder.signature.level_sizes)
    if levels != live.levels:
        raise AttachError(
            f"{where}the file was exported from an encoder with {levels} levels, but the model's encoder has "
            f"{live.levels}; export the model's own checkpoint, and attach the new file"
        )
    if live.image_size not in (None, encoder.signature.image_size):
        raise encoder.wrong_size(live.image_size or (0, 0))


def _check_weights(live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
    source = encoder.onnx_manifest
    if not source or "weights_sha256" not in source:
        raise AttachError(
            f"{manifest_path(encoder.path)}: the manifest contains no SHA-256 of the weights, because an earlier "
            "version of neck-export wrote it, so attach cannot check that the encoder file has the model's weights; "
            "export the encoder again, or skip the check with attach(..., check=False)"
        )
    if any(parameter.is_meta for parameter in live.parameters()):
        raise AttachError(
            f"the model's encoder at {live.slots[0].path} is on the meta device and has no weights yet, so attach "
            "cannot compare the weights of the model with the weights of the file. Load the model's weights, or skip "
            "the comparison with attach(..., check=False)"
        )
    head = "sam2" in necks and encoder.signature.has_head("sam2")
    config = dataclasses.replace(EncoderConfig.from_dict(source["encoder"]), necks=tuple(necks), sam2_head=head)
    check_same(encoder.path, live, config, source["weights_sha256"])
