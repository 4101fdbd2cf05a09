"""Tables on disk: CSV, TSV, JSON, JSON lines, parquet and COCO captions, by the readers of the `datasets` library."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.columns import IMAGE_NAMES, captions_of, looks_like_picture, split_in, text_encoding
from dalle_mini_impl.data.records import Record, Split
from dalle_mini_impl.data.rows import Part, RowSource, find_picture, load_rows, path_record, picture_folders

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""File name endings of tables; a .txt file is one if its first line is a header (`is_text_table`)."""

_JSON_ENCODING = "utf-8-sig"  # with a mark at the beginning or without one
_DELIMITERS = (",", "\t", ";", "|")


def table_kind(path: Path) -> str:
    """The form of a table by its ending."""
    kinds = {".tsv": "TSV", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON", ".parquet": "parquet"}
    return kinds.get(path.suffix.lower(), "CSV")


def table_part(path: Path, split: Split | None = None) -> Part:
    """A table file, whose pictures lie in it or beside it."""
    reader = {"CSV": _csv_rows, "TSV": _csv_rows, "parquet": _parquet_rows}.get(table_kind(path), _json_rows)
    return Part(path.name, lambda: reader(path), split, picture_folders(path.parent))


def table_source(paths: list[Path], config: DataConfig) -> RowSource:
    """One table, or the tables of several splits, told by their file names."""
    splits = [split_in(path.name) for path in paths] if len(paths) > 1 else [None]
    return RowSource(
        kind=table_kind(paths[0]),
        describe=f"{table_kind(paths[0])} {', '.join(map(str, paths))}",
        config=config,
        parts=tuple(table_part(path, split) for path, split in zip(paths, splits, strict=True)),
        roots=tuple(paths),
    )


def is_text_table(path: Path) -> bool:
    """Whether a .txt file is a CSV or TSV with a header, as Flickr8k's captions.txt."""
    try:
        sheet = _sheet(path)
    except (OSError, ValueError, csv.Error):  # csv.Error: a line longer than a cell may be
        return False
    return (
        len(sheet.columns) > 1 and sheet.header and any(name.strip().lower() in IMAGE_NAMES for name in sheet.columns)
    )


@dataclass(frozen=True)
class _Sheet:
    """How a CSV file is written."""

    delimiter: str
    columns: list[str]
    header: bool
    encoding: str


def _sheet(path: Path) -> _Sheet:
    """Tells delimiter and columns of a CSV file from its first line, and its encoding."""
    encoding = text_encoding(path.read_bytes())
    with open(path, encoding=encoding, errors="replace", newline="") as lines:
        line = next((line for line in lines if line.strip()), "")
    if not line:
        raise ValueError(f"{path} is empty")
    cells = {mark: next(csv.reader([line], delimiter=mark, skipinitialspace=True)) for mark in _DELIMITERS}
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=lambda mark: len(cells[mark]))
    first = [cell.strip() for cell in cells[delimiter]]
    if any(looks_like_picture(cell) for cell in first):  # no header: the first row names a picture already
        spot = next(index for index, cell in enumerate(first) if looks_like_picture(cell))
        names = ["image" if index == spot else f"caption_{index}" for index in range(len(first))]
        return _Sheet(delimiter, names, False, encoding)
    unique = [name if first.index(name) == index and name else f"{name}.{index}" for index, name in enumerate(first)]
    return _Sheet(delimiter, unique, True, encoding)


def _csv_rows(path: Path) -> Any:
    """The rows of a CSV or TSV file, every cell as the text it is: "NA" and "007" are captions like any other."""
    from datasets import Features, Value

    sheet = _sheet(path)
    columns = _columns_of_rows(path, sheet) if sheet.header else sheet.columns
    return load_rows(
        "csv",
        [str(path)],
        sep=sheet.delimiter,
        column_names=columns,
        header=0 if sheet.header else None,
        features=Features({name: Value("string") for name in columns}),
        keep_default_na=False,
        skipinitialspace=True,
        encoding=sheet.encoding,
        encoding_errors="replace",
    )


