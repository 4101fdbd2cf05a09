"""The same ids, drawn at twice the size.

The ids and their codes stay those of the frozen VAE, so that everything trained on them stays valid. The upscaler sees
what the ids tell, the codes and the VAE's own picture of them, and adds what an enlarged picture lacks: it learns
from pictures that were prepared at twice the size. Untrained, it only enlarges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import UpscaleConfig, VAEConfig
from dalle_mini_impl.vae.backbone import ChannelNorm, ResidualBlock
from dalle_mini_impl.vae.losses import mixed_loss
from dalle_mini_impl.vae.model import DiscreteVAE

FACTOR = 2
_FOLD = 2  # pixels a cell of the trunk has at each side: a quarter of the work


class Upscaler(nn.Module):
    """Codes of a grid (B, C, G, G) and pictures (B, 3, S, S) of them to pictures (B, 3, 2S, 2S)."""

    def __init__(self, config: UpscaleConfig, vae: VAEConfig, code_channels: int) -> None:
        super().__init__()
        self.vae_config = vae
        self.stem = nn.Conv2d(3 * _FOLD**2, config.width, 3, padding=1)
        self.codes = nn.Conv2d(code_channels, config.width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.blocks)))
        self.norm = ChannelNorm(config.width)
        self.head = nn.Conv2d(config.width, 3 * (FACTOR * _FOLD) ** 2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The kernels of the residual blocks, which Muon may train."""
        return [p for p in self.blocks.parameters() if p.ndim == 4]

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of the residual blocks again from now on, instead of keeping it."""
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            block.recomputes = True

    def forward(self, codes: Tensor, small: Tensor) -> Tensor:
        """Pictures (B, 3, 2S, 2S) float32, nominally in [0, 1]; small are in [0, 1]."""
        x = self.stem(F.pixel_unshuffle((small - 0.5).contiguous(memory_format=torch.channels_last), _FOLD))
        x = x + F.interpolate(self.codes(codes), size=x.shape[-2:], mode="nearest")
        detail = F.pixel_shuffle(self.head(F.silu(self.norm(self.blocks(x)))), FACTOR * _FOLD)
        return enlarge(small) + detail.float()

    def decode(self, ids: Tensor, vae: DiscreteVAE) -> Tensor:
        """Ids (B, N) of a VAE to pictures (B, 3, 2S, 2S) in [0, 1], fp32; ValueError for another number of ids."""
        pictures: Tensor = self(*inputs_of(ids, vae))
        return pictures.clamp(0, 1)

    def loss(self, images: Tensor, codes: Tensor, small: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The VAE's mixed loss of pictures (B, 3, 2S, 2S) in [0, 1], a mean over the batch, and its terms, detached."""
        terms = mixed_loss(images, self(codes, small), self.vae_config)
        total = sum(terms.values(), start=images.new_zeros(()))
        return total, {name: term.detach() for name, term in terms.items()}


@torch.no_grad()
def inputs_of(ids: Tensor, vae: DiscreteVAE) -> tuple[Tensor, Tensor]:
    """What an upscaler sees of ids (B, N): their codes (B, C, G, G) and the frozen VAE's pictures (B, 3, S, S)."""
    small = vae.decode(ids)
    return vae.quantizer.vectors(ids, vae.grid_size), small


def enlarge(small: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) at twice the size, (B, 3, 2S, 2S), by bicubic interpolation, fp32."""
    return F.interpolate(small.float(), scale_factor=float(FACTOR), mode="bicubic").clamp(0, 1)
