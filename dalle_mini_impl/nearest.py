"""A graph of neighbours, by which the vectors nearest to a query are found without looking at all of them.

HNSW (arXiv 1603.09320), by the library usearch. What it finds is nearly always what a look at all vectors would find.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from usearch.index import Index

WORTH_IT_FROM = 500_000
"""Vectors from which on a graph is worth its making: a look at all of them takes 30 ms there, a graph 2 ms."""
_CONNECTIONS = 32
_VISITED_IN_BUILDING = 200
_VISITED_IN_SEARCHING = 128


class NeighbourGraph:
    """Unit vectors, each linked to some that are near it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._visit(_VISITED_IN_SEARCHING)

    @staticmethod
    def is_available() -> bool:
        """Whether the library is installed."""
        try:
            import usearch.index  # noqa: F401
        except ImportError:
            return False
        return True

    @classmethod
    def build(cls, vectors: Tensor) -> Self:
        """The graph of unit vectors (n, E), n at least 1. Raises ValueError that says what to install."""
        cls.require()
        import numpy as np
        from usearch.index import Index

        index = Index(
            ndim=vectors.shape[1],
            metric="ip",
            dtype="f16",
            connectivity=_CONNECTIONS,
            expansion_add=_VISITED_IN_BUILDING,
        )
        index.add(np.arange(len(vectors), dtype=np.uint64), vectors.float().numpy())
        return cls(index)

    @classmethod
    def load(cls, path: Path) -> Self:
        """A graph from its file, which is read as it is needed. Raises ValueError where it isn't one."""
        cls.require()
        from usearch.index import Index

        index = Index.restore(path, view=True)
        if index is None:
            raise ValueError(f"{path.name} is no graph of neighbours")
        return cls(index)

    def save(self, path: Path) -> None:
        """Writes the graph, its vectors included."""
        self._index.save(path)

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, query: Tensor, count: int) -> Tensor:
        """Numbers (count,) of the vectors nearest to a unit vector (E,), or of all where there are fewer; int64."""
        self._visit(max(_VISITED_IN_SEARCHING, count))
        found = self._index.search(query.float().numpy(), count)
        return torch.from_numpy(found.keys.astype("int64"))

    def _visit(self, number: int) -> None:
        """How many vectors a search keeps in view; the file of a graph doesn't say."""
        self._index.expansion_search = number  # type: ignore[misc]  # it has a setter, which its types leave out

    @classmethod
    def require(cls) -> None:
        """Raises ValueError that says what to install where the library isn't."""
        if not cls.is_available():
            raise ValueError("approximate search needs the library usearch: pip install 'dalle-mini-impl[search]'")
