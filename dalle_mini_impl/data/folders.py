"""Folders of pictures: captions in .txt files beside them, in a metadata table, or in the folders' names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import caption_lines, class_caption, decode_text, split_of
from dalle_mini_impl.data.pictures import EXTENSIONS
from dalle_mini_impl.data.records import Record, Split, broken
from dalle_mini_impl.data.rows import RowSource, path_record
from dalle_mini_impl.data.tables import table_part

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def is_picture(path: Path) -> bool:
    """Whether a file's ending is a picture's."""
    return path.suffix.lower() in EXTENSIONS


def texts_in(files: Iterable[Path]) -> dict[Path, Path]:
    """The text files, by their paths with the ending in lower case: cameras and Windows write ``X.JPG``, ``X.TXT``."""
    return {path.with_suffix(".txt"): path for path in files if path.suffix.lower() == ".txt"}


def has_own_text(picture: Path, texts: Mapping[Path, Path]) -> bool:
    """Whether ``x.txt`` lies beside ``x.jpg``."""
    return picture.with_suffix(".txt") in texts


class SplitFolders:
    """Tells the split of a file from the folder at the top, where every picture lies in a folder named after one."""

    def __init__(self, root: Path, pictures: list[Path]) -> None:
        self.root = root
        tops = {parts[0] if len(parts := path.relative_to(root).parts) > 1 else "" for path in pictures}
        self.found = bool(tops) and all(split_of(top) for top in tops)

    def split(self, path: Path) -> Split | None:
        """The split of a file below the root."""
        return split_of(path.relative_to(self.root).parts[0]) if self.found else None

    def folders(self, path: Path) -> tuple[str, ...]:
        """The folders that a file lies in, its split's left out."""
        return path.relative_to(self.root).parts[self.found : -1]


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures with captions in .txt files of the same stem, in its folders' names, or none at all."""

    root: Path
    files: tuple[Path, ...]
    config: DataConfig

    @cached_property
    def _pictures(self) -> list[Path]:
        return [path for path in self.files if is_picture(path)]

    @cached_property
    def _texts(self) -> dict[Path, Path]:
        return texts_in(self.files)

    @cached_property
    def _splits(self) -> SplitFolders:
        return SplitFolders(self.root, self._pictures)

    @cached_property
    def kind(self) -> str:
        """Which of the three it is."""
        if any(has_own_text(path, self._texts) for path in self._pictures):
            return "pictures with .txt captions"
        if any(self._splits.folders(path) for path in self._pictures):
            return "class folders"
        return "pictures without captions"

    @property
    def describe(self) -> str:
        """What is read from where."""
        return f"{len(self._pictures)} files in {self.root}: {self.kind}"

    @property
    def roots(self) -> tuple[Path, ...]:
        """What a fingerprint has to cover."""
        return (self.root,)

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[Record]:
        for path in self._pictures:
            name = path.relative_to(self.root).as_posix()
            try:
                captions = self._captions(path)
            except OSError as error:
                yield broken(name, f"its captions: {error}")
                continue
            load = path_record(name, path, (), None, self.config).load
            yield Record(name, load, captions, self._splits.split(path))

    def _captions(self, path: Path) -> tuple[str, ...]:
        if self.kind == "class folders":
            folders = self._splits.folders(path)
            return (class_caption(folders[-1]),) if folders else ()
        text = self._texts.get(path.with_suffix(".txt"))
        return () if text is None else caption_lines(read_text(text))


@dataclass(frozen=True)
class MetadataFolder:
    """Hugging Face's `imagefolder`: pictures and metadata.csv, .jsonl or .parquet that names them.

    The table is read by the `datasets` library's reader of its format rather than by "imagefolder", which leaves out
    the pictures that the table doesn't name, takes the caption "null" for none, and orders sub-folders by chance.
    """

    root: Path
    files: tuple[Path, ...]
    config: DataConfig
    kind: str = "imagefolder with metadata"

    @cached_property
    def _tables(self) -> list[Path]:
        return [path for path in self.files if path.name in METADATA]

    @property
    def describe(self) -> str:
        """What is read from where."""
        return f"imagefolder {self.root}: {', '.join(path.relative_to(self.root).as_posix() for path in self._tables)}"

    @property
    def roots(self) -> tuple[Path, ...]:
        """What a fingerprint has to cover."""
        return (self.root,)

    def __iter__(self) -> Iterator[Record]:
        root = _absolute(self.root)
        pictures = [path for path in map(_absolute, self.files) if is_picture(path)]
        splits = SplitFolders(root, pictures)
        named: set[Path] = set()
        for table in self._tables:
            source = RowSource(self.kind, str(table), self.config, (table_part(table),))
            for record in source:
                path = _absolute(record.path or table)
                named.add(path)
                inside = path.is_relative_to(root)
                yield Record(
                    name=path.relative_to(root).as_posix() if inside and record.path else record.name,
                    load=record.load,
                    captions=record.captions,
                    split=record.split or (splits.split(path) if inside and record.path else None),
                    path=None if inside else record.path,
                )
        for path in pictures:
            if path not in named:
                name = path.relative_to(root).as_posix()
                yield Record(name, path_record(name, path, (), None, self.config).load, (), splits.split(path))


def _absolute(path: Path) -> Path:
    """The path in full and without "..", links left as they are: a table may name a file in other words than a walk."""
    return Path(os.path.abspath(path))


def read_text(path: Path) -> str:
    """A text file in whichever encoding it is; bytes that mean nothing in it become U+FFFD."""
    return decode_text(path.read_bytes())
