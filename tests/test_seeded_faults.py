"""A folder with every fault that real folders have trains to the end, and its report has the exact counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures_on_disk import COLOURS, colour_of, encoded, picture, put
from PIL import Image

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.config import STAGES, DataConfig
from dalle_mini_impl.data.prepare import PreparedData, prepare
from dalle_mini_impl.pretrained import load_bundle
from tests.tiny import TINY_VALUES

LONG = ("a very long caption " * 500)[:-1] + "!"
FROG = "🐸 على يسار תפוח אדום 🍎👩‍👩‍👧"


def write_faulty_folder(root: Path) -> Path:
    """15 pictures: 4 that can't be used, 1 with an empty caption, 1 with none, and 9 that have to come out right."""
    root.mkdir(parents=True)
    raw = {
        "truncated.jpg": encoded(picture("red", (64, 64)), "JPEG")[:-200],
        "zero_bytes.png": b"",
        "bomb.png": encoded(Image.new("1", (20_000, 20_000))),
        "tiny.png": encoded(picture("red", (3, 3))),
        "cmyk.jpg": encoded(picture("blue").convert("CMYK"), "JPEG", quality=95),
        "deep.png": encoded(Image.fromarray(np.full((24, 24), 32_896, dtype=np.uint16))),
        "moving.gif": encoded(picture("green"), "GIF", save_all=True, append_images=[picture("red")]),
        "empty_caption.png": encoded(picture("red")),
        "uncaptioned.png": encoded(picture("red", (30, 30))),
        "endless_caption.png": encoded(picture("green", (31, 31))),
        "frog.png": encoded(picture("green", (32, 32))),
        "clear.png": encoded(Image.new("RGBA", (24, 24), (0, 0, 0, 0))),
    }
    captions = {
        "empty_caption": " \n\t\n",
        "endless_caption": LONG,
        "frog": f"{FROG}\na frog",
    }
    sideways = Image.new("RGB", (40, 20), COLOURS["blue"])
    sideways.paste(COLOURS["red"], (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: red is on top once it is turned
    raw["turned.jpg"] = encoded(sideways, "JPEG", exif=exif, quality=95)
    for name, data in raw.items():
        (root / name).write_bytes(data)
        stem = name.partition(".")[0]
        if stem != "uncaptioned":
            (root / f"{stem}.txt").write_text(captions.get(stem, f"it is {stem}"), encoding="utf-8")
    for folder, colour in (("one", "red"), ("two", "blue")):
        put(root / folder / "same.png", colour, (25, 25))
        (root / folder / "same.txt").write_text(colour, encoding="utf-8")
    return root


def by_name(data: PreparedData, name: str) -> np.ndarray:
    return data.pictures[data.names.index(name)]


def check_report(path: Path) -> None:
    report = json.loads(path.read_text())
    skipped = {reason: (found["count"], found["names"]) for reason, found in report["skipped"].items()}
    assert skipped == {
        "unreadable": (2, ["truncated.jpg", "zero_bytes.png"]),
        "bomb": (1, ["bomb.png"]),
        "tiny": (1, ["tiny.png"]),
        "empty_caption": (1, ["empty_caption.png"]),
    }
    counts = {key: report[key] for key in ("pictures", "kept", "captioned", "uncaptioned", "captions", "duplicates")}
    assert counts == {"pictures": 15, "kept": 10, "captioned": 9, "uncaptioned": 1, "captions": 10, "duplicates": 0}
    assert report["train"] + report["validation"] + report["test"] == 10 and report["train"] >= 1
    assert report["caption_length_characters"]["max"] == len(LONG) == 10_000


def test_every_fault_is_counted_named_and_survived(tmp_path: Path) -> None:
    root = write_faulty_folder(tmp_path / "faulty")
    prepare(str(root), DataConfig(image_size=16), tmp_path / "data")
    check_report(tmp_path / "data" / "data-report.json")


def test_training_goes_on_to_the_end_whatever_the_folder_holds(tmp_path: Path) -> None:
    root, out = write_faulty_folder(tmp_path / "faulty"), tmp_path / "run"
    options = [f"{section}.{key}={value}" for section, part in TINY_VALUES.items() if isinstance(part, dict)
               for key, value in part.items()]  # fmt: skip
    for stage in STAGES:
        options += [f"train.{stage}.{value}" for value in ("steps=2", "batch_size=4", "evaluations=1")]
    overrides = [argument for option in options for argument in ("--set", option)]
    with pytest.raises(SystemExit) as ended:
        run_verb("train", ["--data", str(root), "--out", str(out), *overrides])
    assert not ended.value.code
    check_report(out / "data-report.json")
    text = json.loads((out / "data-report.json").read_text())["text"]
    data = PreparedData.open(out / "data")
    own = [caption for index in data.train for caption in data.captions[index]]
    assert (text["num_captions"], text["num_captions_cut"]) == (len(own), own.count(LONG) + own.count(FROG))
    bundle = load_bundle(out)
    assert bundle.vae is not None and bundle.clip is not None and bundle.dalle is not None
    assert {stage: bundle.metadata["metrics"][stage]["steps"] for stage in STAGES} == dict.fromkeys(STAGES, 2)


def test_odd_but_good_pictures_come_out_right(tmp_path: Path) -> None:
    root = write_faulty_folder(tmp_path / "faulty")
    data = prepare(str(root), DataConfig(image_size=16, fit="stretch"), tmp_path / "data")
    assert colour_of(by_name(data, "cmyk.jpg")) == "blue"
    assert colour_of(by_name(data, "deep.png")) == "grey"
    assert colour_of(by_name(data, "moving.gif")) == "green"
    assert by_name(data, "clear.png").min() == 255
    assert colour_of(by_name(data, "turned.jpg")[:6]) == "red"
    assert colour_of(by_name(data, "turned.jpg")[10:]) == "blue"
    assert colour_of(by_name(data, "one/same.png")) == "red" and colour_of(by_name(data, "two/same.png")) == "blue"
    captions = dict(zip(data.names, data.captions, strict=True))
    assert captions["one/same.png"] == ("red",) and captions["two/same.png"] == ("blue",)
    assert captions["frog.png"] == (FROG, "a frog")
    assert captions["uncaptioned.png"] == ()
    assert captions["endless_caption.png"] == (LONG,)
