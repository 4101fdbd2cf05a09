"""Faults of the web page that are forbidden here: pictures other than the command's, errors without words."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.search import PictureIndex
from dalle_mini_impl.sheet import read_metadata
from dalle_mini_impl.web import Page, build_page
from tests.tiny import tiny_checkpoint

PROMPT = "a red circle"
SAMPLER = (2.0, 1.0, 0.95)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("web") / "tiny", "clip.caption_layers=1")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TextToImage:
    return TextToImage.from_pretrained(checkpoint)


def _ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_it_draws_what_a_call_draws_and_its_files_replay(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    page = Page(model, str(checkpoint), tmp_path)
    *previews, (shown, status) = page.draw(PROMPT, 5, 2, 3, *SAMPLER)
    assert previews and all(len(pictures) == 5 for pictures, _ in previews)
    called = model(PROMPT, candidates=5, keep=2, seed=3)
    assert len(shown) == 2 and model.ranked_by in status
    for (file, _), picture in zip(shown, called, strict=True):
        assert read_metadata(file)["tokens"] == picture.tokens.tolist()
        assert _ended(["replay", file]) == 0


def test_a_variation_keeps_its_share_and_its_prompt(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    page = Page(model, str(checkpoint), tmp_path)
    *_, (shown, _) = page.draw(PROMPT, 2, 1, 0, *SAMPLER)
    origin = shown[0][0]
    *_, (varied, _) = page.vary(origin, "", 0.5, 3, 3, 7)
    before = read_metadata(origin)
    for file, _ in varied:
        facts = read_metadata(file)
        assert facts["prompt"] == PROMPT and facts["tokens"][:8] == before["tokens"][:8]
        assert facts["seed"] == 7


def test_bad_input_is_said_in_words(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    page = Page(model, str(checkpoint), tmp_path)
    with pytest.raises(gr.Error, match="what is to be drawn"):
        next(page.draw("  ", 2, 1, 0, *SAMPLER))
    with pytest.raises(gr.Error, match="choose a picture first"):
        next(page.vary(None, PROMPT, 0.5, 2, 1, 0))
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(gr.Error, match="can't be read as a picture"):
        next(page.vary(str(text), PROMPT, 0.5, 2, 1, 0))
    with pytest.raises(gr.Error, match="load a picture first"):
        page.classify(None, "a, b")
    with pytest.raises(gr.Error, match="load a picture first"):
        page.caption(None, 4)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 20), "red").save(picture)
    with pytest.raises(gr.Error, match="at least two"):
        page.classify(str(picture), "a circle")


def test_the_page_answers_over_http(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (20, 20), colour).save(folder / f"{colour}.png")
    assert _ended(["index", str(folder), "--checkpoint", str(checkpoint)]) == 0
    index = PictureIndex.load(folder / ".index")
    page = build_page(model, str(checkpoint), index=index, files=tmp_path / "drawn")
    (tmp_path / "drawn").mkdir()
    _, url, _ = page.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", allowed_paths=[str(tmp_path)]
    )
    try:
        client = Client(url, verbose=False, download_files=False)
        job = client.submit(PROMPT, 3, 2, 0, *SAMPLER, api_name="/draw")
        pictures, status = job.result(timeout=60)
        assert len(pictures) == 2 and "ranked by" in status and len(job.outputs()) > 1
        red = handle_file(str(folder / "red.png"))
        answer = client.predict(red, "a red circle\na blue square", api_name="/classify")
        assert {item["label"] for item in answer["confidences"]} == {"a red circle", "a blue square"}
        written = client.predict(red, 4, api_name="/caption")["data"]
        called = model.caption(Image.open(folder / "red.png"), 4)
        assert written == [[item.caption, f"{item.score:.2f}"] for item in called]
        found = client.predict("", red, 3, api_name="/search")
        assert found[0]["caption"] == "1.000 red.png" and len(found) == 3
    finally:
        page.close()


def test_without_gradio_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert _ended(["web"]) == 2
    assert "pip install 'dalle-mini-impl[web]'" in capsys.readouterr().err


def test_watching_changes_no_random_state(model: TextToImage) -> None:
    before = torch.get_rng_state()
    list(model.stream(PROMPT, candidates=2))
    assert torch.equal(before, torch.get_rng_state())
