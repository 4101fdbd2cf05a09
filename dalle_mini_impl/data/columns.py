"""Which columns of a table hold the picture, its captions and its split, and what their values mean."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.pictures import EXTENSIONS
from dalle_mini_impl.data.records import Split

_IMAGE_WORDS = """image img picture photo file_name filename image_path img_path image_file image_name img_name
picture_path file_path filepath path file jpg jpeg png webp images"""
_CAPTION_WORDS = """caption captions text texts sentence sentences raw description descriptions alt_text alt prompt
comment title name label labels class category"""
IMAGE_NAMES = tuple(_IMAGE_WORDS.split())
CAPTION_NAMES = tuple(_CAPTION_WORDS.split())
SPLIT_NAMES = ("split", "subset", "partition")
_INNER_NAMES = ("raw", "caption", "text", "sentence")
_SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that matter."""

    image: str
    captions: tuple[str, ...]
    """One column, or several numbered ones; () where every picture is uncaptioned."""
    split: str | None


def split_of(word: str) -> Split | None:
    """The split that a whole word names ("val", "dev", "Training" …), if any."""
    return _SPLIT_WORDS.get(word.strip().lower())


def split_in(file_name: str) -> Split | None:
    """The split that a part of a file name names ("captions_val2017.json", "test-00000-of-00001.parquet"), if any."""
    found = {split_of(word) for word in re.findall(r"[a-z]+", PurePath(file_name).name.lower())} - {None}
    return found.pop() if len(found) == 1 else None


def find_columns(row: Mapping[str, Any], features: Mapping[str, Any] | None, config: DataConfig, where: str) -> Columns:
    """Tells the columns from their names, their types and the first row.

    Raises ValueError that names the columns there are where it can't, or where the config names one that isn't there.
    """
    names = list(row)
    split = next((name for name in names if _plain(name) in SPLIT_NAMES), None)
    image = _named(config.image_column, "image_column", names, where) or _find_image(row, features)
    if image is None:
        raise ValueError(
            f"{where}: no column of {_listed(names)} looks like pictures or their paths; "
            "name it with --set data.image_column=NAME"
        )
    caption = _named(config.caption_column, "caption_column", names, where)
    if caption is not None:
        return Columns(image, (caption,), split)
    others = [name for name in names if name not in (image, split)]
    captions = find_captions(others) or _only_text(others, row)
    if not captions and any(isinstance(row[name], str) for name in others):
        raise ValueError(
            f"{where}: none of the columns {_listed(others)} is known to hold captions; "
            "name it with --set data.caption_column=NAME"
        )
    return Columns(image, captions, split)


def find_captions(names: Sequence[str]) -> tuple[str, ...]:
    """The best-known caption column and its numbered sisters (caption, caption_2 …)."""
    for wanted in CAPTION_NAMES:
        found = tuple(name for name in names if re.fullmatch(rf"{wanted}(_?\d+)?", _plain(name)))
        if found:
            return found
    return ()


def captions_of(value: Any, feature: Any = None) -> tuple[str, ...]:
    """The captions in a cell: a string, a list (as JSON text too), a class label, or dictionaries with a text inside.

    () stands for a missing value; blank strings are kept, for whoever counts them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, str):
        return _json_list(value) or (value,)
    if isinstance(value, bytes):
        return (value.decode("utf-8", errors="replace"),)
    if isinstance(value, Mapping):
        inner = next((key for key in _INNER_NAMES if key in value), None)
        return captions_of(value[inner]) if inner else ()
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        items = value.tolist() if hasattr(value, "tolist") else value
        inner_feature = getattr(feature, "feature", None)
        return tuple(caption for item in items for caption in captions_of(item, inner_feature))
    if hasattr(feature, "int2str"):
        return () if value < 0 else (class_caption(feature.int2str(int(value))),)
    return (str(value),)


def caption_lines(text: str) -> tuple[str, ...]:
    """The captions of a text file, one a line; a file without any is one blank caption."""
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def text_encoding(data: bytes) -> str:
    """The encoding of a text: UTF-16 where it says so, UTF-8 where it is, else the one of Western Windows."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def decode_text(data: bytes) -> str:
    """A text in whichever encoding it is; bytes that mean nothing in it become U+FFFD."""
    return data.decode(text_encoding(data), errors="replace")


def read_lines(path: Path, what: str) -> list[str]:
    """What stands on the lines of a text file in whichever encoding, without empty ones.

    what: what the lines are. Raises ValueError that names the file where it can't be read.
    """
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except OSError as error:
        raise ValueError(f"{what} can't be read from {path}: {error.strerror or error}") from None
    return [line.strip() for line in lines if line.strip()]


def class_caption(name: str) -> str:
    """The caption that a class name makes: ``red_apple`` and ``red-apple`` become "red apple"."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def looks_like_picture(value: Any) -> bool:
    """Whether a cell holds a picture or, by its ending, the path of one."""
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    if isinstance(value, str):
        return PurePath(value).suffix.lower() in EXTENSIONS
    return isinstance(value, (bytes, Image.Image))


def _find_image(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> str | None:
    """By type, else by a known name with a fitting value, else by the value alone, else by the name alone."""
    kinds = {name: getattr(feature, "feature", feature) for name, feature in (features or {}).items()}
    typed = [name for name in row if type(kinds.get(name)).__name__ == "Image"]
    ranked = sorted((name for name in row if _plain(name) in IMAGE_NAMES), key=lambda n: IMAGE_NAMES.index(_plain(n)))
    fitting = [name for name in ranked if looks_like_picture(row[name])]
    by_value = [name for name in row if looks_like_picture(row[name])]
    by_name = [name for name in ranked if row[name] is None or isinstance(row[name], str)]
    return next(iter([*typed, *fitting, *by_value, *by_name]), None)


def _only_text(names: Sequence[str], row: Mapping[str, Any]) -> tuple[str, ...]:
    """The one remaining column of strings, if it is the only one."""
    texts = tuple(name for name in names if isinstance(row[name], str))
    return texts if len(texts) == 1 else ()


def _json_list(text: str) -> tuple[str, ...]:
    """The strings of a JSON list written into a cell, () for any other text."""
    stripped = text.strip()
    if not (stripped.startswith('["') and stripped.endswith("]")):
        return ()
    try:
        items = json.loads(stripped)
    except json.JSONDecodeError:
        return ()
    return tuple(items) if all(isinstance(item, str) for item in items) else ()


def _named(column: str | None, key: str, names: Sequence[str], where: str) -> str | None:
    """A column that the config names, once it is known to be there."""
    if column is None or column in names:
        return column
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {_listed(names)}"
    raise ValueError(f"{where}: data.{key} is {column!r}, which is no column; {hint}")


def _plain(name: str) -> str:
    """A column name in lower case, with underscores for whatever stands between its words."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
