"""Each form of captioned pictures is recognised, and its captions, pixels and splits come out as they went in."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pictures_on_disk import colour_of, encoded, picture, put

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.made import parse_arguments
from dalle_mini_impl.data.pictures import PictureError, to_rgb
from dalle_mini_impl.data.sources import open_source

CONFIG = DataConfig(image_size=16)


def read(spec: str | Path, config: DataConfig = CONFIG) -> dict[str, tuple[Any, ...]]:
    """Name -> (colour or reason, captions, split) of every record."""
    found: dict[str, tuple[Any, ...]] = {}
    for record in open_source(str(spec), config):
        assert record.name not in found, f"two records are called {record.name}"
        try:
            seen: str = colour_of(to_rgb(record.load()))
        except PictureError as error:
            seen = error.reason
        found[record.name] = (seen, record.captions, record.split)
    return found


def kind(spec: str | Path) -> str:
    return open_source(str(spec), CONFIG).kind


def embedded(colour: str) -> dict[str, Any]:
    return {"bytes": encoded(picture(colour)), "path": None}


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- folders


def test_text_beside_picture_gives_a_caption_a_line_and_equal_stems_dont_clash(tmp_path: Path) -> None:
    put(tmp_path / "one" / "x.png", "red")
    put(tmp_path / "two" / "x.png", "blue")
    put(tmp_path / "two" / "bare.png", "green")
    put(tmp_path / ".hidden" / "y.png", "green")
    put(tmp_path / "._x.png", "green")
    write_lines(tmp_path / "one" / "x.txt", "a red square", "", "  something red ")
    (tmp_path / "two" / "x.txt").write_text("\ufeffein blaues Viereck", encoding="utf-8")
    assert kind(tmp_path) == "pictures with .txt captions"
    assert read(tmp_path) == {
        "one/x.png": ("red", ("a red square", "something red"), None),
        "two/bare.png": ("green", (), None),
        "two/x.png": ("blue", ("ein blaues Viereck",), None),
    }


def test_endings_of_texts_may_be_in_capitals(tmp_path: Path) -> None:
    (put(tmp_path / "a.png", "red")).rename(tmp_path / "A.PNG")
    write_lines(tmp_path / "A.TXT", "red")
    assert read(tmp_path) == {"A.PNG": ("red", ("red",), None)}
    put(tmp_path / "b.png", "blue")
    write_lines(tmp_path / "b.txt", "blue")
    assert read(tmp_path) == {"A.PNG": ("red", ("red",), None), "b.png": ("blue", ("blue",), None)}


def test_a_folder_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "red" / "a.png", "red")
    closed = put(tmp_path / "blue" / "b.png", "blue").parent
    scandir = os.scandir

    def refuse(place: Any) -> Any:
        if Path(place) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read(tmp_path) == {"red/a.png": ("red", ("red",), None)}
    assert f"{closed} can't be read (Permission denied)" in caplog.text


def test_split_folders_are_honoured_but_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    for split, colour in (("train", "red"), ("val", "green"), ("test", "blue")):
        put(tmp_path / "split" / split / "x.png", colour)
        write_lines(tmp_path / "split" / split / "x.txt", colour)
    assert read(tmp_path / "split") == {
        "test/x.png": ("blue", ("blue",), "test"),
        "train/x.png": ("red", ("red",), "train"),
        "val/x.png": ("green", ("green",), "validation"),
    }
    put(tmp_path / "vehicles" / "train" / "1.png", "red")
    put(tmp_path / "vehicles" / "sports_car" / "1.png", "blue")
    assert read(tmp_path / "vehicles") == {
        "sports_car/1.png": ("blue", ("sports car",), None),
        "train/1.png": ("red", ("train",), None),
    }


def test_class_folders_below_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train" / "red-apple" / "1.png", "red")
    put(tmp_path / "dev" / "green_pear" / "1.png", "green")
    assert kind(tmp_path) == "class folders"
    assert read(tmp_path) == {
        "dev/green_pear/1.png": ("green", ("green pear",), "validation"),
        "train/red-apple/1.png": ("red", ("red apple",), "train"),
    }


def test_a_long_line_of_text_beside_class_folders_is_no_table(tmp_path: Path) -> None:
    put(tmp_path / "red_apple" / "1.png", "red")
    (tmp_path / "log.txt").write_text("word " * 50_000)
    assert read(tmp_path) == {"red_apple/1.png": ("red", ("red apple",), None)}


def test_pictures_alone_are_uncaptioned(tmp_path: Path) -> None:
    put(tmp_path / "test_of_red.png", "red")
    assert kind(tmp_path) == "pictures without captions"
    assert read(tmp_path) == {"test_of_red.png": ("red", (), None)}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_imagefolder_metadata(tmp_path: Path, form: str) -> None:
    put(tmp_path / "train" / "a.png", "red")
    put(tmp_path / "train" / "unlisted.png", "blue")
    put(tmp_path / "validation" / "b.png", "green")
    for split, rows in (
        ("train", [{"file_name": "a.png", "text": "null"}, {"file_name": "gone.png", "text": "gone"}]),
        ("validation", [{"file_name": "b.png", "text": "green"}]),
    ):
        path = tmp_path / split / f"metadata.{form}"
        if form == "csv":
            write_lines(path, "file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows))
        elif form == "jsonl":
            write_lines(path, *(json.dumps(row) for row in rows))
        else:
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(path)
    assert kind(tmp_path) == "imagefolder with metadata"
    assert read(tmp_path) == {
        "train/a.png": ("red", ("null",), "train"),
        "train/gone.png": ("unreadable", ("gone",), "train"),
        "validation/b.png": ("green", ("green",), "validation"),
        "train/unlisted.png": ("blue", (), "train"),
    }


def test_metadata_may_name_pictures_in_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = tmp_path / "set" / "train"
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        put(train / f"{name}.png", colour)
    names = ("./a.png", "../train/b.png", str(train / "c.png"))
    write_lines(train / "metadata.csv", "file_name,text", *(f"{name},{number}" for number, name in enumerate(names)))
    monkeypatch.chdir(tmp_path)
    for spec in ("set", tmp_path / "set"):
        assert read(spec) == {
            "train/a.png": ("red", ("0",), "train"),
            "train/b.png": ("green", ("1",), "train"),
            "train/c.png": ("blue", ("2",), "train"),
        }


# --- tables


def test_csv_keeps_every_cell_as_text_and_joins_rows_of_one_picture(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", "red")
    put(tmp_path / "b.png", "blue")
    path = write_lines(
        tmp_path / "set.csv",
        "image,caption,split",
        'a.png,"red, and square",train',
        "b.png,NA,val",
        "a.png,007,train",
        "c.png,,test",
    )
    expected = {
        "a.png": ("red", ("red, and square", "007"), "train"),
        "b.png": ("blue", ("NA",), "validation"),
        "c.png": ("unreadable", ("",), "test"),
    }
    assert kind(path) == "CSV"
    assert read(path) == expected
    assert read(tmp_path) == expected, "the folder of the table is the same source"


def test_tsv_with_several_caption_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    path = write_lines(tmp_path / "set.tsv", "id\tfile_name\tcaption_1\tcaption_2", "7\ta.png\tred\ta square, red")
    assert kind(path) == "TSV"
    assert read(path) == {"a.png": ("red", ("red", "a square, red"), None)}


def test_csv_without_header_or_with_semicolons_or_as_flickr8k(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    expected = {"a.png": ("red", ("red, isn't it",), None)}
    assert read(write_lines(tmp_path / "1.csv", 'a.png,"red, isn\'t it"')) == expected
    assert read(write_lines(tmp_path / "2.csv", "image;caption", "a.png;red, isn't it")) == expected
    flickr = tmp_path / "flickr"
    put(flickr / "Images" / "a.png", "red")
    write_lines(flickr / "captions.txt", "image,caption", "a.png,one", "a.png,two")
    assert read(flickr) == {"a.png": ("red", ("one", "two"), None)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    put(tmp_path / "a.png", "red")
    (tmp_path / "a.txt").write_text("Käfer\n", encoding=encoding)
    (tmp_path / "set.csv").write_text("image,caption\na.png,Käfer\n", encoding=encoding)
    for spec in (tmp_path, tmp_path / "set.csv"):
        assert read(spec) == {"a.png": ("red", ("Käfer",), None)}


def test_unquoted_commas_are_explained(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    path = write_lines(tmp_path / "set.csv", "image,caption", "a.png,red", "a.png,red, square, large")
    with pytest.raises(ValueError, match=r"can't read set\.csv.*line 3.*needs quotes"):
        read(path)
    for header, row in (("image,caption", "a.png,red, square, large"), ("id,image,caption", "7,a.png,red, square")):
        with pytest.raises(ValueError, match=r"can't read first\.csv.*cells, the header.*needs quotes"):
            read(write_lines(tmp_path / "first.csv", header, row, "a.png,red"))
    rows = ["a.png,red"] * 12_000
    with pytest.raises(ValueError, match=r"can't read late\.csv after its first 10,000 rows.*line 12002.*needs quotes"):
        read(write_lines(tmp_path / "late.csv", "image,caption", *rows, "a.png,red, square", *rows))


def test_a_quote_that_runs_over_other_rows_is_told(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "grey")):
        put(tmp_path / f"{name}.png", colour)
    rows = ["image\tcaption", "a.png\ta red", 'b.png\t"blue', "c.png\tgreen", 'd.png\t"grey"']
    assert read(write_lines(tmp_path / "set.tsv", *rows)) == {
        "a.png": ("red", ("a red",), None),
        "b.png": ("unreadable", (), None),
    }
    (record,) = (record for record in open_source(str(tmp_path / "set.tsv"), CONFIG) if record.name == "b.png")
    with pytest.raises(PictureError, match="is closed 2 rows later, which are lost"):
        record.load()
    with pytest.raises(ValueError, match="never closed"):
        read(write_lines(tmp_path / "set.tsv", *rows[:4]))
    two_lines = ('b.png\t"one line, of two', 'and a ""second"", of them"')
    assert read(write_lines(tmp_path / "set.tsv", *rows[:2], *two_lines))["b.png"][0] == "blue"


def test_rows_longer_than_their_header_keep_their_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    put(tmp_path / "b.png", "blue")
    expected = {"a.png": ("red", ("red",), None), "b.png": ("blue", ("blue, too",), None)}
    delimiter_at_the_end = ("image,caption", "", "a.png,red,", 'b.png,"blue, too",')
    assert read(write_lines(tmp_path / "1.csv", *delimiter_at_the_end)) == expected
    numbered = ("image,caption", "1,a.png,red", '2,b.png,"blue, too"')
    assert read(write_lines(tmp_path / "2.csv", *numbered)) == expected


def test_columns_of_unknown_names_are_asked_for_and_then_used(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    path = write_lines(tmp_path / "set.csv", "where,who,what", "a.png,me,red thing")
    with pytest.raises(ValueError, match=r"'who', 'what'.*data\.caption_column=NAME"):
        read(path)
    config = CONFIG.model_copy(update={"caption_column": "what"})
    assert read(path, config) == {"a.png": ("red", ("red thing",), None)}
    with pytest.raises(ValueError, match=r"data\.caption_column is 'whet'.*did you mean 'what'"):
        read(path, CONFIG.model_copy(update={"caption_column": "whet"}))
    with pytest.raises(ValueError, match=r"data\.image_column"):
        read(write_lines(tmp_path / "none.csv", "a,b", "1,2"))


def test_jsonl_with_one_or_several_or_no_captions(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        put(tmp_path / "pictures" / f"{name}.png", colour)
    path = write_lines(
        tmp_path / "set.jsonl",
        json.dumps({"image": "pictures/a.png", "caption": "red"}),
        json.dumps({"image": "pictures/b.png", "caption": ["blue", "a blue square"]}),
        json.dumps({"image": "pictures/c.png"}),
        json.dumps({"image": "http://example.org/d.png", "caption": "elsewhere"}),
    )
    assert kind(path) == "JSON lines"
    assert read(path) == {
        "pictures/a.png": ("red", ("red",), None),
        "pictures/b.png": ("blue", ("blue", "a blue square"), None),
        "pictures/c.png": ("green", (), None),
        "http://example.org/d.png": ("unreadable", ("elsewhere",), None),
    }


def test_a_first_row_without_its_picture_changes_nothing_for_the_others(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    rows = [(None, "nothing"), ("a.png", "red"), ("a.png", "a red square")]
    path = write_lines(tmp_path / "set.jsonl", *(json.dumps({"image": image, "text": text}) for image, text in rows))
    assert read(path) == {
        "set.jsonl row 0 without a path": ("unreadable", ("nothing",), None),
        "a.png": ("red", ("red", "a red square"), None),
    }
    assert next(record.path for record in open_source(str(path), CONFIG) if record.name == "a.png")


def test_json_list_and_list_inside_an_object(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    rows = [{"filename": "a.png", "sentences": [{"raw": "one"}, {"raw": "two"}], "split": "restval"}]
    for name, tree in (("list", rows), ("object", {"dataset": "mine", "images": rows})):
        path = tmp_path / f"{name}.json"
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_text(json.dumps(tree), encoding=encoding)
            assert read(path) == {"a.png": ("red", ("one", "two"), "train")}


def test_tables_of_several_splits_in_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    put(tmp_path / "b.png", "blue")
    write_lines(tmp_path / "train.csv", "image,caption", "a.png,red")
    write_lines(tmp_path / "val.csv", "image,caption", "b.png,blue")
    assert read(tmp_path) == {"a.png": ("red", ("red",), "train"), "b.png": ("blue", ("blue",), "validation")}
    write_lines(tmp_path / "more.csv", "image,caption", "b.png,blue")
    with pytest.raises(ValueError, match=r"several tables.*more\.csv"):
        read(tmp_path)


def test_coco_captions_find_their_pictures_and_splits(tmp_path: Path) -> None:
    for year, colour in (("train2017", "red"), ("val2017", "blue")):
        put(tmp_path / year / "000001.png", colour)
        put(tmp_path / year / "000002.png", "green")
        tree = {
            "info": {"year": 2017},
            "images": [{"id": 1, "file_name": "000001.png"}, {"id": 2, "file_name": "000002.png"}],
            "annotations": [{"id": 9, "image_id": 1, "caption": f"{colour} {n}"} for n in (1, 2)],
        }
        path = tmp_path / "annotations" / f"captions_{year}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(tree))
    assert kind(tmp_path) == kind(path) == "COCO captions"
    assert read(path) == {
        "000001.png": ("blue", ("blue 1", "blue 2"), "validation"),
        "000002.png": ("green", (), "validation"),
    }
    both = list(open_source(str(tmp_path), CONFIG))
    assert [(record.name, record.split) for record in both] == [
        ("000001.png", "train"),
        ("000002.png", "train"),
        ("000001.png", "validation"),
        ("000002.png", "validation"),
    ]
    assert [colour_of(record.load()) for record in both] == ["red", "green", "blue", "green"]


@pytest.mark.parametrize(
    ("image", "annotation", "message"),
    [
        ({"id": 1, "coco_url": "a.png"}, {"image_id": 1, "caption": "red"}, "images have no file_name"),
        ({"id": 1, "file_name": "a.png"}, {"image": 1, "caption": "red"}, "annotations have no image_id"),
    ],
)
def test_coco_captions_without_what_joins_them_are_named(
    tmp_path: Path, image: dict[str, Any], annotation: dict[str, Any], message: str
) -> None:
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": [image], "annotations": [annotation]}))
    with pytest.raises(ValueError, match=rf"captions_val\.json: its {message}"):
        read(path)


def test_coco_captions_may_be_numbers(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "red")
    tree = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": 7}]}
    (tmp_path / "captions.json").write_text(json.dumps(tree), encoding="utf-8-sig")
    assert read(tmp_path) == {"a.png": ("red", ("7",), None)}


def test_parquet_with_bytes_or_with_paths(tmp_path: Path) -> None:
    from datasets import Dataset, Image

    put(tmp_path / "a.png", "green")
    rows = Dataset.from_dict({"picture": [embedded("red"), {"bytes": b"no", "path": "x.png"}], "text": ["red", None]})
    rows.cast_column("picture", Image()).to_parquet(tmp_path / "typed.parquet")
    assert kind(tmp_path / "typed.parquet") == "parquet"
    assert read(tmp_path / "typed.parquet") == {
        "typed.parquet row 0": ("red", ("red",), None),
        "typed.parquet row 1 (x.png)": ("unreadable", (), None),
    }
    plain = Dataset.from_dict({"jpg": [encoded(picture("blue"))], "captions": [["blue", "square"]]})
    plain.to_parquet(tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet") == {"plain.parquet row 0": ("blue", ("blue", "square"), None)}
    Dataset.from_dict({"path": ["a.png"], "caption": ["green"]}).to_parquet(tmp_path / "paths.parquet")
    assert read(tmp_path / "paths.parquet") == {"a.png": ("green", ("green",), None)}


# --- data sets and shards


def test_a_column_of_lists_of_pictures_gives_the_first_of_each(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    broken = {"bytes": b"no picture", "path": None}
    rows = [([embedded("red"), embedded("blue")], "red"), ([broken], "broken"), ([embedded("green")], "green")]
    features = Features({"text": Value("string"), "images": List(Image())})
    table = Dataset.from_list([{"images": images, "text": text} for images, text in rows], features=features)
    table.to_parquet(tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet") == {
        "set.parquet row 0": ("red", ("red",), None),
        "set.parquet row 1": ("unreadable", ("broken",), None),
        "set.parquet row 2": ("green", ("green",), None),
    }


def test_saved_data_set_with_splits_and_class_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=["red_thing", "blue_thing"])})
    parts = {
        "train": Dataset.from_dict({"image": [embedded("red")], "label": [0]}, features=features),
        "test": Dataset.from_dict({"image": [embedded("blue")], "label": [1]}, features=features),
    }
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert kind(tmp_path / "both") == "Hugging Face data set (save_to_disk)"
    assert read(tmp_path / "both") == {
        "train row 0": ("red", ("red thing",), "train"),
        "test row 0": ("blue", ("blue thing",), "test"),
    }
    parts["test"].save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == {"rows row 0": ("blue", ("blue thing",), None)}


def test_saved_data_sets_that_are_damaged_or_none_are_told_apart(tmp_path: Path) -> None:
    from datasets import Dataset

    put(tmp_path / "pictures" / "a.png", "red")
    write_lines(tmp_path / "pictures" / "a.txt", "red")
    write_lines(tmp_path / "pictures" / "state.json", "{}")
    assert read(tmp_path / "pictures") == {"a.png": ("red", ("red",), None)}
    Dataset.from_dict({"image": ["a.png"]}).save_to_disk(tmp_path / "saved")
    write_lines(tmp_path / "saved" / "state.json", "{")
    with pytest.raises(ValueError, match=r"can't open the saved data set .*saved: JSONDecodeError"):
        read(tmp_path / "saved")


def test_folder_of_parquet_shards_as_downloaded_from_the_hub(tmp_path: Path) -> None:
    from datasets import Dataset, Image

    (tmp_path / "data").mkdir()
    for split, colour in (("train", "red"), ("validation", "green")):
        rows = Dataset.from_dict({"image": [embedded(colour)], "caption": [colour]}).cast_column("image", Image())
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("# my pictures\n")
    assert kind(tmp_path) == "Hugging Face data set (folder)"
    assert read(tmp_path) == {
        "train row 0": ("red", ("red",), "train"),
        "validation row 0": ("green", ("green",), "validation"),
    }


def test_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach of a test: what `load_dataset` is asked for, and what becomes of what it answers."""
    import datasets

    asked: list[tuple[str, str | None, bool]] = []

    def load_dataset(path: str, subset: str | None, *, streaming: bool) -> dict[str, Any]:
        asked.append((path, subset, streaming))
        features = datasets.Features({"image": datasets.Image(), "captions": [datasets.Value("string")]})
        columns = {"train": ("red", ["red", "warm"]), "test": ("blue", ["blue"]), "broken": (None, ["green"])}
        return {
            split: datasets.Dataset.from_dict(
                {"image": [embedded(colour) if colour else {"bytes": b"no", "path": None}], "captions": [captions]},
                features=features,
            ).to_iterable_dataset()
            for split, (colour, captions) in columns.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert kind("owner/pictures:small") == "Hugging Face data set (hub)"
    assert read("owner/pictures:small") == {
        "train row 0": ("red", ("red", "warm"), "train"),
        "test row 0": ("blue", ("blue",), "test"),
        "broken row 0": ("unreadable", ("green",), None),
    }
    assert read("owner/pictures")
    assert set(asked) == {("owner/pictures", "small", True), ("owner/pictures", None, True)}


def test_web_dataset_samples_may_differ_in_their_fields(tmp_path: Path) -> None:
    tar(
        tmp_path / "s-000.tar",
        {
            "0001.png": encoded(picture("red")),
            "0001.txt": b"red\na red square",
            "0001.json": b'{"caption": "unused", "n": 1}',
            "0002.jpg": encoded(picture("blue"), "JPEG"),
            "0002.json": b'{"captions": ["blue"], "n": "one"}',
            "0003.png": encoded(picture("green")),
            "0004.txt": b"no picture",
            "0005.PNG": b"broken",
            "0005.txt": b"broken",
        },
    )
    tar(tmp_path / "s-001.tar", {"0001.png": encoded(picture("grey")), "0001.txt": b"grey"})
    first = {
        "s-000.tar/0001": ("red", ("red", "a red square"), None),
        "s-000.tar/0002": ("blue", ("blue",), None),
        "s-000.tar/0003": ("green", (), None),
        "s-000.tar/0004": ("unreadable", ("no picture",), None),
        "s-000.tar/0005": ("unreadable", ("broken",), None),
    }
    second = {"s-001.tar/0001": ("grey", ("grey",), None)}
    assert kind(tmp_path) == "WebDataset shards"
    assert read(tmp_path / "s-000.tar") == first
    for spec in (tmp_path, tmp_path / "s-{000..001}.tar", tmp_path / "s-*.tar"):
        assert read(spec) == first | second
    with pytest.raises(ValueError, match=r"no shard .*s-002.tar"):
        open_source(str(tmp_path / "s-{001..002}.tar"), CONFIG)


def test_what_is_odd_about_a_sample_takes_no_other_with_it(tmp_path: Path) -> None:
    colours = dict(enumerate(("red", "green", "blue", "grey", "red", "green")))
    members = {f"{n}.png": encoded(picture(colour)) for n, colour in colours.items()}
    texts = {
        "0.TXT": b"in capitals",
        "1.txt": "Käfer".encode("cp1252"),
        "2.json": b'{"caption": "never clo',
        "3.cls": b"no number, and not asked for",
        "4.JSON": b'{"caption": "four"}',
        "5.msgpack": b"",
    }
    tar(tmp_path / "s.tar", dict(sorted((members | texts).items())))
    assert read(tmp_path) == {
        "s.tar/0": ("red", ("in capitals",), None),
        "s.tar/1": ("green", ("Käfer",), None),
        "s.tar/2": ("unreadable", (), None),
        "s.tar/3": ("grey", (), None),
        "s.tar/4": ("red", ("four",), None),
        "s.tar/5": ("green", (), None),
    }


def test_fields_of_shards_can_be_named(tmp_path: Path) -> None:
    fields = {
        "0.alt.txt": b"an alt text",
        "0.jpg": encoded(picture("red"), "JPEG"),
        "0.json": b'{"caption": "the usual", "blip": ["by a model"]}',
        "0.mask.png": encoded(picture("grey")),
        "0.txt": b"the text",
    }
    tar(tmp_path / "s.tar", fields)
    for named, expected in (
        ({}, ("red", ("the text",), None)),
        ({"caption_column": "blip"}, ("red", ("by a model",), None)),
        ({"caption_column": "alt.txt", "image_column": "mask.png"}, ("grey", ("an alt text",), None)),
        ({"image_column": "png"}, ("unreadable", ("the text",), None)),
    ):
        assert read(tmp_path, CONFIG.model_copy(update=named)) == {"s.tar/0": expected}


def test_addresses_that_nothing_installed_reads_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_filesystem_class(protocol: str) -> type:
        if protocol == "file":
            return object
        raise ImportError(f"{protocol} needs a package")

    monkeypatch.setattr("fsspec.get_filesystem_class", get_filesystem_class)
    with pytest.raises(ValueError, match=r"https:// can't be read \(https needs a package\): pip install 'fsspec"):
        open_source("https://example.org/{0..1}.tar", CONFIG)
    with pytest.raises(ValueError, match=r"s3:// can't be read .*: install it, or copy the shards"):
        open_source("s3://mine/0.tar", CONFIG)
    assert kind("file:///mine/0.tar") == "WebDataset shards"


def test_a_shard_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    for index, colour in enumerate(("red", "green", "blue")):
        tar(tmp_path / "train" / f"{index}.tar", {f"{n}.png": encoded(picture(colour)) for n in range(3)})
    broken = tmp_path / "train" / "1.tar"
    broken.write_bytes(broken.read_bytes()[:1600])
    (tmp_path / "train" / "0.tar").write_bytes(b"no tar at all")
    found = read(tmp_path)
    assert {name: value for name, value in found.items() if name.startswith("2.tar")} == {
        f"2.tar/{n}": ("blue", (), "train") for n in range(3)
    }
    assert found["1.tar/0"] == ("green", (), "train"), "what comes before the cut is whole"
    lost = [name for name, value in found.items() if value[0] == "unreadable"]
    assert any("0.tar" in name for name in lost) and any("1.tar" in name for name in lost)


@pytest.mark.parametrize("name", ["set [1]", "50 % #2", "a*b?"])
def test_names_with_marks_of_patterns_and_addresses_are_names(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    put(root / "a.png", "red")
    table = write_lines(root / f"{name}.csv", "image,caption", "a.png,red")
    assert read(table) == {"a.png": ("red", ("red",), None)}
    table.rename(root / "metadata.csv")
    assert read(root) == {"a.png": ("red", ("red",), None)}
    tar(root / f"{name}.tar", {"1.png": encoded(picture("blue")), "1.txt": b"blue"})
    assert read(root / f"{name}.tar") == {f"{name}.tar/1": ("blue", ("blue",), None)}


def test_a_downloaded_data_set_whose_folder_reads_as_a_pattern_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "set [1]").mkdir()
    (tmp_path / "set [1]" / "train.parquet").write_bytes(b"not looked at")
    with pytest.raises(ValueError, match=r"set \[1\].*rename the folder"):
        read(tmp_path / "set [1]")


# --- made sources and mistakes


class Maker:
    def __init__(self, count: int = 3, share: float = 0.5, font: Path | None = None, tidy: bool = True) -> None: ...


def test_arguments_of_made_sources_are_typed_and_checked() -> None:
    assert parse_arguments("made", "count=4, share=0.25,font=a/b.ttf,tidy=false", Maker) == {
        "count": 4,
        "share": 0.25,
        "font": Path("a/b.ttf"),
        "tidy": False,
    }
    for text, message in (
        ("cuont=4", "did you mean 'count'"),
        ("count=four", "made:count is 'four'.*int"),
        ("count", "must read key=value"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments("made", text, Maker)


def test_shapes_are_opened_at_the_size_of_the_recipe() -> None:
    source = open_source("shapes:count=3,seed=5", CONFIG.model_copy(update={"image_size": 32}))
    records = list(source)
    assert len(records) == 3 and all(record.captions for record in records)
    assert to_rgb(records[0].load()).size == (32, 32)


def test_unknown_sources_say_what_was_found_and_what_is_accepted(tmp_path: Path) -> None:
    write_lines(tmp_path / "notes.md", "nothing")
    for spec, message in (
        (tmp_path, r"found 1 \.md; accepted are"),
        (tmp_path / "notes.md", r"isn't known \(\.md\); accepted are"),
        (tmp_path / "missing", "no such file or folder"),
        ("shape", "did you mean the made source 'shapes'"),
        ("nobody/has-this-data-set", "hub"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(str(spec), CONFIG)
