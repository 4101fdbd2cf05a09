"""Text to pictures: draw candidates, decode them, rank them.

from dalle_mini_impl import TextToImage
pictures = TextToImage.from_pretrained("emoji")("a red heart", candidates=32, keep=4, seed=0)
pictures[0].image.save("heart.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.pictures import to_rgb, to_square
from dalle_mini_impl.editing import keep_first, keep_outside
from dalle_mini_impl.embed import Embedder
from dalle_mini_impl.guided import GuideSettings, GuideStep, Prior, Prompt, guide, main_text, random_ids
from dalle_mini_impl.pretrained import DEFAULT_CHECKPOINT, Bundle, Storage, load_bundle, save_bundle
from dalle_mini_impl.pretrained_clip import PretrainedCLIP
from dalle_mini_impl.rerank import score_pairs
from dalle_mini_impl.sampling import resolve_precision, sample_rows
from dalle_mini_impl.sheet import to_pil
from dalle_mini_impl.vae.model import DiscreteVAE

Progress = Callable[[int, int], None]
"""Called with the numbers of image tokens drawn so far and in all."""
Start = Literal["noise", "dalle"]

DEFAULT_CANDIDATES = 16
DEFAULT_KEEP = 4
LIKELIHOOD_WEIGHT = 0.03
"""Of the picture's own log-likelihood in its score: 0.01 to 0.1 ranks better than 0, on shapes and on emoji."""
_DECODE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class RankedPicture:
    """A drawn picture and how it did.

    rank: 1 is the best of its prompt, 0 means not ranked. candidate: its number, which with prompt, seed and settings
    fixes its tokens. clip_score: cosine similarity with the prompt, None without a CLIP. log_ratio:
    Σ log p(x|prompt) - log p(x|null). log_likelihood: its first part. read_score: log p(prompt|picture) in nats, None
    where DALL·E doesn't read. score: what it is ranked by, see `TextToImage.ranked_by`. tokens: image ids (N,) int64.
    """

    image: Image.Image
    prompt: str
    rank: int
    candidate: int
    seed: int
    clip_score: float | None
    log_ratio: float
    log_likelihood: float
    read_score: float | None
    score: float
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """How well a caption fits a picture; the fields are those of `RankedPicture`."""

    caption: str
    score: float
    clip_score: float | None
    read_score: float | None
    log_likelihood: float


