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
    *_, (varied, _) = page.vary(origin, "", 0.5, 3, 3, 7, 1.5, 0.9, 0.8)
    before = read_metadata(origin)
    for file, _ in varied:
        facts = read_metadata(file)
        assert facts["prompt"] == PROMPT and facts["tokens"][:8] == before["tokens"][:8]
        assert facts["seed"] == 7
        assert [facts["settings"][name] for name in ("guidance", "temperature", "top_p")] == [1.5, 0.9, 0.8]


def test_bad_input_is_said_in_words(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    page = Page(model, str(checkpoint), tmp_path)
    with pytest.raises(gr.Error, match="what is to be drawn"):
        next(page.draw("  ", 2, 1, 0, *SAMPLER))
    with pytest.raises(gr.Error, match="choose a picture first"):
        next(page.vary(None, PROMPT, 0.5, 2, 1, 0, *SAMPLER))
    with pytest.raises(gr.Error, match="give a seed"):
        next(page.draw(PROMPT, 2, 1, None, *SAMPLER))
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(gr.Error, match="can't be read as a picture"):
        next(page.vary(str(text), PROMPT, 0.5, 2, 1, 0, *SAMPLER))
    with pytest.raises(gr.Error, match="load a picture first"):
        page.classify(None, "a, b")
    with pytest.raises(gr.Error, match="load a picture first"):
        page.caption(None, 4)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 20), "red").save(picture)
    with pytest.raises(gr.Error, match="at least two"):
        page.classify(str(picture), "a circle")
    secret = tmp_path / "secret.txt"
    secret.write_text("one\ntwo\n")
    with pytest.raises(gr.Error, match="at least two"):  # the text is a label, not the name of a file to read
        page.classify(str(picture), str(secret))


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
        glass = tmp_path / "glass.png"
        Image.new("RGBA", (20, 20), (255, 0, 0, 60)).save(glass)
        answer = client.predict(handle_file(str(glass)), "a red circle\na blue square", api_name="/classify")
        expected = Page(model, str(checkpoint), tmp_path).classify(str(glass), "a red circle\na blue square")
        assert {
            item["label"]: pytest.approx(item["confidence"], abs=1e-4) for item in answer["confidences"]
        } == expected
        written = client.predict(red, 4, api_name="/caption")["data"]
        called = model.caption(Image.open(folder / "red.png"), 4)
        assert written == [[item.caption, f"{item.score:.2f}"] for item in called]
        found = client.predict("", red, 3, api_name="/search")
        assert found[0]["caption"] == "1.000 red.png" and len(found) == 3
    finally:
        page.close()


def test_what_a_model_does_is_done_in_turn(model: TextToImage, checkpoint: Path, tmp_path: Path) -> None:
    index = PictureIndex(tmp_path, "clip", [], torch.zeros(0, 1))
    functions = build_page(model, str(checkpoint), index=index, files=tmp_path).fns.values()
    queues = {function.api_name: function.concurrency_id for function in functions}
    assert {queues[name] for name in ("draw", "vary", "classify", "caption", "search")} == {"model"}


def test_nothing_but_what_it_drew_is_served(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    assert _ended(["index", str(folder), "--checkpoint", str(checkpoint)]) == 0
    launched: list[dict[str, object]] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda _, **options: launched.append(options))
    options = ["--checkpoint", str(checkpoint), "--index", str(folder), "--out", str(tmp_path / "out")]
    assert _ended(["web", *options]) == 0
    assert [each["allowed_paths"] for each in launched] == [[str(tmp_path / "out")]]
    assert [each["server_name"] for each in launched] == ["127.0.0.1"], "other machines are let in when asked to"


def test_a_hit_that_was_damaged_since_is_left_out(
    model: TextToImage, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (2000, 1000), "red").save(folder / "red.png")
    Image.new("RGB", (20, 20), "blue").save(folder / "blue.png")
    assert _ended(["index", str(folder), "--checkpoint", str(checkpoint)]) == 0
    (folder / "blue.png").write_bytes(b"no picture")
    page = Page(model, str(checkpoint), tmp_path, PictureIndex.load(folder / ".index"))
    ((picture, label),) = page.search(PROMPT, None, 5)
    assert label.endswith("red.png") and picture.size == (512, 256)


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
