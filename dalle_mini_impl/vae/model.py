"""The discrete VAE: pictures to grids of ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import VAEConfig
from dalle_mini_impl.precision import autocast_off
from dalle_mini_impl.vae.backbone import ResidualBlock, build_decoder, build_encoder
from dalle_mini_impl.vae.losses import from_logit_laplace, logit_laplace_nll, mixed_loss
from dalle_mini_impl.vae.quantizers import Quantized, build_quantizer

LOGITS_STD = 6.0
"""Deviation of a fresh gumbel encoder's logits, over that of its features. Its codes have to stand out from the Gumbel
noise (of 1.3) at once: flat logits carry nothing that the decoder could learn to read, and the KL then keeps it so."""


@dataclass(frozen=True)
class VAEOutput:
    """raw: the decoder's output (B, 3 or 6, S, S). reconstruction: pictures (B, 3, S, S), unclamped while training."""

    raw: Tensor
    reconstruction: Tensor
    quantized: Quantized


class DiscreteVAE(nn.Module):
    """Encoder, quantizer and decoder. Pictures are (B, 3, S, S) in [0, 1] going in and coming out."""

    def __init__(self, config: VAEConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.downsample:
            raise ValueError(f"image size {image_size} is not a multiple of vae.downsample {config.downsample}")
        self.config = config
        self.image_size = image_size
        self.grid_size = image_size // config.downsample
        self.quantizer = build_quantizer(config)
        self.num_codes = self.quantizer.num_codes
        self.encoder = build_encoder(config, self.quantizer.in_channels)
        if config.quantizer == "gumbel":
            head = self.encoder[-1]
            assert isinstance(head, nn.Conv2d)
            nn.init.normal_(head.weight, std=LOGITS_STD * head.in_channels**-0.5)
        raw_channels = 6 if config.reconstruction == "logit_laplace" else 3
        self.decoder = build_decoder(config, self.quantizer.out_channels, raw_channels)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """All kernels but those that make codes and those that paint, which Muon may train."""
        ends = {id(self.encoder[-1].weight), id(self.last_layer)}
        kernels = [p for part in (self.encoder, self.decoder) for p in part.parameters() if p.ndim == 4]
        return [p for p in kernels if id(p) not in ends]

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of the residual blocks again from now on, instead of keeping it."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.recomputes = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to ids (B, N) int64, row by row."""
        return self.quantizer.ids(self.encoder(self._check(images)))

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, N) int64 to pictures (B, 3, S, S) in [0, 1], fp32."""
        if ids.ndim != 2 or ids.shape[1] != self.grid_size**2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected (B, {self.grid_size**2})")
        raw = self.decoder(self.quantizer.vectors(ids, self.grid_size))
        return self.pictures(raw.float()).clamp(0, 1)

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """What the decoder is given for each code, (V, C) fp32."""
        codes = torch.arange(self.num_codes, device=next(self.parameters()).device)
        return self.quantizer.vectors(codes[None], 1).float()[0, :, 0].t()

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) of latents' hard codes, and those ids (B, N); the gradient passes the rounding.

        latents: (B, in_channels, grid, grid) of the quantizer. Values are nominally in [0, 1], but not clamped, because
        a clamp has no gradient outside.
        """
        quantized = self.quantizer.straight_through(latents)
        return self.pictures(self.decoder(quantized.vectors).float()), quantized.ids

    def forward(self, images: Tensor, progress: float = 1.0, generator: torch.Generator | None = None) -> VAEOutput:
        """The training pass over pictures (B, 3, S, S) in [0, 1]; progress in [0, 1] drives the gumbel schedules."""
        latents = self.encoder(self._check(images))
        with autocast_off(images.device):
            quantized = self.quantizer(latents.float(), progress, generator)
        raw = self.decoder(quantized.vectors).float()
        return VAEOutput(raw, self.pictures(raw), quantized)

    def loss(
        self, images: Tensor, progress: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar training loss, a mean over the batch, and its terms (0-d, detached).

        While training, what the codebook of vq has seen is kept for `after_step`.
        """
        output = self(images, progress, generator)
        if self.training:
            self.quantizer.observe(output.quantized)
        terms = self.quantizer_terms(output) | self.reconstruction_terms(images, output.raw)
        total = torch.stack(list(terms.values())).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def quantizer_terms(self, output: VAEOutput) -> dict[str, Tensor]:
        """The quantizer's own terms of the loss, 0-d each, on the scale of the reconstruction's."""
        terms = dict(output.quantized.losses)
        if "kl" in terms:  # nats a picture; the reconstruction terms are means over values
            terms["kl"] = terms["kl"] / output.reconstruction[0].numel()
        return terms

    def reconstruction_terms(self, images: Tensor, raw: Tensor) -> dict[str, Tensor]:
        """The terms of the loss that compare pictures with the decoder's fp32 output for them, 0-d each."""
        if self.config.reconstruction == "logit_laplace":
            mean, log_scale = raw.chunk(2, dim=1)
            return {"logit_laplace": logit_laplace_nll(images.float(), mean, log_scale)}
        return mixed_loss(images.float(), self.pictures(raw), self.config)

    def redecode(self, images: Tensor) -> VAEOutput:
        """As `forward`, but through hard ids: neither encoder nor quantizer gets a gradient, and they learn nothing."""
        with torch.no_grad():
            ids = self.encode(images)
            vectors = self.quantizer.vectors(ids, self.grid_size)
        raw = self.decoder(vectors).float()
        return VAEOutput(raw, self.pictures(raw), Quantized(vectors, ids))

    @property
    def last_layer(self) -> nn.Parameter:
        """The kernels that paint: gradients of losses are compared at them."""
        weight = self.decoder[-2].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @torch.no_grad()
    def before_step(self, micro_batches: Iterable[Tensor] = ()) -> None:
        """To be called before the losses of an optimizer step; drops what a skipped step has left behind.

        micro_batches: the step's pictures (b, 3, S, S), where they are cut up in time, so that the losses of the parts,
        weighted by their sizes, add up to that of the whole.
        """
        self.quantizer.before_step(self.encoder(self._check(images)).float() for images in micro_batches)

    def after_step(self, generator: torch.Generator | None = None) -> None:
        """To be called after each optimizer step that was taken: moves the codebook of vq, on all ranks together.

        generator: the step's random numbers, the same on every rank.
        """
        self.quantizer.after_step(generator)

    def pictures(self, raw: Tensor) -> Tensor:
        """Pictures from the decoder's fp32 output: nominally in [0, 1]."""
        if self.config.reconstruction == "logit_laplace":
            return from_logit_laplace(raw[:, :3])
        return raw + 0.5

    def _check(self, images: Tensor) -> Tensor:
        """Pictures as the encoder wants them: centred on 0, channels last."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, {size}, {size})")
        return (images - 0.5).contiguous(memory_format=torch.channels_last)