class TextToImage:
    """A loaded checkpoint that draws: call it with a prompt, get ranked pictures."""

    def __init__(self, bundle: Bundle, embedder: Embedder | None = None) -> None:
        """Takes a bundle with a VAE and a DALL·E, and the CLIP that ranks, by default the bundle's own.

        Without a CLIP, the other scores rank.
        """
        if bundle.vae is None or bundle.dalle is None:
            missing = " and ".join(name for name in ("vae", "dalle") if getattr(bundle, name) is None)
            raise ValueError(f"checkpoint {bundle.recipe.name!r} has no {missing}: train it before drawing")
        self.bundle = bundle
        self.vae: DiscreteVAE = bundle.vae
        self.dalle: DALLE = bundle.dalle
        self.embedder: Embedder | None = bundle.embedder if embedder is None else embedder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_CHECKPOINT,
        device: torch.device | str | None = None,
        clip: str | Path | None = None,
    ) -> Self:
        """Loads a built-in checkpoint, a folder or a Hugging Face Hub id; ValueError says what is wrong with it.

        clip: a pretrained CLIP or SigLIP that ranks instead of the checkpoint's own, a folder or a Hub id; see
        `PretrainedCLIP`.
        """
        return cls(load_bundle(name, device), None if clip is None else PretrainedCLIP.load(clip, device))

    def save_pretrained(self, folder: str | Path, *, storage: Storage = "fp32") -> Path:
        """Writes the checkpoint folder; see `pretrained.save_bundle`."""
        return save_bundle(self.bundle, folder, storage=storage)

    @property
    def ranked_by(self) -> str:
        """The scores whose sum decides the rank: all that the checkpoint has.

        Each is a log-likelihood: CLIP's scaled cosine and DALL·E's reading of the prompt, given the picture, and, with
        a small weight, the picture's own, given the prompt. None is wrong where the others are.
        """
        has = {"clip_score": self.embedder, "read_score": self.dalle.reading, "log_likelihood": self.dalle}
        return " + ".join(name for name, part in has.items() if part is not None)

    def settings(self, **changes: Any) -> SamplingConfig:
        """The checkpoint's sampler settings with those changes that aren't None; ValueError for a bad one.

        A precision of "auto" becomes the one that this device draws in, so that a replay elsewhere draws in it, too.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            settings = SamplingConfig.model_validate({**self.bundle.recipe.sampling.model_dump(), **given})
        except ValidationError as error:
            problems = [f"{item['loc'][0]} is {item['input']!r}: {item['msg']}" for item in error.errors()]
            raise ValueError("; ".join(problems)) from None
        precision = resolve_precision(settings.precision, self.dalle.image_head.weight.device)
        return settings.model_copy(update={"precision": precision})

    def __call__(
        self,
        prompt: str,
        candidates: int = 16,
        keep: int | None = None,
        seed: int = 0,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        known: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[RankedPicture]:
        """Draws `candidates` pictures of a prompt and returns the best `keep` (default 4), best first.

        guidance, temperature, top_k, top_p, min_p: as in `SamplingConfig`, default what the checkpoint says. known: see
        `draw_jobs`. batch_size: pictures drawn at once; it doesn't change them. progress: called with the tokens drawn
        and their total.
        """
        settings = self.settings(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        return self.draw(
            [prompt], candidates, keep, seed, settings=settings, known=known, batch_size=batch_size, progress=progress
        )[0]

    def tokens_of(self, picture: Image.Image) -> Tensor:
        """The image ids (N,) of any picture, cut or fitted to a square as the training pictures were."""
        return self._encode([picture])[0].cpu()

    @torch.no_grad()
    def _encode(self, pictures: Tensor | Sequence[Image.Image]) -> Tensor:
        """Image ids (n, N) of pictures (n, 3, S, S) in [0, 1], or of any PIL images."""
        device, data = next(self.vae.parameters()).device, self.bundle.recipe.data
        if not isinstance(pictures, Tensor):
            squares = [to_square(to_rgb(picture), data.image_size, data.fit) for picture in pictures]
            pictures = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
        return self.vae.encode(pictures.to(device))

    def complete(
        self,
        picture: Image.Image | Tensor,
        prompt: str,
        share: float = 0.5,
        mask: Image.Image | None = None,
        **options: Any,
    ) -> list[RankedPicture]:
        """Draws variations of a picture, or of image ids (N,), that keep a part of it; ranked, best first.

        share: of its tokens that are kept, from the top. mask: instead, white where it is to be drawn anew. options:
        as in a call.
        """
        ids = picture if isinstance(picture, Tensor) else self.tokens_of(picture)
        known = keep_first(ids, share) if mask is None else keep_outside(ids, mask)
        return self(prompt, known=known, **options)

    def draw(
        self,
        prompts: Sequence[str],
        candidates: int = 1,
        keep: int | None = None,
        seed: int = 0,
        *,
        settings: SamplingConfig | None = None,
        known: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[RankedPicture]]:
        """Draws every prompt in common batches; returns the ranked pictures of each, as with it alone."""
        keep = check_counts(candidates, keep)
        jobs = [(prompt, candidate) for prompt in range(len(prompts)) for candidate in range(candidates)]
        pictures = self.draw_jobs(
            prompts, jobs, seed, settings=settings, known=known, batch_size=batch_size, progress=progress
        )
        return [rank(pictures[first : first + candidates], keep) for first in range(0, len(pictures), candidates)]

    def draw_jobs(
        self,
        prompts: Sequence[str],
        jobs: Sequence[tuple[int, int]],
        seed: int = 0,
        *,
        settings: SamplingConfig | None = None,
        known: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[RankedPicture]:
        """Draws (prompt index, candidate number) jobs in their order, scored but not ranked yet.

        known: (N,) image ids that every picture is given, FREE (-1) where it is to be drawn; see `editing`.
        It is how several processes share the work: each draws its own jobs, and they are ranked together.
        """
        text_ids, _ = self.bundle.tokenizer.batch(list(prompts), self.bundle.stream.text_length)
        samples = sample_rows(
            self.dalle,
            text_ids,
            prompts,
            jobs,
            seed=seed,
            settings=settings or self.bundle.recipe.sampling,
            known=None if known is None else known.expand(len(jobs), -1),
            batch_size=batch_size,
            progress=progress,
        )
        assert samples.log_ratio is not None and samples.log_likelihood is not None
        pictures = []
        for first in range(0, len(jobs), _DECODE_BATCH):
            part = slice(first, first + _DECODE_BATCH)
            images = self.decode(samples.ids[part])
            clip = self._clip_scores(images, [prompts[prompt] for prompt, _ in jobs[part]])
            read = self._read_scores(samples.ids[part], text_ids[[prompt for prompt, _ in jobs[part]]])
            ratios, likelihoods = samples.log_ratio[part].tolist(), samples.log_likelihood[part].tolist()
            for index, image in enumerate(to_pil(images)):
                prompt, candidate = jobs[first + index]
                pictures.append(
                    RankedPicture(
                        image=image,
                        prompt=prompts[prompt],
                        rank=0,
                        candidate=candidate,
                        seed=seed,
                        clip_score=clip[index],
                        log_ratio=ratios[index],
                        log_likelihood=likelihoods[index],
                        read_score=read[index],
                        score=self._score(clip[index], read[index], likelihoods[index]),
                        tokens=samples.ids[first + index],
                    )
                )
        return pictures

    def guide(
        self,
        prompts: str | Sequence[str | Prompt],
        start: Start | Image.Image | Tensor = "noise",
        *,
        candidates: int = DEFAULT_CANDIDATES,
        seed: int = 0,
        settings: GuideSettings | None = None,
    ) -> Iterator[GuideStep]:
        """Moves the codes of one picture to where CLIP finds the prompts in it (VQGAN+CLIP); yields it step by step.

        prompts: one, or several; "text:0.5" has a weight, one below 0 says what should not be there. start: see
        `starting_tokens`; or any picture, or image ids (N,). The rest: see `guided.guide`. Raises ValueError without a
        CLIP.
        """
        if self.embedder is None:
            raise ValueError(f"checkpoint {self.bundle.recipe.name!r} has no CLIP to guide by: name a pretrained one")
        settings = settings or GuideSettings()
        given = [prompts] if isinstance(prompts, str) else prompts
        parsed = [prompt if isinstance(prompt, Prompt) else Prompt.parse(prompt) for prompt in given]
        if isinstance(start, Image.Image):
            start = self.tokens_of(start)
        elif not isinstance(start, Tensor):
            start = self.starting_tokens(parsed, start, candidates, seed)
        prior = None
        if settings.prior:
            text_ids = self.bundle.tokenizer.batch([main_text(parsed)], self.bundle.stream.text_length)[0]
            prior = Prior(self.dalle, text_ids.to(self.dalle.image_head.weight.device))
        return guide(self.vae, self.embedder, parsed, start=start, seed=seed, settings=settings, prior=prior)

    def starting_tokens(
        self, prompts: Sequence[Prompt], start: Start, candidates: int = DEFAULT_CANDIDATES, seed: int = 0
    ) -> Tensor:
        """Image ids (N,) to guide from: random ones, or DALL·E's best of `candidates` for the main prompt."""
        if start == "noise":
            return random_ids(self.vae, seed)
        return self(main_text(prompts), candidates, 1, seed)[0].tokens

    @torch.no_grad()
    def score(self, pictures: Tensor | Sequence[Image.Image], captions: Sequence[str]) -> list[CaptionScores]:
        """Scores captions[i] for picture i, of (n, 3, S, S) in [0, 1] or of any PIL images, by all that there is.

        The likelihoods are of the picture as its tokens tell it. Raises ValueError unless there are as many captions.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures came with {len(captions)} captions: give as many")
        device = next(self.vae.parameters()).device
        text_ids = self.bundle.tokenizer.batch(list(captions), self.bundle.stream.text_length)[0]
        found = []
        for first in range(0, len(captions), _DECODE_BATCH):
            part = slice(first, first + _DECODE_BATCH)
            ids, text = self._encode(pictures[part]), text_ids[part].to(device)
            clip = self._clip_scores(pictures[part], captions[part])
            read = self._read_scores(ids, text)
            likelihoods = self.dalle.log_likelihood(text, ids).tolist()
            for caption, of_clip, of_read, likelihood in zip(captions[part], clip, read, likelihoods, strict=True):
                scores = {"clip_score": of_clip, "read_score": of_read, "log_likelihood": likelihood}
                total = self._score(of_clip, of_read, likelihood)
                found.append(CaptionScores(caption=caption, score=total, **scores))
        return found

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures (n, 3, S, S) in [0, 1] from image ids (n, N), all at once."""
        return self.vae.decode(ids.to(next(self.vae.parameters()).device))

    def _score(self, clip_score: float | None, read_score: float | None, log_likelihood: float) -> float:
        score = LIKELIHOOD_WEIGHT * log_likelihood
        if self.embedder is not None and clip_score is not None:
            score += self.embedder.scale * clip_score
        return score if read_score is None else score + read_score

    def _clip_scores(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> list[float] | list[None]:
        if self.embedder is None:
            return [None] * len(images)
        scores: list[float] = score_pairs(self.embedder, images, prompts).tolist()
        return scores

    @torch.no_grad()
    def _read_scores(self, ids: Tensor, text_ids: Tensor) -> list[float] | list[None]:
        if self.dalle.reading is None:
            return [None] * len(ids)
        device = self.dalle.image_head.weight.device
        scores: list[float] = self.dalle.caption_log_likelihood(text_ids.to(device), ids.to(device)).tolist()
        return scores


def check_counts(candidates: int, keep: int | None) -> int:
    """The number of pictures to keep; ValueError unless 1 ≤ keep ≤ candidates."""
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; draw at least 1")
    if keep is None:
        return min(DEFAULT_KEEP, candidates)
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep is {keep}, but of {candidates} candidates 1 to {candidates} can be kept")
    return keep


def rank(pictures: Sequence[RankedPicture], keep: int) -> list[RankedPicture]:
    """The best `keep` of one prompt's pictures by `score`, best first.

    Equal scores go by candidate number, so the ranking doesn't depend on the order of the pictures.
    """
    ordered = sorted(pictures, key=lambda picture: (-picture.score, picture.candidate))[:keep]
    return [replace(picture, rank=place) for place, picture in enumerate(ordered, start=1)]
