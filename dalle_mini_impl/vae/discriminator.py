"""The patch discriminator of a VQGAN (arXiv 2012.09841) and the losses of both sides."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import LEAST_PATCHES
from dalle_mini_impl.vae.backbone import ChannelNorm

AdversarialLoss = Literal["hinge", "nonsaturating"]


class PatchDiscriminator(nn.Module):
    """Convolutions that halve the sides, then a logit for each patch: is it of a real picture? (arXiv 1611.07004)

    num_layers: halvings; a logit sees 7, 16, 34 or 70 pixels each way with 0 to 3 of them. Nothing in it mixes the
    pictures of a batch, so that the losses don't depend on how a batch is cut up.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level in range(num_layers + 1):
            wider = width * min(2**level, 8)
            stride = 2 if level < num_layers else 1
            layers.append(nn.Conv2d(channels, wider, 4, stride=stride, padding=1))
            if level:
                layers.append(ChannelNorm(wider))
            layers.append(nn.LeakyReLU(0.2))
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S), centred on 0, to logits (B, 1, h, w), fp32: positive where they look real.

        Raises ValueError for pictures too small for the number of layers.
        """
        halvings = sum(getattr(layer, "stride", None) == (2, 2) for layer in self.layers)
        if images.shape[-1] >> halvings < LEAST_PATCHES:
            raise ValueError(
                f"pictures of {images.shape[-1]} pixels are too small for {halvings} layers of the discriminator: "
                f"lower vqgan.discriminator_layers"
            )
        logits: Tensor = self.layers(images)
        return logits.float()


def generator_loss(fake_logits: Tensor, kind: AdversarialLoss) -> Tensor:
    """What a decoder pays for being found out, a 0-d mean: it falls where logits of its pictures rise."""
    if kind == "hinge":
        return -fake_logits.mean()
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: AdversarialLoss) -> Tensor:
    """What a discriminator pays, a 0-d mean: it falls where real logits rise and fake ones sink."""
    if kind == "hinge":
        return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, real_anchor: Tensor, fake_anchor: Tensor) -> Tensor:
    """Keeps real logits from rising far above what fake ones used to be, and the other way round (arXiv 2104.03310).

    Anchors are moving averages of the other steps' logits, 0-d each. It holds back a discriminator of a small set.
    """
    return F.relu(real_logits - fake_anchor).square().mean() + F.relu(real_anchor - fake_logits).square().mean()
