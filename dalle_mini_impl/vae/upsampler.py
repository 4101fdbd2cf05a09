"""A second decoder: the same ids, drawn at twice the size.

The ids and their codes stay those of the frozen VAE, so that everything trained on them stays valid. It learns from
pictures that were prepared at twice the size, and makes up the detail that the ids don't tell.
"""

from __future__ import annotations

from torch import Tensor, nn

from dalle_mini_impl.config import UpscaleConfig, VAEConfig
from dalle_mini_impl.vae.backbone import build_decoder
from dalle_mini_impl.vae.losses import mixed_loss
from dalle_mini_impl.vae.model import DiscreteVAE

FACTOR = 2


class Upscaler(nn.Module):
    """Codes of a grid (B, C, G, G) to pictures (B, 3, 2S, 2S), where the VAE's decoder gives (B, 3, S, S)."""

    def __init__(self, config: UpscaleConfig, vae: VAEConfig, code_channels: int) -> None:
        super().__init__()
        self.vae_config = vae
        shape = {
            "downsample": FACTOR * vae.downsample,
            "width": config.width,
            "latent_width": config.latent_width,
            "decoder_blocks": config.blocks,
        }
        self.decoder = build_decoder(vae.model_copy(update=shape), code_channels)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The kernels of the residual blocks and of the convolutions between levels, which Muon may train."""
        ends = {id(self.decoder[0].weight), id(self.decoder[-2].weight)}
        return [p for p in self.decoder.parameters() if p.ndim == 4 and id(p) not in ends]

    def forward(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, 2S, 2S) float32, nominally in [0, 1]."""
        raw: Tensor = self.decoder(codes)
        return raw.float() + 0.5

    def decode(self, ids: Tensor, vae: DiscreteVAE) -> Tensor:
        """Ids (B, N) of a VAE to pictures (B, 3, 2S, 2S) in [0, 1], fp32; ValueError for another number of ids."""
        if ids.ndim != 2 or ids.shape[1] != vae.grid_size**2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected (B, {vae.grid_size**2})")
        pictures: Tensor = self(vae.quantizer.vectors(ids, vae.grid_size))
        return pictures.clamp(0, 1)

    def loss(self, images: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The VAE's mixed loss of pictures (B, 3, 2S, 2S) in [0, 1], a mean over the batch, and its terms, detached."""
        terms = mixed_loss(images, self(codes), self.vae_config)
        total = sum(terms.values(), start=images.new_zeros(()))
        return total, {name: term.detach() for name, term in terms.items()}