def _columns_of_rows(path: Path, sheet: _Sheet) -> list[str]:
    """The header's columns, with names for cells that rows have besides: their numbers ahead, or blank ones at the end.

    Where the first row is longer than the header, the reader would take its first cells for names of rows and move all
    others to the left. Raises ValueError where that is because of a caption.
    """
    with open(path, encoding=sheet.encoding, errors="replace", newline="") as lines:
        rows = filter(None, csv.reader(lines, delimiter=sheet.delimiter, skipinitialspace=True))
        next(rows)
        row = next(rows, [])
    more = len(row) - len(sheet.columns)
    if more <= 0:
        return sheet.columns
    unnamed = [f".{index}" for index in range(len(sheet.columns), len(row))]
    if not any(cell.strip() for cell in row[-more:]):
        return sheet.columns + unnamed
    spot = next((index for index, name in enumerate(sheet.columns) if name.lower() in IMAGE_NAMES), None)
    if more == 1 and spot is not None and looks_like_picture(row[spot + 1]):
        return unnamed + sheet.columns
    raise ValueError(
        f"the first row has {len(row)} cells, the header {len(sheet.columns)} "
        "(a caption with the delimiter in it needs quotes)"
    )


def _parquet_rows(path: Path) -> Any:
    return load_rows("parquet", [str(path)])


def _json_rows(path: Path) -> Any:
    """The rows of JSON lines, of a JSON list, or of the first list of objects in a JSON object."""
    key = None
    if path.suffix.lower() == ".json":
        key = next((key for key, value in _json_object(path).items() if _is_objects(value)), None)
    return _json_field(path, key) if key else load_rows("json", [str(path)])


def _json_field(path: Path, key: str) -> Any:
    """The objects of a list in a JSON object."""
    return load_rows("json", [str(path)], field=key, encoding=_JSON_ENCODING)


def _json_object(path: Path) -> dict[str, Any]:
    """The top of a JSON file if it is one object, {} if it is a list or JSON lines."""
    try:
        with open(path, encoding=_JSON_ENCODING) as file:
            tree = json.load(file)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_coco(path: Path) -> bool:
    """Whether a JSON file holds COCO captions."""
    tree = _json_object(path)
    images, annotations = tree.get("images", []), tree.get("annotations", [])
    return _is_objects(images) and _is_objects(annotations) and "caption" in annotations[0]


@dataclass(frozen=True)
class CocoSource:
    """COCO captions: pictures and captions in two lists of a JSON file, joined by the picture's id."""

    files: tuple[Path, ...]
    config: DataConfig
    kind: str = "COCO captions"

    @property
    def describe(self) -> str:
        """What is read."""
        return f"COCO captions {', '.join(map(str, self.files))}"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The files that a fingerprint has to cover."""
        return self.files

    def __iter__(self) -> Iterator[Record]:
        for path in self.files:
            yield from self._read(path)

    def _read(self, path: Path) -> Iterator[Record]:
        split = split_in(path.name)
        folders = _coco_folders(path)
        captions: dict[str, list[str]] = {}
        for row in _coco_rows(path, "annotations", ("image_id", "caption")):
            texts = [""] if row["caption"] is None else captions_of(row["caption"])
            captions.setdefault(str(row["image_id"]), []).extend(texts)
        for row in _coco_rows(path, "images", ("id", "file_name")):
            name = str(row["file_name"])
            found = find_picture(name, folders)
            yield path_record(name, found, tuple(captions.get(str(row["id"]), ())), split, self.config)


def _coco_rows(path: Path, field: str, keys: tuple[str, ...]) -> Iterator[Any]:
    """The objects of one of the lists; raises ValueError where they lack a key."""
    for row in _json_field(path, field):
        missing = [key for key in keys if key not in row]
        if missing:
            raise ValueError(f"{path}: its {field} have no {' and no '.join(missing)}, which COCO captions need")
        yield row


def _coco_folders(path: Path) -> tuple[Path, ...]:
    """Where COCO keeps pictures: beside the file or beside its folder, in "val2017" for captions_val2017.json."""
    year = re.sub(r"^(captions|instances|annotations)[_-]*", "", path.stem)
    bases = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    names = dict.fromkeys((year, year.rstrip("0123456789")))
    places = [place for base in bases for place in picture_folders(base)]
    return (*(place / name for place in places for name in names if name), *places)
