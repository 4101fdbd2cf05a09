"""The captioner: a causal transformer that reads a caption off a picture, in the spirit of CoCa (arXiv 2205.01917).

It looks at what CLIP's image tower makes of each place, before that is averaged away, so it can tell which thing is red
and which one is on the left. log p(caption | picture) ranks pictures beside CLIP's cosine.

The places stand ahead of the words in one sequence. CoCa's decoder looks at them by cross-attention, which is a little
cheaper a step and learns more slowly: at equal time it reads worse (docs/experiments.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import CLIPConfig
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.recompute import recomputed
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.stream import BOS, EOS, NULL, PAD, UNK

_NO_WORDS = (PAD, BOS, UNK, NULL)
"""Special ids that no caption is written with."""


class Captioner(nn.Module):
    """Predicts each next token of a caption from those before it and the picture."""

    def __init__(self, config: CLIPConfig, text_length: int, text_vocab: int) -> None:
        super().__init__()
        self.text_length = text_length
        self.embedding = nn.Embedding(text_vocab, config.width)
        self.position = nn.Parameter(torch.randn(text_length, config.width) * 0.02)
        self.picture_norm = Norm(config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, causal=True, token_shift=config.token_shift)
            for _ in range(config.caption_layers)
        )
        self.norm = Norm(config.width)
        self.head = nn.Linear(config.width, text_vocab, bias=False)
        self.recomputes = False
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, places: Tensor, text_ids: Tensor) -> Tensor:
        """Logits (B, t, text_vocab) of the ids after each of the first t ids (B, t) of captions.

        places: (B, M, width), the image tower's last features.
        """
        words = self.embedding(text_ids) + self.position[: text_ids.shape[1]]
        x = torch.cat([self.picture_norm(places), words], dim=1)
        run = recomputed(Block.__call__, self.recomputes)
        for block in self.blocks:
            x = run(block, x)
        logits: Tensor = self.head(self.norm(x[:, places.shape[1] :]))
        return logits

    def nll(self, places: Tensor, text_ids: Tensor) -> Tensor:
        """-log p of each token of captions (B, T) but the first, in nats, (B, T - 1) fp32; 0 at padding."""
        logits = self(places, text_ids[:, :-1]).float()
        return F.cross_entropy(logits.transpose(1, 2), text_ids[:, 1:], ignore_index=PAD, reduction="none")

    @torch.no_grad()
    def write(self, places: Tensor, temperature: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws a caption for each picture, word by word: ids (B, T), padded, and log p(caption | picture) (B,) fp32.

        temperature: 0 always takes the likeliest word. seed: of the noise, which belongs to a row and a slot, so that
        row i is drawn alike in a batch of any size. No caption is empty, and one that has not ended with the last slot
        ends there. The likelihood is that at temperature 1.
        """
        batch, device = len(places), places.device
        ids = torch.full((batch, self.text_length), PAD, device=device)
        ids[:, 0] = BOS
        total, is_over = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
        rows = torch.arange(batch, device=device)
        keys = torch.full_like(rows, noise_key(seed, "", "caption"))
        for slot in range(1, self.text_length):
            log_probs = self(places, ids[:, :slot])[:, -1].float().log_softmax(dim=1)
            refused = [*_NO_WORDS, EOS] if slot == 1 and self.text_length > 2 else [*_NO_WORDS]
            words = log_probs.index_fill(1, torch.tensor(refused, device=device), -torch.inf)
            if temperature > 0:
                noise = gumbel_noise(keys, rows, torch.tensor([slot], device=device), words.shape[1])[:, 0]
                words = words / temperature + noise
            chosen = words.argmax(dim=1) if slot < self.text_length - 1 else torch.full_like(rows, EOS)
            total += torch.where(is_over, 0.0, log_probs.gather(1, chosen[:, None])[:, 0])
            ids[:, slot] = torch.where(is_over, PAD, chosen)
            is_over |= chosen == EOS
            if bool(is_over.all()):
                break
        return ids, total
