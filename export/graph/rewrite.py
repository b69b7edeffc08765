"""Exact rewrites of the encoder for deployment: each is an identity in real arithmetic.

A rewritten module shares every weight with the plain one. Where a rewrite changes a large weight, it does so in the
forward: written to a file, the change is folded into the weight while the weight is written, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.contract.options import Rewrites
from neck.necks import Sam2Head, Sam3DualViTDetNeck, shallow_copy
from neck.position import PositionEmbeddingSine
from neck.trunk import Attention, Block, ViTDetTrunk, cut_windows


def rewrite(encoder: Sam3DualViTDetNeck, rewrites: Rewrites) -> Sam3DualViTDetNeck:
    """Returns the encoder rewritten for its present image size; the given one is left as it is.

    A trunk or a position encoding that is not ours is kept untouched.
    """
    encoder = shallow_copy(encoder)
    if isinstance(encoder.trunk, ViTDetTrunk):
        encoder.trunk = rewrite_trunk(encoder.trunk, rewrites)
        if rewrites.position_tables and isinstance(encoder.position_encoding, PositionEmbeddingSine):
            height, width = encoder.trunk.grid
            sizes = [(int(height * scale), int(width * scale)) for scale in encoder.scale_factors]
            encoder.position_encoding = PositionTables(encoder.position_encoding, sizes)
    if rewrites.merge_upsampling:
        for name, module in list(encoder.named_children()):
            if isinstance(module, nn.ModuleList):
                setattr(encoder, name, nn.ModuleList(merge_upsampling(cast(nn.Sequential, level)) for level in module))
    if rewrites.fold_head and encoder.sam2_head is not None and encoder.sam2_convs is not None:
        encoder.sam2_convs, encoder.sam2_head = fold_head(encoder.sam2_convs, encoder.sam2_head)
    return encoder


def rewrite_trunk(trunk: ViTDetTrunk, rewrites: Rewrites) -> ViTDetTrunk:
    """Rewrites the attentions, and the token order if the window divides the grid."""
    trunk = shallow_copy(trunk)
    blocks = []
    for block in trunk.blocks:
        block = shallow_copy(cast(Block, block))
        if rewrites.rope_halves or rewrites.fold_scale:
            block.attn = DeployAttention(block.attn, rewrites.rope_halves, rewrites.fold_scale)  # type: ignore[assignment]
        blocks.append(block)
    trunk.blocks = nn.ModuleList(blocks)
    window = trunk.config.window_size
    if rewrites.window_major and not any(side % window for side in trunk.grid):
        trunk.__class__ = WindowMajorTrunk
        for block in blocks:
            block.__class__ = WindowMajorBlock
            if isinstance(block.attn, DeployAttention):
                block.attn.tokens_first = True
    return trunk


class DeployProjection(nn.Module):
    """The linear layer of query, key and value with halves instead of pairs, and the scale inside the query's weights.

    Attention does not see the order of a head's channels as long as queries and keys agree, so the rows of their
    weights are permuted from (2i, 2i + 1) to (i, i + D / 2) and the rotary needs no strided access. It is a module of
    its own, so that the graph's nodes keep the layer's path.
    """

    order: Tensor  # (3 C,)
    factor: Tensor  # (3 C,)

    def __init__(self, attn: Attention, rope_halves: bool, fold_scale: bool) -> None:
        super().__init__()
        self.weight, self.bias = attn.qkv.weight, attn.qkv.bias
        self.rope_halves, self.fold_scale = rope_halves, fold_scale
        dim = attn.qkv.in_features
        rows = torch.arange(2 * dim).view(2 * attn.num_heads, -1, 2).transpose(1, 2).flatten()  # per head of q and k
        self.register_buffer("order", torch.cat((rows, torch.arange(2 * dim, 3 * dim))), persistent=False)
        factor = torch.ones(3 * dim, dtype=attn.qkv.weight.dtype)
        factor[:dim] = attn.scale
        self.register_buffer("factor", factor, persistent=False)

    def rewritten(self) -> tuple[Tensor, Tensor]:
        """Weight (3 C, C) and bias (3 C,) after the rewrites."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if self.rope_halves:
            weight, bias = weight.index_select(0, self.order), bias.index_select(0, self.order)
        if self.fold_scale:
            weight, bias = weight * self.factor[:, None], bias * self.factor
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        return F.linear(x, *self.rewritten())


