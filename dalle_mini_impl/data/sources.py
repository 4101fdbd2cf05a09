"""Finds out what `--data` was given and opens it."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import split_in
from dalle_mini_impl.data.folders import METADATA, MetadataFolder, PictureFolder, has_own_text, is_picture, texts_in
from dalle_mini_impl.data.hub import is_saved, loadable_source, saved_source
from dalle_mini_impl.data.made import MADE, open_made, probe
from dalle_mini_impl.data.records import Source
from dalle_mini_impl.data.shards import ShardSource, check_protocols, expand_shards
from dalle_mini_impl.data.tables import TABLES, CocoSource, is_coco, is_text_table, table_source

logger = logging.getLogger("dalle_mini_impl.data")

FORMS = """accepted are
  a folder of pictures with captions in x.txt beside x.jpg, in metadata.csv|jsonl|parquet, or in the folders' names;
  a table .csv, .tsv, .jsonl, .json or .parquet with a column of pictures or their paths and one of captions;
  a COCO captions file, or the folder that holds it; WebDataset shards: a .tar, a folder of them, "x-{000..009}.tar";
  a Hugging Face data set: a folder that save_to_disk wrote or load_dataset reads, or OWNER/NAME on the hub;
  a made source: "shapes", "shapes:count=20000,seed=1", "textures", "emoji", "emoji:scenes=30000"."""


def open_source(spec: str, config: DataConfig) -> Source:
    """Opens a source of captioned pictures, whose `kind` tells the form that was found.

    Raises ValueError that says what was found and which forms are accepted.
    """
    path = Path(spec).expanduser()
    name, _, arguments = spec.partition(":")
    if path.is_dir():
        return _open_folder(path, config)
    if path.is_file():
        return _open_file(path, config)
    if name in MADE:
        return open_made(name, arguments, config)
    if re.search(r"\.tar(\.gz)?$", spec):
        shards = expand_shards(str(path) if "://" not in spec else spec)
        if shards and all("://" in shard or Path(shard).is_file() for shard in shards):
            check_protocols(shards)
            return ShardSource(tuple(shards), config)
        missing = next((shard for shard in shards if "://" not in shard and not Path(shard).is_file()), spec)
        raise ValueError(f"--data {spec!r}: there is no shard {missing}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not spec.startswith("."):
        return loadable_source(spec, config)
    near = difflib.get_close_matches(name, MADE, n=1)
    hint = f"; did you mean the made source {near[0]!r}?" if near else ""
    raise ValueError(f"--data {spec!r}: no such file or folder{hint}; {FORMS}")


def _open_file(path: Path, config: DataConfig) -> Source:
    """A single file."""
    suffix = path.suffix.lower()
    if suffix == ".json" and is_coco(path):
        return CocoSource((path,), config)
    if suffix in TABLES or (suffix == ".txt" and is_text_table(path)):
        return table_source([path], config)
    if suffix == ".tar" or path.name.lower().endswith((".tar.gz", ".tgz")):
        return ShardSource((str(path),), config)
    raise ValueError(f"--data {path} is a file of a form that isn't known ({suffix or 'no ending'}); {FORMS}")


def _open_folder(root: Path, config: DataConfig) -> Source:
    """A folder: the most explicit statement of captions in it wins."""
    if is_saved(root):
        return saved_source(root, config)
    files = tuple(walk(root, _say_left_out))
    pictures = [path for path in files if is_picture(path)]
    coco = [path for path in files if _may_be_coco(path, root) and is_coco(path)]
    if coco:
        return CocoSource(tuple(coco), config)
    if pictures and any(path.name in METADATA for path in files):
        return MetadataFolder(root, files, config)
    shards = [str(path) for path in files if path.suffix.lower() == ".tar"]
    if shards and not pictures:
        return ShardSource(tuple(shards), config)
    if not pictures and any(path.suffix.lower() in (".parquet", ".arrow") for path in files):
        return loadable_source(str(root), config, folder=root)
    texts = texts_in(files)
    if not any(has_own_text(path, texts) for path in pictures):
        tables = [path for path in files if path.parent == root and _is_table(path)]
        if len(tables) == 1 or (tables and all(split_in(path.name) for path in tables)):
            return table_source(tables, config)
        if len(tables) > 1:
            raise ValueError(f"--data {root} holds several tables: {_names(tables)}; point --data at one of them")
    if pictures:
        return PictureFolder(root, files, config)
    raise ValueError(f"--data {root} holds no captioned pictures: {_inventory(files)}; {FORMS}")


def _say_left_out(error: OSError) -> None:
    logger.warning("%s can't be read (%s): what lies in it is left out", error.filename, error.strerror)


def _may_be_coco(path: Path, root: Path) -> bool:
    return path.suffix.lower() == ".json" and path.parent in (root, root / "annotations")


def _is_table(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in TABLES or (suffix == ".txt" and is_text_table(path))


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _inventory(files: tuple[Path, ...]) -> str:
    """What files there are, by their endings."""
    counts = Counter(path.suffix.lower() or "no ending" for path in files).most_common(8)
    return "found " + (", ".join(f"{count} {suffix}" for suffix, count in counts) or "nothing")


def resolve_spec(spec: str) -> str:
    """The same string for the same source: a path in full, anything else as it is."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def content_key(source: Source) -> str:
    """A cheap fingerprint of what a source would give: its files' sizes and times, or a few pictures that it draws."""
    roots: tuple[Path, ...] | None = getattr(source, "roots", None)
    if roots is None:
        return probe(source)
    return files_key(path for root in roots for path in walk(root)) if roots else source.describe


def files_key(paths: Iterable[Path]) -> str:
    """A digest of the paths, sizes and times of files, missing ones included."""
    digest = hashlib.sha256()
    for path in paths:
        name, state = path, "missing"
        try:
            name = path.resolve()
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: what a table names can't be a file's name
            pass
        digest.update(f"{name}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def walk(root: Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Every file below a folder, or the file itself, in a fixed order; hidden ones and macOS' copies left out.

    on_error: is told of folders that can't be read.
    """
    if not root.is_dir():
        yield root
        return
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=on_error, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        if os.path.realpath(folder) in seen:  # links that lead round in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)
