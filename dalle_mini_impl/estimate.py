"""What a recipe costs, before anything is allocated: parameters, operations, memory and time.

Models are built on the meta device, which knows shapes only. Operations are counted as the models run there, by the
convention of `flops`; activations are what autograd would keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dalle_mini_impl.config import MODELS, STAGES, Recipe, Stage, StageConfig
from dalle_mini_impl.flops import count_flops
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.training.batches import share_of_batch
from dalle_mini_impl.training.passes import Forward, Passes, StagePasses, untrainable
from dalle_mini_impl.training.stages import WHOLE_STAGES, asked_for, stage_order
from dalle_mini_impl.vae.backbone import ResidualBlock

Precision = Literal["fp32", "bf16"]
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
_FP32 = _BYTES["fp32"]
BACKWARD_FACTOR = 2
"""A backward pass costs two forward passes: one product for the inputs, one for the weights."""


@dataclass(frozen=True)
class Hardware:
    """Operations a second that a training reaches on one device, in fp32 and in bf16.

    bf16 is None where a device doesn't compute in it natively, so that precision = "auto" trains in fp32 there.
    """

    fp32: float
    bf16: float | None = None

    def precision(self, asked: Literal["auto", "fp32", "bf16"]) -> Precision:
        """What a recipe's precision means on it."""
        if asked == "auto":
            return "fp32" if self.bf16 is None else "bf16"
        return asked

    def flops_per_sec(self, precision: Precision) -> float:
        """Operations a second; bf16 that is emulated counts as fp32, which it is no faster than."""
        return self.bf16 if precision == "bf16" and self.bf16 is not None else self.fp32


HARDWARE = {
    "cpu2": Hardware(fp32=0.1e12, bf16=0.3e12),
    "cpu2-fp32": Hardware(fp32=0.1e12),
    "t4": Hardware(fp32=3.2e12),
    "rtx4090": Hardware(fp32=33e12, bf16=65e12),
    "a100": Hardware(fp32=7.8e12, bf16=125e12),
    "h100": Hardware(fp32=27e12, bf16=390e12),
    "h200": Hardware(fp32=27e12, bf16=390e12),
}
"""About 40 % of what each could do, of a GPU by its maker's data sheet, dense, and in fp32 without TF32, which PyTorch
leaves off. A T4 has no bf16 and 8.1 T in fp32; the 65 T of its fp16 are of no use here, where nothing trains in it.

cpu2 stands for two cores that compute in bf16, cpu2-fp32 for two that don't.
"""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage's cost. Bytes of weights, gradients, optimiser and averages are those of all devices together."""

    parameters: int
    """Those that learn, the discriminator's of vqgan included."""
    forward_flops: float
    """Operations of the forward passes that get a gradient, over one picture and its caption."""
    no_grad_flops: float
    """Operations of those that get none: of models that are only asked, of first passes over a batch that is cut up."""
    precision: Precision
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    """Of the averaged (EMA) weights."""
    earlier_bytes: int
    """Of the models of the stages before, which stay, whole, on each device."""
    activation_bytes: int
    """What a micro-batch keeps for its gradient on one device; in bf16 with a copy of the weights in bf16."""
    gathered_bytes: int
    """Of weights that are gathered at a time where they are shared out, and their gradients; else 0."""
    whole_bytes: int
    """Of the fp32 copy of the weights that an evaluation, and the checkpoint that is kept, put on each device where
    they are shared out; else 0."""
    steps: int
    batch_size: int
    devices: int
    flops_per_sec: float
    """What one device reaches."""
    forward_passes: int = 1
    """2 where gradients are checkpointed."""

    @property
    def train_flops(self) -> float:
        """Of the whole stage."""
        of_picture = (self.forward_passes + BACKWARD_FACTOR) * self.forward_flops + self.no_grad_flops
        return of_picture * self.batch_size * self.steps

    @property
    def is_shared_out(self) -> bool:
        """Whether each of several devices has a part of weights, gradients, optimiser and averages (FSDP)."""
        return self.whole_bytes > 0

    @property
    def device_bytes(self) -> float:
        """The most that each device has to hold: in a step, or in an evaluation (without what that computes)."""
        state = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes
        part = state / self.devices if self.is_shared_out else state
        return part + self.earlier_bytes + max(self.activation_bytes + self.gathered_bytes, self.whole_bytes)

    @property
    def hours(self) -> float:
        """Of training on all devices."""
        return self.train_flops / (self.flops_per_sec * self.devices) / 3600


@dataclass(frozen=True)
class Estimate:
    """The stages, and what drawing takes: the cache of a picture, with guidance that of both its branches."""

    stages: dict[Stage, StageEstimate]
    """In the order of training."""
    not_counted: dict[Stage, str]
    """What of the recipe's stages isn't in here, and why."""
    text_length: int
    image_tokens: int
    guidance: float
    """The recipe's scale; at 1 there is one branch."""
    cache_bytes: int
    draw_flops: float
    """Operations of drawing one picture."""


