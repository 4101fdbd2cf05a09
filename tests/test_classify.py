"""Zero-shot classification: labels become captions, and the shipped CLIP knows what it was never told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_mini_impl import TextToImage
from dalle_mini_impl.classify import ZeroShotClassifier
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.cli.classify import check_folders, confusion_picture, count, read_labels
from dalle_mini_impl.embed import encode_pictures, encode_texts
from dalle_mini_impl.pretrained import Bundle
from tests.tiny import tiny_bundle, tiny_checkpoint

LABELS = ["a red heart", "a green apple", "a blue car"]


def tiny() -> Bundle:
    return tiny_bundle()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def test_probabilities_are_a_softmax_of_scaled_cosines() -> None:
    bundle = tiny()
    assert bundle.clip is not None and bundle.embedder is not None
    pictures = torch.rand(5, 3, 16, 16)
    probabilities = ZeroShotClassifier(bundle.embedder, LABELS).probabilities(pictures)
    cosines = encode_pictures(bundle.clip, pictures) @ encode_texts(bundle.clip, bundle.tokenizer, LABELS).t()
    torch.testing.assert_close(probabilities, (bundle.clip.scale * cosines).softmax(dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))


def test_templates_are_averaged_in_clips_space() -> None:
    bundle = tiny()
    assert bundle.clip is not None and bundle.embedder is not None
    templates = ["{}", "a picture of {} {red}"]
    classifier = ZeroShotClassifier(bundle.embedder, LABELS, templates)
    for label, direction in zip(LABELS, classifier.directions, strict=True):
        texts = [template.replace("{}", label) for template in templates]
        vectors = encode_texts(bundle.clip, bundle.tokenizer, texts)
        mean = vectors.mean(dim=0)
        torch.testing.assert_close(direction, mean / mean.norm())


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["one"], ["{}"], "give at least two"),
        (["one", "two", "one"], ["{}"], "label 'one' is given twice"),
        (["one", "two"], ["a picture"], "must hold {} once"),
        (["one", "two"], [], "at least one template"),
        (["one", "two"], ["{x}"], "must hold {} once"),
    ],
)
def test_labels_that_make_no_choice_are_refused(labels: list[str], templates: list[str], message: str) -> None:
    bundle = tiny()
    assert bundle.clip is not None and bundle.embedder is not None
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(bundle.embedder, labels, templates)


def test_the_shipped_clip_knows_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TextToImage.from_pretrained("emoji")
    for label in LABELS:
        folder = tmp_path / label.replace(" ", "_")
        folder.mkdir()
        for picture in model(label, candidates=4, keep=1):
            picture.image.save(folder / "best.png")
    options = ["--labels", ",".join(LABELS), "--accuracy", "--out", str(tmp_path / "out")]
    assert run("classify", str(tmp_path), *options) == 0
    assert "3 of 3 right" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "labels.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} == set(LABELS)
    for line in lines:
        assert line["probabilities"][line["label"]] == max(line["probabilities"].values()) > 0.5
        assert sum(line["probabilities"].values()) == pytest.approx(1.0, abs=1e-4)
    assert Image.open(tmp_path / "out" / "confusion.png").width > 100


def test_labels_come_from_a_text_or_a_file(tmp_path: Path) -> None:
    assert read_labels(" a circle, a square,,") == ["a circle", "a square"]
    (tmp_path / "labels.txt").write_text("a circle, red\n\na square\n")
    assert read_labels(str(tmp_path / "labels.txt")) == ["a circle, red", "a square"]
    with pytest.raises(ValueError, match="labels can't be read from"):
        read_labels(str(tmp_path / "nothing.txt"))
    (tmp_path / "other").write_bytes("a café\nred\n".encode("utf-8-sig"))
    assert read_labels(str(tmp_path / "other")) == ["a café", "red"]
    many = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "heart") * 9]
    assert read_labels(",".join(many)) == many, "longer than a file's name may be"


def test_a_confusion_counts_true_labels_down_and_guesses_across(tmp_path: Path) -> None:
    rows = [
        {"file": str(tmp_path / folder / f"{i}.png"), "label": label}
        for i, (folder, label) in enumerate([("circle", "a circle"), ("circle", "a square"), ("a_square", "a square")])
    ]
    assert count(rows, ["a circle", "a square"]) == [[1, 1], [0, 1]]
    paths = [Path(row["file"]) for row in rows]
    check_folders(paths, ["a circle", "a square"])
    with pytest.raises(ValueError, match="folder 'circle' is none of the labels"):
        check_folders(paths, ["a square", "a star"])
    picture = confusion_picture([[1, 1], [0, 1]], ["a circle", "a square"])
    assert picture.width == picture.height
    names = [str(number) for number in range(1000)]
    diagonal = [[int(row == column) for column in range(1000)] for row in range(1000)]
    large = confusion_picture(diagonal, names)
    assert large.size == (4000, 4000) and large.getpixel((2, 2)) == 0 and large.getpixel((6, 2)) == 255


def test_pictures_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny"))
    base = ["--labels", "one,two", "--checkpoint", checkpoint]
    assert run("classify", str(tmp_path / "nothing.png"), *base) == 2
    assert "neither a picture nor a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("classify", str(tmp_path / "empty"), *base) == 2
    assert "no readable picture" in capsys.readouterr().err
