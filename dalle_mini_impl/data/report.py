"""What became of each record, told at the end in data-report.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.pictures import Reason
from dalle_mini_impl.data.records import SPLITS, Split

REASONS: tuple[Reason, ...] = ("unreadable", "bomb", "tiny", "empty_caption")
MIN_PICTURES_TO_VALIDATE = 20
"""From this many training pictures on, some are held out even if no hash falls below the fraction."""


class NoPicturesError(ValueError):
    """A source of which no picture can be used; `report` says why, as data-report.json has it."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class Tally:
    """Names, captions and digests of the pictures kept, and the names of those skipped."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.captions: list[tuple[str, ...]] = []
        self.stated: list[Split | None] = []
        self.digests: list[bytes] = []
        self.num_blank = 0
        self.skipped: dict[Reason, list[tuple[str, str]]] = {reason: [] for reason in REASONS}

    @property
    def kept(self) -> int:
        """Number of pictures kept."""
        return len(self.names)

    def keep(self, name: str, captions: tuple[str, ...], num_given: int, split: Split | None, digest: bytes) -> None:
        """Notes a picture kept; `num_given` counts its captions before blank ones were dropped."""
        self.names.append(name)
        self.captions.append(captions)
        self.num_blank += num_given - len(captions)
        self.stated.append(split)
        self.digests.append(digest)

    def skip(self, reason: Reason, name: str, detail: str) -> None:
        """Notes a picture left out."""
        self.skipped[reason].append((name, detail))

    def why_nothing_was_kept(self, spec: str, kind: str) -> str:
        """The reasons in a sentence."""
        reasons = [f"{len(items)} {reason.replace('_', ' ')}" for reason, items in self.skipped.items() if items]
        if not reasons:
            return f"{spec} ({kind}) holds no pictures"
        name, detail = next(item for items in self.skipped.values() for item in items)
        return f"no usable picture in {spec} ({kind}): {', '.join(reasons)}; the first: {name}: {detail}"

    def report(
        self, splits: Sequence[Split], splits_from: str, config: DataConfig, *, fingerprint: str
    ) -> dict[str, Any]:
        """The counts, as data-report.json has them."""
        captioned = sum(1 for captions in self.captions if captions)
        return {
            "image_size": config.image_size,
            "fit": config.fit,
            "pictures": self.kept + sum(len(items) for items in self.skipped.values()),
            "kept": self.kept,
            "captioned": captioned,
            "uncaptioned": self.kept - captioned,
            "captions": sum(len(captions) for captions in self.captions),
            "blank_captions_dropped": self.num_blank,
            **{split: splits.count(split) for split in SPLITS},
            "splits_from": splits_from,
            **self._duplicates(splits),
            "skipped": {
                reason: {
                    "count": len(items),
                    "names": [name for name, _ in items],
                    "why": [detail for _, detail in items],
                }
                for reason, items in self.skipped.items()
            },
            "caption_length_characters": self._lengths(),
            "fingerprint": fingerprint,
        }

    def _duplicates(self, splits: Sequence[Split]) -> dict[str, int]:
        """How many pictures have the very pixels of an earlier one, and how many of those sit in another split."""
        first: dict[bytes, Split] = {}
        again = across = 0
        for digest, split in zip(self.digests, splits, strict=True):
            again += digest in first
            across += first.setdefault(digest, split) != split
        return {"duplicates": again, "duplicates_across_splits": across}

    def _lengths(self) -> dict[str, float]:
        """Caption lengths in characters."""
        lengths = np.array([len(caption) for captions in self.captions for caption in captions])
        if not len(lengths):
            return {}
        return {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": round(float(lengths.mean()), 2),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        }


def assign_splits(
    stated: Sequence[Split | None], digests: Sequence[bytes], validation_fraction: float
) -> tuple[list[Split], str]:
    """The split of each picture and, in words, who decided it.

    What the source states is honoured, unless it would leave nothing to train on. Where it states no validation
    pictures, those whose content hash falls below `validation_fraction` are held out, so that a picture keeps its side
    as the set grows and equal pictures share one.
    """
    notes: list[str] = []
    if all(split in ("validation", "test") for split in stated):
        notes.append("the source states no training pictures, so its splits are ignored")
        stated = [None] * len(stated)
    splits: list[Split] = [split or "train" for split in stated]
    if any(split is not None for split in stated):
        notes.append("splits stated by the source")
    if "validation" in splits or validation_fraction == 0:
        return splits, "; ".join(notes) or "all pictures train: data.validation_fraction is 0"
    candidates = [index for index, split in enumerate(splits) if split == "train"]
    limit = int(validation_fraction * 2**64)
    held_out = {digests[index] for index in candidates if int.from_bytes(digests[index][:8], "big") < limit}
    notes.append(f"validation by content hash, {validation_fraction:g} of the pictures")
    if not held_out and len(candidates) >= MIN_PICTURES_TO_VALIDATE:
        held_out = {min(digests[index] for index in candidates)}
        notes[-1] += " (none fell below it: the lowest hash)"
    if all(digests[index] in held_out for index in candidates):
        return splits, "; ".join([*notes[:-1], "no validation pictures: all would be held out"])
    for index in candidates:
        if digests[index] in held_out:
            splits[index] = "validation"
    return splits, "; ".join(notes)
