"""CLIPs and SigLIPs of others, by Hugging Face Hub id or folder, through `transformers`, behind our own interface.

clip = PretrainedCLIP.load("openai/clip-vit-base-patch32")
clip.encode_texts(["a red heart"]) @ clip.encode_pictures([picture]).t()
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from dalle_mini_impl.data.pictures import to_rgb
from dalle_mini_impl.embed import Pictures, joined, stacked
from dalle_mini_impl.out_of_memory import first_line, is_out_of_memory
from dalle_mini_impl.sheet import to_pil

FAMILIES = ("clip", "siglip")
_MODES = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic", 4: "area"}
"""How PIL's filters, by number, are called by `F.interpolate`, which has no Lanczos (1)."""


class PretrainedCLIP:
    """A model of the CLIP or SigLIP family as an `embed.Embedder`, with its own tokenizer and picture processor.

    Pictures as PIL images go through the processor (its PIL version); `encode_image` does the same to tensors, with a
    gradient. Parameters take no gradient.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any, label: str) -> None:
        """model, tokenizer, processor: of `transformers`. label: what to call it."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.processor, self.label = tokenizer, processor, label

    @classmethod
    def load(cls, name: str | Path, device: torch.device | str | None = None) -> Self:
        """Loads a folder or a Hub id, fp32.

        Raises ValueError where `transformers` isn't installed, there is no such model, or it is of another family.
        """
        try:
            transformers: Any = import_module("transformers")
        except ImportError:
            raise ValueError(
                f"a pretrained CLIP ({name}) is run by transformers: pip install 'dalle-mini-impl[clip]'"
            ) from None
        label = Path(name).resolve().name if Path(name).is_dir() else str(name)
        try:
            family = transformers.AutoConfig.from_pretrained(name).model_type
            if family not in FAMILIES:
                raise ValueError(f"it is a model of the kind {family!r}, not {' or '.join(FAMILIES)}")
            with torch.random.fork_rng(devices=[]):  # building draws initial weights
                model, told = transformers.AutoModel.from_pretrained(
                    name, dtype=torch.float32, output_loading_info=True
                )
            if missing := sorted(told["missing_keys"]):  # transformers draws these at random, and warns
                raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them")
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise ValueError(f"no pretrained CLIP can be loaded from {str(name)!r}: {first_line(error)}") from None
        return cls(model.to(device) if device is not None else model, tokenizer, processor, label)

    @cached_property
    def name(self) -> str:
        """See `Embedder`; the hash is over the weights and the processor's settings."""
        digest = hashlib.sha256(json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return f"{self.label}@{digest.hexdigest()[:12]}"

    @property
    def scale(self) -> float:
        """See `Embedder`."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def bias(self) -> float:
        """See `Embedder`."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def image_size(self) -> int:
        """See `Embedder`."""
        return int(self.model.config.vision_config.image_size)

    @property
    def device(self) -> torch.device:
        """See `Embedder`."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def module(self) -> nn.Module:
        """See `Embedder`."""
        module: nn.Module = self.model
        return module

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """See `Embedder`; texts that are too long are cut."""
        if not texts:
            raise ValueError("there is no text to encode")
        is_siglip = self.model.config.model_type == "siglip"
        vectors = []
        for first in range(0, len(texts), batch_size):
            encoded = self.tokenizer(
                list(texts[first : first + batch_size]),
                padding="max_length" if is_siglip else True,  # SigLIP has read its padding in training, without a mask
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
            features = self.model.get_text_features(**{name: encoded[name].to(self.device) for name in names})
            vectors.append(F.normalize(features.pooler_output.float(), dim=1).cpu())
        return torch.cat(vectors)

    @torch.no_grad()
    def encode_pictures(self, pictures: Pictures, batch_size: int = 64) -> Tensor:
        """See `Embedder`; tensors are read as the 8-bit pictures that they would be as files."""
        images = to_pil(pictures) if isinstance(pictures, Tensor) else pictures
        return joined([self._encode(part).cpu() for part in stacked(images, self._pixels, batch_size)])

    def encode_image(self, images: Tensor) -> Tensor:
        """See `Embedder`."""
        return self._encode(self.preprocess(images))

    def preprocess(self, images: Tensor) -> Tensor:
        """What the processor makes of pictures, (n, 3, S', S'), from tensors (n, 3, H, W) in [0, 1], with a gradient.

        The same filter in floating point: PIL rounds to 8 bits after resizing.
        """
        settings = self.processor
        x = images.to(self.device)
        if settings.do_resize:
            mode = _MODES.get(int(settings.resample), "bicubic")
            smooth = {"antialias": True, "align_corners": False} if mode in ("bilinear", "bicubic") else {}
            x = F.interpolate(x, size=_target(settings.size, *x.shape[2:]), mode=mode, **smooth).clamp(0, 1)
        if getattr(settings, "do_center_crop", False):
            x = _centre_crop(x, settings.crop_size["height"], settings.crop_size["width"])
        x = x * (255 * settings.rescale_factor if settings.do_rescale else 255)
        if settings.do_normalize:
            mean, std = (torch.tensor(each, device=x.device) for each in (settings.image_mean, settings.image_std))
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x

    def _pixels(self, picture: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=to_rgb(picture), return_tensors="pt")["pixel_values"][0]
        return pixels

    def _encode(self, pixels: Tensor) -> Tensor:
        features = self.model.get_image_features(pixel_values=pixels.to(self.device))
        return F.normalize(features.pooler_output.float(), dim=1)


def _target(size: Any, height: int, width: int) -> tuple[int, int]:
    """The height and width that the processor's `size` makes of a picture."""
    if size.get("height") is not None:
        return size["height"], size["width"]
    edge, short, long = size["shortest_edge"], min(height, width), max(height, width)
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)


def _centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of pictures, with black around them where they are smaller."""
    missing_y, missing_x = max(0, height - images.shape[2]), max(0, width - images.shape[3])
    if missing_y or missing_x:
        top, left = missing_y // 2, missing_x // 2
        images = F.pad(images, (left, missing_x - left, top, missing_y - top))
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]