class DeployAttention(nn.Module):
    """Attention whose query, key and value come from a DeployProjection.

    Attributes:
        tokens_first: whether x is (N, B, C), which is how TensorRT-RTX 1.7's fused attention writes its result.
    """

    def __init__(self, attn: Attention, rope_halves: bool, fold_scale: bool) -> None:
        super().__init__()
        self.num_heads, self.proj, self.tokens_first = attn.num_heads, attn.proj, False
        self.qkv: nn.Module = DeployProjection(attn, rope_halves, fold_scale)
        self.rope = RotaryHalves() if rope_halves else attn.rope
        self.scale = 1.0 if fold_scale else attn.scale

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, C), or any split of B * N (tokens_first: N * B), cos and sin (N, D / 2) -> x's shape."""
        tokens, dim = cos.shape[0], x.shape[-1]
        # one reshape and one permute: three splits cost two more kernels a block in TensorRT-RTX 1.7
        sides = (tokens, -1) if self.tokens_first else (-1, tokens)
        qkv = self.qkv(x).view(*sides, 3, self.num_heads, dim // self.num_heads)
        qkv = qkv.permute(2, 1, 3, 0, 4) if self.tokens_first else qkv.permute(2, 0, 3, 1, 4)
        qk, value = qkv.split((2, 1))  # (2, B, heads, N, D), (1, B, heads, N, D)
        query, key = self.rope(qk, cos, sin).split((1, 1))
        mixed = F.scaled_dot_product_attention(query.squeeze(0), key.squeeze(0), value.squeeze(0), scale=self.scale)
        if self.tokens_first:
            return self.proj(mixed.permute(2, 0, 1, 3).contiguous().view(x.shape[0], -1, dim))
        return self.proj(mixed.transpose(1, 2).contiguous().view(-1, *x.shape[1:]))


class RotaryHalves(nn.Module):
    """Rotates the pairs (i, i + D / 2) of x (..., N, D) by the angles of cos, sin (N, D / 2)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, D)."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class WindowMajorBlock(Block):
    """A block on tokens in window order: windows are columns already, and the whole grid is a reshape away."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (n, W * B, C) -> (n, W * B, C); cos and sin have n rows, or n * W in a global block."""
        normed = self.norm1(x)
        if isinstance(self.attn, DeployAttention):
            # reshaped to the grid inside: a reshape around it keeps `x +` out of the projection's kernel (42 MB in all)
            x = x + self.attn(normed, cos, sin)
        else:
            windows = normed.view(cos.shape[0], -1, x.shape[-1]).transpose(0, 1).contiguous()
            mixed = self.attn(windows, cos, sin).transpose(0, 1).contiguous()
            x = x + mixed.view(x.shape[0], -1, x.shape[-1])
        return x + self.mlp(self.norm2(x))


class WindowMajorTrunk(ViTDetTrunk):
    """The trunk with its tokens in window order from the patches to the neck.

    Attention does not care for the order of its tokens, so two permutations take the place of two in every windowed
    block. Shape letter W here: windows of one image; n: tokens of one window.

    The tokens lie as (n, W, B, C): both attentions, (n, W B) and (n W, B), then read and write them with the sequence
    first, as TensorRT-RTX 1.7's fused attention writes its result. With the windows first it permuted the tokens again
    around every global block, in kernels of its own: 277 kernels and 12.815 GB at full size, instead of 273 and 12.667.
    """

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, 14 H, 14 W), normalized -> [features (B, C, H, W)]."""
        window, (height, width) = self.config.window_size, self.grid
        rows, columns, tokens = height // window, width // window, window * window
        channels = self.config.embed_dim
        x = self.patch_embed.proj(images).view(-1, channels, rows, window, columns, window)
        x = x.permute(3, 5, 2, 4, 0, 1)  # (window, window, rows, columns, B, C)
        x = self.ln_pre(self.add_position(x.contiguous().view(tokens, -1, channels)))  # (n, W * B, C)
        global_cos, global_sin = self.window_order(self.global_cos), self.window_order(self.global_sin)
        for block in cast("list[Block]", self.blocks):
            cos, sin = (self.window_cos, self.window_sin) if block.window_size else (global_cos, global_sin)
            x = block(x, cos, sin)
        x = x.view(window, window, rows, columns, -1, channels).permute(4, 5, 2, 0, 3, 1)
        return [x.contiguous().view(-1, channels, height, width)]

    def add_position(self, x: Tensor) -> Tensor:
        """Adds the position embedding to x (n, W * B, C)."""
        if self.config.pretrain_grid == self.config.window_size:
            return x + self.pos_embed[0, 1:, None]  # every window sees the same tile
        position = cut_windows(self.position(), self.config.window_size).transpose(0, 1)  # (n, W, C)
        tokens, windows, channels = position.shape
        return (x.view(tokens, windows, -1, channels) + position[:, :, None]).view(tokens, -1, channels)

    def window_order(self, table: Tensor) -> Tensor:
        """Brings a rotary table (H * W, D / 2) into the tokens' order (n * W, D / 2)."""
        return cut_windows(table.view(1, *self.grid, -1), self.config.window_size).transpose(0, 1).flatten(0, 1)


