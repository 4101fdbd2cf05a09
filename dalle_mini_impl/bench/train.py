"""``dalle-mini bench train``: training steps of the transformer, beside peers and the machine's matmul rate.

A step's share of that rate (MFU) is of the model's operations by the convention of `flops`: attention over the whole
square of tokens, the backward pass as two forward passes, neither the optimiser's own products nor scores that a kernel
computes again. Beside it stands the share without the half of attention that the causal mask hides.

Of a step's time, "data" is what it waits for the batch, which a thread makes meanwhile as in training, and for its way
to the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dalle_mini_impl.bench.batches import prefetched
from dalle_mini_impl.bench.machine import Machine, synchronize
from dalle_mini_impl.bench.peak import peak_bytes_alone
from dalle_mini_impl.bench.peers import Shape, build_dalle_pytorch, can_import
from dalle_mini_impl.bench.sample import build
from dalle_mini_impl.config import DALLEStageConfig
from dalle_mini_impl.estimate import BACKWARD_FACTOR
from dalle_mini_impl.flops import count_flops, hidden_flops
from dalle_mini_impl.training.batches import Batch
from dalle_mini_impl.training.optim import build_optimizers
from dalle_mini_impl.training.task import autocast, autocast_dtype

PHASES = ("data", "forward", "backward", "optimizer")
_WARM_UP_STEPS = 3
_ROUNDS = 3
_ROUND_SEC = 4.0


@dataclass(frozen=True)
class TrainResult:
    """One contestant. seconds: of a step, the median. shares: of its time by phase. mfu: share of the matmul rate in
    the type that all compute in, None for peers. mfu_causal: the same without what the causal mask hides.

    peak_bytes: most memory that it takes in a process of its own, see `peak_bytes_alone`.
    """

    name: str
    batch: int
    seconds: float
    tokens_per_sec: float
    shares: dict[str, float]
    mfu: float | None
    mfu_causal: float | None
    peak_bytes: int


@dataclass
class Contestant:
    """A model with what it does to text ids (B, T) and image ids (B, N), and the optimisers of its weights.

    flops: of a forward pass over one picture; None where they aren't counted. hidden: those of them that attention
    spends on what the causal mask hides.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    optimizers: list[Optimizer]
    flops: float | None = None
    hidden: float = 0.0


Builder = Callable[[Shape, torch.device], Contestant]


def run(shape: Shape, machine: Machine, device: torch.device, batch: int) -> Iterator[TrainResult]:
    """Measures every contestant: its memory by itself, its speed in turns of a few seconds; a result for each."""
    builders = contestants()
    peaks = {name: peak_bytes_alone(device, _few_steps, name, shape, device, batch) for name in builders}
    built = {name: build(shape, device) for name, build in builders.items()}
    times = _timed(built, shape, device, batch)
    rate = machine.flops[compute_type(device)]
    for name, contestant in built.items():
        yield _result(name, contestant, shape, rate, batch, times[name], peaks[name])


def contestants() -> dict[str, Builder]:
    """What builds each of them, by name; peers where they are installed."""
    found: dict[str, Builder] = {
        "ours, Muon": partial(_ours, optimizer="muon", is_compiled=False),
        "ours, AdamW": partial(_ours, optimizer="adamw", is_compiled=False),
        "ours, Muon, compiled": partial(_ours, optimizer="muon", is_compiled=True),
        "torch.nn.TransformerEncoder, AdamW": _plain,
    }
    if can_import("dalle_pytorch"):
        found["DALLE-pytorch, AdamW"] = _dalle_pytorch
    return found


def _few_steps(name: str, shape: Shape, device: torch.device, batch: int) -> None:
    """A contestant's first steps, which take as much memory as all later ones."""
    contestant = contestants()[name](shape, device)
    with contextlib.closing(prefetched(shape, batch, device)) as batches:
        for _ in range(_WARM_UP_STEPS):
            _step(contestant, batches, device)


def _timed(
    built: Mapping[str, Contestant], shape: Shape, device: torch.device, batch: int
) -> dict[str, list[tuple[float, ...]]]:
    """Seconds by phase of each contestant's steps, in rounds in which all of them take turns."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in built}
    with contextlib.closing(prefetched(shape, batch, device)) as batches:
        for contestant in built.values():
            for _ in range(_WARM_UP_STEPS):
                _step(contestant, batches, device)
        for _ in range(_ROUNDS):
            for name, contestant in built.items():
                began = time.perf_counter()
                while time.perf_counter() - began < _ROUND_SEC or not times[name]:
                    times[name].append(_step(contestant, batches, device))
    return times


def compute_type(device: torch.device) -> str:
    """What all contestants' products are computed in, and are compared with: the type that training takes there."""
    return str(autocast_dtype("auto", device) or torch.float32).removeprefix("torch.")


