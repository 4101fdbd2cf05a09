"""The picture index: exact, incremental, whole on disk, and searched by text or by picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_mini_impl import TextToImage
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.cli.pictures import find_pictures
from dalle_mini_impl.search import ENTRIES, GRAPH, Changes, Entry, PictureIndex
from tests.tiny import tiny_checkpoint

NAMES = ["a red heart", "a green apple", "a blue car", "a soccer ball"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


class Embedder:
    """Gives each file the vector of its content, and remembers which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, paths: Sequence[Path]) -> tuple[list[Path], Tensor]:
        self.asked += [path.name for path in paths]
        read = [path for path in paths if path.read_text() != "broken"]
        seeds = [int(path.read_text()) for path in read]
        vectors = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return read, F.normalize(torch.stack(vectors)) if vectors else torch.zeros(0, 1)


def files(folder: Path, **contents: str) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_text(content)
    return sorted(folder.iterdir())


def empty(folder: Path) -> PictureIndex:
    return PictureIndex(folder, "hash", [], torch.zeros(0, 1))


def test_only_new_and_changed_pictures_are_embedded(tmp_path: Path) -> None:
    embed = Embedder()
    paths = files(tmp_path, a="1", b="2", c="3")
    first, changes = empty(tmp_path).updated(paths, embed, batch_size=2)
    assert changes == Changes(added=3, kept=0, removed=0, unreadable=0) and embed.asked == ["a", "b", "c"]
    embed.asked.clear()
    (tmp_path / "b").write_text("20")
    (tmp_path / "c").unlink()
    second, changes = first.updated(files(tmp_path, d="4", e="broken"), embed)
    assert changes == Changes(added=2, kept=1, removed=1, unreadable=1) and embed.asked == ["b", "d", "e"]
    fresh, _ = empty(tmp_path).updated(sorted(tmp_path.iterdir()), Embedder())
    ours = {entry: vector.tolist() for entry, vector in zip(second.entries, second.vectors, strict=True)}
    theirs = {entry: vector.tolist() for entry, vector in zip(fresh.entries, fresh.vectors, strict=True)}
    assert ours == theirs
    nothing, changes = second.updated([], embed)
    assert changes.removed == 3 and nothing.entries == []


def test_a_file_that_was_touched_is_embedded_again(tmp_path: Path) -> None:
    paths, embed = files(tmp_path, a="1"), Embedder()
    index, _ = empty(tmp_path).updated(paths, embed)
    os.utime(paths[0], ns=(1, 1))
    assert index.updated(paths, embed)[1].added == 1


def test_search_is_exact_and_breaks_ties_by_name(tmp_path: Path) -> None:
    contents = {f"p{i:03}": str(i % 50) for i in range(100)}
    index, _ = empty(tmp_path).updated(files(tmp_path, **contents), Embedder())
    query = F.normalize(torch.randn(8, generator=torch.Generator().manual_seed(99)), dim=0)
    hits = index.search(query, top=7)
    scores = index.vectors @ query
    slow = sorted(range(100), key=lambda row: (-scores[row].item(), index.entries[row].path))[:7]
    assert [hit.path for hit in hits] == [tmp_path / index.entries[row].path for row in slow]
    assert [hit.score for hit in hits] == [scores[row].item() for row in slow]
    assert len(index.search(query, top=1000)) == 100
    with pytest.raises(ValueError, match="top is 0"):
        index.search(query, top=0)
    with pytest.raises(ValueError, match="the index is empty"):
        empty(tmp_path).search(query)


def test_an_index_comes_back_from_disk_and_replaces_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    place = tmp_path / "index"
    index, _ = empty(tmp_path / "pictures").updated(files(tmp_path / "pictures", a="1", b="2"), Embedder())
    for _ in range(2):
        index.save(place)
    loaded = PictureIndex.load(place)
    assert loaded.entries == index.entries and loaded.folder == index.folder and loaded.clip == "hash"
    assert torch.allclose(loaded.vectors.float(), index.vectors, atol=1e-3)
    assert len(list(place.iterdir())) == 2, "the vectors of before are gone"


