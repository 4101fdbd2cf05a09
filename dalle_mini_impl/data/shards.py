"""WebDataset: tar shards of pictures and captions, streamed through the `datasets` library.

Its own WebDataset reader decodes every field of a sample, wanted or not, and gives a shard up at the first that it
can't, so that only its archives' files are taken.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import (
    caption_lines,
    captions_of,
    decode_text,
    find_captions,
    split_in,
    split_of,
)
from dalle_mini_impl.data.pictures import EXTENSIONS, PictureError, open_picture
from dalle_mini_impl.data.records import Record, Split, broken, unbroken

_TEXTS = ("txt", "text", "caption")
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)


def expand_shards(pattern: str) -> list[str]:
    """The shards that ``{000..009}``, ``{a,b}``, ``*`` and ``?`` stand for; URLs are taken as they are."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern] if "://" in pattern or not glob.has_magic(pattern) else sorted(glob.glob(pattern))
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [shard for choice in choices for shard in expand_shards(before + choice + after)]


def check_protocols(shards: Iterable[str]) -> None:
    """Raises ValueError where what reads one of the shards' addresses isn't installed, with what is missing."""
    from fsspec import get_filesystem_class

    for protocol in sorted({shard.partition("://")[0] for shard in shards if "://" in shard}):
        try:
            get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            remedy = "pip install 'fsspec[http]'" if protocol in ("http", "https") else "install it, or copy the shards"
            raise ValueError(f"shards at {protocol}:// can't be read ({error}): {remedy}") from None


@dataclass(frozen=True)
class ShardSource:
    """The samples of tar shards, one shard after the other; a broken shard doesn't take the next ones with it."""

    shards: tuple[str, ...]
    config: DataConfig
    kind: str = "WebDataset shards"

    @property
    def describe(self) -> str:
        """What is read."""
        return f"{len(self.shards)} WebDataset shards, the first {self.shards[0]}"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The local files that a fingerprint has to cover."""
        return tuple(Path(shard) for shard in self.shards if "://" not in shard)

    def __iter__(self) -> Iterator[Record]:
        for shard in self.shards:
            yield from self.read_shard(shard)

    def read_shard(self, shard: str) -> Iterator[Record]:
        """The samples of one of the shards."""
        try:
            yield from unbroken(self._read(shard), shard)
        except Exception as error:  # tarfile's, fsspec's, the network's: the next shard may be whole
            yield broken(shard, f"{type(error).__name__}: {error}")

    def _read(self, shard: str) -> Iterator[Record]:
        split = _shard_split(shard) if len(self.shards) > 1 else None
        for key, fields in _samples(shard, {self.config.image_column, self.config.caption_column}):
            name = f"{shard.rsplit('/', 1)[-1]}/{key}"
            try:
                captions = _captions(fields, self.config.caption_column)
            except ValueError as error:
                yield broken(name, f"its JSON: {error}")
                continue
            yield Record(name, _loader(fields, self.config), captions, split)
        if _cut_short(shard):
            yield broken(f"{shard}: everything after its last record", "the archive has no end mark: it is cut short")


def _cut_short(shard: str) -> bool:
    """Whether a local tar lacks the zero blocks at its end; the reader takes a cut between two files for the end."""
    if "://" in shard or not shard.lower().endswith(".tar"):
        return False
    with open(shard, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * tarfile.BLOCKSIZE))
        return any(file.read())


def _shard_split(shard: str) -> Split | None:
    """The split that the shard's folder or name states."""
    return split_of(PurePath(shard).parent.name) or split_in(shard)


def _samples(shard: str, named: set[str | None]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields of each sample: files in a row with one name up to its first dot, by what follows it, lower case.

    A field that comes again begins another sample. Other fields than pictures, texts, JSON and those named are left.
    """
    from datasets import StreamingDownloadManager

    key, fields = "", dict[str, bytes]()
    for path, file in StreamingDownloadManager().iter_archive(shard):
        member = _MEMBER.fullmatch(path)
        if member is None:
            continue
        field = member[2].lower()
        if key and (member[1] != key or field in fields):
            yield key, fields
            fields = {}
        key = member[1]
        if field in (*_TEXTS, "json", *named) or _is_picture(field):
            fields[field] = file.read()
    if key:
        yield key, fields


def _is_picture(field: str) -> bool:
    return PurePath(f"x.{field}").suffix.lower() in EXTENSIONS


def _loader(fields: Mapping[str, bytes], config: DataConfig) -> Callable[[], Image.Image]:
    """Opens the picture of a sample: the one that is named, or else the first."""

    def load() -> Image.Image:
        wanted = config.image_column
        field = next((field for field in sorted(fields) if (field == wanted if wanted else _is_picture(field))), None)
        if field is None:
            raise PictureError("unreadable", f"the sample has no {wanted or 'picture'}")
        return open_picture(fields[field], config)

    return load


def _captions(fields: Mapping[str, bytes], wanted: str | None) -> tuple[str, ...]:
    """The lines of the sample's text, or, where it has none, the caption in its JSON; wanted: the name of either.

    Raises ValueError for JSON that is none.
    """
    text = next((fields[name] for name in ([wanted] if wanted else _TEXTS) if name in fields), None)
    if text is not None:
        return caption_lines(decode_text(text))
    described = json.loads(decode_text(fields["json"])) if "json" in fields else None
    if not isinstance(described, Mapping):
        return ()
    names = [wanted] if wanted else find_captions(list(described))
    return tuple(caption for name in names for caption in captions_of(described.get(name)))
