"""Text to pictures: draw candidates, decode them, rank them.

from dalle_mini_impl import TextToImage
pictures = TextToImage.from_pretrained("emoji")("a red heart", candidates=32, keep=4, seed=0)
pictures[0].image.save("heart.png")
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
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
from dalle_mini_impl.decoding import Partial
from dalle_mini_impl.editing import keep_first, keep_outside
from dalle_mini_impl.embed import Embedder, encode_pictures, encode_texts
from dalle_mini_impl.guided import GuideSettings, GuideStep, Prior, Prompt, guide, main_text, random_ids
from dalle_mini_impl.pretrained import DEFAULT_CHECKPOINT, Bundle, Storage, load_bundle, save_bundle
from dalle_mini_impl.pretrained_clip import PretrainedCLIP
from dalle_mini_impl.rerank import score_pairs
from dalle_mini_impl.sampling import Samples, resolve_precision, sample_rows, stream_rows
from dalle_mini_impl.sheet import to_pil
from dalle_mini_impl.unclip import change_by_text, draw_embeddings, embedding_clip, has_prior, slerp
from dalle_mini_impl.vae.model import DiscreteVAE

Progress = Callable[[int, int], None]
"""Called with the numbers of image tokens drawn so far and in all."""
Start = Literal["noise", "dalle"]

DEFAULT_CANDIDATES = 16
DEFAULT_KEEP = 4
DEFAULT_STRENGTHS = (0.2, 0.35, 0.5)
"""How far `TextToImage.change` turns a picture's embedding to the difference of the captions."""
LIKELIHOOD_WEIGHT = 0.03
"""Of the picture's own log-likelihood in its score: 0.01 to 0.1 ranks better than 0, on shapes and on emoji."""
_DECODE_BATCH = 32
_UNDRAWN = (200, 200, 200)


