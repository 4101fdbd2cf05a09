"""Text to pictures: draw candidates, decode them, rank them; and all that begins with a picture.

from dalle_mini_impl import TextToImage
pictures = TextToImage.from_pretrained("emoji")("a red heart", candidates=32, keep=4, seed=0)
pictures[0].image.save("heart.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.data.pictures import to_rgb, to_square
from dalle_mini_impl.drawing import DECODE_BATCH, DEFAULT_CANDIDATES, Progress, PromptDrawer
from dalle_mini_impl.drawn import CaptionScores, RankedPicture, check_counts, rank, rank_sequence
from dalle_mini_impl.editing import keep_first, keep_outside, mask_as_seen
from dalle_mini_impl.embed import encode_pictures, encode_texts
from dalle_mini_impl.guided import GuideSettings, GuideStep, Prior, Prompt, guide, main_text, random_ids
from dalle_mini_impl.unclip import change_by_text, embedding_clip, slerp

Start = Literal["noise", "dalle"]

DEFAULT_STRENGTHS = (0.2, 0.35, 0.5)
"""How far `TextToImage.change` turns a picture's embedding to the difference of the captions."""


class TextToImage(PromptDrawer):
    """A loaded checkpoint: call it with a prompt, get ranked pictures; give it a picture, get others like it."""

    def tokens_of(self, picture: Image.Image) -> Tensor:
        """The image ids (N,) of any picture, cut or fitted to a square as the training pictures were."""
        return self._encode([picture])[0].cpu()

    @torch.no_grad()
    def _encode(self, pictures: Tensor | Sequence[Image.Image]) -> Tensor:
        """Image ids (n, N) of pictures (n, 3, S, S) in [0, 1], or of any PIL images."""
        return self.vae.encode(self._pixels_of(pictures).to(next(self.vae.parameters()).device))

    def _pixels_of(self, pictures: Tensor | Sequence[Image.Image]) -> Tensor:
        """Any PIL images as the models see them, (n, 3, S, S) in [0, 1]; a tensor is that already."""
        if isinstance(pictures, Tensor):
            return pictures
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

        share: of its tokens that are kept, from the top. mask: instead, white where it is to be drawn anew; painted
        over the picture, or over the square that the models see. options: as in a call.
        """
        ids = picture if isinstance(picture, Tensor) else self.tokens_of(picture)
        if mask is not None and isinstance(picture, Image.Image):
            mask = mask_as_seen(mask, to_rgb(picture).size, self.bundle.recipe.data.fit)
        known = keep_first(ids, share) if mask is None else keep_outside(ids, mask)
        return self(prompt, known=known, **options)

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
        """Image ids (N,) to guide from: random ones, or DALL·E's best of `candidates` for the main prompt.

        Raises ValueError for another word.
        """
        if start == "noise":
            return random_ids(self.vae, seed)
        if start != "dalle":
            raise ValueError(f'start is {start!r}; give "noise", "dalle", a picture or image ids')
        return self(main_text(prompts), candidates, 1, seed)[0].tokens

    @torch.no_grad()
    def score(self, pictures: Tensor | Sequence[Image.Image], captions: Sequence[str]) -> list[CaptionScores]:
        """Scores captions[i] for picture i, of (n, 3, S, S) in [0, 1] or of any PIL images, by all that there is.

        DALL·E's likelihoods are of the picture as its tokens tell it. Raises ValueError unless there are as many
        captions.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures came with {len(captions)} captions: give as many")
        device = next(self.vae.parameters()).device
        text_ids = self.bundle.tokenizer.batch(list(captions), self.bundle.stream.text_length)[0]
        found = []
        for first in range(0, len(captions), DECODE_BATCH):
            part = slice(first, first + DECODE_BATCH)
            given, text = pictures[part], text_ids[part].to(device)
            images = self._pixels_of(given)
            ids = self._encode(images)
            clip, read = self._ranker_scores(given, images, ids, captions[part], text)
            likelihoods = self.dalle.log_likelihood(text, ids).tolist()
            for caption, of_clip, of_read, likelihood in zip(captions[part], clip, read, likelihoods, strict=True):
                scores = {"clip_score": of_clip, "read_score": of_read, "log_likelihood": likelihood}
                total = self._score(of_clip, of_read, likelihood)
                found.append(CaptionScores(caption=caption, score=total, **scores))
        return found

    @torch.no_grad()
    def caption(self, picture: Image.Image, candidates: int = 8, seed: int = 0) -> list[CaptionScores]:
        """Writes captions for a picture, the first of the likeliest words and the others drawn; the best come first.

        There may be fewer than `candidates`, since equal ones are one. Raises ValueError for a checkpoint without a
        captioner.
        """
        clip = self.captioning_clip
        if clip is None:
            raise ValueError(
                f"checkpoint {self.bundle.recipe.name!r} writes no captions: train its CLIP with clip.caption_layers=2"
            )
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}; write at least 1")
        places = clip.places(self._pixels_of([picture]).to(clip.logit_scale.device))
        written = [clip.write_captions(places)[0]]
        if candidates > 1:
            written.append(clip.write_captions(places.expand(candidates - 1, -1, -1), 1.0, seed)[0])
        captions = list(dict.fromkeys(self.bundle.tokenizer.decode(ids) for ids in torch.cat(written).tolist()))
        return sorted(self.score([picture] * len(captions), captions), key=lambda item: -item.score)
