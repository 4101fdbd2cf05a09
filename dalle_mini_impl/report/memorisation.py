"""Does a model copy? Samples between the pictures it was trained on and as many that it has never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.embed import encode_pictures

Indices = npt.NDArray[np.int64]

SMALL_SIDE = 16
"""Side, in pixels, of the small pictures whose colours are compared."""
_AT_ONCE = 256


@dataclass(frozen=True)
class Ruler:
    """A way to measure how far two pictures are apart: the Euclidean distance between their features.

    features: pictures (n, 3, S, S) in [0, 1] to float32 (n, D).
    """

    name: str
    features: Callable[[Tensor], Tensor]


def pixel_ruler() -> Ruler:
    """The root mean square difference of colours, in [0, 1], of pictures averaged down to 16×16 pixels.

    It knows nothing of the training, so it favours neither side.
    """

    def features(pictures: Tensor) -> Tensor:
        side = min(SMALL_SIDE, pictures.shape[-1])
        small = F.adaptive_avg_pool2d(pictures.float(), side).flatten(1)
        return small / math.sqrt(small.shape[1])

    return Ruler("pixels", features)


def clip_ruler(clip: CLIP) -> Ruler:
    """The distance of CLIP's unit vectors, in [0, 2]: by what is to be seen, wherever it stands.

    The CLIP has learnt from the training pictures, so it may see those in another way than held-out ones.
    """
    device = clip.logit_scale.device
    return Ruler("clip", lambda pictures: encode_pictures(clip, pictures.to(device)))


def features_of(ruler: Ruler, data: PreparedData, indices: Indices) -> Iterator[tuple[Indices, Tensor]]:
    """Some pictures' features, some at a time: (their indices, (n, D))."""
    for start in range(0, len(indices), _AT_ONCE):
        part = indices[start : start + _AT_ONCE]
        yield part, ruler.features(data.images(part))


def nearest(queries: Tensor, references: Iterator[tuple[Indices, Tensor]]) -> tuple[Tensor, Indices]:
    """The distance (q,) to the nearest reference of each query (q, D), and that reference's index (q,)."""
    distance = torch.full((len(queries),), float("inf"))
    index = np.full(len(queries), -1, dtype=np.int64)
    for indices, features in references:
        found, column = torch.cdist(queries, features, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        closer = found < distance
        distance = torch.where(closer, found, distance)
        index[closer.numpy()] = indices[column[closer].numpy()]
    return distance, index


def views_of(ruler: Ruler, pictures: Tensor, mirrored: bool) -> Tensor:
    """Features (v, n, D) of pictures as they are and, where training mirrored its own, mirrored."""
    views = [pictures, pictures.flip(-1)] if mirrored else [pictures]
    return torch.stack([torch.cat([ruler.features(part) for part in torch.split(view, _AT_ONCE)]) for view in views])


def nearest_in_views(
    views: Tensor, references: Callable[[], Iterator[tuple[Indices, Tensor]]]
) -> tuple[Tensor, Indices]:
    """As `nearest`, of whichever view of each query (v, q, D) comes nearest."""
    found = [nearest(view, references()) for view in views]
    distances = torch.stack([distance for distance, _ in found])  # (v, q)
    best = distances.argmin(dim=0)
    indices = np.stack([index for _, index in found])[best.numpy(), np.arange(views.shape[1])]
    return distances.min(dim=0).values, indices


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its 95 % interval (percentile bootstrap over groups) and the number of samples.

    chance: where 95 % of the shares would fall if the sides of the references were drawn by lot, where that is known.
    """

    mean: float
    low: float
    high: float
    num_samples: int
    chance: tuple[float, float] | None = None


def share_of(hits: npt.NDArray[np.float64], groups: Sequence[int], seed: int = 0, resamples: int = 2000) -> Share:
    """Mean of hits (n,) over samples whose groups, the prompts they share, vary together. ValueError for none."""
    if not len(hits):
        raise ValueError("a share of no samples can't be told")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(member, weights=hits), np.bincount(member)
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Share(float(hits.mean()), float(low), float(high), len(hits))


def nearer_to_training(to_training: Tensor, to_held_out: Tensor) -> npt.NDArray[np.float64]:
    """1 for a sample nearer to its nearest training picture than to its nearest held-out one, 0.5 for a tie, else 0."""
    hits = (to_training < to_held_out).double() + 0.5 * (to_training == to_held_out).double()
    return hits.numpy().astype(np.float64)


def chance_interval(nearest_of: Indices, num_references: int, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Where 95 % of the shares fall if half of the references, drawn by lot, are called training pictures.

    nearest_of: (n,) the reference of either side nearest to each sample, below num_references. It is wider than coin
    tossing where many samples have the same picture as their nearest.
    """
    rng = np.random.default_rng(seed)
    weight = np.bincount(nearest_of, minlength=num_references) / len(nearest_of)
    is_training = np.arange(num_references) < num_references // 2
    shares = [float(weight[rng.permutation(is_training)].sum()) for _ in range(draws)]
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Shares of pictures nearer to a training than to a held-out picture; 50 % is chance.

    num_references: pictures on either side. samples: all of them; of_training, of_held_out: those drawn for captions of
    training and of held-out pictures. control: held-out pictures that are in neither set, as the VAE gives them back.
    """

    ruler: str
    num_references: int
    samples: Share
    of_training: Share
    of_held_out: Share
    control: Share | None


def audit(
    ruler: Ruler,
    samples: Tensor,
    prompts: Sequence[int],
    from_training: Sequence[bool],
    training: Tensor,
    held_out: Tensor,
    *,
    control: Tensor | None = None,
    mirrored: bool = False,
) -> Audit:
    """Compares samples (n, 3, S, S) in [0, 1] with the features (m, D) of as many training as held-out pictures.

    The larger set would win by its size alone, so ValueError unless both have the same number. prompts: which samples
    share a prompt, whose caption may be that of a picture on either side. from_training: whether a sample was drawn for
    a training picture's caption; for 50 % to be chance, as many have to be drawn for either side, and the pictures that
    the captions belong to stand on theirs. control: pictures
    (k, 3, S, S), see `Audit`. mirrored: whether training mirrored its pictures, so that copies may be mirrored, too.
    """
    if len(training) != len(held_out) or not len(training):
        raise ValueError(f"{len(training)} training and {len(held_out)} held-out pictures: compare with as many")

    def compare(pictures: Tensor) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
        views = views_of(ruler, pictures, mirrored)
        sides = []
        for features in (training, held_out):
            side = [(np.arange(len(features)), features)]
            sides.append(nearest_in_views(views, lambda side=side: iter(side)))  # type: ignore[misc]
        (to_training, index), (to_held_out, other) = sides
        nearest_of = np.where((to_training < to_held_out).numpy(), index, len(training) + other)
        return nearer_to_training(to_training, to_held_out), chance_interval(nearest_of, 2 * len(training))

    (found, chance), groups, is_training = compare(samples), np.asarray(prompts), np.asarray(from_training)
    of_control = None
    if control is not None:
        real, of_chance = compare(control)
        of_control = replace(share_of(real, range(len(control))), chance=of_chance)
    return Audit(
        ruler=ruler.name,
        num_references=len(training),
        samples=replace(share_of(found, groups.tolist()), chance=chance),
        of_training=share_of(found[is_training], groups[is_training].tolist()),
        of_held_out=share_of(found[~is_training], groups[~is_training].tolist()),
        control=of_control,
    )