def test_a_folder_is_moved_with_the_index_inside_it(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    index, _ = empty(pictures).updated(files(pictures, a="1", b="2"), Embedder())
    index.save(pictures / "deep" / ".index")
    moved = pictures.rename(tmp_path / "moved")
    loaded = PictureIndex.load(moved / "deep" / ".index")
    assert loaded.folder == moved and all(hit.path.is_file() for hit in loaded.search(index.vectors[0]))
    embed = Embedder()
    assert loaded.updated([moved / "a", moved / "b"], embed)[1].kept == 2 and embed.asked == []


def test_what_else_lies_in_its_folder_stays(tmp_path: Path) -> None:
    for name in ("photos-vectors.npy", "2023-vectors.npy", "readme.txt"):
        (tmp_path / name).write_text("somebody's")
    index, _ = empty(tmp_path).updated([], Embedder())
    for _ in range(2):
        index.save(tmp_path)
    assert sum(path.read_bytes() == b"somebody's" for path in tmp_path.iterdir()) == 3
    assert len(list(tmp_path.glob("00*-vectors.npy"))) == 1


def test_where_nothing_has_changed_the_graph_stays(tmp_path: Path) -> None:
    embed = Embedder()
    first, _ = empty(tmp_path).updated(files(tmp_path, c="3"), embed)
    second, _ = first.updated(files(tmp_path, a="1"), embed)
    assert [entry.path for entry in second.entries] == ["c", "a"]
    graph = second.with_graph()
    again, changes = graph.updated(sorted([tmp_path / "a", tmp_path / "c"]), embed)
    assert changes.kept == 2 and again.graph is graph.graph and again.entries == second.entries


def large(folder: Path, number: int = 3000) -> PictureIndex:
    entries = [Entry(f"{row:05}.png", 1, 1) for row in range(number)]
    vectors = F.normalize(torch.randn(number, 16, generator=torch.Generator().manual_seed(3)), dim=1).half().float()
    return PictureIndex(folder, "hash", entries, vectors)


def test_a_graph_finds_nearly_always_what_exact_search_finds(tmp_path: Path) -> None:
    index = large(tmp_path)
    index.with_graph().save(tmp_path / "index")
    loaded = PictureIndex.load(tmp_path / "index")
    assert loaded.graph is not None and len(loaded.graph) == 3000
    missed = 0
    for query in F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(4)), dim=1):
        exact, quick = loaded.search(query, 10, exact=True), loaded.search(query, 10)
        assert [hit.path for hit in exact] == [hit.path for hit in index.search(query, 10)]
        missed += len({hit.path for hit in exact} - {hit.path for hit in quick})
        scores = {hit.path: hit.score for hit in exact}
        assert all(hit.score == pytest.approx(scores[hit.path], abs=1e-5) for hit in quick if hit.path in scores)
        assert [hit.score for hit in quick] == sorted((hit.score for hit in quick), reverse=True)
    assert missed <= 10, "2 % of 500"
    assert len(loaded.search(query, top=5000)) == 3000
    index.save(tmp_path / "index")  # without a graph, that of before is gone
    assert PictureIndex.load(tmp_path / "index").graph is None
    assert not list((tmp_path / "index").glob(f"*{GRAPH}"))


def test_without_the_library_an_index_is_searched_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(tmp_path, 40).with_graph().save(tmp_path / "index")
    assert PictureIndex.load(tmp_path / "index").graph is not None
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    loaded = PictureIndex.load(tmp_path / "index")
    assert loaded.graph is None
    assert len(loaded.search(loaded.vectors[0].float(), top=3)) == 3
    with pytest.raises(ValueError, match="needs the library usearch"):
        loaded.with_graph()


