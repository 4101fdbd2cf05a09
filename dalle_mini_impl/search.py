"""CLIP as a search engine: an index of a folder's pictures on disk, searched by text or by picture.

The index is a folder of two or three files: what was embedded (names, sizes and times of the files, which CLIP), the
unit vectors in fp16 and, beside very many, a graph of neighbours. Updating embeds only what is new or changed. Search
is exact, one product with all vectors, which takes 10 ms for a hundred thousand pictures; a graph answers sooner.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_mini_impl.files import write_atomically, write_json
from dalle_mini_impl.nearest import NeighbourGraph

ENTRIES, VECTORS, GRAPH = "index.json", "vectors.npy", "graph.usearch"
FORMAT = 2
_NUMBER = "[0-9]" * 6
_MOST_BY_GRAPH = 0.1
"""Share of all pictures beyond which looking at all of them is quicker, and complete."""
Embed = Callable[[Sequence[Path]], tuple[list[Path], Tensor]]
"""Reads some pictures: those that could be read, and their unit vectors (n, E)."""


@dataclass(frozen=True)
class Entry:
    """A picture of the index: its path below the indexed folder, and how to tell that it hasn't changed."""

    path: str
    size_bytes: int
    time_ns: int

    @classmethod
    def of(cls, folder: Path, path: Path) -> Entry:
        """What a file of the folder is now."""
        stat = path.stat()
        return cls(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Hit:
    """A picture that was found: its path, and its cosine with the query in [-1, 1]."""

    path: Path
    score: float


@dataclass(frozen=True)
class Changes:
    """What an update did: pictures embedded, taken over, dropped because they are gone, and unreadable."""

    added: int
    kept: int
    removed: int
    unreadable: int


class PictureIndex:
    """Pictures of one folder, embedded by one CLIP.

    folder: absolute path of the pictures. clip: `Embedder.name` of the CLIP that made the vectors. vectors: (n, E)
    float32 or float16, a unit vector an entry. graph: of the same vectors, for approximate search; None for exact.
    """

    def __init__(
        self,
        folder: Path,
        clip: str,
        entries: Sequence[Entry],
        vectors: Tensor,
        graph: NeighbourGraph | None = None,
    ) -> None:
        self.folder, self.clip = folder, clip
        self.entries, self.vectors, self.graph = list(entries), vectors, graph

    @classmethod
    def load(cls, place: Path) -> PictureIndex:
        """Opens an index; ValueError that says what to do where there is none or it can't be read."""
        if not (place / ENTRIES).is_file():
            raise ValueError(f"there is no index in {place}: make one with dalle-mini index FOLDER --index {place}")
        try:
            values: dict[str, Any] = json.loads((place / ENTRIES).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
            entries = [Entry(**entry) for entry in values["entries"]]
            # Copy-on-write, so that only the rows that are looked at are read; nothing here writes to them.
            vectors = torch.from_numpy(np.load(place / values["vectors"], mmap_mode="c"))
            has_graph = values.get("graph") is not None and NeighbourGraph.is_available()
            graph = NeighbourGraph.load(place / values["graph"]) if has_graph else None
            if len(vectors) != len(entries):
                raise ValueError(f"{len(entries)} pictures but {len(vectors)} vectors")
            if graph is not None and len(graph) != len(entries):
                raise ValueError(f"{len(entries)} pictures but {len(graph)} vectors in its graph")
            return cls((place / values["folder"]).resolve(), values["clip"], entries, vectors, graph)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last: a graph cut off
            raise ValueError(f"the index in {place} can't be read ({error}): delete it and index again") from None

    def save(self, place: Path) -> None:
        """Writes the index: vectors and graph under new names first, then the list that names them; never a half."""
        place.mkdir(parents=True, exist_ok=True)
        before = {path for name in (VECTORS, GRAPH) for path in place.glob(f"{_NUMBER}-{name}")}
        buffer = io.BytesIO()
        np.save(buffer, self.vectors.half().numpy())
        number = 1 + max((int(path.name.split("-")[0]) for path in before), default=0)
        name = f"{number:06d}-{VECTORS}"
        write_atomically(place / name, lambda part: part.write_bytes(buffer.getvalue()))
        graph_name = None if self.graph is None else f"{number:06d}-{GRAPH}"
        if self.graph is not None and graph_name is not None:
            write_atomically(place / graph_name, self.graph.save)
        write_json(
            place / ENTRIES,
            {
                "format": FORMAT,
                "folder": self._folder_from(place),
                "clip": self.clip,
                "vectors": name,
                "graph": graph_name,
                "entries": [asdict(entry) for entry in self.entries],
            },
        )
        for old in before:
            old.unlink(missing_ok=True)

    def _folder_from(self, place: Path) -> str:
        """Where the pictures are: seen from the index where it lies among them, so that both can be moved."""
        lies_inside = place.resolve().is_relative_to(self.folder)
        return os.path.relpath(self.folder, place.resolve()) if lies_inside else str(self.folder)

    def updated(self, paths: Sequence[Path], embed: Embed, batch_size: int = 64) -> tuple[PictureIndex, Changes]:
        """This index brought up to the pictures at `paths`, all below the folder; only new and changed are embedded.

        Where nothing has changed it keeps its graph; `with_graph` makes a new one.
        """
        known = {entry: row for row, entry in enumerate(self.entries)}
        now = {path: Entry.of(self.folder, path) for path in paths}
        kept = [(entry, known[entry]) for entry in now.values() if entry in known]
        todo = [path for path, entry in now.items() if entry not in known]
        added: list[Entry] = []
        parts = [self.vectors[torch.tensor([row for _, row in kept], dtype=torch.long)].float()] if kept else []
        for first in range(0, len(todo), batch_size):
            read, vectors = embed(todo[first : first + batch_size])
            added += [now[path] for path in read]
            parts += [vectors.float()] if read else []
        vectors = torch.cat(parts) if parts else torch.zeros(0, 1)
        names = {entry.path for entry in now.values()}
        changes = Changes(
            added=len(added),
            kept=len(kept),
            removed=sum(entry.path not in names for entry in self.entries),
            unreadable=len(todo) - len(added),
        )
        if len(kept) == len(self.entries) and not added:
            return PictureIndex(self.folder, self.clip, self.entries, self.vectors, self.graph), changes
        entries = [*(entry for entry, _ in kept), *added]
        return PictureIndex(self.folder, self.clip, entries, vectors), changes

    def with_graph(self) -> PictureIndex:
        """This index with a graph for approximate search; ValueError where the library for it isn't installed."""
        return PictureIndex(self.folder, self.clip, self.entries, self.vectors, NeighbourGraph.build(self.vectors))

    @cached_property
    def _floats(self) -> Tensor:
        return self.vectors.float()

    def search(self, query: Tensor, top: int = 12, *, exact: bool = False) -> list[Hit]:
        """The `top` pictures nearest to a unit vector (E,), best first; of equal ones the earlier path.

        exact: look at all of them even where there is a graph, which may miss one now and then, or an equal one.
        """
        if top < 1:
            raise ValueError(f"top is {top}; ask for at least 1 picture")
        if not self.entries:
            raise ValueError("the index is empty: there is nothing to find")
        # A few more than asked for, so that equal scores at the end are sorted, too.
        count = min(len(self.entries), top + 64)
        if self.graph is None or exact or count > _MOST_BY_GRAPH * len(self.entries):
            scores, rows = (self._floats @ query.float()).topk(count)
        else:
            rows = self.graph.rows(query, count)
            scores = self.vectors[rows].float() @ query.float()
        found = zip(rows.tolist(), scores.tolist(), strict=True)
        best = sorted(found, key=lambda hit: (-hit[1], self.entries[hit[0]].path))[:top]
        return [Hit(self.folder / self.entries[row].path, score) for row, score in best]
