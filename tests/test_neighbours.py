"""Faults forbidden here: a neighbour that is another cell's or not drawn yet, old checkpoints that no longer load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from dalle_mini_impl.config import NeighbourCell, Recipe
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.layers.attention import KVCache
from dalle_mini_impl.layers.neighbours import OFFSETS, Neighbours
from dalle_mini_impl.pretrained import load_bundle, save_bundle
from dalle_mini_impl.weights import load_weights, save_weights
from tests.tiny import tiny_bundle

CODES = 11
NOTHING = CODES
CELLS = get_args(NeighbourCell)


def _table_rows(cells: tuple[NeighbourCell, ...], size: int, ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """What `rows` should give, found cell by cell on the square grid."""
    expected = torch.empty(len(ids), end - start, len(cells), dtype=torch.long)
    for picture, grid in enumerate(ids.tolist()):
        for cell in range(start, end):
            for index, name in enumerate(cells):
                row, column = cell // size + OFFSETS[name][0], cell % size + OFFSETS[name][1]
                is_there = 0 <= row < size and 0 <= column < size
                code = grid[row * size + column] if is_there else NOTHING
                expected[picture, cell - start, index] = code + index * (CODES + 1)
    return expected


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("cells", [("above",), ("two_left", "above_right"), CELLS], ids=str)
def test_each_cell_is_told_the_codes_around_it(cells: tuple[NeighbourCell, ...], size: int) -> None:
    ids = torch.randint(CODES, (4, size * size))
    neighbours = Neighbours(cells, size, CODES, 8)
    for start, end in {(0, size * size), (0, 1), (size * size // 2, size * size // 2 + 1)}:
        rows = neighbours.rows(ids[:, : end - 1], start, end)
        assert torch.equal(rows, _table_rows(cells, size, ids, start, end)), "knows no more than what comes before"
        assert torch.equal(neighbours(ids, start, end), neighbours.table.weight[rows].sum(dim=2))
        longer = torch.cat([ids, torch.zeros_like(ids)], dim=1)  # as a cache is longer than what it holds
        assert torch.equal(neighbours.rows_at(longer, torch.tensor([start])), rows[:, 0])


def test_all_neighbours_come_before_the_cell() -> None:
    for down, right in OFFSETS.values():
        assert down < 0 or (down == 0 and right < -1), "the cell to the left is what predicts"


def test_a_cache_remembers_the_ids_it_has_read() -> None:
    ids = torch.randint(CODES, (3, 9))
    cache = KVCache.allocate(1, 3, 2, 20, 4)
    assert torch.equal(DALLE.read(ids[:, :4], 0, cache), ids[:, :4])
    assert torch.equal(DALLE.read(ids[:, 4:6], 4, cache), ids[:, :6])


def test_a_checkpoint_from_before_loads_what_stood_above(tmp_path: Path) -> None:
    bundle = tiny_bundle('dalle.neighbours=["above"]')
    save_bundle(bundle, tmp_path)
    weights = load_weights(tmp_path / "dalle.safetensors")
    table = weights.pop("neighbours.table.weight")
    save_weights(tmp_path / "dalle.safetensors", {**weights, "above.weight": table})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"]["dalle"].pop("neighbours") == ["above"]
    config["recipe"]["dalle"]["above_embedding"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    dalle = load_bundle(tmp_path).dalle
    assert dalle is not None and dalle.neighbours is not None and dalle.config.neighbours == ("above",)
    assert torch.equal(dalle.neighbours.table.weight, table)


def test_the_older_key_is_refused_where_it_says_something_else() -> None:
    recipe = Recipe.parse({}, ["dalle.above_embedding=true", 'dalle.neighbours=["above"]'])
    assert recipe.dalle.neighbours == ("above",)
    with pytest.raises(ValueError, match=r"older name of dalle\.neighbours .*leave above_embedding out"):
        Recipe.parse({"dalle": {"neighbours": ["above", "two_left"]}}, ["dalle.above_embedding=false"])
    with pytest.raises(ValueError, match=r"neighbours is 3: leave above_embedding out"):
        Recipe.parse({}, ["dalle.above_embedding=true", "dalle.neighbours=3"])
    with pytest.raises(ValueError, match=r"dalle\.neighbours is .*: name each cell once"):
        Recipe.parse({"dalle": {"neighbours": ["above", "above"]}})
