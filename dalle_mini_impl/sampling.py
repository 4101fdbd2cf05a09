"""Sampling: filters → guidance → prefill → decode; ids in, ids out.

`stream_tokens` is the one sampler; everything else collects what it yields. A token is the argmax of filtered logits
plus Gumbel noise keyed by (seed, prompt, candidate, position), so candidate 5 of a prompt is the same picture whatever
the batch size, the number of candidates and the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.stream import NULL

Progress = Callable[[int, int], None]
"""Called with the numbers of tokens drawn so far and in all."""

_NOISE_BLOCK = 1 << 20  # numbers of noise drawn ahead
_CACHE_BYTES = 1 << 30  # KV cache of a micro-batch where the caller names no batch size
_MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class Partial:
    """A batch of pictures while it is drawn.

    ids: (n, index) int64, a view of a buffer that later steps only write behind. index: tokens drawn so far.
    log_ratio: (n,) Σ log p(x | caption) - log p(x | null) over these tokens; None where no null pass is made.
    """

    ids: Tensor
    index: int
    log_ratio: Tensor | None


@dataclass(frozen=True)
class Samples:
    """Finished pictures: ids (n, N) int64 and the guidance log-likelihood ratio (n,) float32, None if disabled."""

    ids: Tensor
    log_ratio: Tensor | None


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest (and what equals the k-th) at -inf; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all at -inf but the likeliest ones whose probabilities add up to p (nucleus sampling)."""
    if p >= 1.0:
        return logits
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # probability of what comes before: 0 for the first
    return logits.masked_fill((likelier >= p).scatter(-1, order, likelier >= p), -math.inf)


