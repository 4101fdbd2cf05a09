"""One streaming pass from a source of captioned pictures to a folder that training reads without further ado.

FOLDER/pictures.npy     uint8 (N, S, S, 3), memory-mapped
FOLDER/captions.jsonl   a line a picture: name, captions, split
FOLDER/index.json       the request that the folder answers, and the fingerprint of its content
FOLDER/data-report.json what was read, kept, skipped and why
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.outcomes import outcomes
from dalle_mini_impl.data.pictures import PictureError, quiet
from dalle_mini_impl.data.records import SPLITS, Source, Split, unbroken
from dalle_mini_impl.data.report import NoPicturesError, Tally, assign_splits
from dalle_mini_impl.data.shard_parts import ShardParts
from dalle_mini_impl.data.sources import content_key, files_key, open_source, resolve_spec
from dalle_mini_impl.files import flush, naming, remove_leftovers

logger = logging.getLogger("dalle_mini_impl.data")

Progress = Callable[[int, int | None], None]
"""Called with the number of records done and, where the source knows it, of all."""

FORMAT = 1
_PICTURES, _CAPTIONS, _INDEX, _REPORT = "pictures.npy", "captions.jsonl", "index.json", "data-report.json"


class PreparedData:
    """Captioned square pictures on disk, split for training."""

    def __init__(
        self,
        pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        names: list[str],
        captions: list[tuple[str, ...]],
        splits: Sequence[Split],
        report: dict[str, Any],
        fingerprint: str,
    ) -> None:
        self.pictures = pictures
        """uint8 (N, S, S, 3), a read-only memory map."""
        self.names = names
        self.captions = captions
        """The captions of each picture; () for an uncaptioned one."""
        self.train, self.validation, self.test = (
            np.array([i for i, split in enumerate(splits) if split == wanted], dtype=np.int64) for wanted in SPLITS
        )
        self.report = report
        self.fingerprint = fingerprint
        """Changes when a picture, a caption or a split does."""

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int] | np.ndarray[Any, Any] | Tensor) -> Tensor:
        """The pictures of some indices as float32 (B, 3, S, S) in [0, 1]."""
        pixels = self.pictures[np.asarray(indices, dtype=np.int64)]  # (B, S, S, 3), a copy
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255.0).contiguous()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a prepared folder; raises ValueError where there is none."""
        folder = Path(folder)
        if not (folder / _INDEX).is_file():
            raise ValueError(f"{folder} holds no prepared data (no {_INDEX}): run prepare() on a source first")
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{folder} has data format {index['format']}, this version reads {FORMAT}: delete it")
        with open(folder / _CAPTIONS, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return cls(
            pictures=np.load(folder / _PICTURES, mmap_mode="r"),
            names=[row["name"] for row in rows],
            captions=[tuple(row["captions"]) for row in rows],
            splits=[row["split"] for row in rows],
            report=json.loads((folder / _REPORT).read_text(encoding="utf-8")),
            fingerprint=index["fingerprint"],
        )


def prepare(
    spec: str,
    config: DataConfig,
    folder: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    expected: str | None = None,
) -> PreparedData:
    """Reads a source (see `sources.open_source`) into a folder, or re-opens the folder if it answers the same request.

    Several processes share tar shards out among them; what else there is, the first one reads. A preparation of shards
    that was stopped goes on with the first shard that isn't done. barrier: waits for all processes.
    expected: the fingerprint of the pictures that have to come out. A folder that has it stays where the source gives
    others by now, or can't be read any more.
    Pictures that can't be used are skipped, counted and named in the report. Raises ValueError for a source that can't
    be recognised, NoPicturesError where none remains, and ChangedPicturesError where others than expected came out.
    """
    folder = Path(folder)
    if rank:
        _help(spec, config, folder, rank, world_size)
        barrier()  # the first process puts the parts together
    else:
        _lead(spec, config, folder, world_size, barrier, progress, expected)
    barrier()
    data = PreparedData.open(folder)
    _check_expected(data.fingerprint, expected, spec, folder)
    return data


class ChangedPicturesError(ValueError):
    """A source gives other pictures or captions than it once did."""


def _check_expected(fingerprint: str | None, expected: str | None, spec: str, folder: Path) -> None:
    if expected not in (None, fingerprint):
        raise ChangedPicturesError(
            f"the pictures or captions of {spec} changed since {folder} was made, which stays as it is: bring them "
            f"back, or choose another --out"
        )


def _lead(
    spec: str,
    config: DataConfig,
    folder: Path,
    world_size: int,
    barrier: Callable[[], None],
    progress: Progress | None,
    expected: str | None,
) -> None:
    """The first process's part of `prepare`."""
    source = _open_or_do_without(spec, config, folder, expected)
    _check_apart(source, spec, folder)
    request = {} if source is None else _request(spec, config, source)
    if source is None or _answers(folder, request):
        barrier()
        return
    parts = ShardParts.of(source, config, folder, request)
    if parts is not None:
        parts.fill(0, world_size, progress)
    barrier()
    _make(folder, source, spec, config, request, parts, progress, expected)


def _open_or_do_without(spec: str, config: DataConfig, folder: Path, expected: str | None) -> Source | None:
    """The source; None where it can't be opened any more and the folder has what is expected of it."""
    try:
        return open_source(spec, config)
    except (ValueError, OSError) as error:
        if expected is None or _fingerprint(folder) != expected:
            raise
        logger.warning("%s can't be read any more, its pictures in %s are taken: %s", spec, folder, error)
        return None


def _check_apart(source: Source | None, spec: str, folder: Path) -> None:
    """Raises ValueError where what is made of pictures would lie among them, and be read as one of them next time."""
    place = folder.resolve()
    for root in (root.resolve() for root in getattr(source, "roots", ()) if root.is_dir()):
        is_read = place.is_relative_to(root) and not any(part.startswith(".") for part in place.relative_to(root).parts)
        if is_read:
            raise ValueError(f"{folder} lies in --data {spec}, whose files are all read: choose an --out elsewhere")


def _request(spec: str, config: DataConfig, source: Source) -> dict[str, Any]:
    """What a prepared folder has to answer."""
    return {
        "spec": resolve_spec(spec),
        "config": config.model_dump(mode="json", exclude={"views"}),
        "content": content_key(source),
    }


def _help(spec: str, config: DataConfig, folder: Path, rank: int, world_size: int) -> None:
    """Prepares this process's share of tar shards, if that is what there is; the first process does what is left."""
    if ".tar" not in spec and not Path(spec).expanduser().is_dir():
        return
    try:
        source = open_source(spec, config)
        request = _request(spec, config, source)
        parts = None if _answers(folder, request) else ShardParts.of(source, config, folder, request)
        if parts is not None:
            parts.fill(rank, world_size)
    except (ValueError, OSError) as error:  # on a machine that doesn't see the data, or whose disk is full
        logger.warning("process %d doesn't help to prepare the pictures: %s", rank, error)


def _make(
    folder: Path,
    source: Source,
    spec: str,
    config: DataConfig,
    request: dict[str, Any],
    parts: ShardParts | None,
    progress: Progress | None,
    expected: str | None,
) -> None:
    """Writes the folder and removes what it was made of. Raises ChangedPicturesError before anything is replaced."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    for ending in ("partial", "old"):
        remove_leftovers(folder.parent, f".{glob.escape(folder.name)}.*.{ending}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming(folder):
            _fill(partial, source, spec, config, request, parts, progress)
        _check_expected(_fingerprint(partial), expected, spec, folder)
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    ShardParts.remove(folder)


def _answers(folder: Path, request: dict[str, Any]) -> bool:
    """Whether the folder was made from this request and the pictures' own files haven't changed since."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index["request"] != request:
            return False
        return bool(index["files_key"] == files_key(Path(path) for path in index["files"]))
    except (OSError, ValueError, KeyError):
        return False


def _fingerprint(folder: Path) -> str | None:
    """Of the pictures in a prepared folder; None where there are none."""
    try:
        return str(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def _move_into_place(partial: Path, folder: Path) -> None:
    """Renames, once all is on the disk and an earlier request out of the way; no reader ever sees half a folder."""
    for path in partial.iterdir():
        flush(path)
    if folder.exists():
        if any(folder.iterdir()) and not (folder / _INDEX).is_file():
            raise ValueError(f"{folder} exists and holds something else than prepared data: choose another folder")
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(folder)


def _fill(
    folder: Path,
    source: Source,
    spec: str,
    config: DataConfig,
    request: dict[str, Any],
    parts: ShardParts | None,
    progress: Progress | None,
) -> None:
    """Writes the four files."""
    tally = Tally()
    files: list[str] = []
    with open(folder / _PICTURES, "w+b") as out, quiet():
        size = config.image_size
        header = _write_header(out, (0, size, size, 3))
        total = len(source) if isinstance(source, Sized) else None
        every = outcomes(unbroken(source, source.kind), config) if parts is None else parts.outcomes()
        for done, (record, outcome) in enumerate(every, start=1):
            if record.path is not None:
                files.append(str(record.path))
            if isinstance(outcome, PictureError):
                tally.skip(outcome.reason, record.name, outcome.detail)
            else:
                out.write(outcome.pixels.tobytes())
                tally.keep(record.name, outcome.captions, len(record.captions), record.split, outcome.digest)
            if progress is not None:
                progress(done, total)
        out.seek(0)
        assert _write_header(out, (tally.kept, size, size, 3)) == header
    splits, splits_from = assign_splits(tally.stated, tally.digests, config.validation_fraction)
    fingerprint = hashlib.sha256(f"{size} {config.fit}".encode())
    with open(folder / _CAPTIONS, "w", encoding="utf-8") as lines:
        for name, captions, split, digest in zip(tally.names, tally.captions, splits, tally.digests, strict=True):
            line = json.dumps({"name": name, "captions": captions, "split": split})
            lines.write(line + "\n")
            fingerprint.update(digest + line.encode())
    report = tally.report(splits, splits_from, config, fingerprint=fingerprint.hexdigest())
    report = {"source": spec, "kind": source.kind, "describe": source.describe, **report}
    if not tally.kept:
        raise NoPicturesError(tally.why_nothing_was_kept(spec, source.kind), report)
    index = {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "request": request,
        "files_key": files_key(Path(path) for path in files),
        "files": files,
    }
    (folder / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / _INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")


def _write_header(out: IO[bytes], shape: tuple[int, ...]) -> int:
    """Writes a .npy header and returns where it ends; NumPy leaves room in it for the first axis to grow."""
    npy_format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.tell()
