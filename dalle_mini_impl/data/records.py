"""What a source of captioned pictures hands out: one `Record` a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Record:
    """One picture and what is said about it; the picture is opened only by `load`."""

    name: str
    """What reports call the picture: a path relative to the source, or a row."""
    load: Callable[[], Image.Image]
    """Opens the picture, in any mode; raises `pictures.PictureError` (or anything: it counts as unreadable)."""
    captions: tuple[str, ...]
    """As the source has them, blank ones included; () for an uncaptioned picture, which trains the null caption."""
    split: Split | None
    """The split that the source states, None where it states none."""
    path: Path | None = None
    """The picture's own file, where it has one outside of the files that `Source.roots` names."""


@runtime_checkable
class Source(Protocol):
    """Captioned pictures in a fixed order, read as they are asked for; a source may also have a length."""

    @property
    def kind(self) -> str:
        """The form that was found, for example "csv" or "picture folder with .txt captions"."""

    @property
    def describe(self) -> str:
        """One line for people: what is read from where."""

    def __iter__(self) -> Iterator[Record]:
        """Every record from the first, in the same order each time."""
