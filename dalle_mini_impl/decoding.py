"""The decoding loop: from a prefilled prompt to whole pictures, a token or several at a time.

`Branches` runs the transformer with and without the caption; `decode` draws. With a window of w > 1 tokens it is
Jacobi decoding: w tokens are guessed, one pass says what each of them would be, and as many as agree from the first
on are kept, and the next one, which the agreeing ones decide. The noise belongs to the position, so the tokens are
those that one at a time would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import choose, choose_without_sorting, guidance_scales, guide
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.native.choice import choose as native_choose
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.stream import NULL

FixedShapes = Literal["eager", "compile", "graph"] | None
"""How steps of one unchanging shape are run; None where shapes may change."""

FREE = -1
"""Stands in `known` where a token is to be drawn."""
_READ_AT_ONCE = 64  # given cells, of whose logits nothing but sums is kept
_NOISE_BLOCK = 1 << 17  # numbers of noise drawn ahead: enough to share out over cores, and still in their caches


@dataclass(frozen=True)
class Partial:
    """A batch of pictures while it is drawn.

    ids: (n, index) int64, a view of a buffer that later steps only write behind. index: tokens that are there so far.
    log_ratio: (n,) Σ log p(x | caption) - log p(x | null) over those that were drawn; None where no null pass is made.
    log_likelihood: (n,) its first part, Σ log p(x | caption).
    """

    ids: Tensor
    index: int
    log_ratio: Tensor | None
    log_likelihood: Tensor


class Noise:
    """The Gumbel noise of a batch of rows, made some positions ahead."""

    def __init__(self, keys: Tensor, owners: Tensor, candidates: Tensor, vocab_size: int) -> None:
        self.keys, self.owners, self.candidates, self.vocab_size = keys, owners, candidates, vocab_size
        self._block_length = max(1, _NOISE_BLOCK // (len(owners) * vocab_size))
        self._start, self._block = 0, torch.empty(0, 0, 0)

    @classmethod
    def of(
        cls, prompts: Sequence[str], rows: Sequence[tuple[int, int]], seed: int, vocab_size: int, device: torch.device
    ) -> Noise:
        """Noise of (prompt index, candidate number) rows; `owners` (n,) are their prompts."""
        table = torch.tensor(rows, dtype=torch.long, device=device)  # (n, 2)
        keys = torch.tensor([noise_key(seed, prompt) for prompt in prompts], device=device)
        return cls(keys[table[:, 0]], table[:, 0], table[:, 1], vocab_size)

    def at(self, start: int, end: int) -> Tensor:
        """(n, end - start, V) of some positions; quick where they move forward."""
        if not self._start <= start <= end <= self._start + self._block.shape[1]:
            length = max(end - start, self._block_length)
            self._start = start
            self._block = self.at_positions(torch.arange(start, start + length, device=self.keys.device))
        return self._block[:, start - self._start : end - self._start]

    def at_positions(self, positions: Tensor) -> Tensor:
        """(n, L, V) of any positions (L,) int64, of which the host needn't know."""
        return gumbel_noise(self.keys, self.candidates, positions, self.vocab_size)


