"""The prior of unCLIP: from a caption to CLIP's embedding of a picture, code by code (arXiv 2204.06125, section 2.2).

An embedding is projected on its first principal components, the largest first, and each of them is quantised. A small
decoder-only transformer reads ``[caption | CLIP's embedding of it | their dot product]`` and predicts the codes one
after the other. The dot product says how well caption and picture fit, so that a good fit can be asked for.

Codes are ordered, so a code is known by cosines of its place among them, and logits are sums of such cosines: what is
learned of a code is learned of its neighbours, too. With a vector for each code, little is learned from small sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import PriorConfig, SamplingConfig
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.recompute import recomputed
from dalle_mini_impl.layers.rope import axis_angles
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.precision import autocast_off, full_product
from dalle_mini_impl.stream import NULL, PAD

_ROWS_AT_ONCE = 512
"""Embeddings that are drawn at once, of all rows' draws together."""
_MAX_COSINES = 64


class EmbeddingCodec(nn.Module):
    """Embeddings (n, E) to codes (n, K) and back: principal components, each cut into equally frequent buckets."""

    def __init__(self, embed_dim: int, num_dims: int, num_buckets: int) -> None:
        super().__init__()
        self.num_dims, self.num_buckets = num_dims, num_buckets
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("components", torch.eye(num_dims, embed_dim))
        self.register_buffer("edges", torch.zeros(num_dims, num_buckets - 1))
        self.register_buffer("centres", torch.zeros(num_dims, num_buckets))
        self.register_buffer("variance_kept", torch.zeros(1))
        self.mean: Tensor
        self.components: Tensor
        self.edges: Tensor
        self.centres: Tensor
        self.variance_kept: Tensor

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been called, here or before the weights were saved."""
        return bool(self.variance_kept > 0)

    def forget(self) -> None:
        """Lets it be fitted anew, to another space."""
        self.variance_kept.zero_()

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> None:
        """Takes mean, components by falling variance, and buckets by quantiles from embeddings (n, E), n ≥ 2.

        A bucket's centre is the mean of what falls into it.
        """
        if embeddings.ndim != 2 or len(embeddings) < 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; expected (n, {len(self.mean)}), n ≥ 2")
        rows = embeddings.double().cpu()
        mean = rows.mean(dim=0)
        variances, vectors = torch.linalg.eigh((rows - mean).t() @ (rows - mean) / len(rows))  # rising
        components = vectors.t().flip(0)[: self.num_dims]
        components = components * components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
        values = ((rows - mean) @ components.t()).t().contiguous()  # (K, n)
        edges = _quantiles(values, self.num_buckets)
        codes = torch.searchsorted(edges, values, right=True)
        sums = torch.zeros(self.num_dims, self.num_buckets, dtype=values.dtype).scatter_add_(1, codes, values)
        counts = torch.zeros_like(sums).scatter_add_(1, codes, torch.ones_like(values))
        nearest = F.pad(edges, (0, 1), value=0.0)
        nearest[:, -1] = edges[:, -1]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), nearest)
        kept = variances.flip(0)[: self.num_dims].sum() / variances.sum().clamp(min=1e-12)
        for buffer, value in (
            (self.mean, mean),
            (self.components, components),
            (self.edges, edges),
            (self.centres, centres),
            (self.variance_kept, kept.clamp(min=1e-6)[None]),
        ):
            buffer.copy_(value)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Unit vectors (n, E) to codes (n, K) int64."""
        with autocast_off(embeddings.device):
            values = (embeddings.float() - self.mean) @ self.components.t()
        return torch.searchsorted(self.edges, values.t().contiguous(), right=True).t()

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (n, K) to unit vectors (n, E) float32."""
        values = self.centres.gather(1, codes.t()).t()  # (n, K)
        with autocast_off(codes.device):
            return F.normalize(self.mean + values @ self.components, dim=1)


class Prior(nn.Module):
    """The transformer over a caption, CLIP's embedding of it, a dot product and the codes of a picture embedding."""

    def __init__(self, config: PriorConfig, text_length: int, text_vocab: int, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.text_length = text_length
        dim, num_dims = config.dim, config.kept_dims(embed_dim)
        self.codec = EmbeddingCodec(embed_dim, num_dims, config.num_buckets)
        self.register_buffer("dot_edges", torch.zeros(config.num_dot_buckets - 1))
        self.dot_edges: Tensor
        self.text_embedding = nn.Embedding(text_vocab, dim)
        self.text_pad = nn.Embedding(text_length, dim)  # a learned pad for each text slot
        self.text_vector = nn.Linear(embed_dim, dim, bias=False)
        self.null_vector = nn.Embedding(1, dim)
        self.dot_embedding = nn.Embedding(config.num_dot_buckets, dim)
        cosines = code_cosines(config.num_buckets)  # (num_buckets, F)
        self.code_embedding = nn.Linear(cosines.shape[1], dim, bias=False)
        self.target_position = nn.Embedding(num_dims, dim)  # of the code being predicted
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, causal=True, dropout=config.dropout, token_shift=True)
            for _ in range(config.layers)
        )
        self._recomputes = False
        self.final_norm = Norm(dim)
        self.head = nn.Linear(dim, cosines.shape[1], bias=False)
        self.register_buffer("cosines", cosines, persistent=False)
        self.cosines: Tensor
        positions = torch.arange(text_length + 1 + num_dims)
        angles = axis_angles(positions, dim // config.heads // 2)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.text_vector.weight, std=0.02)
        nn.init.normal_(self.code_embedding.weight, std=0.02 * (2 / cosines.shape[1]) ** 0.5)
        nn.init.zeros_(self.head.weight)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of the trunk's linear layers, which Muon may train."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of the blocks again from now on, instead of keeping it."""
        self._recomputes = True

    @torch.no_grad()
    def fit(self, embeddings: Tensor, dots: Tensor) -> None:
        """Fits the codec to picture embeddings (n, E), and the buckets of dot products to those of some pairs (m,)."""
        self.codec.fit(embeddings)
        self.dot_edges.copy_(_quantiles(dots, self.config.num_dot_buckets))

    def dot_codes(self, dots: Tensor) -> Tensor:
        """Dot products (n,) of captions and pictures to their buckets, (n,) int64."""
        return torch.searchsorted(self.dot_edges, dots.float().contiguous(), right=True)

    def forward(self, text_ids: Tensor, text_vectors: Tensor, dots: Tensor, codes: Tensor) -> Tensor:
        """Logits (B, min(n + 1, K), num_buckets) of codes 0 … n.

        text_ids: (B, T), a null caption where the text is to be ignored. text_vectors: (B, E) CLIP's unit vectors of
        the captions, zeros for null captions. dots: (B,) buckets. codes: (B, n) the first codes; a last one beyond
        K - 1 is not read.
        """
        num_dims = self.codec.num_dims
        x = self._embed(text_ids, text_vectors, dots)
        codes = codes[:, : num_dims - 1]
        x = torch.cat([x, self._embed_codes(codes, 0)], dim=1)
        return self._logits(self._run(x, 0)[:, self.text_length + 1 :])

    def nll(self, text_ids: Tensor, text_vectors: Tensor, dots: Tensor, codes: Tensor) -> Tensor:
        """-log p(code | what is before it) in nats, (B, K) fp32, of whole rows of codes (B, K)."""
        logits = self(text_ids, text_vectors, dots, codes)
        return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")

    @torch.no_grad()
    def draw(
        self,
        text_ids: Tensor,
        text_vectors: Tensor,
        prompts: Sequence[str],
        rows: Sequence[tuple[int, int]],
        *,
        seed: int,
        settings: SamplingConfig,
    ) -> Tensor:
        """Draws a picture embedding for each row, (n, E) unit vectors: of `prior_draws` the one nearest to its caption.

        text_ids (P, T), text_vectors (P, E) and prompts are the captions. rows: (prompt index, candidate number). The
        noise of a code belongs to seed, prompt, candidate and place, so that a row's codes don't depend on the others.
        """
        parts = []
        at_once = max(1, _ROWS_AT_ONCE // settings.prior_draws)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            codes = self._draw_codes(text_ids, text_vectors, prompts, part, seed, settings)  # (n, draws, K)
            vectors = self.codec.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)  # (n, draws, E)
            owners = torch.tensor([prompt for prompt, _ in part], device=vectors.device)
            fits = (vectors * text_vectors.to(vectors.device)[owners, None]).sum(dim=2)
            parts.append(vectors[torch.arange(len(part)), fits.argmax(dim=1)])
        return torch.cat(parts) if parts else self.codec.mean.new_zeros(0, len(self.codec.mean))

    def _draw_codes(
        self,
        text_ids: Tensor,
        text_vectors: Tensor,
        prompts: Sequence[str],
        rows: Sequence[tuple[int, int]],
        seed: int,
        settings: SamplingConfig,
    ) -> Tensor:
        """Codes (n, draws, K) of each row's draws."""
        device, draws, num_dims = self.head.weight.device, settings.prior_draws, self.codec.num_dims
        table = torch.tensor(rows, device=device).repeat_interleave(draws, dim=0)  # (n × draws, 2)
        number = torch.arange(draws, device=device).repeat(len(rows))
        keys = torch.tensor([noise_key(seed, prompt, "prior") for prompt in prompts], device=device)[table[:, 0]]
        logits, cache = self._prefill(text_ids.to(device), text_vectors.to(device), settings)
        is_guided = settings.prior_guidance != 1.0
        owners = table[:, 0] if not is_guided else torch.cat([table[:, 0], torch.full_like(number, len(prompts))])
        logits, cache = logits[owners], cache.select(owners)
        codes = torch.empty(len(table), 0, dtype=torch.long, device=device)
        for index in range(num_dims):
            if index:
                newest = codes[:, -1:].repeat(2 if is_guided else 1, 1)
                x = self._embed_codes(newest, index - 1)
                logits = self._logits(self._run(x, self.text_length + 1 + index, cache)[:, 0])
            if is_guided:
                conditional, null = logits.chunk(2)
                logits_now = null + settings.prior_guidance * (conditional - null)
            else:
                logits_now = logits
            if settings.prior_temperature > 0:
                places = (number * num_dims + index)[:, None]
                noise = gumbel_noise(keys, table[:, 1], places, self.config.num_buckets)[:, 0]
                logits_now = logits_now / settings.prior_temperature + noise
            codes = torch.cat([codes, logits_now.argmax(dim=1, keepdim=True)], dim=1)
        return codes.view(len(rows), draws, num_dims)

    def _prefill(self, text_ids: Tensor, text_vectors: Tensor, settings: SamplingConfig) -> tuple[Tensor, KVCache]:
        """Reads the captions, and a null caption behind them where there is guidance; logits of code 0, the cache."""
        if settings.prior_guidance != 1.0:
            text_ids = torch.cat([text_ids, torch.full_like(text_ids[:1], NULL)])
            text_vectors = torch.cat([text_vectors, torch.zeros_like(text_vectors[:1])])
        buckets = self.config.num_dot_buckets
        asked_for = min(buckets - 1, int(settings.prior_dot * buckets))
        x = self._embed(text_ids, text_vectors, torch.full((len(text_ids),), asked_for, device=text_ids.device))
        cache = KVCache.allocate(
            len(self.blocks),
            len(x),
            self.config.heads,
            len(self.rope_cos),
            self.config.dim // self.config.heads,
            device=x.device,
            dtype=x.dtype,
        )
        return self._logits(self._run(x, 0, cache)[:, -1]), cache

    def _embed(self, text_ids: Tensor, text_vectors: Tensor, dots: Tensor) -> Tensor:
        """Input vectors (B, T + 2, dim) of all that comes ahead of the codes."""
        if text_ids.ndim != 2 or text_ids.shape[1] != self.text_length:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}; expected (B, {self.text_length})")
        is_pad = (text_ids == PAD).unsqueeze(-1)
        words = torch.where(is_pad, self.text_pad.weight, self.text_embedding(text_ids))
        is_null = (text_vectors == 0).all(dim=1, keepdim=True)
        vectors = torch.where(is_null, self.null_vector.weight, self.text_vector(text_vectors))
        asked = self.dot_embedding(dots) + self.target_position.weight[0]
        return torch.cat([words, vectors[:, None], asked[:, None]], dim=1)

    def _embed_codes(self, codes: Tensor, start: int) -> Tensor:
        """Input vectors (B, n, dim) of codes (B, n) from place `start` on, each predicting the next one."""
        targets = self.target_position.weight[start + 1 : start + 1 + codes.shape[1]]
        x: Tensor = self.code_embedding(self.cosines[codes]) + targets
        return x

    def _run(self, x: Tensor, start: int, cache: KVCache | None = None) -> Tensor:
        """The trunk over x (B, L, dim), whose first token stands at `start`, behind those in the cache."""
        places = slice(start, start + x.shape[1])
        run = recomputed(Block.__call__, self._recomputes and cache is None)
        for layer, block in enumerate(self.blocks):
            x = run(block, x, (self.rope_cos[places], self.rope_sin[places]), None, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        hidden: Tensor = self.final_norm(x)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., num_buckets) float32 of (..., dim)."""
        return full_product(self.head(hidden).float(), self.cosines)


def code_cosines(num_buckets: int) -> Tensor:
    """The slowest cosines over the places of ordered codes, (num_buckets, F ≤ 64): the basis of the DCT-II."""
    places = (torch.arange(num_buckets) + 0.5) / num_buckets
    return torch.cos(math.pi * places[:, None] * torch.arange(min(num_buckets, _MAX_COSINES)))


def _quantiles(values: Tensor, num_buckets: int) -> Tensor:
    """The num_buckets - 1 edges between equally frequent buckets of values (..., n), half-way between two of them."""
    ordered = values.sort(dim=-1).values
    places = torch.arange(1, num_buckets) * values.shape[-1] // num_buckets
    return (ordered[..., places] + ordered[..., (places - 1).clamp(min=0)]) / 2
