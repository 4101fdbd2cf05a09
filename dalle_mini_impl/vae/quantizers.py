"""Three ways from a grid of vectors to a grid of ids, behind one result: vq, fsq and gumbel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import VAEConfig
from dalle_mini_impl.precision import full_product

SOFTNESS = 0.05
"""Temperature of the soft assignment, in cosine similarity, by which the use of codes is balanced."""


@dataclass(frozen=True)
class Quantized:
    """vectors: (B, C, H, W) for the decoder. ids: (B, H × W) int64. losses: named 0-d terms of the training loss.

    rows: (B × H × W, C), what a codebook may learn from, without gradient; None where there is nothing to learn.
    """

    vectors: Tensor
    ids: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None


class Quantizer(nn.Module):
    """The interface of the three: `in_channels` come from the encoder, `out_channels` go to the decoder."""

    num_codes: int
    in_channels: int
    out_channels: int

    def forward(self, latents: Tensor, progress: float, generator: torch.Generator | None = None) -> Quantized:
        """Quantizes latents (B, in_channels, H, W) for training; progress is the share of the run that is done.

        It changes nothing: what is learned without a gradient waits for `after_step`.
        """
        raise NotImplementedError

    def before_step(self, micro_batches: Iterable[Tensor] = ()) -> None:
        """Begins an optimizer step; what was observed in one that was skipped is forgotten.

        micro_batches: the step's latents (b, in_channels, H, W) where they will be quantized part by part. They are
        only computed if losses of the parts need to know the whole.
        """

    def observe(self, quantized: Quantized) -> None:
        """Keeps what `after_step` needs of one part of a step's batch; parts come in the batch's order."""

    def after_step(self, generator: torch.Generator | None) -> None:
        """Learns, without a gradient, from all that was observed in an optimizer step, on all ranks together.

        generator: the step's random numbers, the same on every rank.
        """

    def ids(self, latents: Tensor) -> Tensor:
        """Hard ids (B, H × W) int64 of latents (B, in_channels, H, W)."""
        raise NotImplementedError

    def vectors(self, ids: Tensor, height: int) -> Tensor:
        """The decoder's input (B, out_channels, height, W) for ids (B, height × W)."""
        raise NotImplementedError

    def latents(self, ids: Tensor, height: int) -> Tensor:
        """Latents (B, in_channels, height, W) that have the given hard ids (B, height × W)."""
        raise NotImplementedError

    def relaxed(self, latents: Tensor) -> Tensor:
        """What the decoder would get, (B, out_channels, H, W), if nothing was rounded."""
        raise NotImplementedError

    def log_assignment(self, latents: Tensor) -> Tensor:
        """Log of the share of each code in each cell, (B, H × W, num_codes), with a gradient; the nearest has most."""
        batch, _, height, width = latents.shape
        rows = _rows(self.relaxed(latents))
        every_id = torch.arange(self.num_codes, device=latents.device)
        codes = _rows(self.vectors(every_id[:, None], 1))
        distance: Tensor = torch.cdist(rows, codes).square()
        return (-distance / (2 * SOFTNESS * rows.shape[1])).log_softmax(dim=1).view(batch, height * width, -1)

    def straight_through(self, latents: Tensor) -> Quantized:
        """Hard codes of latents (B, in_channels, H, W), whose gradient is that of the `relaxed` ones."""
        ids, relaxed = self.ids(latents), self.relaxed(latents)
        return Quantized(self.vectors(ids, latents.shape[2]).detach() + (relaxed - relaxed.detach()), ids)


def _rows(latents: Tensor) -> Tensor:
    """(B, C, H, W) to (B × H × W, C) in fp32."""
    return latents.float().permute(0, 2, 3, 1).flatten(0, 2)


def _grid(rows: Tensor, batch: int, height: int) -> Tensor:
    """(B × H × W, C) to (B, C, H, W)."""
    return rows.view(batch, height, -1, rows.shape[1]).permute(0, 3, 1, 2)


