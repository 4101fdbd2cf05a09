"""The stages of a run, and their order."""

from __future__ import annotations

from dalle_mini_impl.config import Recipe, Stage, TrainConfig

ORDER: tuple[Stage, ...] = TrainConfig().stages
"""What a recipe trains unless it says otherwise."""

WHOLE_STAGES: tuple[Stage, ...] = ("prior", "distill", "vqgan")
"""Those whose models are small and never shared out (FSDP): each process has the whole."""

FURTHER: dict[Stage, Stage] = {"vqgan": "vae", "distill": "dalle"}
"""Stages that train another one's model further."""


def stage_order(recipe: Recipe) -> tuple[Stage, ...]:
    """All stages in an order that serves them: part of CLIP's pictures pass through the VAE, the prior and DALL·E see
    CLIP's embeddings, the upscaler what the VAE decodes at last. Adversarial training changes no ids, but for the full
    phase, which comes before DALL·E.
    """
    if recipe.vqgan.phase == "full":
        return "vae", "clip", "vqgan", "prior", "dalle", "distill", "upscale"
    return "vae", "clip", "prior", "dalle", "distill", "vqgan", "upscale"


def outdated_by(stage: Stage, recipe: Recipe) -> tuple[Stage, ...]:
    """The stages whose models are of no use any more where another's has been trained since.

    DALL·E and the upscaler know a VAE's ids, the prior its CLIP's space, and so does a DALL·E with an image_prefix.
    """
    if stage == "vae" or (stage == "vqgan" and recipe.vqgan.phase == "full"):
        return "dalle", "upscale"
    if stage == "clip":
        return ("prior", "dalle") if recipe.dalle.image_prefix else ("prior",)
    return ()


def asked_for(recipe: Recipe) -> list[Stage]:
    """Those of train.stages, the prior where DALL·E is trained on picture embeddings, an upscaler if it has one."""
    wanted = set(recipe.train.stages)
    if recipe.dalle.image_prefix and "dalle" in wanted:
        wanted.add("prior")
    if recipe.upscale.factor > 1:
        wanted.add("upscale")
    return [stage for stage in stage_order(recipe) if stage in wanted]
