"""CLIP: pictures and captions in one space (arXiv 2103.00020), trained with InfoNCE or SigLIP (arXiv 2303.15343).

With caption_layers it also reads captions word by word (CoCa, arXiv 2205.01917); both learn from the same features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_mini_impl.captioner import Captioner
from dalle_mini_impl.config import CLIPConfig
from dalle_mini_impl.layers.blocks import Block
from dalle_mini_impl.layers.norm import Norm
from dalle_mini_impl.layers.recompute import recomputed
from dalle_mini_impl.precision import full_product
from dalle_mini_impl.stream import PAD

MAX_LOGIT_SCALE = math.log(100.0)
SIGLIP_BIAS = -5.0
"""Where siglip's bias starts: about -ln of the negatives in batches of a hundred or some hundreds. The paper's -10 is
for 32,768; from so far off, a short training doesn't get to what its batches want."""


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

    def pool(self, places: Tensor) -> Tensor:
        """The last features (B, L, width) to vectors (B, E)."""
        out: Tensor = self.project(self.norm(places).mean(dim=1))
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
        """Caption ids (B, t) to vectors (B, E)."""
        real = text_ids != PAD  # (B, t)
        x = self.embedding(text_ids) + self.position[: text_ids.shape[1]]
        run = recomputed(Block.__call__, self.recomputes)
        for block in self.blocks:
            x = run(block, x, mask=real[:, None, None, :])
        x = self.norm(x) * real[:, :, None]
        out: Tensor = self.project(x.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1))
        return out


class CLIP(nn.Module):
    """Two towers that put a picture and its caption in the same direction, and a captioner where one is asked for."""

    def __init__(self, config: CLIPConfig, image_size: int, text_length: int, text_vocab: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.text_length = text_length
        self.image_tower = ImageTower(config, image_size)
        self.text_tower = TextTower(config, text_length, text_vocab)
        self.captioner = Captioner(config, text_length, text_vocab) if config.caption_layers else None
        siglip = config.loss == "siglip"
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0 if siglip else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), SIGLIP_BIAS)) if siglip else None

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Kernels of the stem and weights of the transformers' linear layers, which Muon may train."""
        kernels = [p for p in self.image_tower.stem.parameters() if p.ndim == 4]
        trunks = [self.image_tower.blocks, self.text_tower.blocks]
        if self.captioner is not None:
            trunks.append(self.captioner.blocks)
        return [*kernels, *(p for trunk in trunks for p in trunk.parameters() if p.ndim == 2)]

    def checkpoint_blocks(self) -> None:
        """Has gradients compute the inside of all blocks again from now on, instead of keeping it."""
        self.image_tower.recomputes = self.text_tower.recomputes = True
        if self.captioner is not None:
            self.captioner.recomputes = True

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] to unit vectors (B, E), fp32."""
        return self.pool(self.places(images))

    def places(self, images: Tensor) -> Tensor:
        """What the image tower makes of each place of pictures (B, 3, S, S) in [0, 1]: (B, L, width)."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, {size}, {size})")
        return self.image_tower.features(images)[-1]

    def pool(self, places: Tensor) -> Tensor:
        """Unit vectors (B, E), fp32, of pictures by their places (B, L, width)."""
        return F.normalize(self.image_tower.pool(places).float(), dim=1)

    def encode_text(self, text_ids: Tensor) -> Tensor:
        """Caption ids (B, t ≤ T) int64, padded, to unit vectors (B, E), fp32."""
        self._check_text(text_ids)
        return F.normalize(self.text_tower(text_ids).float(), dim=1)

    def _check_text(self, text_ids: Tensor) -> None:
        if text_ids.ndim != 2 or not 1 <= text_ids.shape[1] <= self.text_length:
            raise ValueError(
                f"text_ids have shape {tuple(text_ids.shape)}; expected (B, {self.text_length}), or fewer slots"
            )

    def forward(self, images: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of B pictures (B, E) and of M captions (M, E)."""
        return self.encode_image(images), self.encode_text(text_ids)

    def caption_log_likelihood(self, images: Tensor, text_ids: Tensor) -> Tensor:
        """log p(caption | picture) in nats, (B,) fp32, of pictures (B, 3, S, S) in [0, 1] and captions (B, T).

        Raises ValueError for a model without a captioner.
        """
        self._check_text(text_ids)
        return -self.caption_nll(self.places(images), text_ids).sum(dim=1)

    def score_pairs(self, images: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines with their captions (B,) and `caption_log_likelihood` (B,) of B pictures, which are looked at once.

        Raises ValueError for a model without a captioner.
        """
        captions, owner = torch.unique(text_ids, dim=0, return_inverse=True)  # candidates of a prompt share its caption
        places = self.places(images)
        cosines = (self.pool(places) * self.encode_text(captions)[owner]).sum(dim=1)
        return cosines, -self.caption_nll(places, text_ids).sum(dim=1)

    def caption_nll(self, places: Tensor, text_ids: Tensor) -> Tensor:
        """-log p of each token after the first of captions (B, T), given their pictures' `places`: (B, T - 1), nats."""
        return self._captioner().nll(places, text_ids)

    def write_captions(self, places: Tensor, temperature: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Captions (B, T) drawn for pictures by their `places`, and their log p(caption | picture), (B,).

        temperature, seed: see `Captioner.write`. Raises ValueError for a model without a captioner.
        """
        return self._captioner().write(places, temperature, seed)

    def _captioner(self) -> Captioner:
        if self.captioner is None:
            raise ValueError("this CLIP has no captioner: train it with clip.caption_layers above 0, for example 2")
        return self.captioner

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
        logits = self._scale() * full_product(image_vectors, text_vectors)  # (B, M), log-odds: bf16 is too coarse
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

        With a captioner, caption_weight × its nats a token are added; metrics then have both parts.
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
        places = self.places(images)
        image_vectors, text_vectors = self.pool(places), self.encode_text(all_ids)
        loss = self.contrast(image_vectors, text_vectors, keys, all_keys)
        with torch.no_grad():
            found = (all_keys[full_product(image_vectors, text_vectors).argmax(dim=1)] == keys).float().mean()
        metrics = {"batch_recall": found, "logit_scale": self.logit_scale.detach().exp()[0]}
        if self.captioner is not None:
            caption_nll = self.caption_nll(places, text_ids).sum() / (text_ids[:, 1:] != PAD).sum()
            metrics |= {"contrast": loss.detach(), "caption_nll": caption_nll.detach()}
            loss = loss + self.config.caption_weight * caption_nll
        return loss, metrics


def _multi_positive_nll(logits: Tensor, positive: Tensor) -> Tensor:
    """-log of the probability that a row's softmax puts on its positives, averaged over positives, then rows."""
    log_probs = logits.log_softmax(dim=1)
    weights = positive.to(logits.dtype)
    return -((log_probs * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).mean()
