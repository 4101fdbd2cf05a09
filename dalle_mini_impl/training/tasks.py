"""The three stages as tasks of the loop: how each makes its batches, its loss and its evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.embedding_cache import EmbeddingCache
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache, images_from_pixels, unigram_nll
from dalle_mini_impl.stream import NULL, PAD, Stream
from dalle_mini_impl.text import TextTokenizer, normalize_caption
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, BatchOrder, Indices, LengthBatches, derive_seed, sample_rng
from dalle_mini_impl.training.hard_negatives import CaptionChanger
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.vae.model import DiscreteVAE

logger = logging.getLogger("dalle_mini_impl.training")


class _Task:
    """What the tasks have in common."""

    unit = "pictures"
    units_per_item = 1
    unlike_steps = 0
    data: PreparedData

    def names(self, items: Indices) -> list[str]:
        """Those of the training split."""
        return [self.data.names[index] for index in self.data.train[items]]

    def positions(self, order: BatchOrder, step: int, rank: int, world_size: int) -> Indices:
        """In the order's own order."""
        return order.positions(step, rank, world_size)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], counts: Tensor) -> list[Batch]:
        """Nothing has to be known ahead."""
        return micro_batches

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """Gradients taught it all."""

    def state_dict(self) -> dict[str, Any]:
        """The model has it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take over."""


class VAETask(_Task):
    """Pictures, mirrored or not, through the discrete VAE and back."""

    stage: Stage = "vae"
    score = "psnr"

    def __init__(self, model: DiscreteVAE, data: PreparedData, recipe: Recipe) -> None:
        self.model: nn.Module = model
        self.data = data
        self.seed = recipe.seed
        self.num_items = len(data.train)
        self.held_out = evaluation.held_out(data)

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """{"pixels": (B, S, S, 3) uint8}."""
        pixels = self.data.pictures[self.data.train[items]]
        for row, position in enumerate(positions):
            if sample_rng(self.seed, self.stage, int(position)).random() < 0.5:
                pixels[row] = pixels[row, :, ::-1].copy()
        return {"pixels": torch.from_numpy(pixels)}

    def counts(self, batch: Batch) -> Tensor:
        """Pictures."""
        return torch.tensor([len(batch["pixels"])], dtype=torch.float64)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], counts: Tensor) -> list[Batch]:
        """Where the batch is cut up in time, a first pass of the encoder measures how all of it uses the codes."""
        cut_up = micro_batches if len(micro_batches) > 1 else []
        cast(DiscreteVAE, model).before_step(images_from_pixels(batch["pixels"]) for batch in cut_up)
        return micro_batches

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The VAE's own loss, weighted by this micro-batch's share of the pictures."""
        vae = cast(DiscreteVAE, model)
        images = images_from_pixels(batch["pixels"])
        share = (len(images) / context.counts[0]).float()
        loss, terms = vae.loss(images, context.progress, context.generator)
        return loss * share, {name: term * share for name, term in terms.items()}

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """Moves the codebook of vq by what the whole step's encoder outputs were."""
        cast(DiscreteVAE, model).after_step(generator)

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Hard-reconstruction PSNR and SSIM, use of the codebook; writes originals beside reconstructions."""
        return evaluation.reconstruct(cast(DiscreteVAE, model), self.data, self.held_out, context)

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss and its terms."""
        known = {"loss", "grad_norm"}
        terms = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in known)
        return f"loss {metrics['loss']:.4f} ({terms})"


