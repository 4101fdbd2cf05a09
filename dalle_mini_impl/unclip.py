"""unCLIP: drawing by way of a picture embedding, and what can be done to one (arXiv 2204.06125, section 3).

The embedding of a prompt comes from the prior; that of a picture, from CLIP. Between two of them lies a path on the
sphere (interpolation), and the difference of two captions points along another (a change of a picture by text).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.embed import encode_texts
from dalle_mini_impl.pretrained import Bundle


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The unit vector (..., E) that lies at a share of the way from one unit vector to another, along the sphere.

    0 gives the first, 1 the second. Shoemake 1985, "Animating rotation with quaternion curves".
    """
    cosine = (first * second).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    is_near = angle.sin() < 1e-4  # equal vectors: the straight way is the same
    divisor = torch.where(is_near, 1.0, angle.sin())
    near, far = ((part * angle).sin() / divisor for part in (1 - share, share))
    bent, straight = near * first + far * second, (1 - share) * first + share * second
    return F.normalize(torch.where(is_near, straight, bent), dim=-1)


def change_by_text(picture: Tensor, before: Tensor, after: Tensor, strength: float) -> Tensor:
    """A picture's embedding (..., E) turned, by a share of the way, to the difference of two captions' embeddings.

    The paper's text diff: slerp(picture, normalised(after - before), strength), with a strength from 0.25 to 0.5.
    Raises ValueError for captions that CLIP can't tell apart, which point nowhere.
    """
    difference = after - before
    if bool((difference.norm(dim=-1) < 1e-4).any()):
        raise ValueError("the two captions have the same embedding: describe the picture before and after the change")
    return slerp(picture, F.normalize(difference, dim=-1), strength)


def has_prior(bundle: Bundle) -> bool:
    """Whether a checkpoint can draw prompts by way of picture embeddings."""
    return bundle.prior is not None and bundle.clip is not None and _has_prefix(bundle)


def embedding_clip(bundle: Bundle) -> CLIP:
    """The CLIP whose picture embeddings condition a checkpoint's DALL·E; ValueError where there is none."""
    if bundle.clip is None or not _has_prefix(bundle):
        raise ValueError(
            f"checkpoint {bundle.recipe.name!r} doesn't draw by picture embeddings: train one with dalle.image_prefix, "
            "for example by configs/shapes-unclip.toml"
        )
    return bundle.clip


def _has_prefix(bundle: Bundle) -> bool:
    return bundle.dalle is not None and bundle.dalle.prefix is not None


def draw_embeddings(
    bundle: Bundle, prompts: Sequence[str], jobs: Sequence[tuple[int, int]], *, seed: int, settings: SamplingConfig
) -> Tensor:
    """A picture embedding (n, E) of the prior for each (prompt index, candidate number) job, on the CPU."""
    clip, prior = embedding_clip(bundle), bundle.prior
    if prior is None:
        raise ValueError(f"checkpoint {bundle.recipe.name!r} has no prior: train its prior stage")
    text_ids = bundle.tokenizer.batch(list(prompts), bundle.stream.text_length)[0]
    vectors = encode_texts(clip, bundle.tokenizer, prompts)
    return prior.draw(text_ids, vectors, prompts, jobs, seed=seed, settings=settings).cpu()
