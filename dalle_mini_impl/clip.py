"""CLIP: pictures and captions in one space (arXiv 2103.00020), trained with InfoNCE or SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.config import CLIPConfig
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.recompute import recomputed
from dalle_mini_impl.stream import PAD

MAX_LOGIT_SCALE = math.log(100.0)


class ImageTower(nn.Module):
    """A convolutional stem to a grid of about 8×8 vectors, then a transformer over it, then their mean."""

    def __init__(self, config: CLIPConfig, image_size: int) -> None:
        super().__init__()
        self.fold = 4 if image_size % 8 == 0 else 1
        side = image_size // self.fold
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(self.fold),
            nn.Conv2d(3 * self.fold**2, config.stem_width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.stem_width, config.stem_width, 3, padding=1),
        ]
        width = config.stem_width
        while side > 8:
            layers += [nn.ReLU(), nn.Conv2d(width, config.width, 3, stride=2, padding=1)]
            width, side = config.width, (side + 1) // 2
        layers += [nn.ReLU(), nn.Conv2d(width, config.width, 1)]
        self.stem = nn.Sequential(*layers)
        self.last_of_stem = sum(isinstance(layer, nn.ReLU) for layer in layers) - 1
        """Where the stem's last vectors stand in `features`."""
        self.position = nn.Parameter(torch.randn(side * side, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, causal=False) for _ in range(config.image_layers))
        self.norm = Norm(config.width)
        self.project = nn.Linear(config.width, config.embed_dim, bias=False)
        self.recomputes = False

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to vectors (B, E)."""
        out: Tensor = self.project(self.norm(self.features(images)[-1]).mean(dim=1))
        return out

    def features(self, images: Tensor) -> list[Tensor]:
        """What the layers make of pictures (B, 3, S, S) in [0, 1]: the stem's after each ReLU, then each block's.

        Each is (B, L, C), with L places of C channels.
        """
        x = ((images - 0.5) * 2).contiguous(memory_format=torch.channels_last)
        found = []
        for layer in self.stem:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x.flatten(2).transpose(1, 2))
        x = x.flatten(2).transpose(1, 2) + self.position  # (B, L, width)
        run = recomputed(Block.__call__, self.recomputes)
        for block in self.blocks:
            x = run(block, x)
            found.append(x)
        return found


class TextTower(nn.Module):
    """A bidirectional transformer over the caption's tokens, then their mean; padding is never seen."""

    def __init__(self, config: CLIPConfig, text_length: int, text_vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(text_vocab, config.width)
        self.position = nn.Parameter(torch.randn(text_length, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, causal=False, token_shift=config.token_shift)
            for _ in range(config.text_layers)
        )
        self.norm = Norm(config.width)
        self.project = nn.Linear(config.width, config.embed_dim, bias=False)
        self.recomputes = False
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text_ids: Tensor) -> Tensor:
        """Caption ids (B, T) to vectors (B, E)."""
        real = text_ids != PAD  # (B, T)
        x = self.embedding(text_ids) + self.position
        run = recomputed(Block.__call__, self.recomputes)
        for block in self.blocks:
            x = run(block, x, mask=real[:, None, None, :])
        x = self.norm(x) * real[:, :, None]
        out: Tensor = self.project(x.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1))
        return out


class CLIP(nn.Module):
    """Two towers that put a picture and its caption in the same direction."""

    def __init__(self, config: CLIPConfig, image_size: int, text_length: int, text_vocab: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.text_length = text_length
        self.image_tower = ImageTower(config, image_size)
        self.text_tower = TextTower(config, text_length, text_vocab)
        siglip = config.loss == "siglip"
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0 if siglip else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0)) if siglip else None

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Kernels of the stem and weights of both transformers' linear layers, which Muon may train."""
        kernels = [p for p in self.image_tower.stem.parameters() if p.ndim == 4]
        towers = (self.image_tower.blocks, self.text_tower.blocks)
        return [*kernels, *(p for tower in towers for p in tower.parameters() if p.ndim == 2)]

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of both towers' blocks again from now on, instead of keeping it."""
        self.image_tower.recomputes = self.text_tower.recomputes = True

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to unit vectors (B, E), fp32."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, {size}, {size})")
        return F.normalize(self.image_tower(images).float(), dim=1)

    def encode_text(self, text_ids: Tensor) -> Tensor:
        """Caption ids (B, T) int64 to unit vectors (B, E), fp32."""
        if text_ids.ndim != 2 or text_ids.shape[1] != self.text_length:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}; expected (B, {self.text_length})")
        return F.normalize(self.text_tower(text_ids).float(), dim=1)

    def forward(self, images: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of B pictures (B, E) and of M captions (M, E)."""
        return self.encode_image(images), self.encode_text(text_ids)

    @property
    def scale(self) -> float:
        """What a cosine is multiplied by to be a log-likelihood, but for a constant."""
        return float(self._scale().detach())

    def _scale(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def contrast(self, image_vectors: Tensor, text_vectors: Tensor, image_keys: Tensor, text_keys: Tensor) -> Tensor:
        """The contrastive loss of unit vectors (B, E) and (M, E), M ≥ B, a 0-d mean.

        image_keys (B,) and text_keys (M,) int64: equal keys mark a positive pair, so that equal captions are never
        each other's negatives. Each picture needs a positive among the texts and each of the first B texts one among
        the pictures. Texts beyond those are hard negatives: pictures are compared with them, too, but not they with
        the pictures.
        """
        logits = self._scale() * image_vectors @ text_vectors.t()  # (B, M)
        positive = image_keys[:, None] == text_keys[None, :]
        if self.logit_bias is not None:
            signs = positive.to(logits.dtype) * 2 - 1
            return -F.logsigmoid(signs * (logits + self.logit_bias)).sum() / logits.shape[0]
        own = slice(len(image_keys))
        from_texts = _multi_positive_nll(logits[:, own].t(), positive[:, own].t())
        return 0.5 * (_multi_positive_nll(logits, positive) + from_texts)

    def loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        keys: Tensor,
        negative_ids: Tensor | None = None,
        negative_keys: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of B pairs and its metrics (0-d, detached): the share of pictures that find their caption.

        keys: (B,) int64, equal where captions are equal. negative_ids: (M, T) captions that are nobody's, with their
        negative_keys (M,).
        """
        if images.shape[0] != text_ids.shape[0]:
            raise ValueError(f"{images.shape[0]} pictures and {text_ids.shape[0]} captions are no pairs")
        if tuple(keys.shape) != (images.shape[0],):
            raise ValueError(f"keys have shape {tuple(keys.shape)}; expected ({images.shape[0]},)")
        all_ids, all_keys = text_ids, keys
        if negative_ids is not None and negative_keys is not None:
            all_ids, all_keys = torch.cat([text_ids, negative_ids]), torch.cat([keys, negative_keys])
        image_vectors, text_vectors = self(images, all_ids)
        loss = self.contrast(image_vectors, text_vectors, keys, all_keys)
        with torch.no_grad():
            found = (all_keys[(image_vectors @ text_vectors.t()).argmax(dim=1)] == keys).float().mean()
        return loss, {"batch_recall": found, "logit_scale": self.logit_scale.detach().exp()[0]}


def _multi_positive_nll(logits: Tensor, positive: Tensor) -> Tensor:
    """-log of the probability that a row's softmax puts on its positives, averaged over positives, then rows."""
    log_probs = logits.log_softmax(dim=1)
    weights = positive.to(logits.dtype)
    return -((log_probs * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).mean()
