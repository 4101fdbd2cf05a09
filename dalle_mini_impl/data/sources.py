"""Finds out what `--data` was given and opens it."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.records import Record, Source

MADE = ("shapes", "emoji")


def open_source(spec: str, config: DataConfig) -> Source:
    """Opens a source of captioned pictures."""
    name, separator, arguments = spec.partition(":")
    if name in MADE and not Path(spec).exists():
        return MadeSource(name, arguments if separator else "", config)
    raise ValueError(f"{spec!r} is not a known source")


def resolve_spec(spec: str) -> str:
    """The same string for the same source: a path in full, anything else as it is."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


class MadeSource:
    """A source that is drawn, not read: its class is looked up and called when it is opened."""

    def __init__(self, name: str, arguments: str, config: DataConfig) -> None:
        maker = _maker(name)
        values = parse_arguments(name, arguments, maker)
        if "image_size" in inspect.signature(maker).parameters:
            values.setdefault("image_size", config.image_size)
        self._source: Source = maker(**values)
        self.kind = f"made source {name}"
        self.describe = self._source.describe

    def __iter__(self) -> Iterator[Record]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def content_key(self) -> str:
        """Changes with the arguments and with what the drawing code makes of them, told from the first pictures."""
        digest = hashlib.sha256(self.describe.encode())
        for record in islice(iter(self), 3):
            digest.update(repr((record.name, record.captions, record.split)).encode())
            digest.update(record.load().tobytes())
        return digest.hexdigest()


def _maker(name: str) -> Callable[..., Any]:
    """The class of a made source."""
    if name == "shapes":
        from dalle_mini_impl.data.shapes import ShapesSource

        return ShapesSource
    from dalle_mini_impl.data.emoji import EmojiSource

    return EmojiSource


def parse_arguments(name: str, text: str, maker: Callable[..., Any]) -> dict[str, Any]:
    """``count=200,seed=1`` as keyword arguments of `maker`, typed by its annotations; raises ValueError."""
    constructor = maker.__init__ if inspect.isclass(maker) else maker
    hints = get_type_hints(constructor)
    known = [key for key in inspect.signature(maker).parameters]
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{name}:{text}: {part!r} must read key=value; known keys: {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name}: unknown key {key!r}; {hint}")
        values[key] = _typed(f"{name}:{key}", value, str(hints.get(key, str)))
    return values


def _typed(where: str, text: str, annotation: str) -> Any:
    """A value as its annotation asks."""
    try:
        if "bool" in annotation:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if "int" in annotation:
            return int(text)
        if "float" in annotation:
            return float(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where} is {text!r}, but must be {annotation}") from None
    return Path(text) if "Path" in annotation else text


def content_key(source: Source) -> str:
    """A cheap fingerprint of what a source would give: sizes and times of its files, the first pictures of made ones."""
    if isinstance(source, MadeSource):
        return source.content_key()
    roots: Iterable[Path] = getattr(source, "roots", ())
    return files_key(path for root in roots for path in walk(root))


def files_key(paths: Iterable[Path]) -> str:
    """A digest of the paths, sizes and times of files, missing ones included."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{path.resolve()}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def walk(root: Path) -> Iterator[Path]:
    """Every file below a folder, or the file itself, in a fixed order; hidden ones and macOS' copies left out."""
    if not root.is_dir():
        yield root
        return
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)
