"""The convolutional encoder and decoder between pictures and grids of vectors.

Most of a convolutional net's arithmetic sits at full resolution, so the stem folds patches into channels
(pixel-unshuffle) and the head unfolds them: about four times cheaper on a CPU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import VAEConfig
from dalle_mini_impl.layers.recompute import recomputed


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell; on channels-last pictures about 3 times faster than GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))) at one width; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return recomputed(self._residual, self.recomputes)(x)

    def _residual(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return out


class Upsample(nn.Module):
    """Doubles the sides by nearest neighbour, then a 3×3 convolution to new channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def level_widths(config: VAEConfig) -> list[int]:
    """Channels of each level, finest first: `width` grows geometrically, at most doubling, to `latent_width`."""
    levels = (config.downsample // config.patch).bit_length()
    widths = [min(config.width * 2**level, config.latent_width) for level in range(levels)]
    return [*widths[:-1], config.latent_width]


def build_encoder(config: VAEConfig, out_channels: int) -> nn.Sequential:
    """Pictures (B, 3, S, S) to a grid of vectors (B, out_channels, S/f, S/f)."""
    widths = level_widths(config)
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(config.patch),
        nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1),
    ]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(config.encoder_blocks)]
    layers += [ChannelNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 1)]
    return nn.Sequential(*layers)


def build_decoder(config: VAEConfig, in_channels: int, out_channels: int = 3) -> nn.Sequential:
    """A grid of vectors (B, in_channels, S/f, S/f) to raw pictures (B, out_channels, S, S)."""
    widths = level_widths(config)[::-1]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(Upsample(widths[level - 1], width))
        layers += [ResidualBlock(width) for _ in range(config.decoder_blocks)]
    layers += [
        ChannelNorm(widths[-1]),
        nn.SiLU(),
        nn.Conv2d(widths[-1], out_channels * config.patch**2, 3, padding=1),
        nn.PixelShuffle(config.patch),
    ]
    return nn.Sequential(*layers)
