"""Rows of the `datasets` library, from any of its readers, as records."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import Columns, captions_of, find_columns, looks_like_picture, split_of
from dalle_mini_impl.data.pictures import PictureError, open_picture
from dalle_mini_impl.data.records import Record, Split, broken, unbroken

Row = Mapping[str, Any]

_PICTURE_FOLDERS = ("images", "Images", "image", "imgs", "img", "pictures", "photos")


@dataclass(frozen=True)
class Part:
    """A file, split or other stretch of a source whose rows have the same columns."""

    label: str
    """What its rows are called after in reports."""
    open: Callable[[], Iterable[Row]]
    """The rows from the first; a `datasets` object tells its features, too."""
    split: Split | None = None
    folders: tuple[Path, ...] = ()
    """Where relative paths of pictures are looked up, in this order."""


@dataclass(frozen=True)
class RowSource:
    """Records from the rows of one or several parts."""

    kind: str
    describe: str
    config: DataConfig
    parts: tuple[Part, ...]
    roots: tuple[Path, ...] = field(default=())

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            yield from _part_records(part, self.config)


def load_rows(reader: str, files: list[str], **options: Any) -> Any:
    """Opens files with one of the `datasets` library's readers, streaming, pictures left undecoded."""
    from datasets import load_dataset

    names = [file if "://" in file else glob.escape(file) for file in files]  # the library takes names for patterns
    return undecoded(load_dataset(reader, data_files={"train": names}, split="train", streaming=True, **options))


def undecoded(rows: Any) -> Any:
    """A `datasets` object whose picture columns yield their bytes or paths, so that a broken one can't raise in it."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, ImageFeature):
            rows = rows.cast_column(name, List(ImageFeature(decode=False)))
    return rows


def picture_folders(base: Path) -> tuple[Path, ...]:
    """Where a file in folder `base` may keep the pictures that it names: beside it, or in a folder beside it."""
    return (base, *(base / name for name in _PICTURE_FOLDERS))


def find_picture(name: str, folders: tuple[Path, ...]) -> Path:
    """The first existing file of that name; where there is none, the path at which it was expected."""
    candidates = [folder / name for folder in folders] or [Path(name)]
    return next((path for path in candidates if _is_file(path)), candidates[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for one, a folder that may not be looked into
        return False


def path_record(name: str, path: Path, captions: tuple[str, ...], split: Split | None, config: DataConfig) -> Record:
    """A record whose picture is a file of its own."""

    def load() -> Image.Image:
        if "://" in name:
            raise PictureError("unreadable", "a URL, not a file: download the pictures first")
        return open_picture(path, config)

    return Record(name, load, captions, split, path=path)


def _part_records(part: Part, config: DataConfig) -> Iterator[Record]:
    """The records of one part; a file that breaks off midway ends in an unreadable record."""
    try:
        rows = part.open()
        features = getattr(rows, "features", None)
        iterator = iter(rows)
        first = next(iterator, None)
    except Exception as error:  # each reader has its own: pyarrow's, pandas', json's …
        raise ValueError(_why_unreadable(part.label, error)) from error
    if first is None:
        return
    columns = find_columns(first, features, config, part.label)
    rest = chain([first], iterator)
    feature = (features or {}).get(columns.image)
    if isinstance(first[columns.image], str) or getattr(feature, "dtype", None) in ("string", "large_string"):
        yield from _grouped(part, rest, columns, features, config)
        return

    records = (_row_record(part, index, row, columns, features, config) for index, row in enumerate(rest))
    yield from unbroken(records, part.label)


def _why_unreadable(where: str, error: Exception) -> str:
    hint = " (a caption with the delimiter in it needs quotes)" if "tokenizing" in str(error) else ""
    hint = " (a quote that a cell begins with is never closed)" if "EOF inside string" in str(error) else hint
    return f"can't read {where}: {type(error).__name__}: {str(error).strip()}{hint}"


def _row_record(
    part: Part, index: int, row: Row, columns: Columns, features: Mapping[str, Any] | None, config: DataConfig
) -> Record:
    """A row that has its picture in it."""
    value = row[columns.image]
    inner = value.get("path") if isinstance(value, Mapping) else None
    name = f"{part.label} row {index}" + (f" ({Path(inner).name})" if inner else "")
    captions = _captions(row, columns, features)
    return Record(name, lambda: _open_cell(value, part.folders, config), captions, _split(row, columns, part))


def _open_cell(value: Any, folders: tuple[Path, ...], config: DataConfig) -> Image.Image:
    """The picture in a cell: bytes, a path, both as the `datasets` library has them, or the first of a list."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise PictureError("unreadable", "the row has no picture")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and "://" in value:  # a picture inside a remote archive, as streamed hub datasets have
        from datasets.utils.file_utils import xopen

        with xopen(value, "rb") as remote:
            value = remote.read()
    return open_picture(value if isinstance(value, bytes) else find_picture(str(value), folders), config)


def _grouped(
    part: Part, rows: Iterable[Row], columns: Columns, features: Mapping[str, Any] | None, config: DataConfig
) -> Iterator[Record]:
    """A record a path: tables with a row for each caption name the same picture several times.

    Raises ValueError where they can't be read to the end, however late: one comma too many is easily mended, and would
    cost most of a long table.
    """
    captions: dict[str, list[str]] = {}
    splits: dict[str, Split | None] = {}
    problems: list[Record] = []
    count = 0
    try:
        for count, row in enumerate(rows, start=1):
            name = str(row[columns.image] or f"{part.label} row {count - 1} without a path")
            found = _captions(row, columns, features)
            if swallowed := sum(map(_rows_in, found)):
                detail = f"a quote in its row is closed {swallowed} rows later, which are lost: close it, or double it"
                problems.append(broken(name, detail))
                continue
            captions.setdefault(name, []).extend(found)
            splits.setdefault(name, _split(row, columns, part))
    except Exception as error:
        raise ValueError(_why_unreadable(f"{part.label} after its first {count:,} rows", error)) from error
    for name, texts in captions.items():
        yield path_record(name, find_picture(name, part.folders), tuple(texts), splits[name], config)
    yield from problems


def _rows_in(caption: str) -> int:
    """How many rows of a table of paths a caption has in it: lines of several cells, one of them a picture's path."""
    lines = (re.split(r"[,;|\t]", line) for line in caption.splitlines()[1:])
    return sum(len(cells) > 1 and any(looks_like_picture(cell.strip()) for cell in cells) for cells in lines)


def _captions(row: Row, columns: Columns, features: Mapping[str, Any] | None) -> tuple[str, ...]:
    cells = (captions_of(row.get(name), (features or {}).get(name)) for name in columns.captions)
    return tuple(caption for cell in cells for caption in cell)


def _split(row: Row, columns: Columns, part: Part) -> Split | None:
    stated = split_of(str(row.get(columns.split))) if columns.split else None
    return stated or part.split
