"""The discriminator while it trains: its gradients, its optimizer, and how hard it may pull at the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dalle_mini_impl.config import VQGANConfig
from dalle_mini_impl.precision import autocast_off
from dalle_mini_impl.vae.augment import diff_augment
from dalle_mini_impl.vae.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
)

ANCHOR_DECAY = 0.99
"""Of the moving averages of logits that the LeCam penalty compares with."""
MAX_SKIPPED_IN_A_ROW = 5
_DELTA = 1e-6
"""Keeps the adaptive weight finite where the discriminator's gradient vanishes."""


@dataclass(frozen=True)
class Judged:
    """What the discriminator said of a micro-batch.

    loss: the decoder's adversarial loss, 0-d, with a graph down to the pictures. metrics: 0-d means, detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Adversary:
    """A discriminator that learns beside a stage's own model, a step of its own for each of the stage's.

    `begin`, then `judge` and `weigh` for each micro-batch, then `step`: both sides see each other as they were before
    the step. Gradients are only ever taken with respect to what is named, so that neither side's loss moves the other.
    They are summed over micro-batches and processes, and so is all that the adaptive weight is made of: how a batch is
    cut up changes nothing.
    """

    def __init__(
        self, config: VQGANConfig, discriminator: PatchDiscriminator, accelerator: Accelerator, max_grad_norm: float
    ) -> None:
        self.config, self.accelerator, self.max_grad_norm = config, accelerator, max_grad_norm
        self.discriminator = discriminator.to(accelerator.device)
        self.parameters = list(discriminator.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )
        self.anchors = torch.zeros(2, device=accelerator.device)  # of real and of fake logits
        self.ratio = torch.zeros((), device=accelerator.device)
        """Gradient norm of the other losses over that of the adversarial one, of the last step; 0 before the first."""
        self.num_steps = self.skipped_in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Begins a step; what one that was skipped has left behind is forgotten."""
        self._grads = [torch.zeros_like(p) for p in self.parameters]
        self._logits = torch.zeros_like(self.anchors)
        self._pulls: tuple[Tensor, Tensor] | None = None

    def adversarial_weight(self, step: int) -> Tensor:
        """What the decoder's adversarial loss counts in a step, 0-d.

        0 while the discriminator learns alone, and in the step after, which only measures; then weight × ratio × ramp.
        """
        config = self.config
        active = step - config.alone_steps
        ramp = min(1.0, max(0.0, active / config.ramp_steps)) if config.ramp_steps else float(active >= 0)
        return config.weight * ramp * self.ratio

    def judge(self, images: Tensor, pictures: Tensor, draws: Tensor, share: Tensor) -> Judged:
        """Compares true pictures (B, 3, S, S) in [0, 1] with the decoder's, and learns from it at the next `step`.

        draws: (B, NUM_DRAWS) for the augmentation; each pair is changed alike. share: of the global batch, 0-d.
        """
        config, device = self.config, images.device
        real, fake = (
            self.discriminator(diff_augment(x.float() - 0.5, draws, config.augment)) for x in (images, pictures)
        )
        with autocast_off(device):
            loss = discriminator_loss(real, fake, config.loss)
            if config.lecam_weight and self.num_steps:
                loss = loss + config.lecam_weight * lecam_penalty(real, fake, self.anchors[0], self.anchors[1])
            grads = torch.autograd.grad(share * loss, self.parameters, retain_graph=True)
        means = torch.stack([real.detach().mean(), fake.detach().mean()])
        torch._foreach_add_(self._grads, list(grads))
        self._logits += share * means
        metrics = {"discriminator": loss.detach(), "real_logit": means[0], "fake_logit": means[1]}
        return Judged(generator_loss(fake, config.loss), metrics)

    def weigh(self, pull: Tensor, adversarial_pull: Tensor) -> None:
        """Notes a micro-batch's part of the gradients at the last layer, of the other losses and of the adversarial."""
        before = self._pulls or (torch.zeros_like(pull), torch.zeros_like(pull))
        self._pulls = before[0] + pull, before[1] + adversarial_pull

    @torch.no_grad()
    def step(self) -> None:
        """The discriminator's own step, on all processes alike; raises FloatingPointError after a few that failed."""
        grads, logits, *pulls = self._sum_over_processes([*self._grads, self._logits, *(self._pulls or ())])
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        is_finite = bool(torch.isfinite(norm + logits.sum() + sum(pull.sum() for pull in pulls)))
        if not is_finite:
            self._skip()
            return
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.anchors = logits if self.num_steps == 0 else self.anchors.lerp(logits, 1 - ANCHOR_DECAY)
        if pulls:
            ratio = pulls[0].norm() / (pulls[1].norm() + _DELTA)
            self.ratio = ratio.clamp(max=self.config.max_adaptive_weight)
        self.num_steps += 1
        self.skipped_in_a_row = 0
        self.begin()

    def _sum_over_processes(self, parts: Sequence[Tensor]) -> tuple[Any, ...]:
        """The discriminator's gradients as a list, then the other parts, each summed; one message for all of them."""
        flat = torch.cat([part.detach().float().flatten() for part in parts])
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(flat, "sum")
        sums = [
            piece.view_as(part)
            for piece, part in zip(torch.split(flat, [part.numel() for part in parts]), parts, strict=True)
        ]
        count = len(self.parameters)
        return sums[:count], *sums[count:]

    def _skip(self) -> None:
        self.skipped_in_a_row += 1
        self.begin()
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"vqgan: the discriminator's gradient was not finite in {self.skipped_in_a_row} steps in a row; "
                f"delete the run's folder state/vqgan and start the stage over with a lower "
                f"vqgan.discriminator_learning_rate, or with train.vqgan.precision set to fp32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "anchors": self.anchors,
            "ratio": self.ratio,
            "num_steps": self.num_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a saved state stopped."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.anchors, self.ratio = (state[name].to(self.accelerator.device) for name in ("anchors", "ratio"))
        self.num_steps, self.skipped_in_a_row = state["num_steps"], state["skipped_in_a_row"]
