"""Operations and least bytes of the encoder from its config, part by part, and the floor that they set (no torch).

Operations count 2 for a multiply-add of the matrix products and convolutions; what is done element by element is left
out. Least bytes are what no schedule can spare: each weight and table read once, the image read, the outputs written;
what passes between the parts could stay in a cache. Both are as the rewritten module has them, unless asked otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from export.contract.signature import Signature
from neck.config import EncoderConfig

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
"""Of a weight; outputs have as many, of a quantized file two."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the encoder: `patch`, `windowed`, `global`, `level 0` and so on, `positions`.

    Attributes:
        part: its name.
        operations: of a batch.
        weight_elements: parameters, read in the row's precision (all of them, where some are quantized: a floor).
        table_bytes: FP32 tables (rotary) and the image, which is FP32 in every file.
        output_elements: of a batch, written in the row's precision.
    """

    part: str
    operations: int
    weight_elements: int
    table_bytes: int = 0
    output_elements: int = 0

    def bytes(self, precision: str) -> int:
        """Least bytes at a precision."""
        item = ITEM_BYTES[precision]
        return self.table_bytes + item * self.weight_elements + max(item, 2) * self.output_elements


def encoder_parts(config: EncoderConfig, signature: Signature, batch: int, *, rewritten: bool = True) -> list[Part]:
    """The parts of a run in the order of computation.

    Args:
        config: the architecture; its image size is the run's.
        signature: which necks, levels and positions.
        batch: images.
        rewritten: with each ConvTranspose merged with the 1x1 convolution after it, and the head folded, as the
            rewritten module has them.
    """
    height, width = config.grid
    tokens, window = height * width, config.window_size
    padded = math.prod(-(-side // window) * window for side in config.grid)
    channels, patch = config.embed_dim, 3 * config.patch_size**2
    pixels = tokens * patch
    embedding = channels * (patch + config.pretrain_grid**2 + 2)  # patches, positions, ln_pre
    parts = [Part("patch", 2 * batch * tokens * patch * channels, embedding, 4 * batch * pixels)]
    kinds = {"windowed": (config.depth - len(set(config.global_blocks)), padded, window**2)}
    kinds["global"] = (len(set(config.global_blocks)), tokens, tokens)
    for name, (blocks, rows, seen) in kinds.items():
        # qkv and projection on what attention sees, padding included; scores and their product with the values; MLP
        operations = 8 * rows * channels**2 + 4 * rows * seen * channels + 4 * tokens * channels * config.mlp_hidden
        tables = 4 * seen * config.head_dim if blocks else 0  # cosine and sine, half a head each
        parts.append(Part(name, batch * blocks * operations, blocks * _block_elements(config), tables))
    parts += [_level_part(config, signature, level, batch, rewritten) for level in signature.levels]
    if signature.positions == "graph":
        sizes = [signature.level_sizes[level] for level in signature.levels]
        maps = [signature.level_sizes[level] for neck in signature.necks for level in signature.levels_of(neck)]
        elements = batch * config.d_model * sum(math.prod(size) for size in maps)
        table = config.d_model // 2 * sum({side for size in sizes for side in size})
        parts.append(Part("positions", 0, table, 0, elements))
    return parts


def _block_elements(config: EncoderConfig) -> int:
    channels, hidden = config.embed_dim, config.mlp_hidden
    linear = 4 * channels**2 + 4 * channels + 2 * channels * hidden + hidden + channels
    return linear + 4 * channels  # two LayerNorms


def _level_part(config: EncoderConfig, signature: Signature, level: int, batch: int, rewritten: bool) -> Part:
    """One level of every neck that has it."""
    size, scale = signature.level_sizes[level], config.scale_factors[level]
    kept = [signature.channels(neck, level) for neck in signature.necks if level in signature.levels_of(neck)]
    each = [_level(config, scale, size, rewritten, channels) for channels in kept]
    operations, weights = (sum(values) for values in zip(*each, strict=True))
    return Part(f"level {level}", batch * operations, weights, 0, batch * sum(kept) * math.prod(size))


def _level(config: EncoderConfig, scale: float, size: Sequence[int], rewritten: bool, kept: int) -> tuple[int, int]:
    """Operations for one image and parameters of one level of one neck, whose head keeps some of d_model channels."""
    channels, out, pixels = config.embed_dim, config.d_model, math.prod(size)
    layers: list[tuple[int, int, int, int]] = []  # taps for each output pixel, kernel, channels in, channels out
    at = channels
    upsampled = {4.0: (channels // 2, channels // 4), 2.0: (channels // 2,)}.get(scale, ())
    operations = 0
    for step, width in enumerate(upsampled):
        width = out if step == len(upsampled) - 1 and rewritten else width
        # stride 2, kernel 2: each output pixel has one tap
        operations += 2 * pixels // 4 ** (len(upsampled) - 1 - step) * at * width
        layers.append((1, 4, at, width))
        at = width
    if not (upsampled and rewritten):
        operations += 2 * pixels * at * out
        layers.append((1, 1, at, out))
    last = kept if rewritten else out
    operations += 2 * pixels * 9 * out * last
    layers.append((9, 9, out, last))
    if last != kept:
        operations += 2 * pixels * out * kept
        layers.append((1, 1, out, kept))
    return operations, sum(kernel * inner * outer + outer for _, kernel, inner, outer in layers)


def total_operations(parts: Sequence[Part]) -> int:
    """Operations of all parts."""
    return sum(part.operations for part in parts)


def total_bytes(parts: Sequence[Part], precision: str) -> int:
    """Least bytes of all parts at a precision."""
    return sum(part.bytes(precision) for part in parts)


def floor_ms(parts: Sequence[Part], precision: str, rates: Mapping[str, float | None], copy: float) -> float | None:
    """Least milliseconds of a run: all operations at the matrix rate, or all bytes at the copy rate.

    Args:
        parts: of `encoder_parts`.
        precision: of the row.
        rates: operations per second by precision, measured on this machine; None where it was not.
        copy: bytes per second of a copy, read and written.
    """
    rate = rates.get(precision)
    if not rate:
        return None
    return 1e3 * max(total_operations(parts) / rate, total_bytes(parts, precision) / copy)
