"""The stages of a run, and their order."""

from __future__ import annotations

from dalle_mini_impl.config import Recipe, Stage, TrainConfig

ORDER: tuple[Stage, ...] = TrainConfig().stages
"""What a recipe trains unless it says otherwise."""


def stage_order(recipe: Recipe) -> tuple[Stage, ...]:
    """All stages in an order that serves them: part of CLIP's pictures pass through the VAE, the prior and DALL·E see
    CLIP's embeddings, the upscaler what the VAE decodes at last. Adversarial training changes no ids, but for the full
    phase, which comes before DALL·E.
    """
    if recipe.vqgan.phase == "full":
        return "vae", "clip", "vqgan", "prior", "dalle", "upscale"
    return "vae", "clip", "prior", "dalle", "vqgan", "upscale"


def asked_for(recipe: Recipe) -> list[Stage]:
    """Those of train.stages, the prior where DALL·E is trained on picture embeddings, an upscaler if it has one."""
    wanted = set(recipe.train.stages)
    if recipe.dalle.image_prefix and "dalle" in wanted:
        wanted.add("prior")
    if recipe.upscale.factor > 1:
        wanted.add("upscale")
    return [stage for stage in stage_order(recipe) if stage in wanted]
