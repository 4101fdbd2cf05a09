"""How real reconstructions look: beside PSNR and SSIM their Fréchet distance to true pictures, and their sharpness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.frechet import Moments, frechet_distance
from dalle_mini_impl.training.batches import Indices
from dalle_mini_impl.training.task import EvaluationContext
from dalle_mini_impl.vae.losses import reconstruction_metrics
from dalle_mini_impl.vae.model import DiscreteVAE

Rebuild = Callable[[Tensor], Tensor]
"""Pictures (B, 3, S, S) in [0, 1] to what comes back of them."""
Eyes = Mapping[str, Callable[[Tensor], Tensor]]
"""Kinds of features by the name of their distance: pictures (B, 3, S, S) in [0, 1] to vectors (n, D), in any order."""
Found = dict[str, Moments]
"""Moments of features by what they are of: ``rfd true 0`` are those of the originals of the first half."""


def through(vae: DiscreteVAE) -> Rebuild:
    """Pictures through a VAE's hard ids and back."""
    return lambda images: vae.decode(vae.encode(images))


def eyes_of(clip: CLIP) -> Eyes:
    """What a CLIP sees: `rfd` in a picture as a whole, its embedding; `rfd_local` at each place of its stem's grid.

    The embedding knows what is shown and hardly notices blur; the stem's vectors see some 30 pixels each way and do.
    """
    tower = clip.image_tower
    return {
        "rfd": clip.encode_image,
        "rfd_local": lambda images: tower.features(images)[tower.last_of_stem].flatten(0, 1),
    }


@torch.no_grad()
def fidelity(
    rebuild: Rebuild, eyes: Eyes, data: PreparedData, indices: Indices, context: EvaluationContext
) -> dict[str, float]:
    """Metrics of reconstructions, the same on every process.

    psnr (dB), ssim. sharpness: mean absolute difference of neighbouring pixels, as a share of the originals'.
    For each name of eyes the Fréchet distance of reconstructions to their own originals; 0 is perfect. From 4 pictures
    on also NAME_apart: of the reconstructions of one half to the originals of the other; and NAME_floor: the same with
    the originals of both halves, what a perfect VAE would reach.
    """
    device, world = context.accelerator.device, context.accelerator.num_processes
    places = np.arange(len(indices))[context.accelerator.process_index :: world]
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # psnr, ssim, roughness of both, pictures
    found: Found = {}

    def measure(chunk: Indices) -> tuple[Tensor, Found]:
        images = data.images(chunk).to(device)
        with context.autocast():
            rebuilt = rebuild(images).float()
            moments = {
                f"{name} {kind}": Moments.of(see(pictures).float().cpu())
                for name, see in eyes.items()
                for kind, pictures in (("true", images), ("rebuilt", rebuilt))
            }
        values = reconstruction_metrics(images, rebuilt)
        ones = torch.ones_like(values["psnr"])
        each = [values["psnr"], values["ssim"], _roughness(images), _roughness(rebuilt), ones]
        return torch.stack([value.double().sum() for value in each]), moments

    for half in (0, 1):
        for part, seen in context.chunks.map(measure, indices[places[places % 2 == half]]):
            sums += part
            for key, moments in seen.items():
                _add(found, f"{key} {half}", moments)
    sums = context.accelerator.reduce(sums, "sum")
    if world > 1:
        found = _together(gather_object([found]))
    psnr, ssim, rough, rebuilt_rough, _ = (sums / sums[-1]).tolist()
    metrics = {"psnr": psnr, "ssim": ssim, "sharpness": rebuilt_rough / max(rough, 1e-12)}
    for name in eyes:
        metrics |= _distances(name, found, apart=len(indices) >= 4)
    return metrics


def _add(found: Found, key: str, moments: Moments) -> None:
    found[key] = found[key] + moments if key in found else moments


def _together(parts: Sequence[Found]) -> Found:
    """The moments of all processes."""
    total: Found = {}
    for part in parts:
        for key, moments in part.items():
            _add(total, key, moments)
    return total


def _distances(name: str, found: Found, apart: bool) -> dict[str, float]:
    """Fréchet distances of one kind of features; see `fidelity`."""
    true, rebuilt = ([found[f"{name} {kind} {half}"] for half in (0, 1)] for kind in ("true", "rebuilt"))
    metrics = {name: frechet_distance(rebuilt[0] + rebuilt[1], true[0] + true[1])}
    if apart:
        metrics[f"{name}_apart"] = frechet_distance(rebuilt[0], true[1])
        metrics[f"{name}_floor"] = frechet_distance(true[0], true[1])
    return metrics


def _roughness(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels of each picture, (B,)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    right = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    return down + right
