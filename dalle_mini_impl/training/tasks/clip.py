"""Pictures and captions in one space, as a task of the loop."""

from __future__ import annotations

import logging
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.clip import CLIP, MAX_LOGIT_SCALE
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache, images_from_pixels
from dalle_mini_impl.data.views import shift_images
from dalle_mini_impl.precision import autocast_off, full_product
from dalle_mini_impl.stream import PAD
from dalle_mini_impl.text import TextTokenizer, normalize_caption
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, Indices, derive_seed, rows_where, sample_rng
from dalle_mini_impl.training.dtensors import local
from dalle_mini_impl.training.hard_negatives import CaptionChanger
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.base import BaseTask, captioned, check_captioned, encode, pick_caption
from dalle_mini_impl.vae.model import DiscreteVAE

logger = logging.getLogger("dalle_mini_impl.training")


class CLIPTask(BaseTask):
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
        changeable = self.captioned if self.num_negatives else ()
        self.changer = CaptionChanger(c for i in changeable for c in data.captions[i])
        check_captioned(self.stage, self.captioned)
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
        """Pixels (B, S, S, 3), image ids (B, N) and whether to decode them, caption ids (B, t), caption keys (B,)."""
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
        return _trimmed(batch)

    def counts(self, batch: Batch) -> Tensor:
        """Pairs, and tokens of their captions that are predicted where there is a captioner."""
        return torch.tensor([len(batch["pixels"]), int((batch["text"][:, 1:] != PAD).sum())], dtype=torch.float64)

    def before_step(self, model: nn.Module, micro_batches: list[Batch], contexts: list[StepContext]) -> list[Batch]:
        """Where the batch is cut up: the loss's gradient at every vector of the global batch (GradCache, 2101.06983).

        The loss compares every picture with every caption, so its parts can't be computed apart. A first pass without
        gradient collects all vectors; `loss` then only carries the gradient at its own rows on into the model.
        """
        world = self.accelerator.num_processes
        if len(micro_batches) == 1 and world == 1:
            return micro_batches
        clip = cast(CLIP, model)
        with torch.no_grad():
            vectors = [
                self._vectors(clip, batch, clip.places(self._images(batch, context.host)))
                for batch, context in zip(micro_batches, contexts, strict=True)
            ]
        sizes = [len(batch["keys"]) for batch in micro_batches]
        own = [torch.cat([pair[side] for pair in vectors]) for side in (0, 1)]
        own.append(torch.cat([_with_negatives(batch, "keys", "negative_keys") for batch in micro_batches]))
        images, texts, keys = (self.accelerator.gather(part) if world > 1 else part for part in own)
        inputs = [images.requires_grad_(), texts.requires_grad_(), *_scale(clip)]
        flat_texts, flat_keys = _own_first(texts), _own_first(keys)
        with autocast_off(images.device):
            loss = clip.contrast(images, flat_texts, keys[:, 0], flat_keys)
        image_grad, text_grad, *self._scale_grads = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            found = (flat_keys[full_product(images, flat_texts).argmax(dim=1)] == keys[:, 0]).float().mean()
        self._global = {"loss": loss.detach(), "batch_recall": found, "logit_scale": clip.logit_scale.detach().exp()[0]}
        start = self.accelerator.process_index * sum(sizes)
        rows = slice(start, start + sum(sizes))
        grads = zip(torch.split(image_grad[rows], sizes), torch.split(text_grad[rows], sizes), strict=True)
        return [b | {"image_grad": i, "text_grad": t} for b, (i, t) in zip(micro_batches, grads, strict=True)]

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the batch, or this micro-batch's part of its gradient; and a captioner's loss."""
        clip = cast(CLIP, model)
        if "image_grad" not in batch:
            keys = _own_first(_with_negatives(batch, "keys", "negative_keys"))
            ids = _own_first(_with_negatives(batch, "text", "negatives"))
            count = len(batch["keys"])
            return clip.loss(self._images(batch, context.host), ids[:count], keys[:count], ids[count:], keys[count:])
        places = clip.places(self._images(batch, context.host))
        image_vectors, text_vectors = self._vectors(clip, batch, places)
        share = (len(batch["keys"]) / context.counts[0]).float()
        surrogate = (image_vectors * batch["image_grad"]).sum() + (text_vectors * batch["text_grad"]).sum()
        for parameter, grad in zip(_scale(clip), self._scale_grads, strict=True):
            surrogate = surrogate + share * (parameter * grad).sum()
        metrics = {name: value * share for name, value in self._global.items()}
        if clip.captioner is not None:
            caption_nll = clip.caption_nll(places, batch["text"]).sum() / context.counts[1].float()
            weighted = clip.config.caption_weight * caption_nll
            surrogate = surrogate + weighted
            metrics |= {"contrast": metrics["loss"], "caption_nll": caption_nll.detach()}
            metrics["loss"] = metrics["loss"] + weighted.detach()
        return surrogate, metrics

    def _vectors(self, clip: CLIP, batch: Batch, places: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the pictures (B, E) and of each one's caption and hard negatives (B, 1 + K, E)."""
        ids = _with_negatives(batch, "text", "negatives")  # (B, 1 + K, T)
        text_vectors = clip.encode_text(ids.flatten(0, 1))
        return clip.pool(places), text_vectors.view(*ids.shape[:2], -1)

    def _images(self, batch: Batch, host: Batch) -> Tensor:
        """Pictures (B, 3, S, S), some decoded from their ids, moved by up to max_shift pixels."""
        images = images_from_pixels(batch["pixels"])
        rows = rows_where(host["decoded"], images.device)
        if self.decoder is not None and len(rows):
            with torch.no_grad():
                images[rows] = self.decoder[0].decode(batch["ids"][rows])
        return shift_images(images, batch["shift"], self.max_shift)

    def after_step(self, model: nn.Module, generator: torch.Generator) -> None:
        """Holds the scale at its limit: beyond it the loss has no gradient that would bring it back."""
        with torch.no_grad():
            local(cast(CLIP, model).logit_scale).clamp_(max=MAX_LOGIT_SCALE)

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """Loss beside ln B, recall@1 and @5 in both directions beside chance."""
        return evaluation.retrieve(
            cast(CLIP, model), self.data, self.held_out, self.tokenizer, context, vae=self.decoder and self.decoder[0]
        )

    def describe(self, metrics: dict[str, float]) -> str:
        """The loss beside chance."""
        read = f", caption {metrics['caption_nll']:.2f} nats a token" if "caption_nll" in metrics else ""
        return f"loss {metrics['loss']:.3f}, finds its caption {metrics['batch_recall']:.0%}{read}"


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


def _trimmed(batch: Batch) -> Batch:
    """A batch without the slots that none of its captions and hard negatives needs."""
    names = [name for name in ("text", "negatives") if name in batch]
    longest = max(int((batch[name] != PAD).sum(dim=-1).max()) for name in names)
    return batch | {name: batch[name][..., :longest] for name in names}


def caption_key(caption: str) -> int:
    """Equal for captions that read the same."""
    return derive_seed(normalize_caption(caption))