def test_a_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no index in"):
        PictureIndex.load(tmp_path)
    empty(tmp_path).save(tmp_path)
    next(tmp_path.glob("*.npy")).write_bytes(b"half")
    with pytest.raises(ValueError, match="delete it and index again"):
        PictureIndex.load(tmp_path)
    large(tmp_path, 40).with_graph().save(tmp_path / "large")
    graph = next((tmp_path / "large").glob(f"*{GRAPH}"))
    for part in (4, len(graph.read_bytes()) // 2):
        graph.write_bytes(graph.read_bytes()[:part])
        with pytest.raises(ValueError, match="delete it and index again"):
            PictureIndex.load(tmp_path / "large")
        large(tmp_path, 40).with_graph().save(tmp_path / "large")
        graph = next((tmp_path / "large").glob(f"*{GRAPH}"))
    large(tmp_path, 30).with_graph().graph.save(graph)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="40 pictures but 30 vectors in its graph"):
        PictureIndex.load(tmp_path / "large")
    (tmp_path / ENTRIES).write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="this version reads 2"):
        PictureIndex.load(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures drawn by the shipped checkpoint, named after what they show."""
    folder = tmp_path_factory.mktemp("drawn")
    model = TextToImage.from_pretrained("emoji")
    for pictures in model.draw(NAMES, candidates=4, keep=2):
        for picture in pictures:
            picture.image.save(folder / f"{picture.prompt}-{picture.rank}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_pictures_are_found_by_what_they_show(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "index")
    assert run("index", str(drawn), "--index", place) == 0
    said = capsys.readouterr()
    assert "8 embedded, 0 as they were, 0 gone, 1 left out" in said.out and "broken.png" in said.err
    for name in NAMES:
        assert run("search", name, "--index", place, "--top", "2") == 0
        found = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
        assert {Path(path).name for path in found} == {f"{name}-1.png", f"{name}-2.png"}
    one = drawn / f"{NAMES[0]}-1.png"
    out = tmp_path / "out"
    assert run("search", "--like", str(one), "--index", place, "--out", str(out)) == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines[0]["file"] == str(one) and lines[0]["score"] == pytest.approx(1.0, abs=2e-3) and len(lines) == 8
    assert (out / "sheet.png").stat().st_size > 1000
    assert run("index", str(drawn), "--index", place, "--approximate") == 0
    assert "0 embedded, 8 as they were" in capsys.readouterr().out
    assert len(list((tmp_path / "index").glob(f"*{GRAPH}"))) == 1
    assert run("index", str(drawn), "--index", place) == 0  # it stays an index with a graph
    assert len(list((tmp_path / "index").glob(f"*{GRAPH}"))) == 1
    for how in ([], ["--exact"]):
        assert run("search", NAMES[0], "--index", place, "--top", "1", *how) == 0
        assert f"{NAMES[0]}-" in capsys.readouterr().out


def test_an_index_that_cant_have_a_graph_says_so_before_it_embeds(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert run("index", str(drawn), "--index", str(tmp_path / "index"), "--approximate") == 2
    assert "needs the library usearch" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


def test_what_is_left_out_and_where_nothing_can_be_written_is_said(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    (pictures / ".thumbnails").mkdir(parents=True)
    one = next(drawn.glob("a*.png")).read_bytes()
    for name in ("one.png", "._one.png", ".thumbnails/one.png"):
        (pictures / name).write_bytes(one)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two.png").write_bytes(one)
    (pictures / "linked").symlink_to(tmp_path / "elsewhere")
    (pictures / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert [path.relative_to(pictures).as_posix() for path in find_pictures([pictures])] == [
        "linked/two.png",
        "one.png",
    ]
    (tmp_path / "file").touch()
    assert run("index", str(pictures), "--index", str(tmp_path / "file" / "index")) == 1
    assert "nothing has been done yet" in capsys.readouterr().err
    assert run("index", str(pictures)) == 0
    (pictures / "one.png").unlink()
    (tmp_path / "elsewhere" / "two.png").write_bytes(one[:200])
    assert run("search", "a heart", "--index", str(pictures), "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "1 of them are no longer there" in said and "left out" in said and "two.png" in said


def test_the_index_lies_beside_the_pictures_unless_told_otherwise(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("index", str(drawn)) == 0
    capsys.readouterr()
    assert run("search", "a red heart", "--index", str(drawn), "--top", "1") == 0
    assert "a red heart" in capsys.readouterr().out
    other = str(tiny_checkpoint(tmp_path / "tiny"))
    assert run("search", "a red heart", "--index", str(drawn), "--checkpoint", other) == 2
    assert "made by another CLIP, emoji@" in capsys.readouterr().err
    assert run("search", "--index", str(drawn)) == 2
    assert "give a text" in capsys.readouterr().err
    assert run("search", "a heart", "--index", str(tmp_path)) == 2
    assert "there is no index" in capsys.readouterr().err