def merge_upsampling(level: nn.Sequential) -> nn.Sequential:
    """Makes one ConvTranspose of a ConvTranspose and the 1x1 convolution after it (levels 4.0 and 2.0)."""
    names = list(dict(level.named_children()))
    position = names.index("conv_1x1")
    before = level[position - 1] if position else None
    if not isinstance(before, nn.ConvTranspose2d):
        return level
    point = cast(nn.Conv2d, level.conv_1x1)
    upsample, mix = before.weight, point.weight[:, :, 0, 0]  # (C, M, 2, 2), (d_model, M)
    merged = nn.ConvTranspose2d(before.in_channels, point.out_channels, 2, 2, device="meta")
    merged.weight = nn.Parameter(torch.einsum("cmyx,dm->cdyx", upsample, mix), requires_grad=False)
    merged.bias = nn.Parameter(mix @ cast(Tensor, before.bias) + cast(Tensor, point.bias), requires_grad=False)
    children = {**dict(level.named_children()), names[position - 1]: merged}
    del children["conv_1x1"]
    short = nn.Sequential()
    for name, module in children.items():
        short.add_module(name, module)
    return short


def fold_head(levels: nn.ModuleList, head: Sam2Head) -> tuple[nn.ModuleList, Sam2Head]:
    """Makes one 3x3 convolution of each that a 1x1 convolution of the mask decoder follows; nothing lies between.

    Returns:
        The levels, and a head that does nothing.
    """
    folded, idle = list(levels), shallow_copy(head)
    for index, (name, point) in enumerate(list(head.named_children())[: len(folded)]):
        level = shallow_copy(cast(nn.Sequential, folded[index]))
        last, mix = cast(nn.Conv2d, level.conv_3x3), cast(nn.Conv2d, point).weight[:, :, 0, 0]
        conv = nn.Conv2d(last.in_channels, len(mix), 3, padding=1, device="meta")
        conv.weight = nn.Parameter(torch.einsum("dcyx,kd->kcyx", last.weight, mix), requires_grad=False)
        bias = mix @ cast(Tensor, last.bias) + cast(Tensor, point.bias)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        level.conv_3x3, folded[index] = conv, level
        setattr(idle, name, nn.Identity())
    return nn.ModuleList(folded), idle


class PositionTables(nn.Module):
    """The sine positions of every level from one row and one column table, so that no full-size constant is made.

    Args:
        encoding: the encoding that the tables hold.
        sizes: (height, width) of every feature map that will come.
    """

    def __init__(self, encoding: PositionEmbeddingSine, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for length in sorted({side for size in sizes for side in size}):
            self.register_buffer(f"table_{length}", encoding.table(length).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, num_pos_feats, H, W) for a feature map x (B, C, H, W)."""
        _, _, height, width = x.shape
        rows, columns = (self.get_buffer(f"table_{length}").to(x.dtype) for length in (height, width))
        pair = (rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1))
        return torch.cat(pair).expand(x.shape[0], -1, -1, -1)
