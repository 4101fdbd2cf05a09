"""Captions and the ids of their pictures in one stream, as a task of the loop."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.embedding_cache import EmbeddingCache
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache, unigram_nll
from dalle_mini_impl.stream import NULL, PAD, Stream
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, BatchOrder, Indices, LengthBatches, sample_rng
from dalle_mini_impl.training.soft_targets import code_likeness, soft_share
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.base import BaseTask, encode, pick_caption
from dalle_mini_impl.vae.model import DiscreteVAE

_ROUNDING = 1e-9
"""More than a product of a share and a position may be too small by."""


class DALLETask(BaseTask):
    """Captions and the ids of their pictures."""

    stage: Stage = "dalle"
    score = "image_accuracy"
    unit = "tokens"

    def __init__(
        self,
        model: DALLE,
        data: PreparedData,
        recipe: Recipe,
        tokenizer: TextTokenizer,
        cache: TokenCache,
        vae: DiscreteVAE,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        if (embeddings is None) != (model.prefix is None):
            raise ValueError("a DALLE with an image_prefix needs CLIP's embeddings of the pictures, others have no use")
        self.model: nn.Module = model
        self.embeddings = embeddings
        self.data, self.recipe, self.tokenizer, self.cache, self.vae = data, recipe, tokenizer, cache, vae
        self.stream: Stream = model.stream
        self.num_items = len(data.train)
        self.units_per_item = self.stream.num_image_tokens
        self.held_out = evaluation.held_out(data)
        self.trained_on = evaluation.trained_on(data)
        self._sorted: LengthBatches | None = None
        self.likeness = code_likeness(vae) if recipe.dalle.soft_targets else None
        self.floor = unigram_nll(cache.counts(data.train), cache.counts(self.held_out))

    def positions(self, order: BatchOrder, step: int, rank: int, world_size: int) -> Indices:
        """Captions that take as many slots share a batch, where their number varies at all."""
        if self.stream.slot_step is None:
            return order.positions(step, rank, world_size)
        if self._sorted is None:
            self._sorted = LengthBatches(order, self._slots)
        return self._sorted.positions(step, rank, world_size)

    def _slots(self, items: Indices, positions: Indices) -> Indices:
        text_ids, _, _ = self._captions(items, positions)
        return self.stream.num_slots(text_ids).numpy()

    def _captions(self, items: Indices, positions: Indices) -> tuple[Tensor, Indices, list[np.random.Generator]]:
        """Caption ids (B, T), some of them dropped, views (B,), and each sample's random numbers."""
        config = self.recipe.dalle
        rngs = [sample_rng(self.recipe.seed, self.stage, int(position)) for position in positions]
        views = np.array([rng.integers(self.cache.num_views) for rng in rngs], dtype=np.int64)
        text = []
        is_dropped = torch.tensor([rng.random() < config.caption_dropout for rng in rngs]) & ~self._reads(positions)
        is_missing = torch.tensor([not self.data.captions[index] for index in self.data.train[items]])
        for index, rng in zip(self.data.train[items], rngs, strict=True):
            captions = self.data.captions[index]
            caption = pick_caption(captions, rng) if captions else None
            text.append(encode(self.tokenizer, caption, self.stream.text_length, self.recipe.text.bpe_dropout, rng))
            if caption is None:  # the null caption has to be learned in every number of slots
                text[-1][int(rng.integers(1, self.stream.text_length + 1)) :] = PAD
        text_ids = torch.stack(text)
        is_null = (is_dropped | is_missing)[:, None]
        return torch.where(is_null, self.stream.null_captions(text_ids), text_ids), views, rngs

    def _reads(self, positions: Indices) -> Tensor:
        """Which samples (B,) are read instead of drawn: evenly spread, every n-th where the share is 1 / n."""
        share = self.recipe.dalle.reading_share
        if share == 0:
            return torch.zeros(len(positions), dtype=torch.bool)
        due = positions * share + _ROUNDING
        return torch.from_numpy(np.floor(due) > np.floor(due - share))

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """Caption ids (B, T), image ids (B, N) to predict and to read, views (B,), and which captions are read.

        With an image_prefix also embeddings (B, E), zeros where dropped, independently of the caption.
        """
        config = self.recipe.dalle
        text_ids, views, rngs = self._captions(items, positions)
        ids = self.cache.ids(self.data.train[items], views)
        inputs = ids.clone()
        for row, rng in enumerate(rngs if config.token_corruption else []):
            replaced = torch.from_numpy(rng.random(ids.shape[1]) < config.token_corruption)
            random_ids = torch.from_numpy(rng.integers(self.stream.image_vocab, size=ids.shape[1]))
            inputs[row] = torch.where(replaced, random_ids, inputs[row])
        reads = self._reads(positions)
        batch = {"text": text_ids, "ids": ids, "inputs": inputs, "view": torch.from_numpy(views), "reads": reads}
        if self.embeddings is not None:
            is_dropped = torch.tensor([rng.random() < config.embedding_dropout for rng in rngs])
            vectors = self.embeddings.vectors(self.data.train[items], views)
            batch["embedding"] = vectors.masked_fill(is_dropped[:, None], 0.0)
        return batch

    def counts(self, batch: Batch) -> Tensor:
        """Text tokens to predict (no padding, no null captions) and image tokens: (2, 2), of the drawn and the read."""
        is_target = (batch["text"][:, 1:] != PAD) & (batch["text"][:, :1] != NULL)
        parts = (~batch["reads"], batch["reads"])
        counts = [(int(is_target[rows].sum()), int(rows.sum()) * batch["ids"].shape[1]) for rows in parts]
        return torch.tensor(counts, dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """text_loss_weight × mean over text tokens + the rest × mean over image tokens, both of the global batch.

        With a reading_share, once reading_after of the run is over, that share of the loss is the mean over tokens of
        captions read from their pictures; until then those pictures are drawn as the others are. With look_ahead, the
        mean over image tokens has look_ahead_weight times that of each cell further on beside it. With soft_targets a
        share of the image tokens' mean is that of spread targets, as long as `soft_share` says so.
        """
        dalle, config = cast(DALLE, model), self.recipe.dalle
        is_reading = config.reading_share > 0 and context.progress >= config.reading_after
        share, weight = config.reading_share if is_reading else 0.0, config.text_loss_weight
        view = batch["view"] if dalle.num_views > 1 else None
        text = context.host["text"]
        reads = context.host["reads"] & is_reading if config.reading_share else None
        drawn, read = context.counts.float()  # (2,) each: text and image tokens
        num_text, num_image = (drawn if is_reading else drawn + read).clamp(min=1)
        num_read = read[0].clamp(min=1)
        soft = soft_share(config.soft_targets, context.progress)
        likeness = self._likeness_on(batch["ids"].device) if soft else None
        losses = dalle.loss(text, batch["ids"], view, batch["inputs"], reads, batch.get("embedding"), likeness)
        loss = (1 - share) * losses.total(weight, num_text, num_image)
        parts = {"image_nll": losses.image_nll_sum / num_image, "text_nll": losses.text_nll_sum / num_text}
        if dalle.look_ahead is not None:
            parts["ahead_nll"] = losses.ahead_nll_sum / num_image
            loss = loss + (1 - share) * (1 - weight) * config.look_ahead_weight * parts["ahead_nll"]
        if soft:
            parts["soft_nll"] = losses.soft_nll_sum / num_image
            loss = loss + (1 - share) * (1 - weight) * soft * (parts["soft_nll"] - parts["image_nll"])
        if is_reading:
            parts["read_nll"] = losses.read_nll_sum / num_read
            loss = loss + share * parts["read_nll"]
        return loss, parts

    def _likeness_on(self, device: torch.device) -> Tensor | None:
        if self.likeness is not None:
            self.likeness = self.likeness.to(device)
        return self.likeness

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Image NLL beside that of training pictures, the unigram floor and ln V, caption gain; draws a sheet."""
        dalle = cast(DALLE, model)
        parts = (self.tokenizer, self.cache, context, self.embeddings)
        metrics = evaluation.likelihood(dalle, self.data, self.held_out, *parts)
        if len(self.trained_on):
            metrics["image_nll_trained_on"] = evaluation.image_nll(dalle, self.data, self.trained_on, *parts)
        metrics |= {"image_nll_unigram": self.floor, "image_nll_uniform": math.log(self.stream.image_vocab)}
        evaluation.draw_samples(
            dalle, self.vae, self.data, self.held_out, self.tokenizer, self.recipe, context, self.embeddings, self.stage
        )
        return metrics

    def describe(self, metrics: dict[str, float]) -> str:
        """Bits per image token beside those of the unigram floor and of knowing nothing."""
        bits = [value / math.log(2) for value in (metrics["image_nll"], self.floor, math.log(self.stream.image_vocab))]
        text = f"text {metrics['text_nll']:.2f} nats"
        return (
            f"loss {metrics['loss']:.3f}, {bits[0]:.2f} bits/token (floor {bits[1]:.2f}, uniform {bits[2]:.2f}), {text}"
        )
