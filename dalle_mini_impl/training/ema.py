"""The exponential moving average of a model's weights: the ones that are evaluated and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dalle_mini_impl.training.dtensors import local, part_like


class EMA:
    """A moving average of parameters; buffers are not averaged, the model's own stay in use.

    decay: of the average, reached along min(decay, (1 + t) / (10 + t)) so that the first steps are soon forgotten;
    0 makes the average equal to the raw weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = [local(p.detach()) for _, p in model.named_parameters()]
        torch._foreach_lerp_([local(weight) for weight in self.weights.values()], current, 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[nn.Module]:
        """Lends the averaged weights to the model, in evaluation mode; its own are back afterwards, to the bit."""
        was_training = model.training
        self._swap(model)
        model.eval()
        try:
            yield model
        finally:
            self._swap(model)
            model.train(was_training)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            own = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(own)

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs to go on."""
        return {"num_updates": self.num_updates, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes over a saved average; raises ValueError where the names differ."""
        weights, num_updates = state["weights"], state["num_updates"]
        assert isinstance(weights, dict) and isinstance(num_updates, int)
        if weights.keys() != self.weights.keys():
            differing = sorted(weights.keys() ^ self.weights.keys())
            raise ValueError(f"the saved averaged weights are of another model: {', '.join(differing[:5])} …")
        self.num_updates = num_updates
        for name, tensor in weights.items():
            self.weights[name].copy_(part_like(tensor, self.weights[name]))
