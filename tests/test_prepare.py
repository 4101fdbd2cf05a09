"""One pass prepares data that opens again unchanged, splits by content, and never raises for a single bad picture."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures_on_disk import colour_of, put
from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data import prepare as module
from dalle_mini_impl.data.prepare import PreparedData, prepare
from dalle_mini_impl.data.records import Record, Split
from dalle_mini_impl.data.report import assign_splits

CONFIG = DataConfig(image_size=16)


class Noise:
    """A source whose pictures all differ; it counts its readings."""

    kind, describe, roots = "noise", "noise", ()

    def __init__(self, count: int, side: int = 16, fail_at: int | None = None) -> None:
        self.count, self.side, self.fail_at, self.readings = count, side, fail_at, 0

    def __iter__(self) -> Iterator[Record]:
        self.readings += 1
        for index in range(self.count):
            if index == self.fail_at:
                raise RuntimeError("the disk is gone")
            yield Record(f"{index}", lambda i=index: self.draw(i), (f"number {index}",), None)  # type: ignore[misc]

    def draw(self, index: int) -> Image.Image:
        generator = np.random.default_rng(index)
        return Image.fromarray(generator.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8))


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    source = Noise(200)
    monkeypatch.setattr(module, "open_source", lambda spec, config: source)
    return source


def folder_of_pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        put(root / f"{name}.png", ("red", "green", "blue")[number % 3], (20 + number, 20))
        (root / f"{name}.txt").write_text(f"picture {name}", encoding="utf-8")
    return root


def test_pictures_keep_their_order_pixels_and_captions(noise: Noise, tmp_path: Path) -> None:
    data = prepare("noise", CONFIG, tmp_path / "data")
    assert len(data) == 200 and data.pictures.shape == (200, 16, 16, 3)
    assert isinstance(data.pictures, np.memmap) and not data.pictures.flags.writeable
    for index in (0, 1, 63, 64, 65, 199):
        assert np.array_equal(data.pictures[index], np.asarray(noise.draw(index)))
        assert data.captions[index] == (f"number {index}",) and data.names[index] == str(index)
    images = data.images([5, 3])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(images[0], torch.from_numpy(np.asarray(noise.draw(5)).copy()).permute(2, 0, 1) / 255)
    assert torch.equal(data.images(torch.tensor([5, 3])), data.images(np.array([5, 3])))


def test_the_number_of_threads_that_read_pictures_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uneven(Noise):
        def draw(self, index: int) -> Image.Image:
            time.sleep(0.002 * (index % 3 == 0))  # later pictures overtake it
            return super().draw(index)

    monkeypatch.setattr(module, "open_source", lambda spec, config: Uneven(20))
    made = []
    for count in (1, 5):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        made.append(prepare("x", CONFIG, tmp_path / str(count)))
    one, five = made
    assert (one.names, one.captions, one.fingerprint) == (five.names, five.captions, five.fingerprint)
    assert np.array_equal(one.pictures, five.pictures) and np.array_equal(one.train, five.train)


def test_progress_counts_every_record(noise: Noise, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    prepare("noise", CONFIG, tmp_path / "data", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, None) for done in range(1, 201)]


def test_same_request_is_opened_not_redone(noise: Noise, tmp_path: Path) -> None:
    first = prepare("noise", CONFIG, tmp_path / "data")
    again = prepare("noise", CONFIG.model_copy(update={"views": ("plain", "flip")}), tmp_path / "data")
    assert noise.readings == 1 and first.fingerprint == again.fingerprint
    other = prepare("noise", CONFIG.model_copy(update={"image_size": 8}), tmp_path / "data")
    assert noise.readings == 2 and other.pictures.shape[1] == 8 and other.fingerprint != first.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"], "nothing is left beside the folder"


@pytest.mark.parametrize("change", ["caption", "picture", "new", "removed"])
def test_changed_folder_is_prepared_again(tmp_path: Path, change: str) -> None:
    root = folder_of_pictures(tmp_path / "in", "a", "b", "c")
    first = prepare(str(root), CONFIG, tmp_path / "data")
    assert prepare(str(root), CONFIG, tmp_path / "data").fingerprint == first.fingerprint
    if change == "caption":
        (root / "a.txt").write_text("something else", encoding="utf-8")
    elif change == "picture":
        put(root / "a.png", "grey")
    elif change == "new":
        folder_of_pictures(root, "d")
    else:
        (root / "a.png").unlink()
    assert prepare(str(root), CONFIG, tmp_path / "data").fingerprint != first.fingerprint


def test_changed_picture_that_a_table_names_is_noticed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.png", "red")
    put(tmp_path / "elsewhere" / "b.png", "green")
    table = tmp_path / "table" / "set.csv"
    table.parent.mkdir()
    table.write_text("image,caption\n../elsewhere/a.png,a\n../elsewhere/b.png,b\n")
    assert colour_of(prepare(str(table), CONFIG, tmp_path / "data").pictures[0]) == "red"
    picture = put(tmp_path / "elsewhere" / "a.png", "blue")
    os.utime(picture, (time.time() + 10, time.time() + 10))
    assert colour_of(prepare(str(table), CONFIG, tmp_path / "data").pictures[0]) == "blue"


def test_a_cell_that_cant_be_a_files_name_costs_its_own_row_alone(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        put(tmp_path / f"{name}.png", colour)
    cells = ["a.png", "a caption in the wrong column " * 20, "a\0.png", "b.png"]
    lines = [json.dumps({"image": cell, "caption": "one"}) + "\n" for cell in cells]
    (tmp_path / "set.jsonl").write_text("".join(lines), encoding="utf-8")
    data = prepare(str(tmp_path / "set.jsonl"), CONFIG, tmp_path / "data")
    assert data.names == ["a.png", "b.png"]
    assert data.report["skipped"]["unreadable"]["names"] == cells[1:3]


def test_source_that_breaks_off_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_source", lambda spec, config: Noise(50, fail_at=30))
    report = prepare("noise", CONFIG, tmp_path / "data").report
    assert report["kept"] == 30
    assert report["skipped"]["unreadable"]["names"] == ["noise: everything after record 30"]
    assert "the disk is gone" in report["skipped"]["unreadable"]["why"][0]


def test_failed_run_leaves_the_earlier_data_alone(noise: Noise, tmp_path: Path) -> None:
    prepare("noise", CONFIG, tmp_path / "data")

    def interrupted(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("other", CONFIG, tmp_path / "data", progress=interrupted)
    assert len(PreparedData.open(tmp_path / "data")) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_folder_of_something_else_is_never_replaced(noise: Noise, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="choose another folder"):
        prepare("noise", CONFIG, tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"


def test_nothing_is_made_among_the_pictures(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "in", "a", "b")
    for folder in (root, root / "run" / "data"):
        with pytest.raises(ValueError, match=r"lies in --data .*choose an --out elsewhere"):
            prepare(str(root), CONFIG, folder)
    assert len(prepare(str(root), CONFIG, root / ".run" / "data")) == 2, "hidden folders are not read"
    (root / "set.csv").write_text("image,caption\na.png,one\n", encoding="utf-8")
    assert len(prepare(str(root / "set.csv"), CONFIG, root / "run" / "data")) == 1, "a table says which are read"


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "in", "a", "b")
    (root / "a.png").write_bytes(b"")
    (root / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no usable picture.*1 unreadable, 1 empty caption.*a\.png"):
        prepare(str(root), CONFIG, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_open_refuses_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json"):
        PreparedData.open(tmp_path)


def test_memory_doesnt_grow_with_the_number_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_source", lambda spec, config: Noise(300, side=128))
    tracemalloc.start()
    prepare("noise", CONFIG.model_copy(update={"image_size": 128}), tmp_path / "data")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "data" / "pictures.npy").stat().st_size > 14_000_000
    assert peak_bytes < 12_000_000


def test_blank_captions_beside_good_ones_are_dropped_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "a.png", "captions": ["", "red", " "]}))
    data = prepare(str(tmp_path / "set.jsonl"), CONFIG, tmp_path / "data")
    assert data.captions == [("red",)] and data.report["blank_captions_dropped"] == 2


# --- splits


def digests(count: int) -> list[bytes]:
    return [np.random.default_rng(index).bytes(32) for index in range(count)]


def test_validation_doesnt_move_as_the_set_grows_or_is_reordered(noise: Noise, tmp_path: Path) -> None:
    small = prepare("noise", CONFIG, tmp_path / "small")
    assert 0 < len(small.validation) < 30 and len(small.train) + len(small.validation) == 200
    noise.count = 400
    large = prepare("noise", CONFIG.model_copy(update={"image_size": 8}), tmp_path / "large")
    assert [index for index in large.validation if index < 200] == small.validation.tolist()


def test_copies_of_a_picture_share_a_side() -> None:
    hashes = digests(100) * 2
    splits, _ = assign_splits([None] * 200, hashes, 0.2)
    assert splits[:100] == splits[100:] and 5 < splits.count("validation") / 2 < 40


def test_duplicates_are_counted_also_across_stated_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder_of_pictures(tmp_path / "in" / split, "a", "b")
    put(tmp_path / "in" / "train" / "copy.png", "red", (20, 20))
    report = prepare(str(tmp_path / "in"), CONFIG, tmp_path / "data").report
    assert (report["duplicates"], report["duplicates_across_splits"]) == (3, 2)
    assert (report["train"], report["validation"], report["splits_from"]) == (3, 2, "splits stated by the source")


@pytest.mark.parametrize("count", [20, 21, 40])
def test_validation_is_never_empty_from_twenty_pictures_on(count: int) -> None:
    high = [b"\xff" * 31 + bytes([index]) for index in range(count)]
    splits, decided_by = assign_splits([None] * count, high, 0.05)
    assert splits[0] == "validation" and splits.count("validation") == 1 and "lowest hash" in decided_by


def test_train_is_never_empty() -> None:
    same = [b"\0" * 32] * 30
    assert set(assign_splits([None] * 30, same, 0.05)[0]) == {"train"}
    stated: list[Split | None] = ["test"] * 30
    splits, decided_by = assign_splits(stated, digests(30), 0.1)
    assert set(splits) == {"train", "validation"} and "ignored" in decided_by


def test_stated_validation_is_honoured_and_test_is_left_alone() -> None:
    stated: list[Split | None] = ["train"] * 40 + ["validation"] * 5 + ["test"] * 5
    assert assign_splits(stated, digests(50), 0.5)[0] == stated
    without = ["train"] * 45 + ["test"] * 5
    splits, _ = assign_splits(without, digests(50), 0.5)
    assert splits[45:] == ["test"] * 5 and 5 < splits.count("validation") < 40


def test_zero_fraction_holds_nothing_out() -> None:
    assert set(assign_splits([None] * 50, digests(50), 0.0)[0]) == {"train"}


def test_pictures_of_forms_that_cant_be_read_are_named(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "in", "a")
    for name in ("b.HEIC", "c.jxl"):
        (root / name).write_bytes(b"a form without a reader")
    data = prepare(str(root), CONFIG, tmp_path / "data")
    assert data.report["skipped"]["unreadable"]["names"] == ["b.HEIC", "c.jxl"]


def test_report_is_written_and_complete(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "in", "a", "b", "c")
    (root / "c.txt").unlink()
    data = prepare(str(root), CONFIG, tmp_path / "data")
    report = json.loads((tmp_path / "data" / "data-report.json").read_text())
    assert report == data.report
    wanted = {"kind": "pictures with .txt captions", "pictures": 3, "kept": 3, "captioned": 2, "uncaptioned": 1}
    assert wanted.items() <= report.items() and report["captions"] == 2 and report["image_size"] == 16
    assert report["caption_length_characters"]["max"] == len("picture a")
    assert report["fingerprint"] == data.fingerprint
