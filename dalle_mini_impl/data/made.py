"""Made sources: pictures that are drawn, asked for as ``shapes``, ``textures`` or ``emoji:scenes=30000,seed=1``."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.records import Source

MADE = ("shapes", "textures", "emoji")


def open_made(name: str, arguments: str, config: DataConfig) -> Source:
    """Calls the class of a made source with typed arguments; pictures are `data.image_size` large unless it is given.

    Raises ValueError for arguments that the class doesn't have or take.
    """
    maker = _maker(name)
    values = parse_arguments(name, arguments, maker)
    if "image_size" in inspect.signature(maker).parameters:
        values.setdefault("image_size", config.image_size)
    source: Source = maker(**values)
    return source


def probe(source: Source) -> str:
    """A fingerprint of a made source: its arguments, and what the drawing code makes of its first pictures."""
    digest = hashlib.sha256(source.describe.encode())
    for record in islice(iter(source), 3):
        digest.update(repr((record.name, record.captions, record.split)).encode())
        digest.update(record.load().tobytes())
    return digest.hexdigest()


def _maker(name: str) -> Callable[..., Any]:
    """The class of a made source."""
    if name == "shapes":
        from dalle_mini_impl.data.shapes import ShapesSource

        return ShapesSource
    if name == "textures":
        from dalle_mini_impl.data.textures import TexturesSource

        return TexturesSource
    from dalle_mini_impl.data.emoji import EmojiSource

    return EmojiSource


def parse_arguments(name: str, text: str, maker: Callable[..., Any]) -> dict[str, Any]:
    """``count=200,seed=1`` as keyword arguments of `maker`, typed by its annotations; raises ValueError."""
    constructor = maker.__init__ if inspect.isclass(maker) else maker
    hints = get_type_hints(constructor)
    known = list(inspect.signature(maker).parameters)
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
