"""From a run so far to the task of its next stage: data, caches, models of the stages before, weights to start from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from dalle_mini_impl.config import DataConfig, Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.array_cache import weights_digest
from dalle_mini_impl.data.embedding_cache import EmbeddingCache, embedding_fingerprint
from dalle_mini_impl.data.prepare import PreparedData, prepare
from dalle_mini_impl.data.report import NoPicturesError
from dalle_mini_impl.data.token_cache import TokenCache, cache_fingerprint
from dalle_mini_impl.files import write_json
from dalle_mini_impl.pretrained import Bundle, build_clip, build_dalle, build_prior, build_upscaler, build_vae
from dalle_mini_impl.training.batches import derive_seed
from dalle_mini_impl.training.gradients import within_memory
from dalle_mini_impl.training.processes import workers_of
from dalle_mini_impl.training.progress import counting
from dalle_mini_impl.training.task import Task, autocast, autocast_dtype
from dalle_mini_impl.training.tasks.clip import CLIPTask
from dalle_mini_impl.training.tasks.dalle import DALLETask
from dalle_mini_impl.training.tasks.distill import DistillTask
from dalle_mini_impl.training.tasks.prior import PriorTask
from dalle_mini_impl.training.tasks.upscale import UpscaleTask
from dalle_mini_impl.training.tasks.vae import VAETask
from dalle_mini_impl.training.tasks.vqgan import VQGANTask
from dalle_mini_impl.vae.discriminator import PatchDiscriminator
from dalle_mini_impl.vae.upsampler import FACTOR

logger = logging.getLogger("dalle_mini_impl.training")
M = TypeVar("M", bound=nn.Module)
_READING_PARTS = ("reading.", "captioner.")
_ADDED_PARTS = ("prefix.", "look_ahead.", *_READING_PARTS)
"""What names of weights begin with that fine-tuning can add; those of reading it can leave out, too."""
Cache = TypeVar("Cache", TokenCache, EmbeddingCache)


@dataclass(frozen=True)
class TaskBuilder:
    """What a run has when a stage begins.

    out: its folder. bundle: its checkpoint so far. initial: the checkpoint that it started from, None for none.
    """

    recipe: Recipe
    data_spec: str
    data: PreparedData
    out: Path
    accelerator: Accelerator
    bundle: Bundle
    initial: Bundle | None

    def build(self, stage: Stage) -> Task:
        """A stage's task, with what it needs of the stages before. Raises ValueError where that is missing."""
        bundle, recipe = self.bundle, self.recipe
        if stage == "vae":
            return VAETask(self._model(stage, lambda: build_vae(recipe)), self.data, recipe)
        if stage == "clip":
            decoder = None
            if recipe.clip.reconstructed_share > 0:
                if bundle.vae is not None:
                    decoder = (bundle.vae, self.cache(stage))
                else:
                    logger.warning("no VAE yet: clip.reconstructed_share has no effect, clip sees pictures only")
            clip = self._model(stage, lambda: build_clip(recipe, bundle.stream))
            return CLIPTask(clip, self.data, recipe, bundle.tokenizer, self.accelerator, decoder)
        if stage == "prior":
            return self._prior_task()
        if stage == "vqgan":
            return self._vqgan_task()
        if stage == "upscale":
            return self._upscale_task()
        if bundle.vae is None:
            raise ValueError(
                f"{stage} needs a VAE: train --stage vae first, or start from a checkpoint with --init-from"
            )
        embeddings = self.embeddings(stage) if recipe.dalle.image_prefix else None
        if stage == "distill":
            if bundle.dalle is None:
                raise ValueError(
                    "distill trains a DALL·E further: train --stage dalle first, or start from a checkpoint with "
                    "--init-from"
                )
            teacher = bundle.dalle.to(self.accelerator.device)  # the loop moves what it trains alone
            parts = (self.data, recipe, bundle.tokenizer, self.cache(stage), bundle.vae, embeddings)
            return DistillTask(teacher, *parts)
        dalle = self._model(stage, self._build_learning_dalle)
        dalle.learn_by_features(bundle.vae.code_vectors())  # beside rows that are loaded by now
        return DALLETask(dalle, self.data, recipe, bundle.tokenizer, self.cache(stage), bundle.vae, embeddings)

    def _prior_task(self) -> PriorTask:
        bundle, recipe = self.bundle, self.recipe
        if not recipe.dalle.image_prefix:
            raise ValueError(
                "a prior draws picture embeddings for a DALL·E that is conditioned on them: set dalle.image_prefix, "
                "for example to 4"
            )
        embeddings = self.embeddings("prior")
        assert bundle.clip is not None
        prior = self._model("prior", lambda: build_prior(recipe, bundle.stream))
        before = self.initial.clip if self.initial is not None else None
        if before is not None and weights_digest(before) != weights_digest(bundle.clip):
            prior.codec.forget()  # CLIP's space has moved since
        return PriorTask(prior, self.data, recipe, bundle.tokenizer, bundle.clip, embeddings)

    def _vqgan_task(self) -> Task:
        bundle, recipe = self.bundle, self.recipe
        if bundle.vae is None or bundle.clip is None:
            raise ValueError(
                "vqgan needs a trained VAE, and a CLIP to see with: train --stage vae and --stage clip first, or start "
                "from a checkpoint with --init-from"
            )
        torch.manual_seed(derive_seed(recipe.seed, "vqgan", "weights"))
        discriminator = PatchDiscriminator(recipe.vqgan.discriminator_width, recipe.vqgan.discriminator_layers)
        return VQGANTask(bundle.vae, bundle.clip, discriminator, self.data, recipe, self.accelerator)

    def _upscale_task(self) -> UpscaleTask:
        bundle, recipe = self.bundle, self.recipe
        vae = bundle.vae
        if recipe.upscale.factor == 1:
            raise ValueError("upscale.factor is 1, which asks for no upscaler: set it to 2")
        if vae is None:
            raise ValueError("upscale needs a VAE: train --stage vae first, or start from one with --init-from")
        config = recipe.data.model_copy(update={"image_size": FACTOR * recipe.data.image_size})
        large = read_pictures(self.data_spec, config, self.out, "data-large", self.accelerator)
        upscaler = self._model("upscale", lambda: build_upscaler(recipe, vae))
        return UpscaleTask(upscaler, self.data, large, recipe, self.cache("upscale"), vae)

    def _build_learning_dalle(self) -> DALLE:
        """A fresh DALL·E with the weights that it has in training alone."""
        dalle = build_dalle(self.recipe, self.bundle.stream)
        dalle.learn_to_look_ahead()
        return dalle

    def _model(self, stage: Stage, build: Callable[[], M]) -> M:
        """The weights to start from: those of --init-from, else fresh ones drawn with the recipe's seed.

        A DALL·E that gains an image_prefix or learns to read, and a CLIP that gains a captioner, has that fresh and
        everything else from the checkpoint; one that is to read no more leaves out what it read with.
        """
        torch.manual_seed(derive_seed(self.recipe.seed, stage, "weights"))
        model = build()
        initial = getattr(self.initial, stage, None)
        if initial is not None:
            own, theirs = model.state_dict(), initial.state_dict()
            fresh = {name: value for name, value in own.items() if name.startswith(_ADDED_PARTS)}
            kept = {name: value for name, value in theirs.items() if name in own or not name.startswith(_READING_PARTS)}
            model.load_state_dict({**fresh, **kept})
        return model

    def cache(self, stage: Stage) -> TokenCache:
        """The id cache of the VAE as it is now, encoded if it isn't there yet. stage: that needs it."""
        assert self.bundle.vae is not None
        precision = self.recipe.train.vae.precision
        return self._cached(stage, TokenCache, self.bundle.vae, cache_fingerprint, precision, "encoding pictures")

    def embeddings(self, stage: Stage) -> EmbeddingCache:
        """CLIP's embeddings of all pictures, computed if they aren't there yet. stage: that needs them.

        Raises ValueError without a CLIP.
        """
        if self.bundle.clip is None:
            raise ValueError(
                "picture embeddings (dalle.image_prefix) are CLIP's: train --stage clip first, or start from a "
                "checkpoint with --init-from"
            )
        precision = self.recipe.train.clip.precision
        return self._cached(
            stage, EmbeddingCache, self.bundle.clip, embedding_fingerprint, precision, "embedding pictures"
        )

    def _cached(
        self, stage: Stage, kind: type[Cache], model: Any, fingerprint_of: Callable[..., str], precision: str, what: str
    ) -> Cache:
        """What a model makes of all pictures, opened or, by all processes together, built; what: that work's name.

        Raises MemoryError where memory is short even for one picture at a time.
        """
        accelerator = self.accelerator
        model.to(accelerator.device).eval()
        folder, views = self.out / "cache", self.recipe.data.views
        fingerprint = fingerprint_of(model, self.data.fingerprint, views)
        cache = kind.open(folder, fingerprint)
        accelerator.wait_for_everyone()
        if cache is not None:
            return cache
        dtype = autocast_dtype(precision, accelerator.device)
        is_main = accelerator.is_main_process
        with within_memory(stage, f"{what} one at a time"), counting(what, is_main) as progress:
            return kind.build(
                folder,
                model,
                self.data.pictures,
                views,
                fingerprint,
                autocast=lambda: autocast(accelerator.device, dtype),
                workers=workers_of(accelerator),
                progress=progress,
            )


def read_pictures(
    data_spec: str,
    config: DataConfig,
    out: Path,
    folder: str,
    accelerator: Accelerator,
    expected: str | None = None,
) -> PreparedData:
    """The pictures of a run's data, prepared by all processes in OUT/folder; expected: see `prepare`.

    Raises ValueError where none can be used; OUT/data-report.json then names each.
    """
    try:
        with counting("reading pictures", accelerator.is_main_process) as progress:
            return prepare(
                data_spec,
                config,
                out / folder,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                barrier=accelerator.wait_for_everyone,
                progress=progress,
                expected=expected,
            )
    except NoPicturesError as error:
        path = out / "data-report.json"
        write_json(path, error.report)
        raise ValueError(f"{error}; {path} names all") from None
