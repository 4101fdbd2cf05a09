"""WebDataset: tar shards of pictures and captions, streamed through the `datasets` library."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import caption_lines, captions_of, find_captions, split_in, split_of
from dalle_mini_impl.data.pictures import EXTENSIONS, PictureError, open_picture
from dalle_mini_impl.data.records import Record, Split, broken, unbroken
from dalle_mini_impl.data.rows import load_rows

_TEXTS = ("txt", "text", "caption")
_MEMBERS_READ = 1000


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
            if _cut_short(shard):
                yield broken(
                    f"{shard}: everything after its last record", "the archive has no end mark: it is cut short"
                )
        except Exception as error:  # tarfile's, fsspec's, the network's: the next shard may be whole
            yield broken(shard, f"{type(error).__name__}: {error}")

    def _read(self, shard: str) -> Iterator[Record]:
        split = _shard_split(shard) if len(self.shards) > 1 else None
        for sample in load_rows("webdataset", [shard], features=_features(shard)):
            name = f"{shard.rsplit('/', 1)[-1]}/{sample['__key__']}"
            cells = [value for field, value in sample.items() if _is_picture(field) and value is not None]
            yield Record(name, _loader(cells, self.config), _captions(sample), split)


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


def _features(shard: str) -> Any:
    """The fields to read, declared so that samples may differ in theirs: the usual ones and those of the first samples.

    Left to itself the reader refuses shards in which one of the first pictures has no caption.
    """
    from datasets import Features, Image, Json, Value

    fields = {"jpg", "jpeg", "png", "webp", "json", *_TEXTS}
    if "://" not in shard:
        with tarfile.open(shard) as archive:
            for member in islice(archive, _MEMBERS_READ):
                fields.add(PurePath(member.name).name.partition(".")[2])
    types: dict[str, Any] = {field: Image(decode=False) for field in sorted(fields) if _is_picture(field)}
    types |= {field: Value("string") for field in _TEXTS} | {"json": Json()}
    return Features(types | {"__key__": Value("string"), "__url__": Value("string")})


def _is_picture(field: str) -> bool:
    return PurePath(f"x.{field}").suffix.lower() in EXTENSIONS


def _loader(cells: Sequence[Mapping[str, Any]], config: DataConfig) -> Callable[[], Image.Image]:
    """Opens the first picture of a sample."""

    def load() -> Image.Image:
        if not cells:
            raise PictureError("unreadable", "the sample has no picture")
        return open_picture(cells[0]["bytes"], config)

    return load


def _captions(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """The lines of the sample's text, or, where it has none, the caption in its JSON."""
    for field in _TEXTS:
        if sample.get(field) is not None:
            return caption_lines(sample[field])
    described = sample.get("json")
    if not isinstance(described, Mapping):
        return ()
    return tuple(text for name in find_captions(list(described)) for text in captions_of(described[name]))
