"""Sampling: prefill, then decode under filters and guidance; ids in, ids out.

`stream_tokens` is the one sampler; everything else collects what it yields. A token is the argmax of filtered logits
plus Gumbel noise keyed by (seed, prompt, candidate, position), so candidate 5 of a prompt is the same picture whatever
the batch size, the number of candidates and the number of processes, and whether its tokens are drawn one by one or
several at a time (`window`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.decoding import FREE, Branches, FixedShapes, Noise, Partial, decode, null_log_likelihoods
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.layers.bag_attention import CHUNK
from dalle_mini_impl.native.trunk import can_run
from dalle_mini_impl.precision import computes_bf16
from dalle_mini_impl.stream import Stream

Precision = Literal["auto", "fp32", "bf16"]
Progress = Callable[[int, int], None]
"""Called with the numbers of tokens drawn so far and in all."""
Rows = Sequence[tuple[int, int]]
"""(prompt index, candidate number) of each picture to draw."""

_MAX_BATCH_SIZE = 64
_MEMORY_SHARE = 0.5  # of what is free, for a micro-batch where the caller names no batch size
_LOGITS_COPIES = 12  # tensors the size of a row's logits that live at the same time, some of them of 8 bytes


@dataclass(frozen=True)
class Samples:
    """Finished pictures: ids (n, N) int64; for each, float32 and None if disabled, the log-likelihood ratio of guidance
    (n,), Σ log p(x | caption) - log p(x | null), and its first part (n,)."""

    ids: Tensor
    log_ratio: Tensor | None
    log_likelihood: Tensor | None


def every_row(num_prompts: int, candidates: Sequence[int]) -> list[tuple[int, int]]:
    """The same candidates of every prompt: row p × len(candidates) + c is candidates[c] of prompt p."""
    return [(prompt, candidate) for prompt in range(num_prompts) for candidate in candidates]


def stream_tokens(
    dalle: DALLE | Engine,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Rows,
    *,
    seed: int,
    settings: SamplingConfig,
    known: Tensor | None = None,
    embeddings: Tensor | None = None,
    window: int | None = None,
    fixed: FixedShapes = None,
) -> Iterator[Partial]:
    """Draws a batch of pictures, yielding after each token, or as they come where several are drawn at a time.

    dalle: the model, or the engine that it has been packed into, whose type then counts and not the settings'.
    text_ids: (P, T) captions that take the same slots, read once each. prompts: their P texts, which key the noise.
    rows: (prompt index, candidate number) of each picture. known: (n, N) ids of cells that are given, FREE (-1) where
    they are to be drawn. embeddings: (n, E) CLIP's unit vector of what each picture is to be like, zeros for none;
    guidance then strengthens caption and embedding together. window: tokens guessed and checked in one pass (Jacobi
    decoding), 1 means token by token; default what is faster for so many pictures, see `default_window`.
    fixed: see `decoding.decode`; default a CUDA graph on a GPU, which costs less than it saves, and None elsewhere.
    Raises ValueError for a model in training mode, rows without a prompt, ids that aren't any, or captions of
    different slots (`sample_rows` sorts those).
    """
    engine = pack(dalle, settings, fixed)
    stream = engine.stream
    _check(stream, text_ids, prompts, rows, known, window, embeddings)
    if not rows:
        return iter(())
    groups = stream.groups(text_ids)
    if len(groups) > 1:
        raise ValueError(f"captions take {[ids.shape[1] for _, ids in groups]} slots; draw each kind on its own")
    noise = Noise.of(prompts, rows, seed, stream.image_vocab, engine.device)
    branches = Branches(engine, groups[0][1], noise.owners, embeddings)
    if fixed is None and engine.device.type == "cuda":
        fixed = "graph"
    if fixed is not None and not engine.is_plain:
        raise ValueError(f"steps of one shape ({fixed}) need an engine made with is_plain=True")
    if window is None:
        window = 1 if fixed is not None else default_window(len(rows), engine)
    return decode(branches, noise, settings, known, window, fixed)


def sample_rows(
    dalle: DALLE | Engine,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Rows,
    *,
    seed: int,
    settings: SamplingConfig,
    known: Tensor | None = None,
    embeddings: Tensor | None = None,
    window: int | None = None,
    fixed: FixedShapes = None,
    batch_size: int | None = None,
    log_ratio: bool = True,
    progress: Progress | None = None,
) -> Samples:
    """Draws any pictures of any prompts, in micro-batches; arguments as in `stream_tokens`.

    batch_size: pictures drawn at once, default what fits; it doesn't change the result. log_ratio: also compute the
    log-likelihood of the drawn tokens and its ratio to that without the caption; both are free with guidance and cost
    one more pass over each picture without.
    """
    steps = stream_rows(
        dalle,
        text_ids,
        prompts,
        rows,
        seed=seed,
        settings=settings,
        known=known,
        embeddings=embeddings,
        window=window,
        fixed=fixed,
        batch_size=batch_size,
        log_ratio=log_ratio,
    )
    done, total = 0, len(rows) * dalle.stream.num_image_tokens
    while True:
        try:
            batch, partial = next(steps)
        except StopIteration as stop:
            samples: Samples = stop.value
            return samples
        if progress is not None:
            progress(done + len(batch) * partial.index, total)
        if partial.index == dalle.stream.num_image_tokens:
            done += len(batch) * partial.index


def stream_rows(
    dalle: DALLE | Engine,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Rows,
    *,
    seed: int,
    settings: SamplingConfig,
    known: Tensor | None = None,
    embeddings: Tensor | None = None,
    window: int | None = None,
    fixed: FixedShapes = None,
    batch_size: int | None = None,
    log_ratio: bool = True,
) -> Generator[tuple[list[int], Partial], None, Samples]:
    """`sample_rows` step by step: yields the places in `rows` that are being drawn and how far they are, micro-batch
    after micro-batch, and returns what `sample_rows` does."""
    engine = pack(dalle, settings, fixed)
    stream = engine.stream
    _check(stream, text_ids, prompts, rows, known, window, embeddings)
    batch_size = fitting_batch_size(engine.dalle, settings) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; draw at least 1 picture at once")
    num_tokens = stream.num_image_tokens
    ids = torch.empty((len(rows), num_tokens), dtype=torch.long)
    ratios, likelihoods = torch.zeros(len(rows)), torch.zeros(len(rows))
    for batch in _micro_batches(stream, text_ids, rows, batch_size):
        used = sorted({rows[place][0] for place in batch})
        for partial in stream_tokens(
            engine,
            text_ids[used],
            [prompts[prompt] for prompt in used],
            [(used.index(rows[place][0]), rows[place][1]) for place in batch],
            seed=seed,
            settings=settings,
            known=None if known is None else known[batch],
            embeddings=None if embeddings is None else embeddings[batch],
            window=window,
            fixed=fixed,
        ):
            yield batch, partial
        ids[batch] = partial.ids.cpu()
        if not log_ratio:
            continue
        ratio, likelihood = partial.log_ratio, partial.log_likelihood
        if ratio is None:
            num_slots = int(stream.num_slots(text_ids[[rows[batch[0]][0]]])[0])
            given = None if known is None else known[batch].to(engine.device)
            ratio = likelihood - null_log_likelihoods(engine, num_slots, partial.ids, given)
        ratios[batch], likelihoods[batch] = ratio.cpu(), likelihood.cpu()
    return Samples(ids, ratios if log_ratio else None, likelihoods if log_ratio else None)


@torch.no_grad()
def log_likelihood_ratio(
    dalle: DALLE, text_ids: Tensor, image_ids: Tensor, batch_size: int = 16, known: Tensor | None = None
) -> Tensor:
    """Σ log p(x | caption) - log p(x | null), (n,) float32, of pictures (n, N) with captions (n, T).

    known: (n, N); only cells that are FREE in it count.
    """
    device = dalle.image_head.weight.device
    text_ids, image_ids = text_ids.to(device), image_ids.to(device)
    counts = torch.ones_like(image_ids) if known is None else (known.to(device) == FREE)
    ratios = [torch.zeros(0)]
    for first in range(0, len(image_ids), batch_size):
        part = slice(first, first + batch_size)
        text, image = text_ids[part], image_ids[part]
        of_caption = dalle.token_log_likelihoods(text, image)  # (n, N)
        of_null = dalle.token_log_likelihoods(dalle.stream.null_captions(text), image)
        ratios.append(((of_caption - of_null) * counts[part]).sum(dim=1).cpu())
    return torch.cat(ratios)


def fitting_batch_size(dalle: DALLE, settings: SamplingConfig) -> int:
    """Pictures to draw at once: as many as fit into half of the memory that is free, and at most 64.

    Counted are the KV cache, which is copied once when the null branch joins, logits and noise.
    """
    config, stream = dalle.config, dalle.stream
    branches = 1 if settings.guidance == 1.0 else 2
    itemsize = 2 if resolve_precision(settings.precision, dalle.image_head.weight.device) == "bf16" else 4
    cache_bytes = 2 * config.layers * config.dim * (stream.num_inputs + CHUNK) * itemsize
    logits_bytes = _LOGITS_COPIES * 4 * stream.image_vocab
    row_bytes = branches * (2 * cache_bytes + logits_bytes)
    return int(max(1, min(_MAX_BATCH_SIZE, _MEMORY_SHARE * free_bytes(dalle.image_head.weight.device) // row_bytes)))


def free_bytes(device: torch.device) -> int:
    """Memory of a device that could be taken now; a guess of 2 GiB where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2 << 30


