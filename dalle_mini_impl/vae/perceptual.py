"""Distances of pictures in the layers of a network that has learned to see (LPIPS, arXiv 1801.03924)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Layers = Callable[[Tensor], list[Tensor]]
"""Pictures (B, 3, S, S) in [0, 1] to what a network's layers make of them, (B, L, C) each."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""The distance of two batches of pictures (B, 3, S, S) in [0, 1], a 0-d mean."""

VGG16_CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of VGG16's convolutions in torchvision's `features`; each block but the first begins with max-pooling."""
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS' own shift and scale of pictures in [-1, 1]."""


def layer_distance(layers: Layers, images: Tensor, others: Tensor) -> Tensor:
    """The mean squared distance of unit vectors, over the places of each layer and over the layers, 0-d.

    Vectors along the channels are brought to unit length, so that no layer outweighs the others. `images` get no
    gradient.
    """
    with torch.no_grad():
        wanted = [_unit(layer) for layer in layers(images)]
    distances = [
        (_unit(layer) - target).square().sum(dim=2).mean() for layer, target in zip(layers(others), wanted, strict=True)
    ]
    return torch.stack(distances).mean()


def _unit(features: Tensor) -> Tensor:
    """Features (B, L, C) of unit length, fp32."""
    return F.normalize(features.float(), dim=2, eps=1e-6)


class LPIPS(nn.Module):
    """VGG16's convolutions with a learned weight for each channel of five layers.

    weights: by name, in torchvision's layout (`features.0.weight`) or that of the package lpips
    (`net.slice1.0.weight`), with heads `lin0.model.1.weight` to `lin4…`. Their shapes decide the widths.
    Raises ValueError that lists what is missing, or whose shape doesn't fit.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        found = {_plain_name(name): tensor.detach().float() for name, tensor in weights.items()}
        places = [place for block in VGG16_CONVOLUTIONS for place in block]
        wanted = [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]
        wanted += [f"lin{block}" for block in range(len(VGG16_CONVOLUTIONS))]
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"no weights of VGG16 with LPIPS' heads: {', '.join(missing[:6])} missing")
        self.blocks = nn.ModuleList()
        self.heads = nn.ParameterList()
        channels = 3
        for number, block in enumerate(VGG16_CONVOLUTIONS):
            convolutions = nn.ModuleList()
            for place in block:
                weight, bias = found[f"{place}.weight"], found[f"{place}.bias"]
                if tuple(weight.shape[1:]) != (channels, 3, 3) or bias.shape != weight.shape[:1]:
                    raise ValueError(
                        f"VGG16's convolution {place} has weights {tuple(weight.shape)} and biases "
                        f"{tuple(bias.shape)}; expected (n, {channels}, 3, 3) and (n,)"
                    )
                channels = len(weight)
                convolution = nn.Conv2d(3, 1, 3, padding=1)
                convolution.weight, convolution.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
                convolutions.append(convolution)
            head = found[f"lin{number}"]
            if head.numel() != channels:
                raise ValueError(f"LPIPS' head {number} has {head.numel()} weights for {channels} channels")
            self.blocks.append(convolutions)
            self.heads.append(nn.Parameter(head.flatten().clone()))
        self.requires_grad_(False)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The output of each block for pictures (B, 3, S, S) in [0, 1], as unit vectors (B, L, C), fp32."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        x = (2 * images - 1 - mean) / std
        found = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            x = F.max_pool2d(x, 2) if number else x
            for convolution in block:
                x = F.relu(convolution(x))
            found.append(F.normalize(x.flatten(2).transpose(1, 2).float(), dim=2, eps=1e-10))
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The sum over layers of weighted squared differences, averaged over places and pictures, 0-d."""
        if images.shape[-1] < 16:
            raise ValueError(f"LPIPS needs pictures of at least 16 pixels, not {images.shape[-1]}")
        with torch.no_grad():
            wanted = self.layers(images)
        distances = [
            ((layer - target).square() @ head).mean()
            for layer, target, head in zip(self.layers(others), wanted, self.heads, strict=True)
        ]
        return torch.stack(distances).sum()


def load_lpips(paths: Sequence[str | Path]) -> LPIPS:
    """LPIPS from files: one with everything, or VGG16's convolutions and the heads each in their own.

    Raises ValueError that names the file where it can't be read, or what the files lack.
    """
    weights: dict[str, Tensor] = {}
    for path in map(Path, paths):
        weights |= _read_weights(path)
    try:
        return LPIPS(weights)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: correct vqgan.lpips_weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} can't be read as weights: {error}") from None
    except Exception as error:  # the unpickler has errors of its own for anything but tensors
        raise ValueError(f"{path} holds something else than weights ({type(error).__name__})") from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} is no state dict of tensors")
    return values


def _plain_name(name: str) -> str:
    """The name of a tensor in either layout as `PLACE.weight`, `PLACE.bias` or `linN`."""
    if match := re.fullmatch(r"lin(\d)\.model\.\d\.weight", name):
        return f"lin{match[1]}"
    if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name):
        return f"{match[1]}.{match[2]}"
    return name