class CLIPTask(_Task):
    """Pairs of pictures and captions; some pictures as the VAE gives them back."""

    stage: Stage = "clip"
    score = "-loss"

    def __init__(
        self,
        model: CLIP,
        data: PreparedData,
        recipe: Recipe,
        tokenizer: TextTokenizer,
        accelerator: Accelerator,
        decoder: tuple[DiscreteVAE, TokenCache] | None,
    ) -> None:
        self.model: nn.Module = model
        self.accelerator = accelerator
        self.data, self.seed, self.tokenizer = data, recipe.seed, tokenizer
        self.bpe_dropout = recipe.text.bpe_dropout
        self.text_length = model.text_length
        self.captioned = captioned(data, data.train)
        self.num_negatives = recipe.clip.hard_negatives
        self.changer = CaptionChanger(c for i in self.captioned for c in data.captions[i])
        if len(self.captioned) < 2:
            raise ValueError(f"clip needs at least 2 captioned training pictures; the data has {len(self.captioned)}")
        self.num_items = len(self.captioned)
        self.decoder = decoder
        self.reconstructed_share = recipe.clip.reconstructed_share if decoder is not None else 0.0
        self.max_shift = recipe.data.image_size // 32
        self.held_out = captioned(data, evaluation.held_out(data))
        if not len(self.held_out):
            logger.warning("no held-out picture has a caption: clip is evaluated on training pictures")
            self.held_out = self.captioned[: evaluation.MAX_HELD_OUT]

    def names(self, items: Indices) -> list[str]:
        """Those that have a caption."""
        return [self.data.names[index] for index in self.captioned[items]]

    def batch(self, items: Indices, positions: Indices) -> Batch:
        """Pixels (B, S, S, 3), image ids (B, N) and whether to decode them, caption ids (B, T), caption keys (B,)."""
        indices = self.captioned[items]
        rngs = [sample_rng(self.seed, self.stage, int(position)) for position in positions]
        captions = [pick_caption(self.data.captions[index], rng) for index, rng in zip(indices, rngs, strict=True)]
        text = [
            encode(self.tokenizer, caption, self.text_length, self.bpe_dropout, rng)
            for caption, rng in zip(captions, rngs, strict=True)
        ]
        batch = {
            "pixels": torch.from_numpy(self.data.pictures[indices]),
            "text": torch.stack(text),
            "keys": torch.tensor([caption_key(caption) for caption in captions]),
            "shift": torch.tensor([rng.integers(-self.max_shift, self.max_shift + 1, 2).tolist() for rng in rngs]),
            "decoded": torch.tensor([rng.random() < self.reconstructed_share for rng in rngs]),
        }
        if self.decoder is not None:
            batch["ids"] = self.decoder[1].ids(indices)
        if self.num_negatives:
            changed = [
                [self.changer.changed(caption, rng) for _ in range(self.num_negatives)]
                for caption, rng in zip(captions, rngs, strict=True)
            ]
            batch["negatives"] = torch.stack(
                [
                    torch.stack([encode(self.tokenizer, c, self.text_length, self.bpe_dropout, rng) for c in row])
                    for row, rng in zip(changed, rngs, strict=True)
                ]
            )  # (B, K, T)
            batch["negative_keys"] = torch.tensor([[caption_key(c) for c in row] for row in changed])
        return batch

    def counts(self, batch: Batch) -> Tensor:
        """Pairs."""
        return torch.tensor([len(batch["pixels"])], dtype=torch.float64)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], counts: Tensor) -> list[Batch]:
        """Where the batch is cut up: the loss's gradient at every vector of the global batch (GradCache, 2101.06983).

        The loss compares every picture with every caption, so its parts can't be computed apart. A first pass without
        gradient collects all vectors; `loss` then only carries the gradient at its own rows on into the model.
        """
        world = self.accelerator.num_processes
        if len(micro_batches) == 1 and world == 1:
            return micro_batches
        clip = cast(CLIP, model)
        with torch.no_grad():
            vectors = [self._vectors(clip, batch) for batch in micro_batches]
        sizes = [len(batch["keys"]) for batch in micro_batches]
        own = [torch.cat([pair[side] for pair in vectors]) for side in (0, 1)]
        own.append(torch.cat([_with_negatives(batch, "keys", "negative_keys") for batch in micro_batches]))
        images, texts, keys = (self.accelerator.gather(part) if world > 1 else part for part in own)
        inputs = [images.requires_grad_(), texts.requires_grad_(), *_scale(clip)]
        flat_texts, flat_keys = _own_first(texts), _own_first(keys)
        with torch.autocast(images.device.type, enabled=False):
            loss = clip.contrast(images, flat_texts, keys[:, 0], flat_keys)
        image_grad, text_grad, *self._scale_grads = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            found = (flat_keys[(images @ flat_texts.t()).argmax(dim=1)] == keys[:, 0]).float().mean()
        self._global = {"loss": loss.detach(), "batch_recall": found, "logit_scale": clip.logit_scale.detach().exp()[0]}
        start = self.accelerator.process_index * sum(sizes)
        rows = slice(start, start + sum(sizes))
        grads = zip(torch.split(image_grad[rows], sizes), torch.split(text_grad[rows], sizes), strict=True)
        return [b | {"image_grad": i, "text_grad": t} for b, (i, t) in zip(micro_batches, grads, strict=True)]

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the batch, or this micro-batch's part of its gradient."""
        clip = cast(CLIP, model)
        if "image_grad" not in batch:
            keys = _own_first(_with_negatives(batch, "keys", "negative_keys"))
            ids = _own_first(_with_negatives(batch, "text", "negatives"))
            count = len(batch["keys"])
            return clip.loss(self._images(batch), ids[:count], keys[:count], ids[count:], keys[count:])
        image_vectors, text_vectors = self._vectors(clip, batch)
        share = (len(batch["keys"]) / context.counts[0]).float()
        surrogate = (image_vectors * batch["image_grad"]).sum() + (text_vectors * batch["text_grad"]).sum()
        for parameter, grad in zip(_scale(clip), self._scale_grads, strict=True):
            surrogate = surrogate + share * (parameter * grad).sum()
        return surrogate, {name: value * share for name, value in self._global.items()}

    def _vectors(self, clip: CLIP, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of the pictures (B, E) and of each one's caption and hard negatives (B, 1 + K, E)."""
        ids = _with_negatives(batch, "text", "negatives")  # (B, 1 + K, T)
        image_vectors, text_vectors = clip(self._images(batch), ids.flatten(0, 1))
        return image_vectors, text_vectors.unflatten(0, ids.shape[:2])

    def _images(self, batch: Batch) -> Tensor:
        """Pictures (B, 3, S, S), some decoded from their ids, moved by up to max_shift pixels."""
        images = images_from_pixels(batch["pixels"])
        if self.decoder is not None and bool(batch["decoded"].any()):
            with torch.no_grad():
                images[batch["decoded"]] = self.decoder[0].decode(batch["ids"][batch["decoded"]])
        return shift_images(images, batch["shift"], self.max_shift)

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Loss beside ln B, recall@1 and @5 in both directions beside chance."""
        return evaluation.retrieve(
            cast(CLIP, model), self.data, self.held_out, self.tokenizer, context, vae=self.decoder and self.decoder[0]
        )

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss beside chance."""
        return f"loss {metrics['loss']:.3f}, finds its caption {metrics['batch_recall']:.0%}"


class DALLETask(_Task):
    """Captions and the ids of their pictures."""

    stage: Stage = "dalle"
    score = "-image_nll"
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
        self._sorted: LengthBatches | None = None
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
        for index, rng in zip(self.data.train[items], rngs, strict=True):
            captions = self.data.captions[index]
            caption = pick_caption(captions, rng) if captions else None
            text.append(encode(self.tokenizer, caption, self.stream.text_length, self.recipe.text.bpe_dropout, rng))
            if caption is None:  # the null caption has to be learned in every number of slots
                text[-1][int(rng.integers(1, self.stream.text_length + 1)) :] = PAD
        text_ids = torch.stack(text)
        return torch.where(is_dropped[:, None], self.stream.null_captions(text_ids), text_ids), views, rngs

    def _reads(self, positions: Indices) -> Tensor:
        """Which samples (B,) are read instead of drawn: every n-th."""
        share = self.recipe.dalle.reading_share
        if share == 0:
            return torch.zeros(len(positions), dtype=torch.bool)
        return torch.from_numpy(positions % round(1 / share) == 0)

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
        """Text tokens that are predicted (no padding, no null captions), image tokens, text tokens that are read."""
        is_target = (batch["text"][:, 1:] != PAD) & (batch["text"][:, :1] != NULL)
        reads = batch["reads"]
        drawn = (~reads).sum() * batch["ids"].shape[1]
        counts = (is_target[~reads].sum(), drawn, is_target[reads].sum())
        return torch.tensor([int(count) for count in counts], dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """text_loss_weight × mean over text tokens + the rest × mean over image tokens, both of the global batch.

        With a reading_share, that share of the loss is the mean over tokens of captions read from their pictures.
        """
        dalle = cast(DALLE, model)
        num_text, num_image, num_read = context.counts.float().clamp(min=1)
        weight = self.recipe.dalle.text_loss_weight
        view = batch["view"] if dalle.num_views > 1 else None
        share = self.recipe.dalle.reading_share
        reads = batch["reads"] if share else None
        losses = dalle.loss(batch["text"], batch["ids"], view, batch["inputs"], reads, batch.get("embedding"))
        loss = (1 - share) * losses.total(weight, num_text, num_image)
        parts = {"image_nll": losses.image_nll_sum / num_image, "text_nll": losses.text_nll_sum / num_text}
        if share:
            parts["read_nll"] = losses.read_nll_sum / num_read
            loss = loss + share * parts["read_nll"]
        return loss, parts

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Image NLL beside ln V and the unigram floor, caption gain; draws a sheet of samples."""
        dalle = cast(DALLE, model)
        metrics = evaluation.likelihood(
            dalle, self.data, self.held_out, self.tokenizer, self.cache, context, self.embeddings
        )
        metrics |= {"image_nll_unigram": self.floor, "image_nll_uniform": math.log(self.stream.image_vocab)}
        evaluation.draw_samples(
            dalle, self.vae, self.data, self.held_out, self.tokenizer, self.recipe, context, self.embeddings
        )
        return metrics

    def describe(self, metrics: dict[str, float]) -> str:
        """Bits per image token beside those of the unigram floor and of knowing nothing."""
        bits = [value / math.log(2) for value in (metrics["image_nll"], self.floor, math.log(self.stream.image_vocab))]
        text = f"text {metrics['text_nll']:.2f} nats"
        return (
            f"loss {metrics['loss']:.3f}, {bits[0]:.2f} bits/token (floor {bits[1]:.2f}, uniform {bits[2]:.2f}), {text}"
        )


def captioned(data: PreparedData, indices: Indices) -> Indices:
    """Those of the pictures that have a caption."""
    return np.array([index for index in indices if data.captions[index]], dtype=np.int64)


def _scale(clip: CLIP) -> list[nn.Parameter]:
    """What the loss depends on besides the vectors."""
    return [p for p in (clip.logit_scale, clip.logit_bias) if p is not None]


def _with_negatives(batch: Batch, own: str, negatives: str) -> Tensor:
    """A batch's own rows (B, …) and what it has of hard negatives (B, K, …), as (B, 1 + K, …)."""
    first = batch[own][:, None]
    return torch.cat([first, batch[negatives]], dim=1) if negatives in batch else first


def _own_first(rows: Tensor) -> Tensor:
    """(B, 1 + K, …) as (B × (1 + K), …), with the own rows of all samples before all negatives."""
    return torch.cat([rows[:, 0], rows[:, 1:].flatten(0, 1)])


def pick_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """One of a picture's captions at random."""
    return captions[int(rng.integers(len(captions)))]


def caption_key(caption: str) -> int:
    """Equal for captions that read the same."""
    return derive_seed(normalize_caption(caption))


def encode(
    tokenizer: TextTokenizer, caption: str | None, text_length: int, dropout: float, rng: np.random.Generator
) -> Tensor:
    """Ids (T,) int64 of one caption, segmented with its own random numbers."""
    return tokenizer.batch([caption], text_length, dropout=dropout, rng=rng)[0][0]


def shift_images(images: Tensor, shift: Tensor, limit: int) -> Tensor:
    """Moves each picture (B, 3, S, S) by its (down, right) pixels in shift (B, 2); borders are repeated."""
    if limit == 0:
        return images
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    rows = (place - shift[:, :1]).clamp(0, size - 1)[:, None, :, None]  # (B, 1, S, 1)
    columns = (place - shift[:, 1:]).clamp(0, size - 1)[:, None, None, :]  # (B, 1, 1, S)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(3, device=images.device)[:, None, None]
    return images[batch, channel, rows, columns]