def _micro_batches(stream: Stream, text_ids: Tensor, rows: Rows, batch_size: int) -> Iterator[list[int]]:
    """Places in `rows` that are drawn together: at most batch_size, of captions that take the same slots."""
    slots = stream.num_slots(text_ids).tolist()
    for wanted in sorted(set(slots)):
        places = [place for place, (prompt, _) in enumerate(rows) if slots[prompt] == wanted]
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]


def default_window(num_rows: int, engine: Engine) -> int:
    """Tokens to guess in one pass: 8 on the CPU for one picture, where PyTorch's operations draw for two, else 1.

    With more pictures, fewer guesses are right in all of them at once, and larger passes take longer
    (docs/benchmarks.md).
    """
    return 8 if engine.device.type == "cpu" and num_rows <= (1 if engine.is_native else 2) else 1


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What a device draws in: "auto" is bf16 where it computes in that type, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "fp32"


def resolve_kernel(settings: SamplingConfig, dalle: DALLE) -> Literal["compiled", "torch"]:
    """What draws: "auto" is compiled where it can be. Raises ValueError where it is asked for and can't be had."""
    device = dalle.image_head.weight.device
    if settings.kernel == "torch":
        return "torch"
    if can_run(dalle.config, device, _dtype(settings, device)):
        return "compiled"
    if settings.kernel == "compiled":
        raise ValueError(
            "the compiled kernel was asked for, but it needs a CPU with AVX2 (for bf16 with AVX512-BF16), Linux, g++, "
            "and a model of full attention with squared ReLU and heads of 16, 32, 48 … numbers: set kernel to auto or "
            "torch"
        )
    return "torch"


