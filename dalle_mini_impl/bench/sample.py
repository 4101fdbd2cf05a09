"""``dalle-mini bench sample``: drawing, beside its slow reference, peers and the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from dalle_mini_impl.bench.machine import Machine, best_sec, synchronize
from dalle_mini_impl.bench.peers import Draw, Shape, peers
from dalle_mini_impl.config import DALLEConfig, SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import choose, guidance_scales
from dalle_mini_impl.precision import computes_bf16
from dalle_mini_impl.sampling import stream_tokens
from dalle_mini_impl.stream import Stream

SETTINGS = SamplingConfig(guidance=3.0, guidance_schedule="linear", top_p=1.0, top_k=100)
"""Top-k as the peers have it, guidance at every token but the first."""
REFERENCE_BATCH = 1
_BEST_OF_SEC = 2.0


@dataclass(frozen=True)
class Result:
    """One contestant at one batch size. roofline: share of the least possible time, None for the peers."""

    name: str
    batch: int
    seconds: float
    tokens_per_sec: float
    roofline: float | None


def build(shape: Shape, device: torch.device) -> DALLE:
    """A DALLE of that shape with random weights."""
    stream = Stream(
        text_length=shape.text_length,
        grid_size=shape.grid_size,
        text_vocab=shape.text_vocab,
        image_vocab=shape.image_vocab,
    )
    config = DALLEConfig(dim=shape.dim, layers=shape.layers, heads=shape.heads)
    torch.manual_seed(0)
    dalle = DALLE(config, stream)
    for parameter in dalle.parameters():  # zero matrices would be no work for the cache
        if parameter.ndim > 1 and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=shape.dim**-0.5)
    return dalle.to(device).eval()


def least_seconds(shape: Shape, machine: Machine, pictures: int, guided: bool, dtype: torch.dtype) -> float:
    """The least time that drawing so many pictures can take: every token's operations, weights and cache reads.

    The pictures share a prompt, whose keys and values need to be read once for all of them, in each branch.
    """
    branches = 2 if guided else 1
    rows = pictures * branches
    size = torch.finfo(dtype).bits // 8
    weights = 12 * shape.layers * shape.dim**2 + shape.dim * shape.image_vocab
    seconds = 0.0
    for index in range(1, shape.num_image_tokens):
        seen = shape.text_length + index
        flops = rows * (2 * weights + 4 * shape.layers * shape.dim * seen)
        read_tokens = rows * index + branches * shape.text_length
        read_bytes = size * (weights + read_tokens * 2 * shape.layers * shape.dim)
        seconds += machine.least_sec(flops, read_bytes, dtype)
    return seconds


def run(shape: Shape, machine: Machine, device: torch.device, batches: Sequence[int]) -> Iterator[Result]:
    """Measures every contestant at every batch size, side by side for each size; yields as it goes."""
    dalle = build(shape, device)
    text = torch.randint(10, shape.text_vocab, (1, shape.text_length), device=device)
    start = time.perf_counter()
    _reference(dalle, text)
    synchronize(device)
    yield _result(shape, "our slow reference", REFERENCE_BATCH, time.perf_counter() - start, None)
    ours: dict[str, tuple[Draw, torch.dtype, bool]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        engine = Engine(dalle, dtype)
        for guided in (True, False):
            settings = SETTINGS if guided else SETTINGS.model_copy(update={"guidance": 1.0})
            name = str(dtype).removeprefix("torch.") + ("" if guided else ", no guidance")
            ours[f"ours, {name}"] = _engine(engine, text, settings), dtype, guided
        if engine.is_native:
            plain = Engine(dalle, dtype, is_native=False)
            ours[f"ours, {str(dtype).removeprefix('torch.')}, PyTorch's operations"] = (
                _engine(plain, text, SETTINGS),
                dtype,
                True,
            )
    theirs = peers(shape, device, torch.bfloat16 if computes_bf16(device) else torch.float32)
    for batch in batches:
        for name, (draw, dtype, guided) in ours.items():
            seconds = best_sec(partial(draw, batch), device, _BEST_OF_SEC)
            least = least_seconds(shape, machine, batch, guided, dtype)
            yield _result(shape, name, batch, seconds, least / seconds)
        for name, draw in theirs.items():
            yield _result(shape, name, batch, best_sec(partial(draw, batch), device), None)


def ratios(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """How many times as many tokens a second ours (the faster type, guided) draws as each peer, by batch size."""
    best: dict[int, float] = {}
    for result in results:
        if result.roofline is not None and "no guidance" not in result.name:
            best[result.batch] = max(best.get(result.batch, 0.0), result.tokens_per_sec)
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if result.roofline is None and result.batch in best:
            found.setdefault(result.name, {})[result.batch] = best[result.batch] / result.tokens_per_sec
    return found


def _engine(engine: Engine, text: torch.Tensor, settings: SamplingConfig) -> Draw:
    def draw(pictures: int) -> object:
        rows = [(0, candidate) for candidate in range(pictures)]
        *_, last = stream_tokens(engine, text, ["bench"], rows, seed=0, settings=settings, window=1)
        return last.ids

    return draw


def _reference(dalle: DALLE, text: torch.Tensor) -> torch.Tensor:
    scales = guidance_scales(SETTINGS, dalle.stream.num_image_tokens)
    captions = text.expand(REFERENCE_BATCH, -1)
    return dalle.generate(captions, lambda logits, _: choose(logits, SETTINGS, None), lambda index: scales[index])


def _result(shape: Shape, name: str, batch: int, seconds: float, roofline: float | None) -> Result:
    return Result(name, batch, seconds, batch * shape.num_image_tokens / seconds, roofline)


def as_json(shape: Shape, machine: Machine, results: Sequence[Result]) -> dict[str, object]:
    """Everything in plain values."""
    return {
        "shape": asdict(shape),
        "machine": asdict(machine),
        "torch": torch.__version__,
        "settings": SETTINGS.model_dump(),
        "results": [asdict(result) for result in results],
        "ratios": ratios(results),
    }
