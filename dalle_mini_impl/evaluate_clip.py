"""What a CLIP knows of made scenes that it was never shown: names of colours and shapes, and which caption is whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dalle_mini_impl.classify import ZeroShotClassifier
from dalle_mini_impl.data.scenes import COLOURS, SHAPES, Scene, render
from dalle_mini_impl.data.shapes import held_out_scenes
from dalle_mini_impl.embed import Embedder
from dalle_mini_impl.evaluate import Pairs, Share

Captioned = list[tuple[Scene, str]]
"""Scenes, each with a caption."""


@dataclass(frozen=True)
class ClipReport:
    """Results on one kind of held-out scenes.

    colours, shapes: of single shapes, the share whose colour and whose shape is named right, zero-shot. pictures: of
    distinct captions, the share that finds its own picture first among those of all the others; captions: the share of
    pictures that finds its caption. Guessing finds 1 / pictures.total.
    """

    colours: Share
    shapes: Share
    pictures: Share
    captions: Share


def evaluate_clip(
    embedder: Embedder,
    pairs: Pairs,
    image_size: int,
    *,
    num_singles: int = 500,
    num_captions: int = 1000,
    seed: int = 0,
) -> ClipReport:
    """Classifies single shapes and searches pictures by caption, both in held-out scenes with such colour-shape pairs.

    image_size: side in pixels that the scenes are drawn at. Labels are read in templates, a colour's with each shape
    and a shape's with each colour: "a red {}". Raises ValueError for counts below 1.
    """
    if num_singles < 1 or num_captions < 1:
        raise ValueError(f"num_singles is {num_singles} and num_captions {num_captions}; both must be at least 1")
    alone = [scene for scene, _ in _held_out(pairs, num_singles, seed, _singles)]
    singles = embedder.encode_pictures(render(scene, image_size) for scene in alone)
    scenes = _held_out(pairs, num_captions, seed, _distinct)
    captions = embedder.encode_texts([caption for _, caption in scenes])
    pictures = embedder.encode_pictures(render(scene, image_size) for scene, _ in scenes)
    colours, shapes = zip(*((scene.things[0].colour, str(scene.things[0].shape)) for scene in alone), strict=True)
    return ClipReport(
        colours=_named(embedder, singles, colours, COLOURS, [f"a {{}} {shape}" for shape in SHAPES]),
        shapes=_named(embedder, singles, shapes, SHAPES, [f"a {colour} {{}}" for colour in COLOURS]),
        pictures=_found(captions, pictures),
        captions=_found(pictures, captions),
    )


def _named(
    embedder: Embedder, pictures: Tensor, names: Sequence[str], labels: Iterable[str], templates: list[str]
) -> Share:
    """Of pictures (n, E), the share whose name is the likeliest of the labels."""
    classifier = ZeroShotClassifier(embedder, list(labels), templates)
    told = (pictures @ classifier.directions.t()).argmax(dim=1).tolist()
    return Share.of(classifier.labels[index] == name for index, name in zip(told, names, strict=True))


def _found(queries: Tensor, vectors: Tensor) -> Share:
    """Of queries (n, E), the share whose nearest vector of (n, E) is its own."""
    return Share.of(index == own for own, index in enumerate((queries @ vectors.t()).argmax(dim=1).tolist()))


def _singles(scenes: Captioned) -> Captioned:
    return [(scene, caption) for scene, caption in scenes if len(scene.things) == 1]


def _distinct(scenes: Captioned) -> Captioned:
    return list({caption: (scene, caption) for scene, caption in scenes}.values())


def _held_out(pairs: Pairs, number: int, seed: int, choose: Callable[[Captioned], Captioned]) -> Captioned:
    """So many of those held-out scenes that are chosen; as many are made as it takes."""
    count = number
    while len(chosen := choose(held_out_scenes(count, seed, pairs))) < number:
        count *= 2
    return chosen[:number]
