"""SAM 3's trunk: a ViT with windowed and global attention, after ViTDet (Li et al. 2022).

Shapes: B images, (H, W) the grid of patches, C channels, N tokens of one attention, D channels of one head.

    image (B, 3, 14 H, 14 W) -> patches (B, H, W, C) -> + tiled position -> ln_pre -> blocks -> (B, C, H, W)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neck.config import EncoderConfig, check_image_size
from neck.rope import Rotary, axial_angles


class PatchEmbed(nn.Module):
    """Cuts the image into patches and projects each to C channels, without bias."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 14 H, 14 W) -> (B, H, W, C)."""
        return self.proj(images).permute(0, 2, 3, 1).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention whose queries and keys are turned by rotary angles."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rope = Rotary()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, C), cos and sin (N, D / 2) -> (B, N, C)."""
        tokens, dim = x.shape[-2:]
        qkv = self.qkv(x).view(-1, tokens, 3, self.num_heads, dim // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, N, D)
        query, key, value = qkv.unbind(0)
        query, key = self.rope(query, cos, sin), self.rope(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).contiguous().view(-1, tokens, dim))  # (B, heads, N, D) -> (B, N, C)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; window_size 0 attends over the whole grid."""

    def __init__(self, config: EncoderConfig, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.embed_dim, config.mlp_hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        _, height, width, channels = x.shape
        normed = self.norm1(x)
        if self.window_size:
            windows = self.attn(cut_windows(normed, self.window_size), cos, sin)
            x = x + join_windows(windows, self.window_size, height, width)
        else:
            mixed = self.attn(normed.view(-1, height * width, channels), cos, sin)
            x = x + mixed.view(-1, height, width, channels)
        return x + self.mlp(self.norm2(x))


def cut_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C), padded with zeros at the bottom and right."""
    _, height, width, channels = x.shape
    rows, columns = -(-height // window), -(-width // window)
    x = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
    x = x.view(-1, rows, window, columns, window, channels).transpose(2, 3)
    return x.contiguous().view(-1, window * window, channels)


def join_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """(B * windows, window * window, C) -> (B, height, width, C): the inverse of cut_windows, padding dropped."""
    rows, columns, channels = -(-height // window), -(-width // window), windows.shape[-1]
    x = windows.view(-1, rows, columns, window, window, channels).transpose(2, 3)
    return x.contiguous().view(-1, rows * window, columns * window, channels)[:, :height, :width]


class ViTDetTrunk(nn.Module):
    """The trunk, set to one image size at a time.

    Args:
        config: the architecture; `config.image_size` is the first image size.

    Attributes:
        channel_list: channels of each returned map, [C].
        grid: (H, W) in patches at the present image size.
    """

    window_cos: Tensor  # (window * window, D / 2)
    window_sin: Tensor
    global_cos: Tensor  # (H * W, D / 2)
    global_sin: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.channel_list = [config.embed_dim]
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        # row 0 is the class token of pretraining, which the detector drops
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.pretrain_grid**2, config.embed_dim))
        self.ln_pre = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(
            Block(config, 0 if index in config.global_blocks else config.window_size) for index in range(config.depth)
        )
        self._set_table("window", self._angles(config.window_size, config.window_size))
        self.set_imgsz(config.image_size)

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int] = (1008, 1008)) -> None:
        """Sets the image size in pixels: an int, (height, width) or [height, width], multiples of the patch.

        Raises:
            ConfigError: a size that does not fit, naming the nearest that do.
        """
        height, width = check_image_size(imgsz, self.config.patch_size)
        self.grid = height // self.config.patch_size, width // self.config.patch_size
        window = self.config.window_size
        # global blocks see the grid squeezed into one window's coordinates
        self._set_table("global", self._angles(*self.grid, (window / self.grid[0], window / self.grid[1])))

    def _angles(self, height: int, width: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        return axial_angles(height, width, self.config.head_dim, scale, self.config.rope_theta)

    def _set_table(self, name: str, angles: Tensor) -> None:
        device = self.pos_embed.device if self.pos_embed.device.type != "meta" else "cpu"
        self.register_buffer(f"{name}_cos", angles.cos().to(device, torch.float32), persistent=False)
        self.register_buffer(f"{name}_sin", angles.sin().to(device, torch.float32), persistent=False)

    def position(self) -> Tensor:
        """The trained position embedding, tiled (repeated and cropped) to the grid: (1, H, W, C)."""
        side, (height, width) = self.config.pretrain_grid, self.grid
        tile = self.pos_embed[:, 1:].unflatten(1, (side, side))
        return tile.repeat(1, -(-height // side), -(-width // side), 1)[:, :height, :width]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, 14 H, 14 W), normalized -> [features (B, C, H, W)]."""
        x = self.patch_embed(images)
        if tuple(x.shape[1:3]) != self.grid:
            patch, (height, width) = self.config.patch_size, self.grid
            raise ValueError(
                f"the images have {images.shape[-2]}x{images.shape[-1]} pixels, but the trunk is set to "
                f"{height * patch}x{width * patch}; call set_imgsz with the size of the images first"
            )
        x = self.ln_pre(x + self.position())
        for block in self.blocks:
            if block.window_size:
                x = block(x, self.window_cos, self.window_sin)
            else:
                x = block(x, self.global_cos, self.global_sin)
        return [x.permute(0, 3, 1, 2)]
