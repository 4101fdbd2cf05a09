"""Pretrained CLIPs and SigLIPs: the library's own scores, at every place where a CLIP is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle_mini_impl import TextToImage
from dalle_mini_impl.classify import ZeroShotClassifier
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.pretrained_clip import PretrainedCLIP
from dalle_mini_impl.rerank import score_pairs
from dalle_mini_impl.sheet import read_metadata
from tests.tiny import tiny_bundle, tiny_checkpoint
from tests.tiny_pretrained import save_tiny_clip

transformers = pytest.importorskip("transformers", reason="pretrained CLIPs need transformers: the extra `clip`")

FAMILIES = ["clip", "siglip"]
TEXTS = ["a red heart", "a blue square", "a green apple a red circle a blue heart a green square"]  # the last is cut
LENGTH = 9


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / request.param, request.param)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Soft random pictures of some (width, height)."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture, size in zip(coarse, sizes, strict=True)]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def test_scores_are_the_librarys_own(folder: Path) -> None:
    clip = PretrainedCLIP.load(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    shown = pictures((40, 24), (16, 16), (7, 31))
    padding = {"padding": "max_length" if "siglip" in folder.name else True}
    text = tokenizer(TEXTS, **padding, truncation=True, max_length=LENGTH, return_tensors="pt")
    text.pop("token_type_ids", None)
    if "siglip" in folder.name:  # its processor gives no mask
        text.pop("attention_mask")
    with torch.no_grad():
        expected = model(**text, **processor(images=shown, return_tensors="pt")).logits_per_image
    cosines = clip.encode_pictures(shown, batch_size=2) @ clip.encode_texts(TEXTS, batch_size=2).t()
    torch.testing.assert_close(clip.scale * cosines + clip.bias, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score_pairs(clip, shown, TEXTS), cosines.diagonal())
    shares = ZeroShotClassifier(clip, TEXTS).probabilities(iter(shown))
    torch.testing.assert_close(shares, expected.softmax(dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (11, 11), (40, 24), (24, 41)])
def test_tensors_are_preprocessed_as_the_processor_does(folder: Path, size: tuple[int, int]) -> None:
    clip = PretrainedCLIP.load(folder)
    (picture,) = pictures(size)
    expected = clip.processor(images=picture, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    ours = clip.preprocess(tensor)
    assert ours.shape == expected.shape
    # PIL rounds to 8 bits after each of its two passes; in units of the normalised values.
    assert (ours - expected).abs().max() < 2.1 / 255 / min(clip.processor.image_std)
    if size == (16, 16):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_what_the_processor_says_is_done(folder: Path) -> None:
    clip = PretrainedCLIP.load(folder)
    tensor = torch.from_numpy(np.array(pictures((20, 20))[0])).permute(2, 0, 1)[None].float() / 255
    clip.processor.do_resize, clip.processor.do_normalize = False, False
    clip.processor.do_center_crop, clip.processor.crop_size = True, {"height": 12, "width": 24}
    cropped = clip.preprocess(tensor)
    assert cropped.shape == (1, 3, 12, 24) and (cropped[..., :2] == 0).all() and (cropped[..., -2:] == 0).all()
    torch.testing.assert_close(cropped[..., 2:-2], tensor[:, :, 4:16])
    clip.processor.do_rescale = False
    torch.testing.assert_close(clip.preprocess(tensor), 255 * cropped)


def test_gradients_reach_the_picture_and_nothing_else(folder: Path) -> None:
    clip = PretrainedCLIP.load(folder)
    images = torch.rand(2, 3, 20, 20).requires_grad_()
    vectors = clip.encode_image(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    vectors[:, 0].sum().backward()
    assert images.grad is not None and (images.grad.abs().flatten(1).sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_names_tell_weights_apart(tmp_path: Path) -> None:
    first = PretrainedCLIP.load(save_tiny_clip(tmp_path / "model"))
    again = PretrainedCLIP.load(tmp_path / "model")
    other = PretrainedCLIP.load(save_tiny_clip(tmp_path / "b" / "model", seed=1))
    assert first.name == again.name != other.name and first.name.startswith("model@")
    again.processor.image_mean = [0.0, 0.0, 0.0]
    del again.__dict__["name"]
    assert first.name != again.name, "another preprocessing gives other vectors"


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    PretrainedCLIP.load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_it_ranks_instead_of_the_checkpoints_own(folder: Path) -> None:
    bundle, clip = tiny_bundle(), PretrainedCLIP.load(folder)
    drawn = TextToImage(bundle, clip)("a red heart", candidates=3, keep=3)
    plain = {picture.candidate: picture for picture in TextToImage(bundle)("a red heart", candidates=3, keep=3)}
    cosines = clip.encode_pictures([picture.image for picture in drawn]) @ clip.encode_texts(["a red heart"])[0]
    for picture, cosine in zip(drawn, cosines.tolist(), strict=True):
        assert torch.equal(picture.tokens, plain[picture.candidate].tokens)
        assert picture.clip_score == pytest.approx(cosine, abs=1e-5)
        assert picture.score == pytest.approx(clip.scale * cosine + 0.03 * picture.log_likelihood, abs=1e-3)


def test_every_command_takes_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(tiny_checkpoint(tmp_path / "tiny", "dalle.reading_share=0.2"))]
    clip, shown = PretrainedCLIP.load(folder), tmp_path / "shown"
    shown.mkdir()
    for index, picture in enumerate(pictures((40, 24), (16, 16), (30, 30))):
        picture.save(shown / f"{index}.png")
    files = [shown / f"{index}.png" for index in range(3)]
    cosines = clip.encode_pictures([Image.open(file) for file in files]) @ clip.encode_texts(TEXTS).t()
    by, out = ["--clip", str(folder)], tmp_path / "out"

    assert run("classify", str(shown), "--labels", ",".join(TEXTS), *by, "--out", str(out)) == 0
    lines = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [TEXTS[index] for index in cosines.argmax(dim=1)]

    assert run("rerank", str(shown), "--prompt", TEXTS[0], *by, "--out", str(out)) == 0
    lines = [json.loads(line) for line in (out / "ranking.jsonl").read_text().splitlines()]
    assert [line["clip_score"] for line in lines] == pytest.approx(sorted(cosines[:, 0].tolist(), reverse=True))

    options = [*by, *checkpoint, "--out", str(out / "scores.jsonl")]
    assert run("score", str(files[0]), "--caption", TEXTS[0], *options) == 0
    (line,) = (out / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["clip_score"] == pytest.approx(cosines[0, 0].item(), abs=1e-5)

    options = [*by, *checkpoint, "--candidates", "2", "--keep", "1", "--out", str(out)]
    assert run("sample", "--prompt", TEXTS[0], *options) == 0
    (drawn,) = out.glob("001-*.png")
    facts = read_metadata(drawn)
    again = clip.encode_pictures([Image.open(drawn)]) @ clip.encode_texts([TEXTS[0]])[0]
    assert facts["clip"] == clip.name and facts["clip_score"] == pytest.approx(again.item(), abs=1e-5)
    capsys.readouterr()


def test_an_index_is_searched_by_the_clip_that_made_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    for index, picture in enumerate(pictures((40, 24), (16, 16), (30, 30))):
        picture.save(shown / f"{index}.png")
    by = ["--clip", str(folder)]
    assert run("index", str(shown), *by) == 0
    assert "3 embedded" in capsys.readouterr().out
    assert run("search", TEXTS[0], "--index", str(shown), *by, "--out", str(tmp_path)) == 0
    clip = PretrainedCLIP.load(folder)
    cosines = clip.encode_pictures(pictures((40, 24), (16, 16), (30, 30))) @ clip.encode_texts(TEXTS[:1])[0]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    expected = sorted(cosines.tolist(), reverse=True)
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=2e-3), "the index keeps 16 bits"
    capsys.readouterr()
    assert run("search", TEXTS[0], "--index", str(shown)) == 2
    said = capsys.readouterr().err
    assert f"made by another CLIP, {clip.name}, not by emoji@" in said and "--clip" in said
    assert run("index", str(shown)) == 0
    said = capsys.readouterr()
    assert f"is an index by {clip.name}" in said.err and "3 embedded" in said.out


def test_what_is_no_clip_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no pretrained CLIP can be loaded from 'nobody/nothing'"):
        PretrainedCLIP.load("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pretrained CLIP can be loaded from .*empty"):
        PretrainedCLIP.load(tmp_path / "empty")
    transformers.BertConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="model of the kind 'bert', not clip or siglip"):
        PretrainedCLIP.load(tmp_path / "bert")
    weights = save_tiny_clip(tmp_path / "half") / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensors[key] for key in sorted(tensors)[1:]}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of its weights are missing, {sorted(tensors)[0]}"):
        PretrainedCLIP.load(tmp_path / "half")
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"no pretrained CLIP can be loaded from .*half"):
        PretrainedCLIP.load(tmp_path / "half")
    (tmp_path / "a.png").touch()
    assert run("classify", str(tmp_path), "--labels", "one,two", "--clip", str(tmp_path / "empty")) == 2
    assert "error: no pretrained CLIP" in capsys.readouterr().err

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("dalle_mini_impl.pretrained_clip.import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'dalle-mini-impl\[clip\]'"):
        PretrainedCLIP.load("openai/clip-vit-base-patch32")
