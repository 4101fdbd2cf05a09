"""The stage `distill`: a trained DALL·E learns to draw in one pass what guidance draws in two (arXiv 2210.03142)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE, nll_sum
from dalle_mini_impl.filters import guidance_scales, guide
from dalle_mini_impl.stream import NULL, PAD
from dalle_mini_impl.training import evaluation
from dalle_mini_impl.training.batches import Batch, Indices, rows_where
from dalle_mini_impl.training.task import EvaluationContext, StepContext
from dalle_mini_impl.training.tasks.dalle import DALLETask


def unguided(recipe: Recipe) -> Recipe:
    """A recipe that draws without guidance, as a distilled DALL·E has to."""
    return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"guidance": 1.0})})


class DistillTask(DALLETask):
    """DALL·E's own batches, on which it learns what it would say under guidance.

    before: the DALL·E that training starts from; it stays as it is and teaches: its guided logits of every picture
    token, at the recipe's sampling.guidance. What it says without a caption, of captions and in reading stays.
    """

    stage: Stage = "distill"
    score = "-guidance_kl"

    def __init__(self, before: DALLE, *parts: Any, **more: Any) -> None:
        super().__init__(copy.deepcopy(before), *parts, **more)
        scales = guidance_scales(self.recipe.sampling, self.stream.num_image_tokens)
        if all(scale == 1 for scale in scales):
            raise ValueError(
                "sampling.guidance is 1, so that there is nothing to distill: set it above 1, for example to 3"
            )
        self.before = before.eval().requires_grad_(False)
        self.scales = torch.tensor(scales)
        self.recipe = unguided(self.recipe)
        self._kl_before: float | None = None

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """As DALL·E's own, with the divergence from what guidance says in place of the picture tokens' likelihood."""
        dalle, config = cast(DALLE, model), self.recipe.dalle
        (num_text, num_image), (num_read, _) = context.counts.float().clamp(min=1)
        text, reads = context.host["text"], context.host["reads"]
        drawn, read_rows = (rows_where(chosen, batch["ids"].device) for chosen in (~reads, reads))
        of_drawn = {name: value[drawn] for name, value in batch.items()}
        text_sum, kl_sum = self._divergence(dalle, of_drawn | {"text": text[~reads]})
        parts = {"guidance_kl": kl_sum / num_image, "text_nll": text_sum / num_text}
        weight = config.text_loss_weight
        loss = (1 - config.reading_share) * (weight * parts["text_nll"] + (1 - weight) * parts["guidance_kl"])
        if config.reading_share:
            read = dalle.loss(text[reads], batch["ids"][read_rows], reads=reads[reads]) if len(read_rows) else None
            parts["read_nll"] = torch.zeros_like(num_read) if read is None else read.read_nll_sum / num_read
            assert dalle.reading is not None
            nothing = 0 * dalle.reading.weight.sum()  # DDP waits for its gradient, also where no row is read
            loss = loss + config.reading_share * parts["read_nll"] + nothing
        return loss, parts

    def _divergence(self, dalle: DALLE, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed nats: the captions' negative log-likelihood, and KL(guided | own) of the picture tokens.

        batch: on the device but for its text, which may be on the host.
        """
        device = batch["ids"].device
        scales = self.scales.to(device, non_blocking=True)
        text_sum = kl_sum = torch.zeros((), device=device)
        for rows, text in self.stream.groups(batch["text"]):
            rows, text = (values.to(device, non_blocking=True) for values in (rows, text))
            ids = batch["inputs"][rows]
            view = batch["view"][rows] if dalle.num_views > 1 else None
            embedding = batch["embedding"][rows] if "embedding" in batch else None
            with torch.no_grad():
                conditional = self.before(text, ids, view, embedding)[1].float()
                null = self.before(torch.full_like(text, NULL), ids, view)[1].float()
            target = guide(conditional, null, scales).log_softmax(dim=-1)
            text_logits, image_logits = dalle(text, ids, view, embedding)
            own = image_logits.float().log_softmax(dim=-1)
            kl_sum = kl_sum + F.kl_div(own, target, reduction="sum", log_target=True)
            text_sum = text_sum + nll_sum(text_logits, dalle.text_targets(text), ignore=PAD)
        return text_sum, kl_sum

    def evaluate(self, model: nn.Module, context: EvaluationContext) -> dict[str, float]:
        """DALL·E's own metrics, and the divergence from guidance, nats a token, beside that before training."""
        if self._kl_before is None:
            self._kl_before = self._mean_divergence(self.before, context)
        divergence = self._mean_divergence(cast(DALLE, model), context)
        own = super().evaluate(model, context)
        return own | {"guidance_kl": divergence, "guidance_kl_before": self._kl_before}

    def _mean_divergence(self, dalle: DALLE, context: EvaluationContext) -> float:
        """Nats a picture token over held-out pictures, the same on every process."""
        parts = (self.tokenizer, self.cache, context, self.embeddings)

        def measure(chunk: Indices) -> Tensor:
            text, ids, embedding = evaluation.streams(dalle, self.data, chunk, *parts)
            view = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            batch = {"text": text, "inputs": ids, "ids": ids, "view": view}
            if embedding is not None:
                batch["embedding"] = embedding
            with context.autocast():
                divergence = self._divergence(dalle, batch)[1]
            return torch.stack([divergence.double(), divergence.new_tensor(ids.numel(), dtype=torch.float64)])

        total, count = evaluation.total(measure, self.held_out, context, 2).tolist()
        return float(total / count)

    def describe(self, metrics: dict[str, float]) -> str:
        """The divergence from guidance."""
        return f"{metrics['guidance_kl']:.4f} nats a token from guidance, text {metrics['text_nll']:.2f} nats"