def _dtype(settings: SamplingConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if resolve_precision(settings.precision, device) == "bf16" else torch.float32


def pack(dalle: DALLE | Engine, settings: SamplingConfig, fixed: FixedShapes = None) -> Engine:
    """The model packed to draw as settings say, see `Engine`; one that is packed stays as it is.

    fixed: as in `decoding.decode`. Raises ValueError for a model in training mode, or a kernel that is asked for and
    can't be had.
    """
    if isinstance(dalle, Engine):
        return dalle
    if dalle.training:
        raise ValueError("this DALLE is in training mode: call .eval() before sampling")
    device = dalle.image_head.weight.device
    dtype = _dtype(settings, device)
    return Engine(dalle, dtype, is_plain=fixed is not None, is_native=resolve_kernel(settings, dalle) == "compiled")


def _check(
    stream: Stream,
    text_ids: Tensor,
    prompts: Sequence[str],
    rows: Rows,
    known: Tensor | None,
    window: int | None,
    embeddings: Tensor | None,
) -> None:
    stream.check_text(text_ids)
    if len(prompts) != len(text_ids):
        raise ValueError(f"{len(text_ids)} captions came with {len(prompts)} prompts: give as many")
    wrong = [row for row in rows if not (0 <= row[0] < len(prompts) and 0 <= row[1] < 2**32)]
    if wrong:
        raise ValueError(f"row {wrong[0]} must be a prompt below {len(prompts)} and a candidate below 2**32")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; draw at least 1 token at a time")
    if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != len(rows)):
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; expected ({len(rows)}, E), one a picture")
    if known is None:
        return
    if tuple(known.shape) != (len(rows), stream.num_image_tokens):
        raise ValueError(f"known has shape {tuple(known.shape)}; expected {(len(rows), stream.num_image_tokens)}")
    if known.numel() and not FREE <= int(known.min()) <= int(known.max()) < stream.image_vocab:
        raise ValueError(f"known ids must be below {stream.image_vocab}, or {FREE} where a token is to be drawn")
