"""What each stage computes of one picture and its caption, with models on the meta device: what estimates count.

It follows the tasks of `training.tasks` without their data: which models there are, what goes through them, and which
of that gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE, nll_sum
from dalle_mini_impl.pretrained import build_clip, build_dalle, build_prior, build_upscaler, build_vae
from dalle_mini_impl.stream import NUM_SPECIAL, PAD, Stream
from dalle_mini_impl.vae.discriminator import PatchDiscriminator
from dalle_mini_impl.vae.model import DiscreteVAE

Forward = Callable[[], object]


@dataclass(frozen=True)
class Passes:
    """What goes through a stage's models of one picture and its caption.

    model: what is trained, so far as it requires a gradient. forward: what the gradient goes back through. no_grad:
    what gets none, each with how often a picture takes it, on average. partner: what learns beside the model, with an
    AdamW of its own. missing: what isn't in here, though the stage has it.
    """

    model: nn.Module
    forward: Forward
    no_grad: tuple[tuple[float, Forward], ...] = ()
    partner: nn.Module | None = None
    missing: str | None = None

    def trained(self) -> list[nn.Parameter]:
        """The model's parameters that learn."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class StagePasses:
    """The passes of a recipe's stages, at the longest captions and the largest vocabulary that it allows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stream = Stream(
            text_length=recipe.text.max_length,
            grid_size=recipe.grid_size,
            text_vocab=max(recipe.text.vocab_size, NUM_SPECIAL + 1),
            image_vocab=recipe.vae.num_codes,
            slot_step=recipe.text.slot_step,
            image_prefix=recipe.dalle.image_prefix,
        )
        size = recipe.data.image_size
        self.host_text = torch.full((1, self.stream.text_length), NUM_SPECIAL)  # no padding: it takes all slots
        with torch.device("meta"):
            self.images = torch.zeros(1, 3, size, size)
            self.ids = torch.zeros(1, self.stream.num_image_tokens, dtype=torch.long)
            self.embedding = torch.zeros(1, recipe.clip.embed_dim) if recipe.dalle.image_prefix else None
        self.text = self.host_text.to("meta")

    def build(self, stage: Stage, *, is_cut_up: bool, is_alone: bool) -> Passes:
        """A stage's passes.

        is_cut_up: whether a process takes its part of the batch in several micro-batches. is_alone: whether one process
        has the whole batch.
        """
        builders: dict[Stage, Callable[[], Passes]] = {
            "clip": lambda: self._clip(is_cut_up or not is_alone),
            "vae": lambda: self._vae(is_cut_up),
            "dalle": self._dalle,
            "prior": self._prior,
            "distill": self._distill,
            "vqgan": self._vqgan,
            "upscale": self._upscale,
        }
        with torch.device("meta"):
            return builders[stage]()

    def drawing(self) -> Forward:
        """One branch of drawing a picture: the whole stream once, as in training, but for the cells ahead."""
        with torch.device("meta"):
            dalle = build_dalle(self.recipe, self.stream)
        return lambda: dalle(self.text, self.ids, None, self.embedding)

    def _clip(self, has_first_pass: bool) -> Passes:
        """Both towers, the captioner, and the VAE for the share of pictures that it gives back; see `CLIPTask`.

        has_first_pass: through the towers, to collect the vectors of a batch that isn't computed at once (GradCache).
        """
        config, vae = self.recipe.clip, build_vae(self.recipe)
        clip = build_clip(self.recipe, self.stream)
        texts = self.text.expand(1 + config.hard_negatives, -1)
        latents = self._latents(vae)

        def towers() -> tuple[Tensor, ...]:
            places = clip.places(self.images)
            return places, clip.pool(places), clip.encode_text(texts)

        def forward() -> tuple[Tensor, ...]:
            places, *vectors = towers()
            return (*vectors, clip.caption_nll(places, self.text)) if clip.captioner is not None else tuple(vectors)

        decoded = config.reconstructed_share * (2 if has_first_pass else 1)
        first = [(1.0, towers)] if has_first_pass else []
        return Passes(clip, forward, (*first, (decoded, lambda: vae.decoder(latents))))

    def _vae(self, is_cut_up: bool) -> Passes:
        """Pictures to latents and back; vq's balance term asks the encoder ahead about a batch that is cut up."""
        vae, config = build_vae(self.recipe), self.recipe.vae
        latents = self._latents(vae)
        has_first_pass = is_cut_up and config.quantizer == "vq" and config.balance_weight > 0
        first = ((1.0, lambda: vae.encoder(self.images)),) if has_first_pass else ()
        return Passes(vae, lambda: (vae.encoder(self.images), vae.decoder(latents)), first)

    def _dalle(self) -> Passes:
        """The loss of a picture that is drawn, with the cells ahead and spread targets where the recipe has them.

        Features of codes are left out: their maps are small, and computed once a batch.
        """
        dalle, codes = build_dalle(self.recipe, self.stream), self.stream.image_vocab
        dalle.learn_to_look_ahead()
        likeness = torch.zeros(codes, codes) if self.recipe.dalle.soft_targets else None
        return Passes(dalle, lambda: dalle.loss(self.host_text, self.ids, embedding=self.embedding, likeness=likeness))

    def _distill(self) -> Passes:
        """A DALL·E that learns what the one before says under guidance, which takes that one two passes."""
        dalle = build_dalle(self.recipe, self.stream)
        teacher = build_dalle(self.recipe, self.stream).requires_grad_(False)
        return Passes(
            dalle,
            lambda: self._divergence(dalle),
            (
                (1.0, lambda: teacher(self.text, self.ids, None, self.embedding)),
                (1.0, lambda: teacher(self.text, self.ids)),
            ),
        )

    def _divergence(self, dalle: DALLE) -> tuple[Tensor, Tensor]:
        text_logits, image_logits = dalle(self.text, self.ids, None, self.embedding)
        own = image_logits.float().log_softmax(dim=-1)
        divergence = F.kl_div(own, torch.zeros_like(own), reduction="sum", log_target=True)
        return divergence, nll_sum(text_logits, dalle.text_targets(self.text), ignore=PAD)

    def _prior(self) -> Passes:
        """Captions and the codes of picture embeddings; CLIP embeds the captions."""
        clip, prior = build_clip(self.recipe, self.stream), build_prior(self.recipe, self.stream)
        vector, dots = torch.zeros(1, self.recipe.clip.embed_dim), torch.zeros(1, dtype=torch.long)
        codes = torch.zeros(1, prior.codec.num_dims, dtype=torch.long)
        return Passes(
            prior, lambda: prior.nll(self.text, vector, dots, codes), ((1.0, lambda: clip.encode_text(self.text)),)
        )

    def _upscale(self) -> Passes:
        """What a VAE's decoder makes of ids, drawn at twice the size."""
        vae = build_vae(self.recipe)
        upscaler, latents = build_upscaler(self.recipe, vae), self._latents(vae)
        return Passes(upscaler, lambda: upscaler(latents, self.images), ((1.0, lambda: vae.decoder(latents)),))

    def _vqgan(self) -> Passes:
        """A VAE, or its decoder alone, before a discriminator and, where it is the judge, CLIP's image tower.

        The first steps, in which the discriminator learns alone, count as the others do.
        """
        config, vae = self.recipe.vqgan, build_vae(self.recipe)
        latents, tower = self._latents(vae), build_clip(self.recipe, self.stream).image_tower.requires_grad_(False)
        discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        is_full, asks_clip = config.phase == "full", config.perceptual == "clip" and config.perceptual_weight > 0
        vae.requires_grad_(is_full)
        vae.decoder.requires_grad_(True)

        def forward() -> list[object]:
            pictures = vae.pictures(vae.decoder(latents))
            kept: list[object] = [pictures, discriminator(self.images), discriminator(pictures)]
            kept += [vae.encoder(self.images)] if is_full else []
            return kept + ([tower.features(pictures)] if asks_clip else [])

        encoding = () if is_full else ((1.0, lambda: vae.encoder(self.images)),)
        seeing = ((1.0, lambda: tower.features(self.images)),) if asks_clip else ()
        asks_files = config.perceptual == "lpips" and config.perceptual_weight > 0
        missing = "the network in vqgan.lpips_weights, whose files say what it is" if asks_files else None
        return Passes(vae, forward, (*encoding, *seeing), discriminator, missing)

    @staticmethod
    def _latents(vae: DiscreteVAE) -> Tensor:
        """What a VAE's decoder reads, (1, C, G, G)."""
        return torch.zeros(1, vae.quantizer.out_channels, vae.grid_size, vae.grid_size)


def untrainable(recipe: Recipe) -> dict[Stage, str]:
    """The stages that a recipe names but can't be trained by it, and why."""
    reasons: dict[Stage, str | None] = {
        "prior": None if recipe.dalle.image_prefix else "dalle.image_prefix is 0, so that no DALL·E asks for one",
        "upscale": "upscale.factor is 1, which asks for no upscaler" if recipe.upscale.factor == 1 else None,
        "distill": "sampling.guidance is 1: there is nothing to distill" if recipe.sampling.guidance == 1 else None,
    }
    return {stage: reason for stage, reason in reasons.items() if reason and stage in recipe.train.stages}