def _step(contestant: Contestant, batches: Iterator[Batch], device: torch.device) -> tuple[float, ...]:
    """One training step on the next batch; seconds of each phase."""
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    batch = next(batches)
    mark()
    with autocast(device, autocast_dtype("auto", device)):
        loss = contestant.loss(batch["text"], batch["ids"])
    mark()
    loss.backward()  # type: ignore[no-untyped-call]
    mark()
    parameters = [p for optimizer in contestant.optimizers for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    for optimizer in contestant.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    mark()
    return tuple(after - before for before, after in pairwise(marks))


def _result(
    name: str,
    contestant: Contestant,
    shape: Shape,
    matmul_rate: float,
    batch: int,
    times: Sequence[tuple[float, ...]],
    peak_bytes: int,
) -> TrainResult:
    totals = sorted(sum(step) for step in times)
    seconds = totals[len(totals) // 2]
    whole = sum(totals)
    shares = {phase: sum(step[index] for step in times) / whole for index, phase in enumerate(PHASES)}
    tokens = batch * (shape.text_length + shape.num_image_tokens)
    mfu = mfu_causal = None
    if contestant.flops is not None:
        in_a_step = (1 + BACKWARD_FACTOR) * batch / seconds / matmul_rate
        mfu, mfu_causal = in_a_step * contestant.flops, in_a_step * (contestant.flops - contestant.hidden)
    return TrainResult(name, batch, seconds, tokens / seconds, shares, mfu, mfu_causal, peak_bytes)


def _ours(shape: Shape, device: torch.device, optimizer: str, *, is_compiled: bool) -> Contestant:
    dalle = build(shape, device).train()
    config = DALLEStageConfig.model_validate({"optimizer": optimizer})
    if is_compiled:
        dalle.compile_blocks()

    def loss(text: Tensor, image: Tensor) -> Tensor:
        losses = dalle.loss(text, image)
        return losses.total(0.125, losses.num_text, losses.num_image)

    hidden = hidden_flops(dalle.stream.num_inputs, shape.dim, shape.layers)
    return Contestant(loss, build_optimizers(dalle, config), _flops(loss, shape, device), hidden)


def _flops(loss: Callable[[Tensor, Tensor], Tensor], shape: Shape, device: torch.device) -> float:
    """Operations of a forward pass over one picture."""
    text = torch.full((1, shape.text_length), 10, device=device)
    image = torch.zeros((1, shape.num_image_tokens), dtype=torch.long, device=device)
    with torch.no_grad():
        return count_flops(lambda: loss(text, image))[0]


class _Plain(nn.Module):
    """What one writes down first: one vocabulary, learned positions, PyTorch's own layers and causal mask."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first_image_id = shape.text_vocab
        length = shape.text_length + shape.num_image_tokens
        self.embedding = nn.Embedding(shape.text_vocab + shape.image_vocab, shape.dim)
        self.position = nn.Parameter(torch.zeros(length, shape.dim))
        layer = nn.TransformerEncoderLayer(
            shape.dim, shape.heads, 4 * shape.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.head = nn.Linear(shape.dim, shape.text_vocab + shape.image_vocab)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """The mean negative log-likelihood of all tokens but the first."""
        ids = torch.cat([text, image + self.first_image_id], dim=1)
        x = self.embedding(ids[:, :-1]) + self.position[: ids.shape[1] - 1]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def _plain(shape: Shape, device: torch.device) -> Contestant:
    model = _Plain(shape).to(device)
    return Contestant(model, [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)])


def _dalle_pytorch(shape: Shape, device: torch.device) -> Contestant:
    model = build_dalle_pytorch(shape, device)

    def loss(text: Tensor, image: Tensor) -> Tensor:
        value: Tensor = model(text, image, return_loss=True)
        return value

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Contestant(loss, [torch.optim.AdamW(parameters, lr=1e-3, fused=True)])


def as_json(shape: Shape, machine: Machine, compute_type: str, results: Sequence[TrainResult]) -> dict[str, Any]:
    """Everything in plain values, with how many times as many tokens a second our best takes as each peer."""
    best = max(result.tokens_per_sec for result in results if result.name.startswith("ours"))
    return {
        "shape": asdict(shape),
        "machine": asdict(machine),
        "compute_type": compute_type,
        "torch": torch.__version__,
        "results": [asdict(result) for result in results],
        "ratios": {r.name: best / r.tokens_per_sec for r in results if not r.name.startswith("ours")},
    }