def filter_logits(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """Temperature, then top-k, then top-p on logits (..., V); a temperature of 0 keeps the likeliest token alone."""
    if settings.temperature == 0:
        return keep_top_k(logits, 1)
    return keep_top_p(keep_top_k(logits / settings.temperature, settings.top_k), settings.top_p)


def choose(logits: Tensor, settings: SamplingConfig, gumbel: Tensor | None) -> Tensor:
    """Draws ids (n,) from logits (n, V): filters first, then the argmax with Gumbel noise (n, V) added."""
    if settings.temperature == 0 or gumbel is None:
        return logits.argmax(dim=-1)
    return (filter_logits(logits, settings) + gumbel).argmax(dim=-1)


def guidance_scale(settings: SamplingConfig, index: int, num_tokens: int) -> float:
    """The guidance scale at token `index` of num_tokens: constant, or rising from 1 at the first to guidance."""
    if settings.guidance_schedule == "constant":
        return settings.guidance
    share = index / (num_tokens - 1) if num_tokens > 1 else 1.0
    if settings.guidance_schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return 1.0 + (settings.guidance - 1.0) * share


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): null + scale × (conditional - null); exactly conditional at 1."""
    return conditional if scale == 1.0 else null + scale * (conditional - null)


def stream_tokens(
    dalle: DALLE,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Sequence[tuple[int, int]],
    *,
    seed: int,
    settings: SamplingConfig,
) -> Iterator[Partial]:
    """Draws a batch of pictures, yielding after each token.

    text_ids: (P, T) captions that take the same slots, read once each. prompts: their P texts, which key the noise.
    rows: (prompt index, candidate number) of each picture. Raises ValueError for a model in training mode, rows
    without a prompt, or captions of different slots (`sample_rows` sorts those).
    """
    _check(dalle, text_ids, prompts, rows)
    if not rows:
        return iter(())
    groups = dalle.stream.groups(text_ids)
    if len(groups) > 1:
        raise ValueError(f"captions take {[ids.shape[1] for _, ids in groups]} slots; draw each kind on its own")
    return _decode(dalle, groups[0][1], _Noise.of(dalle, prompts, rows, seed), settings)


def sample_rows(
    dalle: DALLE,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Sequence[tuple[int, int]],
    *,
    seed: int,
    settings: SamplingConfig,
    batch_size: int | None = None,
    log_ratio: bool = True,
    progress: Progress | None = None,
) -> Samples:
    """Draws any pictures of any prompts, in micro-batches; arguments as in `stream_tokens`.

    batch_size: pictures drawn at once, default what fits; it doesn't change the result. log_ratio: also compute the
    log-likelihood ratio; it is free with guidance and costs one more pass over each picture without.
    """
    _check(dalle, text_ids, prompts, rows)
    batch_size = fitting_batch_size(dalle, settings) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; draw at least 1 picture at once")
    num_tokens = dalle.stream.num_image_tokens
    ids = torch.empty((len(rows), num_tokens), dtype=torch.long)
    ratios = torch.zeros(len(rows))
    done = 0
    for batch in _micro_batches(dalle, text_ids, rows, batch_size):
        used = sorted({rows[place][0] for place in batch})
        own_rows = [(used.index(rows[place][0]), rows[place][1]) for place in batch]
        own_prompts = [prompts[prompt] for prompt in used]
        for partial in stream_tokens(dalle, text_ids[used], own_prompts, own_rows, seed=seed, settings=settings):
            if progress is not None:
                progress(done + len(batch) * partial.index, len(rows) * num_tokens)
        done += len(batch) * num_tokens
        ids[batch] = partial.ids.cpu()
        if log_ratio:
            captions = text_ids[[rows[place][0] for place in batch]]
            ratio = (
                log_likelihood_ratio(dalle, captions, partial.ids) if partial.log_ratio is None else partial.log_ratio
            )
            ratios[batch] = ratio.cpu()
    return Samples(ids=ids, log_ratio=ratios if log_ratio else None)


def sample_tokens(
    dalle: DALLE,
    text_ids: Tensor,
    candidates: Sequence[int],
    *,
    seed: int,
    prompt: str,
    settings: SamplingConfig,
    batch_size: int | None = None,
    log_ratio: bool = True,
    progress: Progress | None = None,
) -> Samples:
    """Draws numbered candidates of one prompt, whose caption is text_ids (T,); see `sample_rows`."""
    return sample_rows(
        dalle,
        text_ids[None],
        [prompt],
        [(0, candidate) for candidate in candidates],
        seed=seed,
        settings=settings,
        batch_size=batch_size,
        log_ratio=log_ratio,
        progress=progress,
    )


def sample_many(
    dalle: DALLE,
    text_ids: Tensor,
    prompts: Sequence[str],
    candidates: Sequence[int] = (0,),
    *,
    seed: int,
    settings: SamplingConfig,
    batch_size: int | None = None,
    log_ratio: bool = True,
    progress: Progress | None = None,
) -> Samples:
    """Draws the same candidate numbers of P prompts, captions (P, T), many prompts to a batch.

    Row p × len(candidates) + c of the result is candidates[c] of prompt p: the tokens `sample_tokens` gives.
    """
    return sample_rows(
        dalle,
        text_ids,
        prompts,
        [(prompt, candidate) for prompt in range(len(prompts)) for candidate in candidates],
        seed=seed,
        settings=settings,
        batch_size=batch_size,
        log_ratio=log_ratio,
        progress=progress,
    )


@torch.no_grad()
def log_likelihood_ratio(dalle: DALLE, text_ids: Tensor, image_ids: Tensor, batch_size: int = 16) -> Tensor:
    """Σ log p(x | caption) - log p(x | null), (n,) float32, of pictures (n, N) with captions (n, T)."""
    device = dalle.image_head.weight.device
    text_ids, image_ids = text_ids.to(device), image_ids.to(device)
    ratios = []
    for first in range(0, len(image_ids), batch_size):
        text, image = text_ids[first : first + batch_size], image_ids[first : first + batch_size]
        null = dalle.stream.null_captions(text)
        ratios.append(dalle.log_likelihood(text, image) - dalle.log_likelihood(null, image))
    return torch.cat(ratios) if ratios else torch.zeros(0)


def fitting_batch_size(dalle: DALLE, settings: SamplingConfig) -> int:
    """Pictures to draw at once, so that the KV cache stays within 1 GiB."""
    config, stream = dalle.config, dalle.stream
    branches = 1 if settings.guidance == 1.0 else 2
    row_bytes = 2 * branches * config.layers * config.dim * stream.num_inputs * dalle.image_head.weight.element_size()
    return max(1, min(_MAX_BATCH_SIZE, _CACHE_BYTES // row_bytes))


def _micro_batches(
    dalle: DALLE, text_ids: Tensor, rows: Sequence[tuple[int, int]], batch_size: int
) -> Iterator[list[int]]:
    """Places in `rows` that are drawn together: at most batch_size, of captions that take the same slots."""
    slots = dalle.stream.num_slots(text_ids).tolist()
    for wanted in sorted(set(slots)):
        places = [place for place, (prompt, _) in enumerate(rows) if slots[prompt] == wanted]
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]


class _Noise:
    """The Gumbel noise of a batch of rows, drawn some positions ahead."""

    def __init__(self, keys: Tensor, owners: Tensor, candidates: Tensor, vocab_size: int) -> None:
        self.keys, self.owners, self.candidates, self.vocab_size = keys, owners, candidates, vocab_size
        self.block_length = max(1, _NOISE_BLOCK // (len(owners) * vocab_size))

    @classmethod
    def of(cls, dalle: DALLE, prompts: Sequence[str], rows: Sequence[tuple[int, int]], seed: int) -> _Noise:
        device = dalle.image_head.weight.device
        table = torch.tensor(rows, dtype=torch.long, device=device)  # (n, 2)
        keys = torch.tensor([noise_key(seed, prompt) for prompt in prompts], device=device)
        return cls(keys[table[:, 0]], table[:, 0], table[:, 1], dalle.stream.image_vocab)

    def positions(self, num_tokens: int) -> Iterator[Tensor]:
        """Noise (n, V) of each position in turn."""
        for start in range(0, num_tokens, self.block_length):
            end = min(start + self.block_length, num_tokens)
            yield from gumbel_noise(self.keys, self.candidates, start, end, self.vocab_size).unbind(dim=1)


@torch.no_grad()
def _decode(dalle: DALLE, text_ids: Tensor, noise: _Noise, settings: SamplingConfig) -> Iterator[Partial]:
    """Prefills each caption once, expands the cache to the rows, then draws token by token.

    With guidance the batch is stacked: n conditional rows, then the same n rows under the null caption.
    """
    num_tokens, num_rows = dalle.stream.num_image_tokens, len(noise.owners)
    device, guided = noise.owners.device, settings.guidance != 1.0
    captions, batch_rows = text_ids.to(device), noise.owners  # (P, t)
    if guided:
        batch_rows = torch.cat([noise.owners, torch.full_like(noise.owners, len(captions))])
        captions = torch.cat([captions, torch.full_like(captions[:1], NULL)])
    logits, cache = dalle.prefill(captions)  # (P + 1, V)
    logits, cache = logits[batch_rows], cache.select(batch_rows)
    ids = torch.empty((num_rows, num_tokens), dtype=torch.long, device=device)
    log_ratio = torch.zeros(num_rows, device=device) if guided else None
    for index, gumbel in enumerate(noise.positions(num_tokens)):
        if index > 0:
            previous = ids[:, index - 1]
            logits = dalle.decode_step(previous.repeat(2) if guided else previous, index, cache)
        logits = logits.float()
        if log_ratio is None:
            ids[:, index] = choose(logits, settings, gumbel)
        else:
            conditional, null = logits.chunk(2)
            scale = guidance_scale(settings, index, num_tokens)
            ids[:, index] = choose(guide(conditional, null, scale), settings, gumbel)
            difference = conditional.log_softmax(dim=-1) - null.log_softmax(dim=-1)
            log_ratio = log_ratio + difference.gather(1, ids[:, index : index + 1])[:, 0]
        yield Partial(ids=ids[:, : index + 1], index=index + 1, log_ratio=log_ratio)


def _check(dalle: DALLE, text_ids: Tensor, prompts: Sequence[str], rows: Sequence[tuple[int, int]]) -> None:
    if dalle.training:
        raise ValueError("this DALLE is in training mode, where dropout acts: call .eval() before sampling")
    dalle.stream.check_text(text_ids)
    if len(prompts) != len(text_ids):
        raise ValueError(f"{len(text_ids)} captions came with {len(prompts)} prompts: give as many")
    wrong = [row for row in rows if not (0 <= row[0] < len(prompts) and 0 <= row[1] < 2**32)]
    if wrong:
        raise ValueError(f"row {wrong[0]} must be a prompt below {len(prompts)} and a candidate below 2**32")
