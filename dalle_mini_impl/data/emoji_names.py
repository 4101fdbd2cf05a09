"""What emoji are called: their CLDR short names, other common names, and the articles that go with them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]{2}|\U0001f3f4[\U000e0020-\U000e007f]+")
_TONE_WORDS = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_MEMBERS = re.compile(r"(family|kiss|couple with heart)((?: (?:man|woman|person|boy|girl|adult|child))+)")
_HAIR = re.compile(r"(man|woman|person) ((?:red|curly|white|blond) hair|bald|beard)")
_WITHOUT_ARTICLE = frozenset(
    "rice spaghetti popcorn sushi broccoli garlic bread butter salt sake fog fire money meat food "
    "ginger tofu lightning golf polish up down ok".split()
)
_AN = re.compile(r"(?!uni|use|eu|ewe|one)[aeiou]|hour|x-ray")
_UNKIND = frozenset({"shit", "hankey"})
_MAX_ALIASES = 2
_STATUS_FULL = 2
"""The emoji package's mark of a fully qualified sequence."""


@dataclass(frozen=True)
class Glyph:
    """An emoji: its code points, its CLDR short name, and other names that no other emoji has."""

    sequence: str
    name: str
    aliases: tuple[str, ...] = ()

    @property
    def toned(self) -> bool:
        """Whether it is the variant of another emoji with a skin tone."""
        return SKIN_TONE.search(self.sequence) is not None

    @property
    def is_flag(self) -> bool:
        """Whether it is the flag of a country or region."""
        return _FLAG.fullmatch(self.sequence) is not None


def all_glyphs() -> list[Glyph]:
    """Every fully qualified emoji in the order of the code points.

    Raises ValueError where the package that knows the names isn't installed.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError:
        raise ValueError("the names of emoji are missing: pip install 'dalle-mini-impl[emoji]'") from None
    entries = [(s, data) for s, data in sorted(EMOJI_DATA.items()) if data["status"] == _STATUS_FULL]
    names = {sequence: clean_name(data["en"], sequence) for sequence, data in entries}
    others = {s: list(dict.fromkeys(_plain(alias) for alias in data.get("alias", []))) for s, data in entries}
    taken = Counter(name.lower() for name in names.values())
    taken.update(alias.lower() for aliases in others.values() for alias in aliases)
    return [
        Glyph(s, name, tuple(a for a in others[s] if taken[a.lower()] == 1 and _reads_well(a, name))[:_MAX_ALIASES])
        for s, name in names.items()
    ]


def _plain(code: str) -> str:
    return code.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _reads_well(alias: str, name: str) -> bool:
    """Whether a short code is a name in its own right: a few words of letters, and more than another spelling."""
    squeezed = {re.sub(r"[^a-z]", "", text.lower()) for text in (alias, name)}
    few = len(alias) > 2 and len(alias.split()) <= 4 and re.fullmatch(r"[A-Za-z' -]+", alias) is not None
    return few and len(squeezed) == 2 and alias not in _UNKIND and not name.startswith("flag: ")


def clean_name(code: str, sequence: str) -> str:
    """Turns a code such as ":waving_hand_dark_skin_tone:" into the CLDR name, "waving hand: dark skin tone"."""
    name = _plain(code)
    if _FLAG.fullmatch(sequence):
        return f"flag: {name}"
    if name.startswith("keycap "):
        return name.replace(" ", ": ", 1)
    tones = _TONE_WORDS.findall(name) if SKIN_TONE.search(sequence) else []
    name = _TONE_WORDS.sub("", name) if tones else name
    if members := _MEMBERS.fullmatch(name):
        name = f"{members[1]}: {', '.join(members[2].split())}"
    elif hair := _HAIR.fullmatch(name):
        name = f"{hair[1]}: {hair[2]}"
    for tone in tones:
        name += f"{', ' if ':' in name else ': '}{tone} skin tone"
    return name


def with_article(name: str) -> str:
    """Puts "a" or "an" before names that take one: not before "grapes", "Saturn", "two o'clock" or "flag: France"."""
    last = re.split(" with | of | on ", name)[0].split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "ras", "ros"))
    known = name[0].islower() and not re.search(r":|o'clock|-thirty", name)
    if plural or last.lower() in _WITHOUT_ARTICLE or not known:
        return name
    return f"{'an' if _AN.match(name) else 'a'} {name}"