class Branches:
    """The transformer over n pictures that share P captions; the null branch joins when it is first needed.

    captions: (P, t), read once each. owners: (n,) the caption of each picture. embeddings: (n, E) a picture embedding
    for each, with which its caption is read for it alone.
    """

    def __init__(self, engine: Engine, captions: Tensor, owners: Tensor, embeddings: Tensor | None = None) -> None:
        self.engine = engine
        self._num_slots = captions.shape[1]
        captions = captions.to(owners.device)
        if embeddings is None:
            logits, cache = engine.prefill(captions)
            logits, cache = logits[owners], cache.select(owners)
        else:
            logits, cache = engine.prefill(captions[owners], embeddings.to(owners.device))
            cache = cache.select(torch.arange(len(owners), device=owners.device))
        self.first = logits[:, None].float()
        """Logits (n, 1, V) of image id 0."""
        self._cache = cache
        self._guided = False

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Everything that reading writes to."""
        return self._cache.keys, self._cache.values, self._cache.last, self._cache.ids

    @property
    def guided(self) -> bool:
        """Whether `read` gives null logits, too."""
        return self._guided

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads the next k ids (n, k); conditional and null logits (n, k, V) of the id after each."""
        if not self._guided:
            return self.engine.extend(ids, self._cache).float(), None
        logits = self.engine.extend(ids.repeat(2, 1), self._cache).float()
        conditional, null = logits.chunk(2)
        return conditional, null

    def read_in_place(self, ids: Tensor, cell: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `read` for one id (n, 1) at a cell (1,) that only the device knows; see `Engine.step_in_place`."""
        if not self._guided:
            return self.engine.step_in_place(ids[:, 0], cell, self._cache).float()[:, None], None
        logits = self.engine.step_in_place(ids[:, 0].repeat(2), cell, self._cache).float()[:, None]
        conditional, null = logits.chunk(2)
        return conditional, null

    def take_back(self, tokens: int) -> None:
        """Forgets the last `tokens` that the latest `read` has read."""
        if tokens:
            self._cache.take_back(tokens)

    def add_null(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Lets the null branch catch up on ids (n, k), of which the last is still to be read; see `_read_null`."""
        first, likelihoods, cache = _read_null(self.engine, self._num_slots, ids)
        self._cache = self._cache.beside(cache)
        self._guided = True
        return first, likelihoods


def _read_null(engine: Engine, num_slots: int, ids: Tensor) -> tuple[Tensor, Tensor, KVCache]:
    """Reads ids (n, k), but for the last, behind a null caption of so many slots, which is read once for all pictures.

    Gives the logits (n, 1, V) of id 0, log p (n, k) of all ids, and the cache.
    """
    logits, cache = engine.prefill(torch.full((1, num_slots), NULL, device=ids.device))
    cache = cache.expand(len(ids))
    first = logits.float().expand(len(ids), -1)[:, None]
    parts = [_log_likelihoods(first, ids[:, :1])] if ids.shape[1] else [first.new_zeros(len(ids), 0)]
    for start, end in _parts(ids.shape[1] - 1):
        parts.append(_log_likelihoods(engine.extend(ids[:, start:end], cache).float(), ids[:, start + 1 : end + 1]))
    return first, torch.cat(parts, dim=1), cache


@torch.no_grad()
def null_log_likelihoods(engine: Engine, num_slots: int, ids: Tensor, known: Tensor | None) -> Tensor:
    """Σ log p(x | null), (n,), of pictures (n, N), over the cells that are FREE in `known`; see `Partial`."""
    _, likelihoods, _ = _read_null(engine, num_slots, ids)
    return likelihoods.sum(dim=1) if known is None else (likelihoods * (known == FREE)).sum(dim=1)


@torch.no_grad()
def decode(
    branches: Branches,
    noise: Noise,
    settings: SamplingConfig,
    known: Tensor | None,
    window: int,
    fixed: FixedShapes = None,
) -> Iterator[Partial]:
    """Draws the pictures of `branches`; see `sampling.stream_tokens`.

    fixed: how to run steps of a single token, all of one shape: "eager", "compile", "graph" (one captured CUDA graph);
    None lets every step be as short as it can.
    """
    num_tokens, num_rows, device = branches.engine.stream.num_image_tokens, len(noise.owners), noise.owners.device
    scale_list = guidance_scales(settings, num_tokens)
    guided_from = next((index for index, scale in enumerate(scale_list) if scale != 1.0), num_tokens)
    scales = torch.tensor(scale_list, device=device)
    is_free = known is None
    known = torch.full((num_rows, num_tokens), FREE, device=device) if known is None else known.to(device)
    given = _leading(known)
    ids = torch.empty((num_rows, num_tokens), dtype=torch.long, device=device)
    ids[:, :given] = known[:, :given]
    ratio = _Ratio(num_rows, known, device, has_null=guided_from < num_tokens)
    if given:
        yield _partial(ids, given, ratio)
    for start, end in _parts(given - 1):
        branches.read(ids[:, start:end])
    index = given
    left = ids[:, :0]  # what the last pass drew beyond what was kept
    while index < num_tokens:
        if fixed is not None and window == 1 and index and (branches.guided or guided_from == num_tokens):
            yield from _decode_fixed(branches, noise, settings, known, scales, ids, index, ratio, fixed)
            return
        if guided_from <= index and not branches.guided:
            first_null, caught_up = branches.add_null(ids[:, :index])
            ratio.subtract(caught_up)
        if index == 0:
            guess, (conditional, null) = left, (branches.first, first_null if branches.guided else None)
        else:
            limit = guided_from if index < guided_from else num_tokens  # a pass is either guided or not
            guess = _guess(left, ids, index, min(window - 1, limit - index - 1), known)
            conditional, null = branches.read(torch.cat([ids[:, index - 1 : index], guess], dim=1))
        end = index + conditional.shape[1]
        drawn, of_caption, of_null = _draw(
            conditional, null, scales[index:end], settings, noise.at(index, end), branches.engine.is_native
        )  # (n, 1 + guesses) each
        if not is_free:
            drawn = torch.where(known[:, index:end] == FREE, drawn, known[:, index:end])
        kept = 1 + _num_agreeing(guess, drawn)
        branches.take_back(conditional.shape[1] - kept)
        ids[:, index : index + kept] = drawn[:, :kept]
        left = drawn[:, kept:]
        ratio.add(of_caption[:, :kept], None if of_null is None else of_null[:, :kept], index)
        index += kept
        yield _partial(ids, index, ratio)


def _parts(count: int) -> Iterator[tuple[int, int]]:
    """Places 0 … count, some at a time: beginning and end of each part, whose logits are in memory at once."""
    return ((start, min(count, start + _READ_AT_ONCE)) for start in range(0, count, _READ_AT_ONCE))


def _draw(
    conditional: Tensor, null: Tensor | None, scales: Tensor, settings: SamplingConfig, noise: Tensor, is_native: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids (n, L) drawn from logits (n, L, V); their log-likelihoods with and, where there is null, without caption."""
    if is_native:
        return native_choose(conditional, null, scales, settings, noise)
    pick = choose_without_sorting if conditional.device.type == "cpu" else choose
    drawn = pick(conditional if null is None else guide(conditional, null, scales), settings, noise)
    return drawn, _log_likelihoods(conditional, drawn), None if null is None else _log_likelihoods(null, drawn)


def _log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """log p, (n, L), of ids (n, L) under logits (n, L, V)."""
    return logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]


def _decode_fixed(
    branches: Branches,
    noise: Noise,
    settings: SamplingConfig,
    known: Tensor,
    scales: Tensor,
    ids: Tensor,
    index: int,
    ratio: _Ratio,
    fixed: FixedShapes,
) -> Iterator[Partial]:
    """The tokens from `index` ≥ 1 on by one function whose shapes never change: the host only asks for it again."""
    cell = torch.tensor([index - 1], device=ids.device)  # the one that is read; the next one is drawn

    def step() -> None:
        place = cell + 1
        conditional, null = branches.read_in_place(ids.index_select(1, cell), cell)
        logits = conditional if null is None else guide(conditional, null, scales.index_select(0, place))
        drawn = choose(logits, settings, noise.at_positions(place))
        given = known.index_select(1, place)
        drawn = torch.where(given == FREE, drawn, given)
        ids.index_copy_(1, place, drawn)
        is_drawn = (given == FREE)[:, 0]
        of_caption = conditional.log_softmax(dim=-1).gather(2, drawn[..., None])[:, 0, 0]
        ratio.likelihood.add_(of_caption * is_drawn)
        if null is not None:
            of_null = null.log_softmax(dim=-1).gather(2, drawn[..., None])[:, 0, 0]
            ratio.total.add_((of_caption - of_null) * is_drawn)
        cell.add_(1)

    run = _prepared(step, fixed, (cell, ids, *branches.state, ratio.total, ratio.likelihood))
    while index < ids.shape[1]:
        run()
        index += 1
        yield _partial(ids, index, ratio)


def _prepared(step: Callable[[], None], fixed: FixedShapes, state: Sequence[Tensor]) -> Callable[[], None]:
    """The step, compiled or captured; capturing runs it a few times, after which its state is what it was before."""
    if fixed == "compile":
        return torch.compile(step, dynamic=False)
    if fixed != "graph":
        return step
    before = [tensor.clone() for tensor in state]
    with torch.cuda.device(state[0].device):  # streams are the current device's, which needn't be the model's
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are chosen and memory is found before the capture
                step()
                for tensor, old in zip(state, before, strict=True):
                    tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
    return graph.replay


class _Ratio:
    """The running log-likelihood ratio of the tokens that are drawn, not given, and its first part.

    has_null: whether the null branch ever reads along, so that there is a ratio.
    """

    def __init__(self, num_rows: int, known: Tensor, device: torch.device, *, has_null: bool) -> None:
        self.has_null = has_null
        self.total = torch.zeros(num_rows, device=device)
        self.likelihood = torch.zeros(num_rows, device=device)
        self._free = known == FREE

    def add(self, of_caption: Tensor, of_null: Tensor | None, start: int) -> None:
        """Adds log p (n, k) of the tokens from `start` on, with the caption and, where it was read, without."""
        own = self._sum(of_caption, start)
        self.likelihood = self.likelihood + own
        self.total = self.total + own if of_null is None else self.total + (own - self._sum(of_null, start))

    def subtract(self, of_null: Tensor) -> None:
        """Takes away log p (n, k) of the first tokens without the caption."""
        self.total = self.total - self._sum(of_null, 0)

    def _sum(self, likelihoods: Tensor, start: int) -> Tensor:
        return (likelihoods * self._free[:, start : start + likelihoods.shape[1]]).sum(dim=1)


def _partial(ids: Tensor, index: int, ratio: _Ratio) -> Partial:
    total = ratio.total.clone() if ratio.has_null else None
    return Partial(ids[:, :index], index, total, ratio.likelihood.clone())


def _leading(known: Tensor) -> int:
    """How many of the first cells are given in all pictures."""
    is_given = (known != FREE).all(dim=0)
    return int(is_given.long().cumprod(dim=0).sum())


def _num_agreeing(guess: Tensor, drawn: Tensor) -> int:
    """How many of the first guesses (n, k) are what was drawn, in all pictures."""
    if guess.shape[1] == 0:  # token by token: no wait for the device
        return 0
    agree = (guess == drawn[:, : guess.shape[1]]).all(dim=0)
    return int(agree.long().cumprod(dim=0).sum())


def _guess(left: Tensor, ids: Tensor, index: int, count: int, known: Tensor) -> Tensor:
    """Guesses (n, count) for the ids from `index` on: what the last pass drew there, then repeats of the newest id."""
    if count <= 0:
        return left[:, :0]
    guess = left[:, :count]
    if guess.shape[1] < count:
        newest = ids[:, index - 1 : index] if guess.shape[1] == 0 else guess[:, -1:]
        guess = torch.cat([guess, newest.expand(-1, count - guess.shape[1])], dim=1)
    given = known[:, index : index + count]
    return torch.where(given == FREE, guess, given)
