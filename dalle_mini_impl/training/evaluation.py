"""What each stage is judged by on held-out pictures, with chance and floors beside it. Runs on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import Recipe
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.embedding_cache import EmbeddingCache
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.token_cache import TokenCache
from dalle_mini_impl.sampling import every_row, sample_rows
from dalle_mini_impl.sheet import contact_sheet, reconstruction_sheet, save_sheet, to_pil
from dalle_mini_impl.stream import PAD
from dalle_mini_impl.text import TextTokenizer, normalize_caption
from dalle_mini_impl.training.batches import Indices
from dalle_mini_impl.training.task import EvaluationContext
from dalle_mini_impl.vae.losses import reconstruction_metrics
from dalle_mini_impl.vae.model import DiscreteVAE
from dalle_mini_impl.vae.quantizers import usage_and_perplexity

MAX_HELD_OUT = 512
"""Held-out pictures an evaluation uses at most, evenly spaced over the validation split."""
NUM_RECONSTRUCTIONS = 16
NUM_PROMPTS, NUM_CANDIDATES = 8, 3


def held_out(data: PreparedData, at_most: int = MAX_HELD_OUT) -> Indices:
    """The pictures that evaluations use; training pictures where nothing is held out."""
    return _evenly(data.validation if len(data.validation) else data.train, at_most)


def trained_on(data: PreparedData, at_most: int = MAX_HELD_OUT) -> Indices:
    """As many training pictures to compare those with; none where nothing is held out."""
    return _evenly(data.train, min(at_most, len(data.validation)))


def _evenly(indices: Indices, at_most: int) -> Indices:
    places = np.linspace(0, len(indices) - 1, min(at_most, len(indices))).round().astype(np.int64)
    return indices[places]


def reconstruct(vae: DiscreteVAE, data: PreparedData, indices: Indices, context: EvaluationContext) -> dict[str, float]:
    """PSNR (dB) and SSIM through the hard ids, share of codes used and their perplexity; writes a sheet."""

    def rebuilt(chunk: Indices) -> tuple[Tensor, Tensor, Tensor]:
        images = data.images(chunk).to(context.accelerator.device)
        with context.autocast():
            ids = vae.encode(images)
            return images, vae.decode(ids), ids

    def measure(chunk: Indices) -> Tensor:  # psnr, ssim, pictures, and how often each code is used
        images, decoded, ids = rebuilt(chunk)
        values = reconstruction_metrics(images, decoded)
        sums = torch.stack([values["psnr"].sum(), values["ssim"].sum(), values["psnr"].new_tensor(len(chunk))])
        return torch.cat([sums.double(), torch.bincount(ids.flatten(), minlength=vae.num_codes).double()])

    totals = total(measure, indices, context, 3 + vae.num_codes)
    sums, counts = totals[:3], totals[3:]
    usage, perplexity = usage_and_perplexity(counts)
    if context.accelerator.is_main_process:
        images, decoded, _ = (
            torch.cat(parts) for parts in zip(*context.chunks.map(rebuilt, indices[:NUM_RECONSTRUCTIONS]), strict=True)
        )
        context.folder.mkdir(parents=True, exist_ok=True)
        save_sheet(reconstruction_sheet(images, decoded), context.folder / f"vae-{context.step:06d}.png")
    psnr, ssim = (sums[:2] / sums[2]).tolist()
    return {"psnr": psnr, "ssim": ssim, "codes_used": usage, "perplexity": perplexity, "num_codes": vae.num_codes}


def retrieve(
    clip: CLIP,
    data: PreparedData,
    indices: Indices,
    tokenizer: TextTokenizer,
    context: EvaluationContext,
    vae: DiscreteVAE | None,
) -> dict[str, float]:
    """Loss beside ln B, and recall@1 and @5 in both directions over pairs with different captions, beside chance.

    With a captioner the loss has its nats a token in it, and both parts are there, too. vae: where given, decodes of
    the pictures are judged as well, as reranking will.
    """
    read = torch.zeros(2, dtype=torch.float64, device=context.accelerator.device)  # nats, tokens

    def embed(chunk: Indices) -> tuple[list[tuple[int, Any, Any, Any]], Tensor]:
        images = data.images(chunk).to(context.accelerator.device)
        text = tokenizer.batch([data.captions[i][0] for i in chunk], clip.text_length)[0].to(images.device)
        with context.autocast():
            places = clip.places(images)
            image_vectors, text_vectors = clip.pool(places), clip.encode_text(text)
            if clip.captioner is not None:
                part = torch.stack([clip.caption_nll(places, text).sum(), (text[:, 1:] != PAD).sum()])
            else:
                part = torch.zeros_like(read)
            decoded = clip.encode_image(vae.decode(vae.encode(images))) if vae is not None else image_vectors
        arrays = (vectors.float().cpu().numpy() for vectors in (image_vectors, text_vectors, decoded))
        return list(zip(chunk.tolist(), *arrays, strict=True)), part

    rows: list[tuple[int, Any, Any, Any]] = []
    for embedded, part in context.chunks.map(embed, share(_distinct(data, indices), context)):
        rows += embedded
        read += part
    rows = sorted(gather_object(rows), key=lambda row: row[0]) if context.accelerator.num_processes > 1 else rows
    images_, texts, decodes = (torch.from_numpy(np.stack([row[part] for row in rows])) for part in (1, 2, 3))
    metrics = _contrast_in_chunks(clip, images_, texts)
    metrics |= _recalls(images_, texts)
    if vae is not None:
        metrics["decoded_to_text_recall_at_1"] = _recall(decodes @ texts.t(), 1)
    if clip.captioner is not None:
        nats, tokens = context.accelerator.reduce(read, "sum").tolist()
        metrics |= {"contrast": metrics["loss"], "caption_nll": nats / tokens}
        metrics["loss"] += clip.config.caption_weight * metrics["caption_nll"]
    return metrics


def _contrast_in_chunks(clip: CLIP, images: Tensor, texts: Tensor) -> dict[str, float]:
    """The loss over batches of at most 128 pairs, and ln B, what guessing costs InfoNCE."""
    device = clip.logit_scale.device
    size = min(128, len(images))
    losses = []
    for start in range(0, len(images) - size + 1, size):
        keys = torch.arange(size, device=device)
        part = slice(start, start + size)
        losses.append(clip.contrast(images[part].to(device), texts[part].to(device), keys, keys).item())
    return {"loss": sum(losses) / len(losses), "loss_chance": math.log(size)}


def _recalls(images: Tensor, texts: Tensor) -> dict[str, float]:
    scores = images @ texts.t()
    metrics = {"num_pairs": float(len(scores))}
    for k in (1, 5):
        metrics[f"image_to_text_recall_at_{k}"] = _recall(scores, k)
        metrics[f"text_to_image_recall_at_{k}"] = _recall(scores.t(), k)
        metrics[f"chance_recall_at_{k}"] = min(1.0, k / len(scores))
    return metrics


def _recall(scores: Tensor, k: int) -> float:
    """Share of rows of scores (n, n) whose own column is among the k highest; ties count against it."""
    own = scores.diagonal()[:, None]
    return ((scores >= own).sum(dim=1) <= k).double().mean().item()


def streams(
    dalle: DALLE,
    data: PreparedData,
    chunk: Indices,
    tokenizer: TextTokenizer,
    cache: TokenCache,
    context: EvaluationContext,
    embeddings: EmbeddingCache | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """First captions (B, T), plain ids (B, N) and, where there are any, embeddings (B, E) of some pictures."""
    device = context.accelerator.device
    captions = [data.captions[i][0] if data.captions[i] else None for i in chunk]
    text = tokenizer.batch(captions, dalle.stream.text_length)[0].to(device)
    own_embeddings = None if embeddings is None else embeddings.vectors(chunk).to(device)
    return text, cache.ids(chunk).to(device), own_embeddings


def likelihood(
    dalle: DALLE,
    data: PreparedData,
    indices: Indices,
    tokenizer: TextTokenizer,
    cache: TokenCache,
    context: EvaluationContext,
    embeddings: EmbeddingCache | None = None,
) -> dict[str, float]:
    """Nats and bits a token of plain pictures and their captions, how many are guessed right, and the caption gain.

    image_accuracy: share of image tokens that are the likeliest code of all. Of few pictures, seen many times, it goes
    on rising when likelihood falls already, because what the model is wrong about it is too sure of.
    read_nll: nats a text token costs where the picture is known; what it is below text_nll, the picture tells.
    Caption gain: nats an image token costs more under another picture's caption; 0 means captions are ignored. Left out
    where no two captions differ. With embeddings all of these know the picture's own, and the embedding gain is what
    an image token costs more without it.
    """
    device = context.accelerator.device
    others = _other_captions(data, indices)

    def measure(chunk: Indices) -> Tensor:
        sums = torch.zeros(11, dtype=torch.float64, device=device)
        text, ids, own_embeddings = streams(dalle, data, chunk, tokenizer, cache, context, embeddings)
        with context.autocast():
            true = dalle.loss(text, ids, embedding=own_embeddings)
            if own_embeddings is not None:
                without = dalle.loss(text, ids)
                sums[8:10] += torch.stack([without.image_nll_sum - true.image_nll_sum, without.num_image])
            if dalle.reading is not None:
                read = dalle.loss(text, ids, reads=torch.ones(len(ids), dtype=torch.bool, device=device))
                sums[6:8] += torch.stack([read.read_nll_sum, read.num_read])
        sums[10] += true.num_right
        sums[:4] += torch.stack([true.image_nll_sum, true.num_image, true.text_nll_sum, true.num_text])
        swapped = [row for row, i in enumerate(chunk) if int(i) in others]
        if swapped:
            other_text = tokenizer.batch([others[int(chunk[row])] for row in swapped], dalle.stream.text_length)[0]
            theirs = None if own_embeddings is None else own_embeddings[swapped]
            with context.autocast():
                is_all = len(swapped) == len(chunk)
                own = true if is_all else dalle.loss(text[swapped], ids[swapped], embedding=theirs)
                other = dalle.loss(other_text.to(device), ids[swapped], embedding=theirs)
            sums[4:6] += torch.stack([other.image_nll_sum - own.image_nll_sum, other.num_image])
        return sums

    totals = total(measure, indices, context, 11).tolist()
    image, num_image, text_nll, num_text, gain, num_swapped = totals[:6]
    read_nll, num_read, embedding_gain, num_without, num_right = totals[6:]
    image_nll = image / num_image
    metrics = {
        "image_nll": image_nll,
        "image_bits": image_nll / math.log(2),
        "image_accuracy": num_right / num_image,
        "text_nll": text_nll / max(1, num_text),
    }
    if num_read:
        metrics["read_nll"] = read_nll / num_read
    if num_without:
        metrics["embedding_gain"] = embedding_gain / num_without
    return metrics | ({"caption_gain": gain / num_swapped} if num_swapped else {})


def image_nll(
    dalle: DALLE,
    data: PreparedData,
    indices: Indices,
    tokenizer: TextTokenizer,
    cache: TokenCache,
    context: EvaluationContext,
    embeddings: EmbeddingCache | None = None,
) -> float:
    """Nats a token of plain pictures under their captions, as in `likelihood`."""

    def measure(chunk: Indices) -> Tensor:
        text, ids, own_embeddings = streams(dalle, data, chunk, tokenizer, cache, context, embeddings)
        with context.autocast():
            losses = dalle.loss(text, ids, embedding=own_embeddings)
        return torch.stack([losses.image_nll_sum, losses.num_image])

    nll, num_tokens = total(measure, indices, context, 2).tolist()
    return float(nll / num_tokens)


def draw_samples(
    dalle: DALLE,
    vae: DiscreteVAE,
    data: PreparedData,
    indices: Indices,
    tokenizer: TextTokenizer,
    recipe: Recipe,
    context: EvaluationContext,
    embeddings: EmbeddingCache | None = None,
    name: str = "dalle",
) -> None:
    """Writes NAME-STEP.png: held-out captions with their own picture and a few drawn by the sampler, of one seed.

    With embeddings they are drawn by caption and by that of the held-out picture. Prompts are shared out over the
    processes.
    """
    chosen = _distinct(data, indices)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(NUM_PROMPTS, len(chosen))).round().astype(np.int64)]
    own = share(chosen, context)
    drawn: list[tuple[int, Any]] = []
    if len(own):
        captions = [data.captions[i][0] for i in own]
        text = tokenizer.batch(captions, dalle.stream.text_length)[0].to(context.accelerator.device)
        rows = every_row(len(captions), range(NUM_CANDIDATES))
        vectors = None if embeddings is None else embeddings.vectors(own)[[prompt for prompt, _ in rows]]

        def draw(places: Indices) -> Tensor:
            with context.autocast():
                samples = sample_rows(
                    dalle,
                    text,
                    captions,
                    [rows[place] for place in places],
                    seed=recipe.seed,
                    settings=recipe.sampling,
                    embeddings=None if vectors is None else vectors[places],
                    log_ratio=False,
                )
            return samples.ids.cpu()

        ids = torch.cat(list(context.chunks.map(draw, np.arange(len(rows)))))
        by_prompt = ids.view(len(own), NUM_CANDIDATES, -1).numpy()
        drawn = list(zip(own.tolist(), by_prompt, strict=True))
    if context.accelerator.num_processes > 1:
        drawn = gather_object(drawn)
    if context.accelerator.is_main_process and drawn:
        _write_sheet(vae, data, sorted(drawn, key=lambda item: item[0]), context, name)


def _write_sheet(
    vae: DiscreteVAE, data: PreparedData, drawn: Sequence[tuple[int, Any]], context: EvaluationContext, name: str
) -> None:
    """One row a caption: its own picture as the VAE gives it back, called what it is, then the samples."""
    device = context.accelerator.device
    rows = []
    for index, ids in drawn:
        with context.autocast():
            original = vae.decode(vae.encode(data.images([index]).to(device)))
            pictures = vae.decode(torch.from_numpy(ids).to(device))
        labels = ["held out" if len(data.validation) else "trained on", *("" for _ in pictures)]
        rows.append((data.captions[index][0], list(zip(to_pil(torch.cat([original, pictures])), labels, strict=True))))
    context.folder.mkdir(parents=True, exist_ok=True)
    save_sheet(contact_sheet(rows), context.folder / f"{name}-{context.step:06d}.png")


def share(indices: Indices, context: EvaluationContext) -> Indices:
    """This process's part."""
    return indices[context.accelerator.process_index :: context.accelerator.num_processes]


