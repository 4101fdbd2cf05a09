"""Tar shards shared out over processes: the same folder as one process makes, and nothing read twice after a stop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data import prepare as module
from dalle_mini_impl.data.prepare import PreparedData, prepare
from dalle_mini_impl.data.shards import ShardSource
from tests.test_sources import encoded, picture, tar

CONFIG = DataConfig(image_size=16)
COLOURS = ("red", "green", "blue", "red", "green")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of four pictures: one of them unreadable, one with a blank caption, one shard cut short."""
    folder = tmp_path / "shards"
    for number, colour in enumerate(COLOURS):
        members: dict[str, bytes] = {}
        for index in range(4):
            members[f"{index}.png"] = encoded(picture(colour))
            members[f"{index}.txt"] = f" a {colour} square {index} \n".encode()
        members["1.png"] = b"no picture" if number == 1 else members["1.png"]
        members["2.txt"] = b"  " if number == 3 else members["2.txt"]
        tar(folder / f"{'val' if number == 4 else 'train'}-{number}.tar", members)
    cut = folder / "train-2.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    return folder


def told(data: PreparedData) -> dict[str, Any]:
    """The report, without Pillow's words on what is no picture: they have an address in them."""
    skipped = {reason: found["names"] for reason, found in data.report["skipped"].items()}
    return {**data.report, "skipped": skipped}


def same(one: PreparedData, two: PreparedData) -> bool:
    return (
        one.fingerprint == two.fingerprint
        and told(one) == told(two)
        and one.names == two.names
        and np.array_equal(one.pictures, two.pictures)
    )


@pytest.fixture
def in_one_go(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    """What comes of it without any parts."""
    with monkeypatch.context() as patch:
        patch.setattr(module.ShardParts, "of", staticmethod(lambda *_: None))
        data = prepare(str(shards), CONFIG, tmp_path / "in one go")
    assert {reason: found["count"] for reason, found in data.report["skipped"].items() if found["count"]} == {
        "unreadable": 2,
        "empty_caption": 1,
    }
    assert len(data.validation) == 4
    return data


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    original = ShardSource.read_shard

    def read_shard(self: ShardSource, shard: str):  # type: ignore[no-untyped-def]
        read.append(Path(shard).name)
        return original(self, shard)

    monkeypatch.setattr(ShardSource, "read_shard", read_shard)
    return read


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_several_processes_make_the_folder_of_one(
    shards: Path, tmp_path: Path, in_one_go: PreparedData, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    read = count_reads(monkeypatch)
    barrier = threading.Barrier(world_size)
    made: dict[int, PreparedData] = {}

    def one(rank: int) -> None:
        made[rank] = prepare(
            str(shards), CONFIG, tmp_path / "out", rank=rank, world_size=world_size, barrier=lambda: void(barrier)
        )

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(path.name for path in shards.iterdir()), "each shard is read once, by one process"
    assert len(made) == world_size and all(same(data, in_one_go) for data in made.values())
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []


def void(barrier: threading.Barrier) -> None:
    barrier.wait(timeout=60)


def test_a_stopped_preparation_goes_on_with_the_next_shard(
    shards: Path, tmp_path: Path, in_one_go: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(shards), CONFIG, tmp_path / "out", progress=stop)
    read = count_reads(monkeypatch)
    assert same(prepare(str(shards), CONFIG, tmp_path / "out"), in_one_go)
    assert 0 < len(read) < len(COLOURS) and "train-0.tar" not in read


def test_parts_of_other_shards_are_not_taken_for_these(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(shards), CONFIG, tmp_path / "out")
    tar(shards / "train-0.tar", {"9.png": encoded(picture("blue")), "9.txt": b"a blue square"})
    names = prepare(str(shards), CONFIG, tmp_path / "out").names
    assert "train-0.tar/9" in names and "train-0.tar/0" not in names


def test_a_process_that_cant_see_the_shards_leaves_them_to_the_first(tmp_path: Path, shards: Path) -> None:
    done = []

    def barrier() -> None:
        if not done:  # the first process, meanwhile
            done.append(prepare(str(shards), CONFIG, tmp_path / "out"))

    data = prepare(str(tmp_path / "not-here.tar"), CONFIG, tmp_path / "out", rank=1, world_size=2, barrier=barrier)
    assert same(data, done[0])
