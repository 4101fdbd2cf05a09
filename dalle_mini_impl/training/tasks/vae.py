"""Pictures to ids and back, as a task of the loop."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import images_from_pixels
from dalle_mini_impl.data.views import has_moves, move_px, shift_images
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, Indices, sample_rng
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.base import BaseTask
from dalle_mini_impl.vae.model import DiscreteVAE


class VAETask(BaseTask):
    """Pictures, mirrored or not, through the discrete VAE and back; moved, too, where the recipe has moved views."""

    stage: Stage = "vae"
    score = "psnr"

    def __init__(self, model: DiscreteVAE, data: PreparedData, recipe: Recipe) -> None:
        self.model: nn.Module = model
        self.data = data
        self.seed = recipe.seed
        self.num_items = len(data.train)
        self.max_move = move_px(recipe.data.image_size) if has_moves(recipe.data.views) else 0
        self.held_out = evaluation.held_out(data)

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """{"pixels": (B, S, S, 3) uint8}."""
        pixels = self.data.pictures[self.data.train[items]]
        rngs = [sample_rng(self.seed, self.stage, int(position)) for position in positions]
        for row, rng in enumerate(rngs):
            if rng.random() < 0.5:
                pixels[row] = pixels[row, :, ::-1].copy()
        shift = torch.tensor([rng.integers(-self.max_move, self.max_move + 1, 2).tolist() for rng in rngs])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return {"pixels": shift_images(images, shift, self.max_move).permute(0, 2, 3, 1)}

    def counts(self, batch: Batch) -> Tensor:
        """Pictures."""
        return torch.tensor([len(batch["pixels"])], dtype=torch.float64)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], contexts: list[StepContext]) -> list[Batch]:
        """Where the batch is cut up in time, a first pass of the encoder measures how all of it uses the codes."""
        cut_up = micro_batches if len(micro_batches) > 1 else []
        cast(DiscreteVAE, model).before_step(images_from_pixels(batch["pixels"]) for batch in cut_up)
        return micro_batches

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The VAE's own loss, weighted by this micro-batch's share of the pictures."""
        vae = cast(DiscreteVAE, model)
        images = images_from_pixels(batch["pixels"])
        share = (len(images) / context.counts[0]).float()
        loss, terms = vae.loss(images, context.progress, context.generator)
        return loss * share, {name: term * share for name, term in terms.items()}

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """Moves the codebook of vq by what the whole step's encoder outputs were."""
        cast(DiscreteVAE, model).after_step(generator)

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Hard-reconstruction PSNR and SSIM, use of the codebook; writes originals beside reconstructions."""
        return evaluation.reconstruct(cast(DiscreteVAE, model), self.data, self.held_out, context)

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss and its terms."""
        known = {"loss", "grad_norm"}
        terms = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in known)
        return f"loss {metrics['loss']:.4f} ({terms})"