@dataclass(frozen=True, kw_only=True)
class RankedPicture:
    """A drawn picture and how it did.

    rank: 1 is the best of its prompt, 0 means not ranked. candidate: its number, which with prompt, seed and settings
    fixes its tokens. clip_score: cosine similarity with the prompt, or with the embedding where there is no prompt;
    None without a CLIP. log_ratio: Σ log p(x|prompt) - log p(x|null). log_likelihood: its first part. read_score:
    log p(prompt|picture) in nats, None where DALL·E doesn't read. score: what it is ranked by, see
    `TextToImage.ranked_by`. tokens: image ids (N,) int64. embedding: the picture embedding (E,) that it was drawn by.
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
    embedding: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """How well a caption fits a picture; the fields are those of `RankedPicture`."""

    caption: str
    score: float
    clip_score: float | None
    read_score: float | None
    log_likelihood: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The pictures of a prompt while they are drawn.

    images: every candidate, grey where nothing is drawn yet. done, total: image tokens. ranked: None until all are
    drawn, then the best of them, best first.
    """

    images: list[Image.Image]
    done: int
    total: int
    ranked: list[RankedPicture] | None = None


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
        if given.get("unclip") and not has_prior(self.bundle):
            raise ValueError(f"checkpoint {self.bundle.recipe.name!r} has no prior to draw by: leave unclip out")
        if settings.upscale and self.bundle.upscale is None:
            raise ValueError(
                f"checkpoint {self.bundle.recipe.name!r} has no upscaler: train one with upscale.factor=2, or leave "
                "upscale out"
            )
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
        if not isinstance(pictures, Tensor):
            pictures = self._pixels_of(pictures)
        return self.vae.encode(pictures.to(next(self.vae.parameters()).device))

    def _pixels_of(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Any PIL images as the models see them, (n, 3, S, S) in [0, 1]."""
        data = self.bundle.recipe.data
        squares = [to_square(to_rgb(picture), data.image_size, data.fit) for picture in pictures]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255

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
        embeddings: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[RankedPicture]:
        """Draws (prompt index, candidate number) jobs in their order, scored but not ranked yet.

        known: (N,) image ids that every picture is given, FREE (-1) where it is to be drawn; see `editing`.
        embeddings: (n, E) the picture embedding to draw each job by; an empty prompt then says nothing. Default what
        the prior draws for the prompts, where there is one and `settings.unclip` doesn't forbid it.
        It is how several processes share the work: each draws its own jobs, and they are ranked together.
        """
        settings = settings or self.bundle.recipe.sampling
        text_ids, embeddings = self._conditions(prompts, jobs, seed, settings, embeddings)
        samples = sample_rows(
            self.dalle,
            text_ids,
            prompts,
            jobs,
            seed=seed,
            settings=settings,
            known=None if known is None else known.expand(len(jobs), -1),
            embeddings=embeddings,
            batch_size=batch_size,
            progress=progress,
        )
        return self._scored(samples, prompts, text_ids, embeddings, jobs, seed, settings)

    def _conditions(
        self,
        prompts: Sequence[str],
        jobs: Sequence[tuple[int, int]],
        seed: int,
        settings: SamplingConfig,
        embeddings: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Caption ids (P, T) and picture embeddings (n, E), given or drawn by the prior; None where there are none."""
        captions: list[str | None] = list(prompts)
        if embeddings is not None:
            embedding_clip(self.bundle)
            captions = [prompt or None for prompt in prompts]
        elif settings.unclip and has_prior(self.bundle):
            embeddings = draw_embeddings(self.bundle, prompts, jobs, seed=seed, settings=settings)
        return self.bundle.tokenizer.batch(captions, self.bundle.stream.text_length)[0], embeddings

    def stream(
        self,
        prompt: str,
        candidates: int = 16,
        keep: int | None = None,
        seed: int = 0,
        *,
        settings: SamplingConfig | None = None,
        known: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Drawing]:
        """Draws as a call does, and shows the pictures whenever another row of their grids is done.

        The last `Drawing` has them ranked, and they are those that a call with the same arguments returns.
        """
        keep = check_counts(candidates, keep)
        settings = settings or self.bundle.recipe.sampling
        jobs = [(0, candidate) for candidate in range(candidates)]
        text_ids, embeddings = self._conditions([prompt], jobs, seed, settings, None)
        steps = stream_rows(
            self.dalle,
            text_ids,
            [prompt],
            jobs,
            seed=seed,
            settings=settings,
            known=None if known is None else known.expand(candidates, -1),
            embeddings=embeddings,
            batch_size=batch_size,
        )
        samples = yield from self._previews(steps, candidates)
        pictures = self._scored(samples, [prompt], text_ids, embeddings, jobs, seed, settings)
        total = samples.ids.numel()
        images = [picture.image for picture in pictures]
        yield Drawing(images=images, done=total, total=total, ranked=rank(pictures, keep))

    def _previews(
        self, steps: Generator[tuple[list[int], Partial], None, Samples], num_pictures: int
    ) -> Generator[Drawing, None, Samples]:
        """A Drawing for each row of grids that is done; returns the samples."""
        row_tokens, per_picture = self.dalle.stream.grid_size, self.dalle.stream.num_image_tokens
        images = [self._grey()] * num_pictures
        shown = 0
        while True:
            try:
                batch, partial = next(steps)
            except StopIteration as stop:
                samples: Samples = stop.value
                return samples
            done = batch[0] * per_picture + len(batch) * partial.index
            if done - shown < len(batch) * row_tokens:
                continue
            shown = done
            for place, image in zip(batch, self._unfinished(partial.ids), strict=True):
                images[place] = image
            yield Drawing(images=list(images), done=done, total=num_pictures * per_picture)

    def _grey(self) -> Image.Image:
        size = self.bundle.recipe.data.image_size
        return Image.new("RGB", (size, size), _UNDRAWN)

    def _unfinished(self, ids: Tensor) -> list[Image.Image]:
        """Pictures of the first ids (n, k) of their grids; grey in the rows that have none, and after the last."""
        num_tokens, side = self.dalle.stream.num_image_tokens, self.dalle.stream.grid_size
        whole = torch.zeros(len(ids), num_tokens, dtype=torch.long, device=ids.device)
        whole[:, : ids.shape[1]] = ids
        images = self.decode(whole)  # (n, 3, S, S)
        cell = images.shape[-1] // side
        drawn = (torch.arange(num_tokens, device=images.device) < ids.shape[1]).view(side, side)
        mask = drawn.repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (S, S)
        return to_pil(torch.where(mask, images, _UNDRAWN[0] / 255))

    def _scored(
        self,
        samples: Samples,
        prompts: Sequence[str],
        text_ids: Tensor,
        embeddings: Tensor | None,
        jobs: Sequence[tuple[int, int]],
        seed: int,
        settings: SamplingConfig,
    ) -> list[RankedPicture]:
        """Drawn tokens of (prompt index, candidate number) jobs as pictures with their scores, not ranked yet."""
        assert samples.log_ratio is not None and samples.log_likelihood is not None
        pictures = []
        for first in range(0, len(jobs), _DECODE_BATCH):
            part = slice(first, first + _DECODE_BATCH)
            images = self.decode(samples.ids[part])
            texts = [prompts[prompt] for prompt, _ in jobs[part]]
            if embeddings is None or all(texts):
                clip = self._clip_scores(images, texts)
                read = self._read_scores(samples.ids[part], text_ids[[prompt for prompt, _ in jobs[part]]])
            else:  # there is nothing to read, and the embedding says what the picture should be like
                met = encode_pictures(embedding_clip(self.bundle), images) * embeddings[part].cpu()
                clip, read = met.sum(dim=1).tolist(), [None] * len(texts)
            ratios, likelihoods = samples.log_ratio[part].tolist(), samples.log_likelihood[part].tolist()
            shown = self.upscale(samples.ids[part]) if settings.upscale else images
            for index, image in enumerate(to_pil(shown)):
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
                        embedding=None if embeddings is None else embeddings[first + index].cpu(),
                    )
                )
        return pictures

    def embedding_of(self, picture: Image.Image) -> Tensor:
        """CLIP's embedding (E,) of any picture, a unit vector on the CPU, fitted to a square as in training.

        Raises ValueError for a checkpoint that doesn't draw by embeddings.
        """
        return encode_pictures(embedding_clip(self.bundle), self._pixels_of([picture]))[0]

    def draw_by_embeddings(
        self,
        embeddings: Tensor,
        prompt: str = "",
        candidates: int = 8,
        keep: int | None = None,
        seed: int = 0,
        *,
        is_sequence: bool = False,
        settings: SamplingConfig | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[RankedPicture]]:
        """Draws candidates of each picture embedding (m, E) with the same noise; the ranked pictures of each.

        prompt: a caption that DALL·E is told besides, default none. is_sequence: rank candidate numbers by the sum of
        their scores over all embeddings, so that pictures of one rank differ by their embeddings alone.
        """
        keep = check_counts(candidates, keep)
        pictures = self.draw_jobs(
            [prompt],
            [(0, candidate) for _ in embeddings for candidate in range(candidates)],
            seed,
            settings=settings,
            embeddings=embeddings.repeat_interleave(candidates, dim=0),
            batch_size=batch_size,
            progress=progress,
        )
        rows = [pictures[first : first + candidates] for first in range(0, len(pictures), candidates)]
        return rank_sequence(rows, keep) if is_sequence else [rank(row, keep) for row in rows]

    def vary(self, picture: Image.Image, prompt: str = "", **options: Any) -> list[RankedPicture]:
        """Draws variations: pictures with the same CLIP embedding; ranked, best first. See `draw_by_embeddings`."""
        return self.draw_by_embeddings(self.embedding_of(picture)[None], prompt, **options)[0]

    def interpolate(
        self, first: Image.Image, second: Image.Image, steps: int = 5, prompt: str = "", **options: Any
    ) -> list[list[RankedPicture]]:
        """Draws pictures on the way from one to another, ends included: the ranked ones of each of `steps` ≥ 2 steps.

        Embeddings move along the sphere (slerp); candidates of one number have the same noise in each step. options:
        as in `draw_by_embeddings`.
        """
        if steps < 2:
            raise ValueError(f"steps is {steps}; a way from one picture to another has at least 2, its ends")
        ends = self.embedding_of(first), self.embedding_of(second)
        way = torch.stack([slerp(*ends, step / (steps - 1)) for step in range(steps)])
        return self.draw_by_embeddings(way, prompt, **options)

    def change(
        self,
        picture: Image.Image,
        before: str,
        after: str,
        strengths: Sequence[float] = DEFAULT_STRENGTHS,
        prompt: str = "",
        **options: Any,
    ) -> list[list[RankedPicture]]:
        """Draws a picture changed as two captions say: the ranked pictures of each strength.

        before, after: what it shows, and what it is to show. strengths: shares of the way, 0 … 1, from the picture's
        embedding to the direction of the change; what is kept has the same noise in each. options: as in
        `draw_by_embeddings`.
        """
        if not strengths or not all(0 <= strength <= 1 for strength in strengths):
            raise ValueError(f"strengths are {list(strengths)}; give at least one, each from 0 (no change) to 1")
        texts = encode_texts(embedding_clip(self.bundle), self.bundle.tokenizer, [before, after])
        own = self.embedding_of(picture)
        changed = torch.stack([change_by_text(own, texts[0], texts[1], strength) for strength in strengths])
        return self.draw_by_embeddings(changed, prompt, is_sequence=True, **options)

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

    @torch.no_grad()
    def upscale(self, ids: Tensor) -> Tensor:
        """Pictures (n, 3, 2S, 2S) in [0, 1] from image ids (n, N); ValueError for a checkpoint without an upscaler."""
        if self.bundle.upscale is None:
            raise ValueError(f"checkpoint {self.bundle.recipe.name!r} has no upscaler: train one with upscale.factor=2")
        return self.bundle.upscale.decode(ids.to(next(self.vae.parameters()).device), self.vae)

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


def rank_sequence(rows: Sequence[Sequence[RankedPicture]], keep: int) -> list[list[RankedPicture]]:
    """The pictures of each row by the sum of their candidate number's scores over all rows, the best `keep` first."""
    totals = [sum(picture.score for picture in column) for column in zip(*rows, strict=True)]
    order = sorted(range(len(totals)), key=lambda candidate: (-totals[candidate], candidate))[:keep]
    return [[replace(row[candidate], rank=place) for place, candidate in enumerate(order, start=1)] for row in rows]


def rank(pictures: Sequence[RankedPicture], keep: int) -> list[RankedPicture]:
    """The best `keep` of one prompt's pictures by `score`, best first.

    Equal scores go by candidate number, so the ranking doesn't depend on the order of the pictures.
    """
    ordered = sorted(pictures, key=lambda picture: (-picture.score, picture.candidate))[:keep]
    return [replace(picture, rank=place) for place, picture in enumerate(ordered, start=1)]
