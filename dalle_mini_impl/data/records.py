"""What a source of captioned pictures hands out: one `Record` a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from dalle_mini_impl.data.pictures import PictureError

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


def broken(name: str, detail: str) -> Record:
    """A stretch of a source that can't be read, as a record whose picture can't be opened."""

    def load() -> Image.Image:
        raise PictureError("unreadable", detail)

    return Record(name, load, (), None)


def unbroken(records: Iterable[Record], where: str) -> Iterator[Record]:
    """The records of a source; one that breaks off midway ends in a broken record instead of an exception.

    What it raises before its first record is a mistake of its user's and raised on.
    """
    iterator = iter(records)
    count = 0
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # each reader has its own: pyarrow's, pandas', tarfile's …
            if not count:
                raise
            yield broken(f"{where}: everything after record {count}", f"{type(error).__name__}: {error}")
            return
        count += 1
        yield record
