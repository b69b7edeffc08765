"""What sits in the place of a live model's encoder: the interface of each kind, around one DeployedEncoder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.live.encoder import DeployedEncoder, Levels
from engines.live.found import AttachError, LiveEncoder, Slot, not_read
from neck.necks import Outputs


@dataclasses.dataclass
class Record:
    """What is attached, what was there before, and where the rest of the model was then."""

    encoder: DeployedEncoder
    originals: list[tuple[Slot, nn.Module]]
    freed: bool
    device: torch.device | None
    dtype: torch.dtype | None


class VitdetStandIn(nn.Module):
    """In the place of Sam3DualViTDetNeck as Meta and Ultralytics use it, by forward or by one neck at a time."""

    record: Record

    def __init__(self, live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self._unread = encoder, live.unread
        self._necks = tuple(necks)
        self.trunk = Passed()
        # names in the place of the convolutions: sam_forward_feature_levels gets them back
        self.convs, self.sam2_convs = "sam3", "sam2" if "sam2" in necks else None

    def forward(self, images: Tensor) -> Outputs:
        """The four lists with every level that the encoder had; those that the caller drops are not a number."""
        found = {neck: self._padded(images, levels) for neck, levels in self._run(images, self._necks).items()}
        sam3, sam2 = found.get("sam3", ([], [])), found.get("sam2", (None, None))
        return *sam3, *sam2

    def sam_forward_feature_levels(self, x: Tensor, convs: str) -> Levels:
        """One neck of the images that `trunk` passed on."""
        return self._padded(x, self._run(x, (convs,))[convs])

    def set_imgsz(self, imgsz: tuple[int, int] | list[int] = (1008, 1008)) -> None:
        """As DeployedEncoder.set_imgsz."""
        self.encoder.set_imgsz(imgsz)

    def _run(self, images: Tensor, necks: Sequence[str]) -> dict[str, Levels]:
        return self.encoder.forward_necks(images, necks)

    def _padded(self, images: Tensor, levels: Levels) -> Levels:
        return _with_unread(self.encoder, images, levels, self._unread)


class Passed(nn.Module):
    """A trunk that passes the images on, for the file computes trunk and necks at once."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """The images, where a trunk gives its maps."""
        return [images]


class FpnStandIn(nn.Module):
    """In the place of transformers' vision encoder; gives its output class.

    Where a tracker's neck is a module of its own, that neck finds its features by the hidden state that this run gave.
    """

    record: Record

    def __init__(self, live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, getattr(live.module, "config", None)
        self._output, self._own, self._unread = _output_class(live.module), live.necks[0], live.unread
        self._necks = tuple(necks)
        self.latest: tuple[Tensor, Levels] | None = None

    def forward(self, pixel_values: Tensor, **_: object) -> Any:  # noqa: ANN401 - their class
        """pixel_values (B, 3, H, W) -> their output with the features and positions, finest level first."""
        found = self.encoder.forward_necks(pixel_values, self._necks)
        height, width = self.encoder.signature.level_sizes[2]  # scale 1: the tokens
        hidden = not_read(pixel_values, (len(pixel_values), height * width, self.encoder.trunk_channels))
        padded = {
            neck: _with_unread(self.encoder, pixel_values, levels, self._unread) for neck, levels in found.items()
        }
        if "sam2" in padded and self._own != "sam2":
            self.latest = (hidden, padded["sam2"])
        feats, positions = padded[self._own]
        return self._output(
            last_hidden_state=hidden, fpn_hidden_states=tuple(feats), fpn_position_encoding=tuple(positions)
        )


class TrackerNeckStandIn(nn.Module):
    """In the place of the tracker's own neck: hands out what the encoder's stand-in computed for these pictures."""

    record: Record

    def __init__(self, encoder: FpnStandIn) -> None:
        super().__init__()
        self._encoder = (encoder,)  # a tuple: it is a part of another module

    def forward(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """hidden: the encoder's hidden state in any view -> features and positions, finest level first."""
        latest = self._encoder[0].latest
        if latest is None or latest[0].data_ptr() != hidden.data_ptr():
            raise AttachError(
                "the tracker asks for features of other pictures than were encoded last; encode them again"
            )
        feats, positions = latest[1]
        return tuple(feats), tuple(positions)


def _with_unread(encoder: DeployedEncoder, images: Tensor, levels: Levels, unread: int) -> Levels:
    feats, positions = levels
    channels, sizes = encoder.signature.d_model, encoder.signature.level_sizes[len(feats) : len(feats) + unread]
    more = [not_read(feats[0], (len(images), channels, *size)) for size in sizes]
    return feats + more, positions + more


def _output_class(module: nn.Module) -> Any:  # noqa: ANN401 - a dataclass of theirs
    """The class of a transformers encoder's output: the one beside it with features and positions of every level."""
    wanted = {"last_hidden_state", "fpn_hidden_states", "fpn_position_encoding"}
    for value in vars(sys.modules[type(module).__module__]).values():
        if dataclasses.is_dataclass(value) and wanted <= {field.name for field in dataclasses.fields(value)}:
            return value
    raise AttachError(f"{type(module).__name__}: beside it is no output class with {', '.join(sorted(wanted))}")
