"""unCLIP from the command line to files on disk: drawing by a prior, variations, interpolation, changes, replays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.sheet import is_sheet, read_metadata
from dalle_mini_impl.unclip import change_by_text, slerp
from tests.tiny import tiny_bundle, tiny_checkpoint

PROMPT = "a red circle"


def _units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), dim=-1)


def test_slerp_goes_along_the_sphere_evenly_from_end_to_end() -> None:
    first, second = _units(2, 4, 9)
    assert torch.allclose(slerp(first, second, 0.0), first, atol=1e-6)
    assert torch.allclose(slerp(first, second, 1.0), second, atol=1e-6)
    way = torch.stack([slerp(first, second, step / 10) for step in range(11)])
    assert torch.allclose(way.norm(dim=-1), torch.ones(11, 4), atol=1e-6)
    angles = (way[1:] * way[:-1]).sum(dim=-1).clamp(-1, 1).acos()
    assert torch.allclose(angles, (first * second).sum(dim=-1).acos() / 10 * torch.ones(10, 1), atol=1e-4)
    assert torch.allclose(slerp(first, first, 0.3), first, atol=1e-6), "between equal vectors there is nothing"


def test_a_change_turns_to_the_difference_of_the_captions() -> None:
    picture, before, after = _units(3, 9)
    direction = F.normalize(after - before, dim=0)
    cosines = [float(change_by_text(picture, before, after, share) @ direction) for share in (0.0, 0.25, 0.5, 1.0)]
    assert cosines == sorted(cosines) and cosines[-1] == pytest.approx(1.0)
    assert torch.allclose(change_by_text(picture, before, after, 0.0), picture, atol=1e-6)
    with pytest.raises(ValueError, match="the same embedding"):
        change_by_text(picture, before, before, 0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("unclip"), "data.image_size=32", "dalle.image_prefix=3")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TextToImage:
    return TextToImage.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (10, 10, 30, 30))
    image.save(path)
    return path


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def _results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def _tokens(out: Path) -> list[list[int]]:
    return [read_metadata(out / line["file"])["tokens"] for line in _results(out)]


def test_a_checkpoint_with_a_prior_draws_by_it_unless_told_otherwise(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint", checkpoint, "--prompt", PROMPT, "--candidates", 3, "--keep", 3, "--seed", 4)
    for name, more in (("auto", []), ("unclip", ["--unclip"]), ("plain", ["--no-unclip"])):
        assert _run("sample", *options, *more, "--out", tmp_path / name) == 0
        for line in _results(tmp_path / name):
            facts = read_metadata(tmp_path / name / line["file"])
            assert (facts["embedding"] is None) == (name == "plain")
            assert facts["settings"]["unclip"] == (name != "plain")
            assert _run("replay", tmp_path / name / line["file"]) == 0
    assert _tokens(tmp_path / "auto") == _tokens(tmp_path / "unclip") != _tokens(tmp_path / "plain")
    capsys.readouterr()
    assert _run("sample", "--prompt", PROMPT, "--unclip", "--out", tmp_path / "emoji") == 2
    assert "has no prior to draw by" in capsys.readouterr().err
    for more in (["--no-unclip", *map(str, options[:2])], []):
        assert _run("sample", "--prompt", PROMPT, "--prior-guidance", 3, *more, "--out", tmp_path / "emoji") == 2
        assert "prior_guidance is for drawing by way of a prior" in capsys.readouterr().err


def test_pictures_of_the_prior_dont_depend_on_the_batch(model: TextToImage) -> None:
    prompts = [PROMPT, "two small yellow stars"]
    together = model.draw(prompts, candidates=3, keep=3, seed=2)
    for prompt, ranked in zip(prompts, together, strict=True):
        alone = model(prompt, candidates=2, keep=2, seed=2, batch_size=1)
        for picture in alone:
            same = next(other for other in ranked if other.candidate == picture.candidate)
            assert torch.equal(same.tokens, picture.tokens)
            assert same.embedding is not None and picture.embedding is not None
            assert torch.allclose(same.embedding, picture.embedding, atol=1e-6)
    embeddings = torch.stack([p.embedding for ranked in together for p in ranked if p.embedding is not None])
    assert len(embeddings.unique(dim=0)) == 6, "each candidate has an embedding of its own"


def test_variations_of_a_picture(checkpoint: Path, model: TextToImage, photo: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", checkpoint, "--candidates", 4, "--seed", 3)
    assert _run("vary", photo, *options, "--out", tmp_path / "out") == 0
    lines = _results(tmp_path / "out")
    assert [line["rank"] for line in lines] == [1, 2, 3, 4] and {line["prompt"] for line in lines} == {""}
    with Image.open(photo) as image:
        own = model.embedding_of(image)
        again = model.vary(image, candidates=4, keep=4, seed=3)
    for line, picture in zip(lines, again, strict=True):
        facts = read_metadata(tmp_path / "out" / line["file"])
        assert torch.equal(torch.tensor(facts["embedding"]), own) and facts["picture"] == str(photo)
        assert facts["tokens"] == picture.tokens.tolist()
        assert facts["read_score"] is None
        assert _run("replay", tmp_path / "out" / line["file"]) == 0
    with Image.open(tmp_path / "out" / lines[0]["file"]) as best:
        assert float(model.embedding_of(best) @ own) == pytest.approx(lines[0]["clip_score"], abs=0.02)
    assert is_sheet(tmp_path / "out" / "sheet.png")
    captioned = ("--prompt", PROMPT, "--keep", 2, "--out", tmp_path / "captioned")
    assert _run("vary", photo, *options, *captioned) == 0
    assert len(_results(tmp_path / "captioned")) == 2
    assert all(tokens not in _tokens(tmp_path / "out") for tokens in _tokens(tmp_path / "captioned"))
    assert _run("replay", tmp_path / "captioned" / _results(tmp_path / "captioned")[0]["file"]) == 0


def test_the_way_from_one_picture_to_another(
    checkpoint: Path, model: TextToImage, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32), "green").save(other)
    options = ("--checkpoint", checkpoint, "--candidates", 2, "--out", tmp_path / "out")
    assert _run("interpolate", photo, other, *options, "--steps", 4) == 0
    lines = _results(tmp_path / "out")
    assert [line["share"] for line in lines] == [0.0, 0.3333, 0.6667, 1.0]
    vectors = torch.tensor([read_metadata(tmp_path / "out" / line["file"])["embedding"] for line in lines])
    with Image.open(photo) as first, Image.open(other) as second:
        ends = torch.stack([model.embedding_of(first), model.embedding_of(second)])
    assert torch.allclose(vectors[[0, 3]], ends, atol=1e-6)
    angles = (vectors[1:] * vectors[:-1]).sum(dim=1).clamp(-1, 1).acos()
    assert torch.allclose(angles, angles.mean() * torch.ones(3), atol=1e-3)
    assert _run("replay", tmp_path / "out" / lines[1]["file"]) == 0
    assert is_sheet(tmp_path / "out" / "sheet.png")
    assert _run("interpolate", photo, tmp_path / "out" / "sheet.png", *options) == 2
    assert "is a sheet of pictures" in capsys.readouterr().err


def test_pictures_of_a_sequence_share_their_noise(model: TextToImage) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    rows = model.change(picture, PROMPT, "a blue square", candidates=4, keep=4, seed=1)
    order = [picture.candidate for picture in rows[0]]
    assert sorted(order) == [0, 1, 2, 3] and all([p.candidate for p in row] == order for row in rows)
    totals = [sum(row[place].score for row in rows) for place in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert [picture.rank for picture in rows[2]] == [1, 2, 3, 4]


def test_a_picture_changed_by_text(
    checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint", checkpoint, "--candidates", 2, "--from", PROMPT, "--out", tmp_path / "out")
    assert _run("change", photo, *options, "--to", "a blue square", "--strength", 0.1, "--strength", 0.6) == 0
    lines = _results(tmp_path / "out")
    assert [line["strength"] for line in lines] == [0.1, 0.6]
    facts = read_metadata(tmp_path / "out" / lines[1]["file"])
    assert (facts["from"], facts["to"]) == (PROMPT, "a blue square")
    assert _run("replay", tmp_path / "out" / lines[1]["file"]) == 0
    assert is_sheet(tmp_path / "out" / "sheet.png")
    capsys.readouterr()
    assert _run("change", photo, *options, "--to", PROMPT) == 2
    assert "the same embedding" in capsys.readouterr().err
    assert _run("change", photo, *options, "--to", "x", "--strength", 2) == 2
    assert "strengths are [2.0]" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["vary", "interpolate", "change"])
def test_a_checkpoint_without_a_prefix_is_told(
    verb: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"vary": [], "interpolate": [photo], "change": ["--from", "a", "--to", "b"]}[verb]
    assert _run(verb, photo, *more, "--checkpoint", "emoji", "--out", tmp_path / "out") == 2
    assert "'emoji' doesn't draw by picture embeddings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_measures_both_ways(checkpoint: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, more in (("auto", []), ("plain", ["--no-unclip"])):
        options = ("--prompts", 2, "--candidates", 2, "--out", tmp_path / f"{name}.json")
        assert _run("evaluate", "--checkpoint", checkpoint, *options, *more) == 0
        drawn[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert drawn["auto"]["settings"]["unclip"] and not drawn["plain"]["settings"]["unclip"]


def test_a_decoder_without_a_prior_draws_by_captions_and_by_pictures() -> None:
    bundle = tiny_bundle("dalle.image_prefix=3")
    model = TextToImage(replace(bundle, prior=None))
    assert model(PROMPT, candidates=1)[0].embedding is None
    assert model.vary(Image.new("RGB", (16, 16), "red"), candidates=1)[0].embedding is not None
    with pytest.raises(ValueError, match="has no prior to draw by"):
        model.settings(unclip=True)