class VectorQuantizer(Quantizer):
    """Nearest neighbour on the unit sphere, codes kept by EMA, dead codes restarted (VQ-VAE-2, ViT-VQGAN).

    Once `quantize_after` of the run is done, a step's encoder outputs become the codebook, and the next step quantizes.
    A code whose EMA count falls below `dead_code_share` of the uniform count is moved onto a random encoder output of
    the step. The EMA forgets faster over its first updates, because the encoder moves fast there and unused codes must
    not wait for their restart. All parts of a step see the same codebook, and how the step's batch was cut up, over
    ranks or in time, doesn't change what becomes of it.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.num_codes = config.codebook_size
        self.in_channels = self.out_channels = config.code_dim
        self.scale = config.code_dim**0.5
        self.start = config.quantize_after
        self.decay = config.codebook_decay
        self.dead_share = config.dead_code_share
        self.commitment_weight = config.commitment_weight
        self.balance_weight = config.balance_weight
        codebook = F.normalize(torch.randn(self.num_codes, config.code_dim), dim=1)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_counts", torch.zeros(self.num_codes))
        self.register_buffer("ema_sums", torch.zeros_like(codebook))
        self.register_buffer("updates", torch.zeros(1))
        self.codebook: Tensor
        self.ema_counts: Tensor
        self.ema_sums: Tensor
        self.updates: Tensor
        self._observed: list[tuple[Tensor, Tensor]] = []  # rows and ids of a step
        self._code_use: Tensor | None = None  # (K,), of a whole step
        self._has_codebook: bool | None = None  # what `updates` says, None until it was read

    @property
    def has_codebook(self) -> bool:
        """Whether a codebook has been learned; the device is asked once, and again after weights were loaded."""
        if self._has_codebook is None:
            self._has_codebook = bool(self.updates)
        return self._has_codebook

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        super()._load_from_state_dict(*arguments, **more)
        self._has_codebook = None

    def forward(self, latents: Tensor, progress: float, generator: torch.Generator | None = None) -> Quantized:
        """Straight-through quantization; unquantized while training has no codebook yet."""
        batch, _, height, _ = latents.shape
        rows = F.normalize(_rows(latents), dim=1)
        detached = rows.detach()
        ids = self._nearest(detached)
        if self.training and not self.has_codebook:
            to_learn = detached if progress >= self.start else None
            return Quantized(_grid(rows * self.scale, batch, height), ids.view(batch, -1), rows=to_learn)
        codes = self.codebook[ids]
        losses = {"commitment": self.commitment_weight * F.mse_loss(rows, codes) * rows.shape[1]}
        if self.balance_weight:
            losses["balance"] = self.balance_weight * self._imbalance(rows)
        straight = rows + (codes - rows).detach()
        return Quantized(_grid(straight * self.scale, batch, height), ids.view(batch, -1), losses, detached)

    def ids(self, latents: Tensor) -> Tensor:
        """Nearest codes."""
        return self._nearest(F.normalize(_rows(latents), dim=1)).view(latents.shape[0], -1)

    def vectors(self, ids: Tensor, height: int) -> Tensor:
        """The codes themselves."""
        return _grid(self.codebook[ids.flatten()] * self.scale, ids.shape[0], height)

    def latents(self, ids: Tensor, height: int) -> Tensor:
        """The codes themselves, on the unit sphere."""
        return _grid(self.codebook[ids.flatten()], ids.shape[0], height)

    def relaxed(self, latents: Tensor) -> Tensor:
        """Directions, on the codes' sphere."""
        relaxed: Tensor = F.normalize(latents.float(), dim=1) * self.scale
        return relaxed

    @torch.no_grad()
    def before_step(self, micro_batches: Iterable[Tensor] = ()) -> None:
        """Where a step is quantized part by part, measures the use of codes that the balance term needs."""
        self._observed.clear()
        self._code_use = None
        if not self.balance_weight or not self.has_codebook:
            return
        total, num_rows = torch.zeros_like(self.ema_counts), 0
        for latents in micro_batches:
            rows = F.normalize(_rows(latents), dim=1)
            total += self._soft(rows) * len(rows)
            num_rows += len(rows)
        if num_rows:
            self._code_use = _sum_over_ranks(total) / (num_rows * _world_size())

    def observe(self, quantized: Quantized) -> None:
        """Keeps encoder outputs and their codes."""
        if quantized.rows is not None:
            self._observed.append((quantized.rows, quantized.ids.flatten()))

    @torch.no_grad()
    def after_step(self, generator: torch.Generator | None) -> None:
        """Starts the codebook, or moves it and restarts its dead codes."""
        if not self._observed:
            return
        rows, ids = (torch.cat(parts) for parts in zip(*self._observed, strict=True))
        self._observed.clear()
        self._code_use = None
        counts = torch.zeros_like(self.ema_counts).index_add_(0, ids, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.codebook).index_add_(0, ids, rows)
        fresh = _random_rows(rows, self.num_codes, generator)
        together = _sum_over_ranks(torch.cat([counts[:, None], sums, fresh], dim=1))
        counts, sums, fresh = together[:, 0], *together[:, 1:].chunk(2, dim=1)
        fresh = _apart(fresh, generator)
        if self.has_codebook:
            self._move(counts, sums, fresh)
        else:
            self.codebook.copy_(fresh)
            self.ema_counts.fill_(counts.sum() / self.num_codes)
            self.ema_sums.copy_(fresh * self.ema_counts[:, None])
        self.updates += 1
        self._has_codebook = True

    def _cosines(self, rows: Tensor) -> Tensor:
        """Of rows (n, C) with all codes, (n, K): bf16 wouldn't tell near codes apart."""
        return full_product(rows, self.codebook)

    def _nearest(self, rows: Tensor) -> Tensor:
        return self._cosines(rows).argmax(dim=1)

    def _soft(self, rows: Tensor) -> Tensor:
        """Mean soft assignment (K,) of rows (n, C)."""
        return (self._cosines(rows) / SOFTNESS).softmax(dim=1).mean(dim=0)

    def _imbalance(self, rows: Tensor) -> Tensor:
        """ln K minus the entropy of the global batch's mean soft assignment, 0-d nats: 0 where codes are used alike.

        An entropy is no mean over rows, so that those of micro-batches don't add up. This does, and has its value and
        its gradient: the cross-entropy of the rows' own assignments with the global batch's, held fixed.
        """
        own = self._soft(rows)
        use = self._code_use if self.training else None
        if use is None:
            use = own.detach()
            if self.training and _world_size() > 1:
                use = _sum_over_ranks(use.clone()) / _world_size()
        return math.log(self.num_codes) + (own * use.clamp(min=1e-12).log()).sum()

    def _move(self, counts: Tensor, sums: Tensor, fresh: Tensor) -> None:
        """One EMA update by the counts (K,) and sums (K, C) of a step; dead codes become fresh ones (K, C)."""
        updates = self.updates + 1
        step = 1 - torch.minimum((updates + 1) / (updates + 10), torch.full_like(updates, self.decay))
        self.ema_counts.lerp_(counts, step)
        self.ema_sums.lerp_(sums, step)
        uniform = self.ema_counts.sum() / self.num_codes
        dead = (self.ema_counts < self.dead_share * uniform)[:, None]
        self.ema_sums.copy_(torch.where(dead, fresh * uniform, self.ema_sums))
        self.ema_counts.copy_(torch.where(dead[:, 0], uniform, self.ema_counts))
        self.codebook.copy_(F.normalize(self.ema_sums, dim=1))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _random_rows(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """This rank's part of `count` random rows of all ranks (each has equally many): its own rows, zeros for others'."""
    device = generator.device if generator is not None else rows.device
    picks = torch.randint(_world_size() * len(rows), (count,), generator=generator, device=device).to(rows.device)
    chosen = rows[picks % len(rows)]
    if _world_size() == 1:
        return chosen
    return chosen * (picks // len(rows) == dist.get_rank())[:, None]


def _apart(rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows, slightly moved on the sphere so that no two are equal."""
    device = generator.device if generator is not None else rows.device
    noise = torch.randn(rows.shape, generator=generator, device=device).to(rows.device)
    return F.normalize(rows + 0.01 * noise, dim=1)


class FiniteScalarQuantizer(Quantizer):
    """Each channel rounded to a few levels: a codebook that can't collapse (FSQ, arXiv 2309.15505)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.num_codes = config.num_codes
        self.in_channels = self.out_channels = len(config.fsq_levels)
        levels = torch.tensor(config.fsq_levels)
        self.register_buffer("levels", levels, persistent=False)
        basis = torch.cat([torch.ones(1, dtype=torch.long), levels[:-1].cumprod(0)])
        self.register_buffer("basis", basis, persistent=False)
        self.levels: Tensor
        self.basis: Tensor

    def forward(self, latents: Tensor, progress: float, generator: torch.Generator | None = None) -> Quantized:
        """Straight-through rounding."""
        batch, _, height, _ = latents.shape
        bounded = self._bound(_rows(latents))
        straight = bounded + (self._round(bounded) - bounded).detach()
        return Quantized(self._centre(straight, batch, height), self._pack(bounded).view(batch, -1))

    def ids(self, latents: Tensor) -> Tensor:
        """Rounded levels as one number in mixed radix."""
        return self._pack(self._bound(_rows(latents))).view(latents.shape[0], -1)

    def vectors(self, ids: Tensor, height: int) -> Tensor:
        """Levels scaled to [-1, 1]."""
        return self._centre(self._unpack(ids).float(), ids.shape[0], height)

    def latents(self, ids: Tensor, height: int) -> Tensor:
        """The middle of each level's range."""
        return _grid(torch.logit((self._unpack(ids) + 0.5) / self.levels), ids.shape[0], height)

    def relaxed(self, latents: Tensor) -> Tensor:
        """The bounded values, scaled as levels are."""
        return self._centre(self._bound(_rows(latents)), latents.shape[0], latents.shape[2])

    def _bound(self, rows: Tensor) -> Tensor:
        """To [-1/2, levels - 1/2], every level equally wide."""
        return torch.sigmoid(rows) * self.levels - 0.5

    def _round(self, bounded: Tensor) -> Tensor:
        """The nearest level; a saturated sigmoid reaches half a level beyond the first and the last."""
        return torch.minimum(bounded.round().clamp(min=0), self.levels - 1)

    def _unpack(self, ids: Tensor) -> Tensor:
        return (ids.flatten()[:, None] // self.basis) % self.levels

    def _pack(self, bounded: Tensor) -> Tensor:
        return (self._round(bounded).long() * self.basis).sum(dim=1)

    def _centre(self, rows: Tensor, batch: int, height: int) -> Tensor:
        return _grid(2 * rows / (self.levels - 1) - 1, batch, height)


class GumbelQuantizer(Quantizer):
    """DALL·E 1's relaxation: softmax of logits plus Gumbel noise, colder and colder (arXiv 2102.12092, section 2.1)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.num_codes = self.in_channels = config.codebook_size
        self.out_channels = config.latent_width
        self.config = config
        self.codebook = nn.Embedding(self.num_codes, self.out_channels)

    def temperature(self, progress: float) -> float:
        """Falls from 1 to temperature_final along a cosine over temperature_anneal of the run."""
        return 1 + (self.config.temperature_final - 1) * _cosine_ramp(progress, self.config.temperature_anneal)

    def kl_weight(self, progress: float) -> float:
        """Rises from 0 to kl_weight along a cosine over kl_warmup of the run."""
        return self.config.kl_weight * _cosine_ramp(progress, self.config.kl_warmup)

    def forward(self, latents: Tensor, progress: float, generator: torch.Generator | None = None) -> Quantized:
        """Soft codes while training, hard ones in evaluation; the KL is per picture, divided by its pixels later."""
        batch, _, height, _ = latents.shape
        logits = _rows(latents)  # (B·H·W, K)
        log_probs = logits.log_softmax(dim=1)
        divergence = (log_probs.exp() * (log_probs + torch.log(torch.tensor(float(self.num_codes))))).sum() / batch
        ids = logits.argmax(dim=1)
        if self.training:
            uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-10, 1 - 1e-7)
            noisy = (logits - (-uniform.log()).log()) / self.temperature(progress)
            rows = noisy.softmax(dim=1) @ self.codebook.weight.float()
        else:
            rows = self.codebook(ids).float()
        losses = {"kl": self.kl_weight(progress) * divergence}
        return Quantized(_grid(rows, batch, height), ids.view(batch, -1), losses)

    def ids(self, latents: Tensor) -> Tensor:
        """The likeliest codes."""
        return _rows(latents).argmax(dim=1).view(latents.shape[0], -1)

    def vectors(self, ids: Tensor, height: int) -> Tensor:
        """The codes' embeddings."""
        return _grid(self.codebook(ids.flatten()), ids.shape[0], height)

    def latents(self, ids: Tensor, height: int) -> Tensor:
        """Logits that give half of the probability to the code, and the rest to all others alike."""
        one_hot = F.one_hot(ids.flatten(), self.num_codes).float()
        return _grid(one_hot * math.log(max(2, self.num_codes - 1)), ids.shape[0], height)

    def relaxed(self, latents: Tensor) -> Tensor:
        """The codes' mean by the softmax of the logits."""
        rows = _rows(latents).softmax(dim=1) @ self.codebook.weight.float()
        return _grid(rows, latents.shape[0], latents.shape[2])

    def log_assignment(self, latents: Tensor) -> Tensor:
        """The logits' own softmax."""
        return _rows(latents).log_softmax(dim=1).view(latents.shape[0], -1, self.num_codes)


def _cosine_ramp(progress: float, share: float) -> float:
    """From 0 to 1 along half a cosine over a share of the run; 1 from the start where that is 0."""
    done = min(1.0, progress / share) if share else 1.0
    return 0.5 * (1 - math.cos(math.pi * done))


def build_quantizer(config: VAEConfig) -> Quantizer:
    """The quantizer a recipe asks for."""
    kinds: dict[str, type[Quantizer]] = {
        "vq": VectorQuantizer,
        "fsq": FiniteScalarQuantizer,
        "gumbel": GumbelQuantizer,
    }
    return kinds[config.quantizer](config)


def usage_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Share of codes used at least once, and exp of the entropy of their use (at most the number of codes).

    counts: (K,) how often each code was used.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()
