"""unCLIP's prior as a task of the loop: captions and the codes of their pictures' embeddings."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.data.embedding_cache import EmbeddingCache
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.embed import encode_texts
from dalle_mini_impl.precision import autocast_off
from dalle_mini_impl.prior import Prior
from dalle_mini_impl.sampling import every_row
from dalle_mini_impl.stream import NULL
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, Indices, sample_rng
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.base import BaseTask, captioned, check_captioned, encode, pick_caption

_MAX_FITTED, _MAX_FITTED_DOTS = 100_000, 4096  # pictures, evenly spaced over those of training


class PriorTask(BaseTask):
    """Captions, CLIP's embeddings of them and of their plain pictures."""

    stage: Stage = "prior"
    score = "-nll"

    def __init__(
        self,
        model: Prior,
        data: PreparedData,
        recipe: Recipe,
        tokenizer: TextTokenizer,
        clip: CLIP,
        embeddings: EmbeddingCache,
    ) -> None:
        self.model: nn.Module = model
        self.data, self.recipe, self.tokenizer, self.clip, self.embeddings = data, recipe, tokenizer, clip, embeddings
        self.captioned = captioned(data, data.train)
        check_captioned(self.stage, self.captioned)
        self.num_items = len(self.captioned)
        self.held_out = captioned(data, evaluation.held_out(data))
        if not len(self.held_out):
            self.held_out = self.captioned[: evaluation.MAX_HELD_OUT]
        fitted, paired = (
            self.captioned[:: -(-len(self.captioned) // most)] for most in (_MAX_FITTED, _MAX_FITTED_DOTS)
        )
        vectors = embeddings.vectors(fitted)
        if not model.codec.is_fitted:
            texts = encode_texts(clip, tokenizer, [data.captions[index][0] for index in paired])
            model.fit(vectors, (texts * embeddings.vectors(paired)).sum(dim=1))
        self.unigram = self._unigram(model, vectors)

    @staticmethod
    def _unigram(prior: Prior, vectors: Tensor) -> Tensor:
        """-log of the (add-one smoothed) share of each code in training, (K, num_buckets)."""
        codes = prior.codec.encode(vectors)  # (n, K)
        counts = torch.ones(prior.codec.num_dims, prior.codec.num_buckets)
        counts.scatter_add_(1, codes.t(), torch.ones(codes.t().shape))
        return -(counts / counts.sum(dim=1, keepdim=True)).log()

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """Caption ids to read and, for CLIP, plainly segmented (B, T), embeddings (B, E), which captions to drop."""
        config, length = self.recipe.prior, self.clip.text_length
        indices = self.captioned[items]
        rngs = [sample_rng(self.recipe.seed, self.stage, int(position)) for position in positions]
        captions = [pick_caption(self.data.captions[index], rng) for index, rng in zip(indices, rngs, strict=True)]
        dropout = self.recipe.text.bpe_dropout
        text = [
            encode(self.tokenizer, caption, length, dropout, rng) for caption, rng in zip(captions, rngs, strict=True)
        ]
        return {
            "text": torch.stack(text),
            "plain": self.tokenizer.batch(captions, length)[0],
            "embedding": self.embeddings.vectors(indices),
            "dropped": torch.tensor([rng.random() < config.caption_dropout for rng in rngs]),
        }

    def counts(self, batch: Batch) -> Tensor:
        """Codes."""
        return torch.tensor([len(batch["text"]) * cast(Prior, self.model).codec.num_dims], dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean negative log-likelihood of a code."""
        prior = cast(Prior, model)
        device = batch["text"].device
        with torch.no_grad(), autocast_off(device):
            vectors = self._frozen_clip(device).encode_text(batch["plain"])
        is_dropped = batch["dropped"][:, None]
        dots = (vectors * batch["embedding"]).sum(dim=1)
        nll = prior.nll(
            torch.where(is_dropped, NULL, batch["text"]),
            vectors.masked_fill(is_dropped, 0.0),
            prior.dot_codes(dots),
            prior.codec.encode(batch["embedding"]),
        )
        mean = nll.sum() / context.counts[0].float()
        return mean, {"nll": mean.detach()}

    def _frozen_clip(self, device: torch.device) -> CLIP:
        """CLIP in evaluation mode, where the batches are."""
        return self.clip.to(device).eval()

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Nats a code beside its floors, and cosines of drawn embeddings with the true ones beside theirs.

        cosine_drawn: of what the prior draws for a held-out caption. Beside it the cosine of another held-out picture,
        of the caption's own embedding and of the true one through the codec, which is the most that can be reached.
        """
        prior = cast(Prior, model)
        device = context.accelerator.device
        clip = self._frozen_clip(device)

        def measure(chunk: Indices) -> Tensor:
            captions = [self.data.captions[index][0] for index in chunk]
            text = self.tokenizer.batch(captions, clip.text_length)[0].to(device)
            true = self.embeddings.vectors(chunk).to(device)
            texts = clip.encode_text(text)
            codes = prior.codec.encode(true)
            with context.autocast():
                nll = prior.nll(text, texts, prior.dot_codes((texts * true).sum(dim=1)), codes)
            unigram = self.unigram.to(device).gather(1, codes.t())
            rows = every_row(len(chunk), [0])
            drawn = prior.draw(text, texts, captions, rows, seed=self.recipe.seed, settings=self.recipe.sampling)
            others = self.embeddings.vectors(self._others(chunk)).to(device)
            cosines = [(vectors * true).sum() for vectors in (drawn, others, texts, prior.codec.decode(codes))]
            fit = (drawn * texts).sum()
            return torch.stack([nll.sum(), unigram.sum(), *cosines, fit, nll.new_tensor(len(chunk))])

        nll, unigram, *cosines, fit, count = evaluation.total(measure, self.held_out, context, 8).tolist()
        num_codes = count * prior.codec.num_dims
        names = ("cosine_drawn", "cosine_other", "cosine_caption", "cosine_codec")
        return {
            "nll": nll / num_codes,
            "nll_unigram": unigram / num_codes,
            "nll_uniform": math.log(prior.codec.num_buckets),
            **{name: cosine / count for name, cosine in zip(names, cosines, strict=True)},
            "drawn_to_caption": fit / count,
            "variance_kept": float(prior.codec.variance_kept),
        }

    def _others(self, chunk: Indices) -> Indices:
        """For each held-out picture another one: the one half of them further on."""
        places = np.searchsorted(self.held_out, chunk)
        others: Indices = self.held_out[(places + max(1, len(self.held_out) // 2)) % len(self.held_out)]
        return others

    def describe(self, metrics: dict[str, float]) -> str:
        """Nats a code beside knowing nothing."""
        return f"{metrics['nll']:.3f} nats a code (uniform {math.log(cast(Prior, self.model).codec.num_buckets):.3f})"
