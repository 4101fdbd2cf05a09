"""The upscaler as a task of the loop: ids of the frozen VAE and the same pictures at twice the size."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache, images_from_pixels
from dalle_mini_impl.data.views import apply_view
from dalle_mini_impl.sheet import reconstruction_sheet, save_sheet
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, Indices, rows_where, sample_rng
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.base import BaseTask
from dalle_mini_impl.vae.losses import reconstruction_metrics
from dalle_mini_impl.vae.model import DiscreteVAE
from dalle_mini_impl.vae.upsampler import Upscaler, enlarge, inputs_of


class UpscaleTask(BaseTask):
    """Pictures at twice the size from the ids of the small ones, in the views of the id cache."""

    stage: Stage = "upscale"
    score = "psnr"

    def __init__(
        self,
        model: Upscaler,
        data: PreparedData,
        large: PreparedData,
        recipe: Recipe,
        cache: TokenCache,
        vae: DiscreteVAE,
    ) -> None:
        if large.names != data.names or large.captions != data.captions:
            raise ValueError(
                f"at twice the size the source gives other pictures ({len(large)} instead of {len(data)}): "
                "it has to give the same ones in the same order, whatever data.image_size is"
            )
        self.model: nn.Module = model
        self.data, self.large, self.recipe, self.cache, self.vae = data, large, recipe, cache, vae
        self.num_items = len(data.train)
        self.held_out = evaluation.held_out(data)

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """Large pixels (B, 2S, 2S, 3) uint8 and image ids (B, N), both in the sample's view (B,)."""
        views = torch.tensor(
            [
                int(sample_rng(self.recipe.seed, self.stage, int(place)).integers(self.cache.num_views))
                for place in positions
            ]
        )
        indices = self.data.train[items]
        return {
            "pixels": torch.from_numpy(self.large.pictures[indices]),
            "ids": self.cache.ids(indices, views.numpy()),
            "view": views,
        }

    def counts(self, batch: Batch) -> Tensor:
        """Pictures."""
        return torch.tensor([len(batch["ids"])], dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The upscaler's own loss, weighted by this micro-batch's share of the pictures."""
        images = images_from_pixels(batch["pixels"])
        for number, view in enumerate(self.recipe.data.views):
            rows = rows_where(context.host["view"] == number, images.device)
            images[rows] = apply_view(images[rows], view, self.recipe.upscale.factor)
        vae = self.vae.to(images.device).eval()
        loss, terms = cast(Upscaler, model).loss(images, *inputs_of(batch["ids"], vae))
        share = (len(images) / context.counts[0]).float()
        return loss * share, {name: term * share for name, term in terms.items()}

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """PSNR (dB) and SSIM on large held-out pictures, beside those of enlarging the VAE's own; writes a sheet."""

        def pictures(chunk: Indices) -> tuple[Tensor, ...]:
            return self._pictures(model, chunk, context)

        def measure(chunk: Indices) -> Tensor:
            large, drawn, resized = pictures(chunk)
            values = [reconstruction_metrics(large, pictures) for pictures in (drawn, resized)]
            parts = [value[name].sum() for value in values for name in ("psnr", "ssim")]
            return torch.stack([*parts, parts[0].new_tensor(len(large))])

        *totals, count = evaluation.total(measure, self.held_out, context, 5).tolist()
        if context.accelerator.is_main_process:
            first = context.chunks.map(pictures, self.held_out[: evaluation.NUM_RECONSTRUCTIONS])
            large, drawn, _ = (torch.cat(parts) for parts in zip(*first, strict=True))
            context.folder.mkdir(parents=True, exist_ok=True)
            save_sheet(reconstruction_sheet(large, drawn), context.folder / f"upscale-{context.step:06d}.png")
        names = ("psnr", "ssim", "psnr_resized", "ssim_resized")
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def _pictures(self, model: nn.Module, indices: Indices, context: EvaluationContext) -> tuple[Tensor, ...]:
        """Large pictures, those of the upscaler, and those of the VAE enlarged (bicubic)."""
        device = context.accelerator.device
        ids, large = self.cache.ids(indices).to(device), self.large.images(indices).to(device)
        vae = self.vae.to(device).eval()
        with context.autocast():
            drawn = cast(Upscaler, model).decode(ids, vae)
            small = vae.decode(ids)
        return large, drawn, enlarge(small)

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss and its terms."""
        terms = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in {"loss", "grad_norm"})
        return f"loss {metrics['loss']:.4f} ({terms})"
