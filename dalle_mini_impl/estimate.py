"""What a recipe costs, before anything is allocated: parameters, operations, memory and time.

Models are built on the meta device, which knows shapes only. Operations are counted as the models run there, by the
convention of `flops`; activations are what autograd would keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import OPTIONAL_STAGES, STAGES, Recipe, Stage
from dalle_mini_impl.flops import count_flops
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.pretrained import build_clip, build_dalle, build_prior, build_upscaler, build_vae
from dalle_mini_impl.stream import NUM_SPECIAL, Stream
from dalle_mini_impl.vae.backbone import ResidualBlock

_FP32, _BF16 = 4, 2
BACKWARD_FACTOR = 2
"""A backward pass costs two forward passes: one product for the inputs, one for the weights."""
ACHIEVED = {
    "cpu2": 0.3e12,
    "cpu2-fp32": 0.1e12,
    "t4": 20e12,
    "rtx4090": 65e12,
    "a100": 125e12,
    "h100": 390e12,
    "h200": 390e12,
}
"""Operations a second that a training reaches, about 40 % of what the hardware could do in bf16 (T4: fp16).

cpu2 stands for two cores that compute in bf16, cpu2-fp32 for two that don't.
"""


@dataclass(frozen=True)
class StageEstimate:
    """One stage's cost. Bytes are for one device that holds everything, batch and activations for a micro-batch."""

    parameters: int
    forward_flops: float
    """Operations of a forward pass over one picture and its caption."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    """Of the averaged (EMA) weights."""
    activation_bytes: int
    steps: int
    batch_size: int
    forward_passes: int = 1
    """2 where gradients are checkpointed."""

    @property
    def train_flops(self) -> float:
        """Of the whole stage."""
        return (self.forward_passes + BACKWARD_FACTOR) * self.forward_flops * self.batch_size * self.steps

    def device_bytes(self, devices: int = 1) -> float:
        """Of each of several devices that share weights, gradients and optimiser out among them (FSDP)."""
        shared = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes
        return shared / devices + self.activation_bytes

    def hours(self, hardware: str, devices: int = 1) -> float:
        """Of training on such devices; ValueError for one that isn't in ACHIEVED."""
        if hardware not in ACHIEVED:
            raise ValueError(f"nothing is known of hardware {hardware!r}; known: {', '.join(ACHIEVED)}")
        return self.train_flops / (ACHIEVED[hardware] * devices) / 3600


@dataclass(frozen=True)
class Estimate:
    """The stages, and what drawing takes: the cache of a picture in bf16, with guidance both of its branches."""

    stages: dict[Stage, StageEstimate]
    text_length: int
    image_tokens: int
    guidance: float
    """The recipe's scale; at 1 there is one branch."""
    cache_bytes: int
    draw_flops: float
    """Operations of drawing one picture."""


def estimate(recipe: Recipe, devices: int = 1) -> Estimate:
    """The cost of a recipe at its longest captions and largest vocabulary, which data can only make less."""
    stream = Stream(
        text_length=recipe.text.max_length,
        grid_size=recipe.grid_size,
        text_vocab=max(recipe.text.vocab_size, NUM_SPECIAL + 1),
        image_vocab=recipe.vae.num_codes,
        image_prefix=recipe.dalle.image_prefix,
    )
    with torch.device("meta"):
        vae, clip, dalle = build_vae(recipe), build_clip(recipe, stream), build_dalle(recipe, stream)
        size = recipe.data.image_size
        images = torch.zeros(1, 3, size, size)
        text = torch.zeros(1, stream.text_length, dtype=torch.long)
        ids = torch.zeros(1, stream.num_image_tokens, dtype=torch.long)
    latents = torch.zeros(1, vae.quantizer.out_channels, vae.grid_size, vae.grid_size, device="meta")
    passes: dict[Stage, tuple[nn.Module, Callable[[], object]]] = {
        "clip": (clip, lambda: _clip_pass(clip, images, text)),
        "vae": (vae, lambda: (vae.encoder(images), vae.decoder(latents))),
        "dalle": (dalle, lambda: dalle(text, ids)),
    }
    if recipe.dalle.image_prefix:
        with torch.device("meta"):
            prior = build_prior(recipe, stream)
            vector, bucket = torch.zeros(1, recipe.clip.embed_dim), torch.zeros(1, dtype=torch.long)
            codes = torch.zeros(1, prior.codec.num_dims, dtype=torch.long)
        passes["prior"] = prior, lambda: prior(text, vector, bucket, codes)
    if recipe.upscale.factor > 1:
        with torch.device("meta"):
            upscaler = build_upscaler(recipe, vae)
        passes["upscale"] = upscaler, lambda: upscaler(latents, images)
    trained = [stage for stage in (*STAGES, *OPTIONAL_STAGES) if stage in passes]
    stages = {stage: _stage(recipe, stage, *passes[stage], devices) for stage in trained}
    config, tokens, guidance = recipe.dalle, stream.num_inputs, recipe.sampling.guidance
    branches = 1 if guidance == 1 else 2
    return Estimate(
        stages=stages,
        text_length=stream.text_length,
        image_tokens=stream.num_image_tokens,
        guidance=guidance,
        cache_bytes=branches * 2 * config.layers * config.dim * tokens * _BF16,
        draw_flops=branches * stages["dalle"].forward_flops,
    )


def _clip_pass(clip: CLIP, images: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """What a picture and its caption go through in training."""
    places = clip.places(images)
    vectors = clip.pool(places), clip.encode_text(text)
    return vectors if clip.captioner is None else (*vectors, clip.caption_nll(places, text))


def _stage(
    recipe: Recipe, stage: Stage, model: nn.Module, forward: Callable[[], object], devices: int
) -> StageEstimate:
    config = getattr(recipe.train, stage)
    count = sum(parameter.numel() for parameter in model.parameters())
    by_muon = 0
    if config.optimizer == "muon":
        by_muon = sum(parameter.numel() for parameter in model.hidden_matrices())  # type: ignore[operator]
    flops, kept = count_flops(lambda: _kept_elements(model, forward))
    if config.checkpoint_gradients:
        kept = _kept_with_checkpoints(model, forward, kept)
    micro_batch = config.micro_batch_size or -(-config.batch_size // devices)
    return StageEstimate(
        parameters=count,
        forward_flops=flops,
        weight_bytes=count * _FP32,
        gradient_bytes=count * _FP32,
        optimizer_bytes=(2 * (count - by_muon) + by_muon) * _FP32,
        average_bytes=count * _FP32,
        activation_bytes=kept * micro_batch * _BF16,
        steps=config.steps,
        batch_size=config.batch_size,
        forward_passes=2 if config.checkpoint_gradients else 1,
    )


def _kept_with_checkpoints(model: nn.Module, forward: Callable[[], object], without: int) -> int:
    """`_kept_elements`, which is `without`, with checkpoints: what goes into the blocks, and the inside of one."""
    entering: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].numel()))
        for module in model.modules()
        if isinstance(module, Block | ResidualBlock)
    ]
    model.checkpoint_blocks()  # type: ignore[operator]
    outside = _kept_elements(model, forward)
    for hook in hooks:
        hook.remove()
    return outside + sum(entering) + (without - outside) // len(hooks)


def _kept_elements(model: nn.Module, forward: Callable[[], object]) -> int:
    """Numbers that autograd keeps for the backward pass of one picture, weights not counted."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[object] = []  # so that no storage's place is taken by a later one

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = max(kept.get(storage, 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())
