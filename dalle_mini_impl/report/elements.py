"""HTML as a tree of elements: whatever a caption says, it can't break the page."""

from __future__ import annotations

import base64
import io
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

Element = ET.Element
Node = Element | str | None | Iterable["Node"]


def tag(name: str, /, *children: Node, **attributes: object) -> Element:
    """An element. children: text, elements, lists of them; None is left out. attributes: class_="a", stroke_width=2."""
    element = ET.Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(_attribute(key), _clean(str(value)))
    for child in children:
        _append(element, child)
    return element


def _attribute(key: str) -> str:
    return key if key in ("viewBox", "preserveAspectRatio") else key.rstrip("_").replace("_", "-")


def _append(element: Element, child: Node) -> None:
    if child is None:
        return
    if isinstance(child, str):
        text = _clean(child)
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text
    elif isinstance(child, Element):
        element.append(child)
    else:
        for grandchild in child:
            _append(element, grandchild)


def _clean(text: str) -> str:
    """Without the control characters that no page may hold."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def to_html(root: Element) -> str:
    """The page as text."""
    return "<!doctype html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def table(head: Sequence[Node], rows: Iterable[Sequence[Node]], *, numbers: Sequence[int] = ()) -> Element:
    """A table that scrolls on a narrow screen. numbers: columns that are aligned right."""

    def row(cells: Sequence[Node], kind: str) -> Element:
        return tag(
            "tr", [tag(kind, cell, class_="number" if column in numbers else None) for column, cell in enumerate(cells)]
        )

    body = tag("tbody", [row(cells, "td") for cells in rows])
    return tag("div", tag("table", tag("thead", row(head, "th")), body), class_="scroll")


def picture(image: Image.Image, alt: str, class_: str = "small") -> Element:
    """A picture inside of the page."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return _inline(buffer.getvalue(), alt, image.width, image.height, class_)


def sheet(path: Path, alt: str) -> Element:
    """A PNG file inside of the page."""
    with Image.open(path) as image:
        width, height = image.size
    return _inline(path.read_bytes(), alt, width, height, "sheet")


def _inline(png: bytes, alt: str, width: int, height: int, class_: str) -> Element:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return tag("img", src=source, alt=alt, width=width, height=height, class_=class_)


def details(summary: str, *children: Node, is_open: bool = False) -> Element:
    """A part that can be folded; it works without scripts."""
    return tag("details", tag("summary", summary), *children, open="" if is_open else None)
