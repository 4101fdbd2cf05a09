"""Data sets of the `datasets` library itself: saved to disk, in a folder that it can load, or on the hub."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import split_in
from dalle_mini_impl.data.rows import Part, RowSource, undecoded


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder: other programs, too, call a file state.json."""
    both = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in both)


def saved_source(folder: Path, config: DataConfig) -> RowSource:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises ValueError where it can't be opened, with the library's reason.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # the library's, pyarrow's, json's …
        raise ValueError(f"can't open the saved data set {folder}: {type(error).__name__}: {error}") from error
    splits = dict(found) if isinstance(found, DatasetDict) else {"rows": found}
    return _source("Hugging Face data set (save_to_disk)", str(folder), splits, config, (folder,))


def loadable_source(name: str, config: DataConfig, *, folder: Path | None = None) -> RowSource:
    """A data set that `load_dataset` knows: ``OWNER/NAME`` or ``OWNER/NAME:CONFIG`` on the hub, or a local folder.

    Raises ValueError where it can't be loaded, with the library's reason.
    """
    from datasets import load_dataset

    path, _, subset = (str(folder), "", "") if folder else name.partition(":")
    try:
        splits = load_dataset(path, subset or None, streaming=True)
    except Exception as error:  # the library's, the hub's, the network's
        where = f"the folder {folder}" if folder else f"a data set {name!r} of the Hugging Face hub"
        hint = "; it takes [, * and ? in a path for a pattern: rename the folder" if glob.has_magic(path) else ""
        raise ValueError(f"can't open {where}: {type(error).__name__}: {error}{hint}") from error
    kind = "Hugging Face data set (folder)" if folder else "Hugging Face data set (hub)"
    return _source(kind, name, dict(splits), config, (folder,) if folder else ())


def _source(kind: str, name: str, splits: dict[str, Any], config: DataConfig, roots: tuple[Path, ...]) -> RowSource:
    """One part a split; splits with names of their own ("unsupervised", "rows") count as not stated."""
    stated = {label: split_in(label) if len(splits) > 1 else None for label in splits}
    parts = tuple(
        Part(label, lambda rows=rows: undecoded(rows), stated[label], roots)  # type: ignore[misc]
        for label, rows in splits.items()
    )
    return RowSource(kind, f"{kind} {name}: {', '.join(splits)}", config, parts, roots)
