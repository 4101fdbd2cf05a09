"""The stage `vqgan`: a trained VAE trained further against a discriminator (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Recipe, Stage, VQGANConfig
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import images_from_pixels
from dalle_mini_impl.precision import autocast_off
from dalle_mini_impl.sheet import comparison_sheet, save_sheet
from dalle_mini_impl.training.adversary import Adversary, Judged
from dalle_mini_impl.training.batches import Batch, Indices, sample_rng
from dalle_mini_impl.training.evaluation import NUM_RECONSTRUCTIONS
from dalle_mini_impl.training.fidelity import eyes_of, fidelity, through
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.vae import VAETask
from dalle_mini_impl.vae.augment import NUM_DRAWS
from dalle_mini_impl.vae.discriminator import PatchDiscriminator
from dalle_mini_impl.vae.model import DiscreteVAE, VAEOutput
from dalle_mini_impl.vae.perceptual import Perceptual, layer_distance, load_lpips

logger = logging.getLogger("dalle_mini_impl.training")


class VQGANTask(VAETask):
    """Pictures through the VAE and back, judged by a discriminator that learns beside it.

    before: the VAE that training starts from, which stays as it is. clip: its image tower is the perceptual loss, and
    measures how far reconstructions are from true pictures.
    """

    stage: Stage = "vqgan"
    score = "-rfd"

    def __init__(
        self,
        before: DiscreteVAE,
        clip: CLIP,
        discriminator: PatchDiscriminator,
        data: PreparedData,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(copy.deepcopy(before), data, recipe)
        if len(self.held_out) < 2:
            raise ValueError(f"vqgan is judged by 2 held-out pictures at least; the data has {len(self.held_out)}")
        self.config: VQGANConfig = recipe.vqgan
        self.unlike_steps = self.config.alone_steps
        self.before = before.to(accelerator.device).eval().requires_grad_(False)
        self.clip = clip.to(accelerator.device).eval().requires_grad_(False)
        self.perceptual = self._perceptual(accelerator.device)
        self.adversary = Adversary(self.config, discriminator, accelerator, recipe.train.vqgan.max_grad_norm)
        self._metrics_before: dict[str, float] | None = None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.config.phase == "full" or name.startswith("decoder."))

    def _perceptual(self, device: torch.device) -> Perceptual | None:
        """The perceptual distance that the recipe asks for."""
        if self.config.perceptual == "none" or not self.config.perceptual_weight:
            return None
        if self.config.perceptual == "lpips":
            return load_lpips(self.config.lpips_weights).to(device)
        tower = self.clip.image_tower
        return lambda images, others: layer_distance(tower.features, images, others)

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """{"pixels": (B, S, S, 3) uint8, "draws": (B, NUM_DRAWS) float32 in [0, 1), for the augmentation}."""
        rngs = [sample_rng(self.seed, "vqgan augment", int(position)) for position in positions]
        draws = torch.stack([torch.from_numpy(rng.random(NUM_DRAWS)) for rng in rngs])
        return {**super().batch(items, positions), "draws": draws.float()}

    def before_step(self, model: nn.Module, micro_batches: list[Batch], contexts: list[StepContext]) -> list[Batch]:
        """Forgets what a skipped step has left behind; in the full phase as a VAE's own training."""
        self.adversary.begin()
        if self.config.phase == "full":
            return super().before_step(model, micro_batches, contexts)
        return micro_batches

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, as something that has its gradient, if not its value.

        The gradient is taken once, at the decoder's output, apart for the adversarial loss and for the others: so the
        ratio of both at the last layer costs next to nothing, and no gradient reaches discriminator or CLIP.
        """
        vae, images = cast(DiscreteVAE, model), images_from_pixels(batch["pixels"])
        share = (len(images) / context.counts[0]).float()
        alone = context.step < self.config.alone_steps
        with torch.set_grad_enabled(not alone):
            output = self._rebuild(vae, images, context.generator)
        raw = output.raw.detach().requires_grad_(not alone)
        pictures = vae.pictures(raw)
        judged = self.adversary.judge(images, pictures, batch["draws"], share)
        if alone:
            metrics = {"loss": judged.loss.detach(), **judged.metrics}
            return metrics["loss"] * share, {name: value * share for name, value in metrics.items()}
        terms = vae.reconstruction_terms(images, raw)
        if self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual_weight * self.perceptual(images, pictures)
        return self._balance(vae, output, raw, terms, judged, share, context.step)

    def _rebuild(self, vae: DiscreteVAE, images: Tensor, generator: torch.Generator) -> VAEOutput:
        """Pictures to ids and back: with a gradient to the decoder only, or, in the full phase, to everything."""
        if self.config.phase == "decoder":
            return vae.redecode(images)
        output: VAEOutput = vae(images, 1.0, generator)
        if torch.is_grad_enabled():
            vae.quantizer.observe(output.quantized)
        return output

    def _balance(
        self,
        vae: DiscreteVAE,
        output: VAEOutput,
        raw: Tensor,
        terms: dict[str, Tensor],
        judged: Judged,
        share: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the adversarial loss up with the others; all are functions of raw, which is the output, cut off."""
        with autocast_off(raw.device):
            (pull,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), raw, retain_graph=True)
            (adversarial_pull,) = torch.autograd.grad(judged.loss, raw)
            weight = self.adversary.adversarial_weight(step)
            at_last_layer = (
                torch.autograd.grad(output.raw, vae.last_layer, share * part, retain_graph=True)[0]
                for part in (pull, adversarial_pull)
            )
            self.adversary.weigh(*at_last_layer)
            loss = (output.raw * (pull + weight * adversarial_pull)).sum()
            own_terms = vae.quantizer_terms(output)
            for term in own_terms.values():
                loss = loss + term
        metrics = {**own_terms, **terms, "adversarial": judged.loss, **judged.metrics, "adversarial_weight": weight}
        total = torch.stack([*own_terms.values(), *terms.values(), weight * judged.loss]).sum()
        return loss * share, {name: (value * share).detach() for name, value in {"loss": total, **metrics}.items()}

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """The discriminator's step; in the full phase the codebook's, too."""
        self.adversary.step()
        if self.config.phase == "full":
            super().after_step(model, generator)

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """See `fidelity`: the metrics of the VAE as it is, and as it was before; writes both beside the originals."""
        vae = cast(DiscreteVAE, model)
        if self._metrics_before is None:
            self._metrics_before = self._fidelity(self.before, context)
        metrics = self._fidelity(vae, context)
        if context.accelerator.is_main_process:
            self._write_sheet(vae, context)
        names = ("psnr", "ssim", "sharpness", "rfd", "rfd_local")
        return metrics | {f"{name}_before": self._metrics_before[name] for name in names}

    def _fidelity(self, vae: DiscreteVAE, context: EvaluationContext) -> dict[str, float]:
        return fidelity(through(vae), eyes_of(self.clip), self.data, self.held_out, context)

    def _write_sheet(self, vae: DiscreteVAE, context: EvaluationContext) -> None:
        """Originals, what came back of them before this stage, and what comes back now."""

        def rebuilt(chunk: Indices) -> tuple[Tensor, ...]:
            images = self.data.images(chunk).to(context.accelerator.device)
            with context.autocast():
                return images, *(through(version)(images) for version in (self.before, vae))

        parts = context.chunks.map(rebuilt, self.held_out[:NUM_RECONSTRUCTIONS])
        images, before, after = (torch.cat(part) for part in zip(*parts, strict=True))
        context.folder.mkdir(parents=True, exist_ok=True)
        sheet = comparison_sheet({"originals": images, "before": before, "after": after})
        save_sheet(sheet, context.folder / f"vqgan-{context.step:06d}.png")

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss, what the discriminator makes of true and rebuilt pictures, and how hard it pulls."""
        text = f"loss {metrics['loss']:.4f}, discriminator {metrics['discriminator']:.3f}"
        text += f" (real {metrics['real_logit']:+.2f}, rebuilt {metrics['fake_logit']:+.2f})"
        if "adversarial_weight" in metrics:
            return f"{text}, adversarial weight {metrics['adversarial_weight']:.3g}"
        return f"{text}, the discriminator alone"

    def state_dict(self) -> dict[str, Any]:
        """The discriminator's side."""
        return {"adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the saved discriminator."""
        self.adversary.load_state_dict(state["adversary"])
