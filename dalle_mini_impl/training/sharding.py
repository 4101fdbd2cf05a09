"""Weights, gradients and optimisers shared out over the processes (FSDP2), where the launcher's settings ask for it.

Accelerate reads the settings and starts the processes; `fully_shard` of PyTorch does the rest, on GPUs and CPUs alike
(Accelerate's own FSDP leaves CPUs out, and wants classes to wrap that not every stage's model has).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn

from dalle_mini_impl.config import Stage, StageConfig
from dalle_mini_impl.training.dtensors import is_shared, whole
from dalle_mini_impl.training.stages import WHOLE_STAGES

UNITS = ("Block",)
"""Classes of modules whose weights are gathered together, just before they are needed."""


@dataclass(frozen=True)
class Sharding:
    """How a stage is shared out.

    units: names of classes of modules that are gathered one by one; the rest of a model is one more unit.
    reshard_after_forward: gather the weights of a unit again for its backward pass, instead of keeping them.
    """

    units: tuple[str, ...] = UNITS
    reshard_after_forward: bool = True

    @classmethod
    def of(cls, accelerator: Accelerator) -> Self | None:
        """What the launcher's settings ask for; None for plain data parallelism or a single process.

        Raises ValueError for settings that would do nothing here or something else than they say.
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
            return None
        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
        names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(UNITS))
        refused = {
            "fsdp_version: 1": plugin.fsdp_version != 2 and "set fsdp_version: 2",
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP": wrap == "SIZE_BASED_WRAP" and "set TRANSFORMER_BASED_WRAP",
            "fsdp_offload_params": _is_set("FSDP_OFFLOAD_PARAMS") and "set it to false",
            "fsdp_activation_checkpointing": plugin.activation_checkpointing
            and "set it to false, and train.STAGE.checkpoint_gradients to true in the recipe",
            "fsdp_ignored_modules": plugin.ignored_modules and "leave it out",
            "parallelism_config": getattr(accelerator, "parallelism_config", None) and "leave it out",
        }
        for setting, remedy in refused.items():
            if remedy:
                raise ValueError(f"{setting} of the accelerate config isn't supported here: {remedy}")
        units = tuple(name.strip() for name in names.split(",")) if wrap == "TRANSFORMER_BASED_WRAP" else ()
        return cls(units, bool(plugin.reshard_after_forward))

    def check(self, stage: Stage, model: nn.Module, config: StageConfig) -> None:
        """Raises ValueError where a recipe asks for what doesn't go together with sharing out."""
        if stage in WHOLE_STAGES:
            raise ValueError(
                f"stage {stage} doesn't work with FSDP, and its models are small: train it with --stage {stage} and a "
                f"config without FSDP"
            )
        if getattr(model, "num_lengths", 1) > 1:
            raise ValueError(
                "text.slot_step doesn't work with FSDP: processes would gather weights for different numbers of "
                "passes; leave text.slot_step out, or use a config without FSDP"
            )
        if config.compile is True:
            raise ValueError("compile = true doesn't work with FSDP: leave it at auto, or use a config without FSDP")

    def apply(self, module: nn.Module) -> None:
        """Shares out a module's weights, in place; its own forward is the one that gathers them.

        Weights may lie on the host: each unit is moved to the device as it is shared out (`fully_shard` does that), so
        that no device ever holds more than its parts and one whole unit.
        """
        from torch.distributed.fsdp import fully_shard

        for part in reversed(list(module.modules())):
            if type(part).__name__ in self.units:
                fully_shard(part, reshard_after_forward=self.reshard_after_forward)
        fully_shard(module)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves a module's buffers, in place, and leaves its parameters where they are."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def is_sharded(module: nn.Module) -> bool:
    """Whether `Sharding.apply` has shared it out."""
    return hasattr(module, "set_requires_gradient_sync")  # FSDPModule's, a second to import


@contextmanager
def no_sync(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Keeps gradients to the process for a while, as `Accelerator.no_sync` does for modules that it has prepared."""
    if not is_sharded(module):
        with accelerator.no_sync(module):
            yield
        return
    set_sync = cast(Callable[[bool], None], module.set_requires_gradient_sync)
    set_sync(False)
    try:
        yield
    finally:
        set_sync(True)


class Replica:
    """The whole model beside a sharded one, for work in which processes take different numbers of passes.

    It has no weights but while it is lent, so it costs a whole model's memory only during an evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copies a model that isn't sharded yet, all but its weights; its buffers are on the device already."""
        self._model = _without_weights(model)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Lends the model with these weights and buffers, shared out or whole; every process has to take part."""
        try:
            yield self.take({name: _whole_copy(tensor.detach()) for name, tensor in weights.items()})
        finally:
            self._model = _without_weights(self._model)

    def take(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model with these whole weights and buffers, which are its own from now on, in evaluation mode."""
        self._model.load_state_dict(weights, assign=True)
        return self._model.eval()


def _whole_copy(tensor: Tensor) -> Tensor:
    """All of a tensor in memory of its own, and once only: gathering has made a copy already."""
    return whole(tensor) if is_shared(tensor) else tensor.clone()


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes only (on the meta device); its buffers are copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
