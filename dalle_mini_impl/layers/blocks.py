"""The pre-norm transformer block, shared by DALL·E and CLIP's towers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.layers.attention import Attention, KVCache
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.shift import TokenShift


class SquaredReLU(torch.autograd.Function):
    """relu(x)², with a backward pass of two products instead of autograd's four passes over the widest tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Same shape and type out as in."""
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """2 relu(x) × gradient."""
        (positive,) = ctx.saved_tensors
        gradient: Tensor = (grads[0] * positive).mul_(2)
        return gradient


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)²."""
    out: Tensor = SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return out


class FeedForward(nn.Module):
    """relu2: W₂ relu(W₁ x)² (Primer, arXiv 2109.08668); swiglu: W₂ (silu(W_g x) · W₁ x) (arXiv 2002.05202); gelu:
    W₂ gelu(W₁ x), DALL·E 1's."""

    def __init__(self, dim: int, kind: Literal["relu2", "swiglu", "gelu"], multiple: float) -> None:
        super().__init__()
        hidden = max(8, int(dim * multiple / 8 + 0.5) * 8)
        self.kind = kind
        self.up = nn.Linear(dim, hidden * (2 if kind == "swiglu" else 1), bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) to (B, L, dim)."""
        hidden = self.up(x)
        if self.kind == "swiglu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        elif self.kind == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = squared_relu(hidden)
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), both behind a token shift where there is one."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool,
        ffn: Literal["relu2", "swiglu", "gelu"] = "relu2",
        ffn_multiple: float = 4.0,
        dropout: float = 0.0,
        token_shift: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = Norm(dim)
        self.attention = Attention(dim, heads, causal=causal, dropout=dropout)
        self.ffn_norm = Norm(dim)
        self.ffn = FeedForward(dim, ffn, ffn_multiple)
        self.attention_shift = TokenShift(dim) if token_shift else None
        self.ffn_shift = TokenShift(dim) if token_shift else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, L, dim) to (B, L, dim); arguments as in Attention."""
        h = self.attention_norm(x)
        if self.attention_shift is not None:
            h = self.attention_shift(h, cache and cache.shift(layer, 0, h))
        x = x + self.dropout(self.attention(h, rope, mask, cache, layer))
        h = self.ffn_norm(x)
        if self.ffn_shift is not None:
            h = self.ffn_shift(h, cache and cache.shift(layer, 1, h))
        out: Tensor = x + self.dropout(self.ffn(h))
        return out
