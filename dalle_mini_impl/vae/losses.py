"""Reconstruction losses and metrics of pictures, all on (B, 3, S, S) tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.config import VAEConfig

LOGIT_LAPLACE_EPS = 0.1


def ssim(x: Tensor, y: Tensor, window: int = 7, stride: int = 1) -> Tensor:
    """Mean structural similarity of pictures in [0, 1] over uniform windows, (B,) (Wang et al. 2004).

    A stride above 1 looks at fewer windows: much cheaper as a loss.
    """
    x, y = x.float(), y.float()
    moments = F.avg_pool2d(torch.cat([x, y, x * x, y * y, x * y]), window, stride)
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
    var_x, var_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (top / bottom).mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [0, 1] in dB, (B,)."""
    error = (x.float() - y.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def laplacian_distance(x: Tensor, y: Tensor, levels: int = 3) -> Tensor:
    """L1 between the band-pass levels of two pictures' Laplacian pyramids, 0-d."""
    difference = x - y
    total = difference.new_zeros(())
    for _ in range(levels):
        coarse = F.avg_pool2d(difference, 2, ceil_mode=True)  # an odd side ends in half a window
        spread = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        fine = difference - spread[..., : difference.shape[-2], : difference.shape[-1]]
        total = total + fine.abs().mean()
        difference = coarse
    return total + difference.abs().mean()


def logit_laplace_nll(images: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood per value under DALL·E 1's logit-Laplace distribution, 0-d (appendix A.3).

    images in [0, 1]; mean and log_scale are raw decoder outputs of the same shape.
    """
    squeezed = (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS
    logit = squeezed.log() - (1 - squeezed).log()
    log_scale = log_scale.clamp(-7, 7)
    nll = (logit - mean).abs() / log_scale.exp() + log_scale + (2 * squeezed * (1 - squeezed)).log()
    return nll.mean()


def from_logit_laplace(mean: Tensor) -> Tensor:
    """Pictures, nominally in [0, 1], from the logit-Laplace mean; not clamped: a clamp has no gradient beyond."""
    return (mean.sigmoid() - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)


def mixed_loss(images: Tensor, reconstruction: Tensor, config: VAEConfig) -> dict[str, Tensor]:
    """The weighted terms L1, L2, 1 - SSIM and Laplacian pyramid; terms of weight 0 are not computed."""
    terms: dict[str, Tensor] = {}
    if config.l1_weight:
        terms["l1"] = config.l1_weight * F.l1_loss(reconstruction, images)
    if config.l2_weight:
        terms["l2"] = config.l2_weight * F.mse_loss(reconstruction, images)
    if config.ssim_weight:
        terms["ssim"] = config.ssim_weight * (1 - ssim(reconstruction, images, window=8, stride=4).mean())
    if config.laplacian_weight:
        terms["laplacian"] = config.laplacian_weight * laplacian_distance(reconstruction, images)
    if not terms:
        raise ValueError("every reconstruction weight of the vae is 0: raise vae.l1_weight or another")
    return terms


@torch.no_grad()
def reconstruction_metrics(images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each picture, (B,) each."""
    return {"psnr": psnr(images, reconstruction), "ssim": ssim(images, reconstruction)}