def estimate(recipe: Recipe, hardware: str = "cpu2", devices: int = 1) -> Estimate:
    """The cost of a recipe at its longest captions and largest vocabulary, which data can only make less.

    Of the stages that every recipe has and those that this one's train.stages asks for. Raises ValueError for hardware
    that isn't in HARDWARE, and for devices that can't share a stage's batch evenly, as training does.
    """
    if hardware not in HARDWARE:
        raise ValueError(f"nothing is known of hardware {hardware!r}; known: {', '.join(HARDWARE)}")
    device, passes, not_counted = HARDWARE[hardware], StagePasses(recipe), untrainable(recipe)
    wanted = {*STAGES, *asked_for(recipe)} - not_counted.keys()
    stages: dict[Stage, StageEstimate] = {}
    earlier_bytes = 0
    for stage in (stage for stage in stage_order(recipe) if stage in wanted):
        config: StageConfig = getattr(recipe.train, stage)
        rows = share_of_batch(config.batch_size, devices, f"train.{stage}.batch_size")
        micro_batch = min(config.micro_batch_size or rows, rows)
        own = passes.build(stage, is_cut_up=micro_batch < rows, is_alone=devices == 1)
        stages[stage] = _stage(stage, config, own, micro_batch, device, devices, earlier_bytes)
        if own.missing is not None:
            not_counted[stage] = own.missing
        if stage in MODELS:  # the others train one of those further
            earlier_bytes += stages[stage].weight_bytes
    stream, guidance = passes.stream, recipe.sampling.guidance
    branches = 1 if guidance == 1 else 2
    draw_flops = stages["dalle"].forward_flops
    if recipe.dalle.look_ahead:  # which is only learned
        draw_flops, _ = count_flops(passes.drawing())
    numbers = branches * 2 * recipe.dalle.layers * recipe.dalle.dim * stream.num_inputs
    return Estimate(
        stages=stages,
        not_counted=not_counted,
        text_length=stream.text_length,
        image_tokens=stream.num_image_tokens,
        guidance=guidance,
        cache_bytes=numbers * _BYTES[device.precision(recipe.sampling.precision)],
        draw_flops=branches * draw_flops,
    )


def _stage(
    stage: Stage,
    config: StageConfig,
    passes: Passes,
    micro_batch: int,
    hardware: Hardware,
    devices: int,
    earlier_bytes: int,
) -> StageEstimate:
    model = passes.model
    count, trained = _numel(model.parameters()), _numel(passes.trained())
    partner = 0 if passes.partner is None else _numel(passes.partner.parameters())
    by_muon = 0
    if config.optimizer == "muon":
        by_muon = _numel(p for p in model.hidden_matrices() if p.requires_grad)  # type: ignore[operator]
    flops, kept = count_flops(lambda: _kept(model, passes.forward))
    with torch.no_grad():
        no_grad_flops = sum(times * count_flops(forward)[0] for times, forward in passes.no_grad)
    if config.checkpoint_gradients:
        kept = _kept_with_checkpoints(model, passes.forward, kept)
    precision = hardware.precision(config.precision)
    casts = kept.weights if precision == "bf16" else 0
    is_shared_out = devices > 1 and stage not in WHOLE_STAGES
    return StageEstimate(
        parameters=trained + partner,
        forward_flops=flops,
        no_grad_flops=no_grad_flops,
        precision=precision,
        weight_bytes=(count + partner) * _FP32,
        gradient_bytes=(trained + 2 * partner) * _FP32,  # the partner's are added up apart from its optimiser's
        optimizer_bytes=(2 * (trained + partner) - by_muon) * _FP32,
        average_bytes=count * _FP32,
        earlier_bytes=earlier_bytes,
        activation_bytes=(kept.activations * micro_batch + casts) * _BYTES[precision],
        gathered_bytes=2 * _gathered(model) * _FP32 if is_shared_out else 0,
        whole_bytes=count * _FP32 if is_shared_out else 0,
        steps=config.steps,
        batch_size=config.batch_size,
        devices=devices,
        flops_per_sec=hardware.flops_per_sec(precision),
        forward_passes=2 if config.checkpoint_gradients else 1,
    )


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gathered(model: nn.Module) -> int:
    """Weights that are whole at a time where a model is shared out: a block, the next one, and all that is in none."""
    blocks = [_numel(module.parameters()) for module in model.modules() if isinstance(module, Block)]
    return _numel(model.parameters()) - sum(blocks) + 2 * max(blocks, default=0)


@dataclass(frozen=True)
class Kept:
    """Numbers that autograd keeps for the backward pass of one picture: of its own, and of weights."""

    activations: int
    weights: int


def _kept_with_checkpoints(model: nn.Module, forward: Forward, without: Kept) -> Kept:
    """`_kept`, which is `without`, with checkpoints: what goes into the blocks, and the inside of one."""
    entering: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].numel()))
        for module in model.modules()
        if isinstance(module, Block | ResidualBlock)
    ]
    model.checkpoint_blocks()  # type: ignore[operator]
    outside = _kept(model, forward)
    for hook in hooks:
        hook.remove()
    inside = (without.activations - outside.activations) // len(hooks)
    weights = outside.weights + (without.weights - outside.weights) // len(hooks)
    return Kept(outside.activations + sum(entering) + inside, weights)


def _kept(model: nn.Module, forward: Callable[[], object]) -> Kept:
    """What autograd keeps of a forward pass over one picture; of weights, matrices and kernels only."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[object] = []  # so that no storage's place is taken by a later one

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()._cdata
        if storage not in weights or tensor.ndim >= 2:
            kept[storage] = max(kept.get(storage, 0), tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())
    of_weights = sum(count for storage, count in kept.items() if storage in weights)
    return Kept(sum(kept.values()) - of_weights, of_weights)
