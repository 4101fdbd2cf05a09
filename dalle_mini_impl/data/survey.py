"""A look at a source before it is read: how many pictures, how large, and what their captions speak of."""

from __future__ import annotations

import re
import time
from collections.abc import Sized
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.made import MADE
from dalle_mini_impl.data.pictures import quiet
from dalle_mini_impl.data.records import unbroken
from dalle_mini_impl.data.sources import open_source

LOOK_AT = 2_000
"""Records whose captions are read; of about 60 of them, ever further apart, the picture is measured."""
COUNT_TO = 100_000
LOOK_SEC, COUNT_SEC = 10.0, 20.0
"""Where records come slowly (from the net, from archives), looking and counting end here."""

_SIDES = re.compile(
    r"\b(left|right|links|rechts|gauche|droite|izquierda|derecha|sinistra|destra|esquerda|direita"
    r"|letters?|digits?|numbers?|words?|text)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Survey:
    """What a look at a source has shown.

    num_pictures: counted, or at least so many where is_counted is False. side_px: the median of the shorter sides, None
    for pictures that are drawn in any size. names_sides: a caption says left or right, or speaks of writing, so that a
    mirrored picture would contradict it. made: the name of a made source, None for pictures of one's own.
    """

    num_pictures: int
    is_counted: bool
    side_px: float | None
    names_sides: bool
    made: str | None = None


def survey(spec: str, config: DataConfig) -> Survey:
    """Looks at anything that `open_source` takes; raises ValueError as that does."""
    source = open_source(spec, config)
    name = spec.partition(":")[0]
    made = name if source.kind == name and name in MADE else None
    total = len(source) if isinstance(source, Sized) else None
    start, count, next_picture = time.monotonic(), 0, 0
    sides: list[int] = []
    names_sides, complete = False, True
    with quiet():
        for record in unbroken(source, source.kind):
            elapsed_sec = time.monotonic() - start
            if count < LOOK_AT and elapsed_sec < LOOK_SEC:
                names_sides = names_sides or any(_SIDES.search(caption) for caption in record.captions)
                if made is None and count >= next_picture:
                    next_picture = max(count + 1, int(count * 1.15))
                    with suppress(Exception):  # what can't be read is counted and named when all are
                        sides.append(min(record.load().size))
            elif total is not None or count >= COUNT_TO or elapsed_sec > COUNT_SEC:
                complete = False
                break
            count += 1
    num_pictures = count if total is None else total
    return Survey(num_pictures, complete or total is not None, median(sides) if sides else None, names_sides, made)
