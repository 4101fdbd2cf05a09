"""How real reconstructions look: beside PSNR and SSIM their Fréchet distance to true pictures, and their sharpness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.frechet import Moments, frechet_distance
from dalle_mini_impl.training.batches import Indices
from dalle_mini_impl.training.task import EvaluationContext
from dalle_mini_impl.vae.losses import reconstruction_metrics
from dalle_mini_impl.vae.model import DiscreteVAE

BATCH_SIZE = 64
Features = Callable[[Tensor], Tensor]
"""Pictures (B, 3, S, S) in [0, 1] to vectors (B, D)."""
Rebuild = Callable[[Tensor], Tensor]
"""Pictures (B, 3, S, S) in [0, 1] to what comes back of them."""


def through(vae: DiscreteVAE) -> Rebuild:
    """Pictures through a VAE's hard ids and back."""
    return lambda images: vae.decode(vae.encode(images))


@torch.no_grad()
def fidelity(
    rebuild: Rebuild, features: Features, data: PreparedData, indices: Indices, context: EvaluationContext
) -> dict[str, float]:
    """Metrics of reconstructions, the same on every process.

    psnr (dB), ssim. sharpness: mean absolute difference of neighbouring pixels, as a share of the originals'.
    rfd: Fréchet distance of reconstructions to their own originals; 0 is perfect. From 4 pictures on also rfd_apart: of
    the reconstructions of one half to the originals of the other; and rfd_floor: the same with the originals of both
    halves, what a perfect VAE would reach.
    """
    device, world = context.accelerator.device, context.accelerator.num_processes
    places = np.arange(len(indices))[context.accelerator.process_index :: world]
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # psnr, ssim, roughness of both, pictures
    rows: list[tuple[int, Any, Any]] = []
    for start in range(0, len(places), BATCH_SIZE):
        chunk = places[start : start + BATCH_SIZE]
        images = data.images(indices[chunk]).to(device)
        with context.autocast():
            rebuilt = rebuild(images).float()
            vectors = [features(pictures).double().cpu().numpy() for pictures in (images, rebuilt)]
        values = reconstruction_metrics(images, rebuilt)
        each = [
            values["psnr"],
            values["ssim"],
            _roughness(images),
            _roughness(rebuilt),
            torch.ones_like(values["psnr"]),
        ]
        sums += torch.stack([value.double().sum() for value in each])
        rows += list(zip(chunk.tolist(), *vectors, strict=True))
    sums = context.accelerator.reduce(sums, "sum")
    rows = sorted(gather_object(rows), key=lambda row: row[0]) if world > 1 else rows
    psnr, ssim, rough, rebuilt_rough, _ = (sums / sums[-1]).tolist()
    metrics = {"psnr": psnr, "ssim": ssim, "sharpness": rebuilt_rough / max(rough, 1e-12)}
    return metrics | _distances(*(torch.from_numpy(np.stack([row[part] for row in rows])) for part in (1, 2)))


def _distances(true: Tensor, rebuilt: Tensor) -> dict[str, float]:
    """Fréchet distances of the features (n, D) of originals and of reconstructions; see `fidelity`."""
    metrics = {"rfd": frechet_distance(Moments.of(rebuilt), Moments.of(true))}
    half = len(true) // 2
    if half < 2:
        return metrics
    first, others = slice(0, 2 * half, 2), Moments.of(true[1 : 2 * half : 2])
    metrics["rfd_apart"] = frechet_distance(Moments.of(rebuilt[first]), others)
    metrics["rfd_floor"] = frechet_distance(Moments.of(true[first]), others)
    return metrics


def _roughness(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels of each picture, (B,)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    right = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    return down + right
