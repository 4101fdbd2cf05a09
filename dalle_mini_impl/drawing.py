"""Drawing prompts: candidates are sampled, decoded, scored by all that the checkpoint has, and ranked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.decoding import Partial
from dalle_mini_impl.drawn import Drawing, RankedPicture, check_counts, rank
from dalle_mini_impl.embed import Embedder, OwnCLIP, encode_pictures
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.pretrained import DEFAULT_CHECKPOINT, Bundle, Storage, load_bundle, save_bundle
from dalle_mini_impl.pretrained_clip import PretrainedCLIP
from dalle_mini_impl.rerank import score_pairs
from dalle_mini_impl.sampling import Samples, pack, resolve_kernel, resolve_precision, sample_rows, stream_rows
from dalle_mini_impl.sheet import to_pil
from dalle_mini_impl.unclip import draw_embeddings, embedding_clip, has_prior
from dalle_mini_impl.vae.model import DiscreteVAE

Progress = Callable[[int, int], None]
"""Called with the numbers of image tokens drawn so far and in all."""

DEFAULT_CANDIDATES = 16
LIKELIHOOD_WEIGHT = 0.03
"""Of the picture's own log-likelihood in its score: 0.01 to 0.1 ranks better than 0, on shapes and on emoji."""
DECODE_BATCH = 32
_UNDRAWN = (200, 200, 200)


class PromptDrawer:
    """A loaded checkpoint that draws prompts; `pipeline.TextToImage` adds what begins with a picture."""

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
        self._packed: tuple[Engine, object] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_CHECKPOINT,
        device: torch.device | str | None = None,
        clip: str | Path | None = None,
    ) -> Self:
        """Loads a built-in checkpoint, a folder or a Hugging Face Hub id; ValueError says what is wrong with it.

        clip: a pretrained CLIP or SigLIP whose cosine ranks instead of that of the checkpoint's own, a folder or a Hub
        id; see `PretrainedCLIP`. A captioner of the checkpoint's goes on reading.
        """
        return cls(load_bundle(name, device), None if clip is None else PretrainedCLIP.load(clip, device))

    def save_pretrained(self, folder: str | Path, *, storage: Storage = "fp32") -> Path:
        """Writes the checkpoint folder; see `pretrained.save_bundle`."""
        return save_bundle(self.bundle, folder, storage=storage)

    @property
    def ranked_by(self) -> str:
        """The scores whose sum decides the rank: all that the checkpoint has.

        Each is a log-likelihood: CLIP's scaled cosine, and the prompt's, read from the picture by the checkpoint's
        captioner or else by its DALL·E, and, with a small weight, the picture's own, given the prompt. None is wrong
        where the others are.
        """
        has = {"clip_score": self.embedder, "read_score": self.reader, "log_likelihood": self.dalle}
        return " + ".join(name for name, part in has.items() if part is not None)

    def settings(self, **changes: Any) -> SamplingConfig:
        """The checkpoint's sampler settings with those changes that aren't None; ValueError for a bad one.

        A precision and a kernel of "auto" become those that draw here, so that a replay elsewhere asks for them, too.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            settings = SamplingConfig.model_validate({**self.bundle.recipe.sampling.model_dump(), **given})
        except ValidationError as error:
            problems = [f"{item['loc'][0]} is {item['input']!r}: {item['msg']}" for item in error.errors()]
            raise ValueError("; ".join(problems)) from None
        if given.get("unclip") and not has_prior(self.bundle):
            raise ValueError(f"checkpoint {self.bundle.recipe.name!r} has no prior to draw by: leave unclip out")
        if "prior_guidance" in given and not (settings.unclip and has_prior(self.bundle)):
            raise ValueError("prior_guidance is for drawing by way of a prior, which isn't done here: leave it out")
        if settings.upscale and self.bundle.upscale is None:
            raise ValueError(
                f"checkpoint {self.bundle.recipe.name!r} has no upscaler: train one with upscale.factor=2, or leave "
                "upscale out"
            )
        precision = resolve_precision(settings.precision, self.dalle.image_head.weight.device)
        return settings.model_copy(update={"precision": precision, "kernel": resolve_kernel(settings, self.dalle)})

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
            self._engine(settings),
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

    def _engine(self, settings: SamplingConfig) -> Engine:
        """The transformer packed to draw as settings say, kept from one drawing to the next while its weights stay."""
        precision = resolve_precision(settings.precision, self.dalle.image_head.weight.device)
        weights = [(weight.data_ptr(), weight._version) for weight in self.dalle.parameters()]
        packed_for = precision, resolve_kernel(settings, self.dalle), self.dalle.training, weights
        if self._packed is None or self._packed[1] != packed_for:
            self._packed = pack(self.dalle, settings), packed_for
        return self._packed[0]

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
            self._engine(settings),
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
        for first in range(0, len(jobs), DECODE_BATCH):
            part = slice(first, first + DECODE_BATCH)
            images = self.decode(samples.ids[part])
            texts = [prompts[prompt] for prompt, _ in jobs[part]]
            if embeddings is None or all(texts):
                captions = text_ids[[prompt for prompt, _ in jobs[part]]]
                clip, read = self._ranker_scores(images, images, samples.ids[part], texts, captions)
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
                        # Copies: a view takes all pictures' along wherever it is pickled.
                        tokens=samples.ids[first + index].clone(),
                        embedding=None if embeddings is None else embeddings[first + index].cpu().clone(),
                    )
                )
        return pictures

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

    @torch.no_grad()
    def _ranker_scores(
        self,
        given: Tensor | Sequence[Image.Image],
        images: Tensor,
        ids: Tensor,
        prompts: Sequence[str],
        text_ids: Tensor,
    ) -> tuple[list[float] | list[None], list[float] | list[None]]:
        """CLIP's cosines, and log p(caption | picture) by what reads best; None where nothing tells them.

        given: the pictures as they came, for a pretrained CLIP to preprocess in its own way. images: (n, 3, S, S) in
        [0, 1], what became of them, and ids (n, N), what the VAE makes of those. text_ids: (n, T), the prompts.
        """
        clip, device = self.captioning_clip, self.dalle.image_head.weight.device
        text_ids = text_ids.to(device)
        if clip is not None and isinstance(self.embedder, OwnCLIP) and self.embedder.clip is clip:
            cosines, read = clip.score_pairs(images.to(device), text_ids)
            return cosines.tolist(), read.tolist()
        clip_scores: list[float] | list[None] = [None] * len(images)
        read_scores: list[float] | list[None] = [None] * len(images)
        if self.embedder is not None:
            clip_scores = score_pairs(self.embedder, given, prompts).tolist()
        if clip is not None:
            read_scores = clip.caption_log_likelihood(images.to(device), text_ids).tolist()
        elif self.reader == "dalle":
            read_scores = self.dalle.caption_log_likelihood(text_ids, ids.to(device)).tolist()
        return clip_scores, read_scores

    @property
    def reader(self) -> Literal["captioner", "dalle"] | None:
        """What reads captions off pictures: the captioner of the checkpoint's CLIP, or else its DALL·E."""
        if self.captioning_clip is not None:
            return "captioner"
        return None if self.dalle.reading is None else "dalle"

    @property
    def captioning_clip(self) -> CLIP | None:
        """The checkpoint's own CLIP where it has a captioner, whatever CLIP ranks beside it."""
        clip = self.bundle.clip
        return None if clip is None or clip.captioner is None else clip