def total(measure: Callable[[Indices], Tensor], indices: Indices, context: EvaluationContext, num_sums: int) -> Tensor:
    """Sums over some pictures, (num_sums,) float64, the same on every process: measure gives those over a chunk."""
    sums = torch.zeros(num_sums, dtype=torch.float64, device=context.accelerator.device)
    for part in context.chunks.map(measure, share(indices, context)):
        sums += part
    reduced: Tensor = context.accelerator.reduce(sums, "sum")
    return reduced


def _distinct(data: PreparedData, indices: Indices) -> Indices:
    """Captioned pictures, one for each first caption."""
    first: dict[str, int] = {}
    for index in indices:
        if data.captions[index]:
            first.setdefault(normalize_caption(data.captions[index][0]), int(index))
    return np.array(sorted(first.values()), dtype=np.int64)


def _other_captions(data: PreparedData, indices: Indices) -> dict[int, str]:
    """For each captioned picture the first caption of a later one that reads differently (cyclically)."""
    captioned = [int(i) for i in indices if data.captions[i]]
    others = {}
    for place, index in enumerate(captioned):
        own = normalize_caption(data.captions[index][0])
        following = captioned[place + 1 :] + captioned[:place]
        other = next((data.captions[i][0] for i in following if normalize_caption(data.captions[i][0]) != own), None)
        if other is not None:
            others[index] = other
    return others
