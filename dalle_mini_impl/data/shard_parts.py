"""Tar shards prepared one by one: several processes share them out, and what was stopped goes on where it was.

.FOLDER.parts-KEY/000012.pixels  the pictures that are kept of shard 12, one after the other
.FOLDER.parts-KEY/000012.jsonl   a line a record; written last, so that where it is the part is whole
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.outcomes import Outcome, Picture, outcomes, without_blanks
from dalle_mini_impl.data.pictures import PictureError, quiet
from dalle_mini_impl.data.records import Record, Source
from dalle_mini_impl.data.shards import ShardSource
from dalle_mini_impl.files import naming, write_atomically


@dataclass(frozen=True)
class ShardParts:
    """The parts of one source for one request; every process that makes one of them makes the same."""

    source: ShardSource
    config: DataConfig
    folder: Path

    @classmethod
    def of(cls, source: Source, config: DataConfig, prepared: Path, request: Mapping[str, Any]) -> Self | None:
        """The parts beside the folder that will be prepared; None for anything but several shards."""
        if not isinstance(source, ShardSource) or len(source.shards) < 2:
            return None
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
        return cls(source, config, prepared.with_name(f".{prepared.name}.parts-{key}"))

    @staticmethod
    def remove(prepared: Path) -> None:
        """Removes the parts that a prepared folder was made of, and those of earlier requests."""
        for folder in prepared.parent.glob(f".{prepared.name}.parts-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def fill(self, rank: int, world_size: int, progress: Callable[[int, int | None], None] | None = None) -> None:
        """Prepares every world_size-th shard, from the rank-th on, that isn't prepared yet."""
        done = 0
        with quiet():
            for index in range(rank, len(self.source.shards), world_size):
                if not self._rows(index).is_file():
                    for _ in self._fill_one(index):
                        done += 1
                        if progress is not None:
                            progress(done, None)

    def outcomes(self) -> Iterator[tuple[Record, Outcome]]:
        """What became of every record of all shards, in their order; shards that nobody has prepared are now."""
        for index in range(len(self.source.shards)):
            if not self._rows(index).is_file():
                for _ in self._fill_one(index):
                    pass
            with self._pixels(index).open("rb") as pixels, self._rows(index).open(encoding="utf-8") as rows:
                for line in rows:
                    yield self._read(json.loads(line), pixels)

    def _rows(self, index: int) -> Path:
        return self.folder / f"{index:06d}.jsonl"

    def _pixels(self, index: int) -> Path:
        return self.folder / f"{index:06d}.pixels"

    def _fill_one(self, index: int) -> Iterator[None]:
        """Prepares one shard; yields after each record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows: list[str] = []
        partial = self._pixels(index).with_suffix(".partial")
        with naming(partial), partial.open("wb") as out:
            for record, outcome in outcomes(self.source.read_shard(self.source.shards[index]), self.config):
                row: dict[str, Any] = {"name": record.name, "captions": record.captions, "split": record.split}
                if isinstance(outcome, PictureError):
                    row |= {"reason": outcome.reason, "detail": outcome.detail}
                else:
                    row |= {"digest": outcome.digest.hex()}
                    out.write(outcome.pixels.tobytes())
                rows.append(json.dumps(row) + "\n")
                yield
        partial.replace(self._pixels(index))
        write_atomically(self._rows(index), lambda path: path.write_text("".join(rows), encoding="utf-8"))

    def _read(self, row: Mapping[str, Any], pixels: IO[bytes]) -> tuple[Record, Outcome]:
        record = Record(row["name"], _already_read, tuple(row["captions"]), row["split"])
        if "reason" in row:
            return record, PictureError(row["reason"], row["detail"])
        size = self.config.image_size
        data = np.frombuffer(pixels.read(size * size * 3), dtype=np.uint8).reshape(size, size, 3)
        return record, Picture(data, without_blanks(record.captions), bytes.fromhex(row["digest"]))


def _already_read() -> Image.Image:
    raise PictureError("unreadable", "a prepared part keeps the square picture only")
