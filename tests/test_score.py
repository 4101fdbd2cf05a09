"""Captions scored against pictures: each number is its model's own, and the true caption comes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_mini_impl import TextToImage
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.rerank import score_pairs
from tests.tiny import tiny_bundle, tiny_checkpoint

CAPTIONS = ["a red circle", "a blue square above a green triangle", "two small yellow stars"]


def test_each_score_is_its_models_own() -> None:
    bundle = tiny_bundle("dalle.reading_share=0.2")
    model = TextToImage(bundle)
    assert bundle.clip is not None and bundle.embedder is not None
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = model.score(pictures, CAPTIONS)
    ids = model.vae.encode(pictures)
    text = bundle.tokenizer.batch(CAPTIONS, bundle.stream.text_length)[0]
    clip = score_pairs(bundle.embedder, pictures, CAPTIONS)
    with torch.no_grad():
        likelihoods = model.dalle.log_likelihood(text, ids)
        readings = model.dalle.caption_log_likelihood(text, ids)
    for index, item in enumerate(scores):
        assert item.caption == CAPTIONS[index]
        assert item.clip_score == pytest.approx(clip[index].item(), abs=1e-5)
        assert item.log_likelihood == pytest.approx(likelihoods[index].item(), rel=1e-5)
        assert item.read_score == pytest.approx(readings[index].item(), rel=1e-5)
        assert item.clip_score is not None and item.read_score is not None
        expected = bundle.clip.scale * item.clip_score + item.read_score + 0.03 * item.log_likelihood
        assert item.score == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="3 pictures came with 2 captions"):
        model.score(pictures, CAPTIONS[:2])


def test_a_captioner_reads_instead_of_dalle() -> None:
    bundle = tiny_bundle("dalle.reading_share=0.2", "clip.caption_layers=1")
    model = TextToImage(bundle)
    assert bundle.clip is not None
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = bundle.tokenizer.batch(CAPTIONS, bundle.stream.text_length)[0]
    with torch.no_grad():
        readings = bundle.clip.caption_log_likelihood(pictures, text)
    for item, reading in zip(model.score(pictures, CAPTIONS), readings, strict=True):
        assert item.read_score == pytest.approx(reading.item(), rel=1e-5)
    assert model.ranked_by == "clip_score + read_score + log_likelihood" and model.reader == "captioner"
    drawn = model(CAPTIONS[0], candidates=2, keep=2)[0]
    seen = model.decode(drawn.tokens[None])
    with torch.no_grad():
        assert drawn.read_score == pytest.approx(bundle.clip.caption_log_likelihood(seen, text[:1]).item(), rel=1e-4)


def test_captions_are_written_and_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "clip.caption_layers=1")
    model = TextToImage.from_pretrained(checkpoint)
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    written = model.caption(picture, candidates=5, seed=3)
    assert 1 <= len(written) <= 5 and len({item.caption for item in written}) == len(written)
    assert [item.score for item in written] == sorted((item.score for item in written), reverse=True)
    assert model.caption(picture, candidates=5, seed=3) == written
    assert {item.caption for item in model.caption(picture, 3, seed=3)} <= {item.caption for item in written}
    picture.save(tmp_path / "noise.png")
    options = ["--checkpoint", str(checkpoint), "--candidates", "5", "--keep", "2", "--seed", "3"]
    with pytest.raises(SystemExit) as stopped:
        main(["caption", str(tmp_path / "noise.png"), *options, "--out", str(tmp_path / "captions.jsonl")])
    assert not stopped.value.code
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [item.caption for item in written[:2]]
    assert all(line["caption"] for line in lines)
    with pytest.raises(SystemExit) as stopped:
        main(["caption", str(tmp_path / "noise.png"), *options[:4], "--keep", "6"])
    assert stopped.value.code == 2
    assert written[0].caption in capsys.readouterr().out


def test_a_checkpoint_without_a_captioner_writes_none() -> None:
    with pytest.raises(ValueError, match=r"'tiny' writes no captions: train its CLIP with clip\.caption_layers=2"):
        TextToImage(tiny_bundle()).caption(Image.new("RGB", (16, 16)))


def test_the_true_caption_of_a_drawn_picture_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TextToImage.from_pretrained("emoji")
    model("a red heart", candidates=4, keep=1)[0].image.save(tmp_path / "heart.png")
    options = [str(tmp_path / "heart.png"), "--caption", "a green apple", "--caption", "a red heart"]
    with pytest.raises(SystemExit) as stopped:
        main(["score", *options, "--out", str(tmp_path / "scores.jsonl")])
    assert not stopped.value.code
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == ["a red heart", "a green apple"]
    assert lines[0]["clip_score"] > lines[1]["clip_score"] and lines[0]["log_likelihood"] > lines[1]["log_likelihood"]
    assert lines[0]["read_score"] > lines[1]["read_score"] + 5, "nats of the caption, read from the picture"
    assert "'a red heart': score " in capsys.readouterr().out
