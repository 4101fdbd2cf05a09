"""The prefix that conditions the transformer on a picture embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImagePrefix(nn.Module):
    """A picture embedding as tokens ahead of the caption, as in unCLIP's decoder (arXiv 2204.06125, section 2.1)."""

    def __init__(self, embed_dim: int, length: int, dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.project = nn.Linear(embed_dim, length * dim, bias=False)
        self.position = nn.Embedding(length, dim)
        self.null = nn.Embedding(length, dim)  # stands for an embedding that is not given
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, embedding: Tensor | None, batch: int) -> Tensor:
        """Unit vectors (B, E), zeros where there is none, or None for B times none, to (B, P, dim)."""
        if embedding is None:
            return self.null.weight.expand(batch, -1, -1)
        if tuple(embedding.shape) != (batch, self.embed_dim):
            raise ValueError(f"embedding has shape {tuple(embedding.shape)}; expected ({batch}, {self.embed_dim})")
        if self.training:
            projected = self.project(embedding)
        else:  # rounded from double: the last bits of a picture's own must not depend on how many are projected with it
            projected = F.linear(embedding.double(), self.project.weight.double()).float()
        tokens = projected.view(batch, *self.position.weight.shape) + self.position.weight
        return torch.where((embedding == 0).all(dim=1)[:, None, None], self.null.weight, tokens)
