"""``dalle-mini report``: a page that stands alone, says what is missing, and finds what was learnt by heart."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.cli.app import main
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.data.scenes import render
from dalle_mini_impl.data.shapes import ShapesSource
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.pretrained import save_bundle
from dalle_mini_impl.report.drawing import choose_prompts, draw_candidates
from dalle_mini_impl.report.elements import tag, to_html
from dalle_mini_impl.report.measure import flat_psnr
from dalle_mini_impl.report.memorisation import (
    Audit,
    Ruler,
    audit,
    chance_interval,
    clip_ruler,
    nearest,
    pixel_ruler,
    share_of,
)
from dalle_mini_impl.report.records import read_run
from dalle_mini_impl.report.sections import against_chance
from dalle_mini_impl.report.svg import Level, Line, line_chart, share_chart, thinned, ticks
from dalle_mini_impl.sheet import contact_sheet
from dalle_mini_impl.training.run import train
from tests.test_training_tracking import recipe
from tests.tiny import tiny_bundle

SECTIONS = (
    "curves",
    "reconstructions",
    "samples",
    "neighbours",
    "memorisation",
    "best-of-n",
    "codebook",
    "data",
    "time",
    "settings",
)
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order; notes addresses, ids and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "not all is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute of {tag} is there twice"
        self.ids += [value for value in [values.get("id")] if value]
        self.addresses += [value for key in ("src", "href", "srcset", "action") if (value := values.get(key))]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(plain(data))

    @property
    def text(self) -> str:
        return plain(" ".join(self.words))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "<mine> & yours"
    assert train(recipe("data.image_size=32", "clip.caption_layers=1"), "shapes:count=200", out)
    return out


def report(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", text))
    assert "script" not in page.tags and "link" not in page.tags
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(set(page.ids)) == len(page.ids)
    assert all(f"#{name}" in page.addresses for name in SECTIONS)
    return page


def test_a_finished_run_fills_every_section(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(finished, "--samples", "8", "--candidates", "3") == 0
    told = capsys.readouterr().out
    page = read(finished / "report.html")
    for ruler in ("pixels", "clip"):
        line = next(line for line in told.splitlines() if line.startswith(f"{ruler}: "))
        assert "of 24 samples are nearer to a training than to a held-out picture; chance alone gives " in line
        assert line.partition("; ")[2] in page.text
    facts = page.text[page.text.index("nearer to training") : page.text.index("Curves")]
    assert "chance alone gives" in facts and "interval" not in facts
    assert "Not here" not in page.text
    assert "<mine> & yours" in page.text
    for words in (
        f"chance, ln B: {math.log(10):.3g}",
        f"knows nothing, ln V: {math.log(32):.3g}",
        "knows how frequent each code is",
        "a flat colour a token",
        "all codes: 32",
        "chance: 50 %",
        "control: real held-out pictures",
        "24 samples between",
        "the checker of shapes",
        "● train.vae.batch_size",
        "all stages are finished",
        "Reading captions",
    ):
        assert words in page.text, words
    assert page.text.count("after 4 steps") >= 2 and page.text.count("after 2 steps") >= 2
    assert page.tags.count("img") == 4 + 3 * 8


def test_the_figures_are_the_files_own(finished: Path) -> None:
    record = read_run(finished)
    assert record.is_finished and [stage.steps for stage in record.stages.values()] == [4, 4, 4]
    vae = record.stages["vae"]
    steps, values = vae.curve("psnr", "evaluations")
    assert steps == [2, 4] and vae.last("psnr") in [pytest.approx(value, abs=1e-5) for value in values]
    assert [step for step, _ in vae.sheets] == [2, 4]
    data = PreparedData.open(finished / "data")
    images = data.images(data.validation)
    flat = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    errors = (images - flat).square().mean(dim=(1, 2, 3))
    assert flat_psnr(data, 4) == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)


def test_captions_beside_training_pictures_are_theirs(finished: Path) -> None:
    """Those of all pictures, held out or not, stood there."""
    data = PreparedData.open(finished / "data")
    num_captions = sum(len(data.captions[index]) for index in data.train)
    assert num_captions < sum(len(captions) for captions in data.captions)
    assert report(finished, "--samples", "0") == 0
    facts = read(finished / "report.html").text
    assert f"training pictures {len(data.train):,} {num_captions:,} captions" in facts


def test_stages_that_not_every_run_has_have_their_curves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = [f"train.{stage}.{value}" for stage in ("prior", "vqgan") for value in ("steps=4", "batch_size=8")]
    wanted = recipe("dalle.image_prefix=2", "vqgan.alone_steps=1", *quick)
    assert train(wanted, "shapes:count=60", out)
    assert train(wanted, "shapes:count=60", out, stages=["vqgan"])
    record = read_run(out)
    assert list(record.stages) == ["vae", "clip", "prior", "dalle", "vqgan"]
    assert report(out, "--samples", "4", "--candidates", "1") == 0
    text = read(out / "report.html").text
    assert f"VAE {record.last('vae', 'psnr'):.1f} dB" in text
    before, after = (record.stages[stage].last("psnr") for stage in ("vae", "vqgan"))
    assert before != after and record.last("vae", "psnr") == after, "the first figures are of the checkpoint's VAE"
    assert "Prior of unCLIP" in text and "Adversarial training" in text and "Fréchet distance" in text


def test_every_stage_has_its_speed(tmp_path: Path) -> None:
    """Distillation counts tokens, too, and its speed was looked up in pictures: there was none."""
    out = tmp_path / "run"
    wanted = recipe('train.stages=["vae","dalle","distill"]', "train.distill.steps=2", "train.distill.batch_size=8")
    assert train(wanted, "shapes:count=60", out)
    assert report(out, "--samples", "0") == 0
    speeds = {row[0]: row[6] for row in read(out / "report.html").rows if len(row) == 8}
    for name, unit in (("Discrete VAE", "pictures"), ("DALL·E", "tokens"), ("Distillation of guidance", "tokens")):
        assert re.fullmatch(rf"[\d,]+ {unit}", speeds[name])


def test_an_unfinished_run_has_a_page_with_what_there_is(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "report.html").unlink(missing_ok=True)
    for name in ("state/clip", "state/dalle", "cache"):
        shutil.rmtree(out / name)
    for name in ("clip", "dalle"):
        (out / "checkpoint" / f"{name}.safetensors").unlink()
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"dalle"' not in line]
    half = '{"stage": "clip", "step": 4, "ti'
    (out / "metrics.jsonl").write_text("\n".join([*lines, half]))
    page_path = tmp_path / "pages" / "page.html"
    assert report(out, "--out", page_path) == 0
    page = read(page_path)
    assert not (out / "report.html").exists(), "--out is where it goes, and nowhere else"
    assert "CLIP not finished (4 steps so far), DALL·E not begun" in page.text
    assert page.text.count("Not here: DALL·E is not trained yet.") == 3
    assert "Not here: The id cache is not made yet" in page.text
    assert "Not here: this stage has not begun." in page.text
    shutil.rmtree(out / "checkpoint")
    shutil.rmtree(out / "data")
    (out / "metrics.jsonl").unlink()
    (out / "data-report.json").unlink()
    for folder in ("pages", "v1.2"):  # one that is there, and one that only looks like the name of a file
        assert report(out, "--out", tmp_path / folder) == 0
        assert "the pictures are not read yet" in read(tmp_path / folder / "report.html").text


def test_pictures_that_are_gone_are_not_a_vae_that_is_untrained(finished: Path, tmp_path: Path) -> None:
    """Without data/ every section said of a finished run: "The VAE is not trained yet"."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "data")
    assert report(out, "--samples", "2", "--candidates", "1") == 0
    text = read(out / "report.html").text
    assert text.count(f"Not here: The run's pictures are gone: {out / 'data'} has none.") == 4
    assert "flat colours" not in text[: text.index("Curves")]
    assert "not trained yet" not in text


def test_a_recipe_without_clip_finishes(tmp_path: Path) -> None:
    """It was under way for ever: CLIP not begun."""
    out = tmp_path / "run"
    assert train(recipe('train.stages=["vae","dalle"]'), "shapes:count=60", out)
    assert read_run(out).is_finished
    assert report(out, "--samples", "2", "--candidates", "1") == 0
    text = read(out / "report.html").text
    assert "finished: Discrete VAE finished, CLIP not part of this recipe, DALL·E finished." in text
    assert "Not here: this stage is not part of this recipe." in text
    assert "under way" not in text and "not begun" not in text


def test_a_recipe_without_dalle_promises_none(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(recipe('train.stages=["vae"]'), "shapes:count=60", out)
    assert report(out) == 0
    text = read(out / "report.html").text
    assert "finished: Discrete VAE finished, CLIP not part of this recipe, DALL·E not part of this recipe." in text
    assert text.count("Not here: DALL·E is not part of this recipe.") == 3
    assert "Not here: No stage of this run needed an id cache" in text
    assert not any(promise in text for promise in ("comes with", "not trained yet", "not begun", "not made yet"))


@pytest.mark.parametrize("prefix", [0, 2])
def test_models_taken_over_are_not_awaited(tmp_path: Path, prefix: int) -> None:
    """One stage of a run from another checkpoint was under way for ever: the other stages had not begun."""
    source, out = tmp_path / "source", tmp_path / "run"
    bundle = tiny_bundle(f"dalle.image_prefix={prefix}")
    save_bundle(bundle, source)
    quick = ("train.vqgan.steps=4", "train.vqgan.batch_size=8", "vqgan.alone_steps=1", f"dalle.image_prefix={prefix}")
    assert train(recipe(*quick), "shapes:count=60", out, stages=["vqgan"], init_from=str(source))
    record = read_run(out)
    taken = ["vae", "clip", *(["prior"] if prefix else []), "dalle"]
    assert {stage: record.stages[stage].progress for stage in record.stages} == {
        **dict.fromkeys(taken, "taken over from --init-from"),
        "vqgan": "finished",
    }
    assert record.is_finished
    assert report(out, "--samples", "2", "--candidates", "1") == 0
    text = read(out / "report.html").text
    assert "finished: Discrete VAE taken over from --init-from, CLIP taken over from --init-from," in text
    assert (
        text.count("Not here: the model is taken over from --init-from, and this stage has not run.") == len(taken) + 2
    )
    assert not any(promise in text for promise in ("under way", "comes with", "not begun", "not trained yet"))


def test_a_recipe_that_draws_at_twice_the_size_is_compared_at_its_own(tmp_path: Path) -> None:
    """Without its upscaler nothing could be drawn; with it, pictures were too large for CLIP. There was no page."""
    out = tmp_path / "run"
    quick = ("train.upscale.steps=2", "train.upscale.batch_size=8")
    wanted = recipe("upscale.factor=2", "sampling.upscale=true", *quick)
    for stages in (["vae", "clip", "dalle"], ["upscale"]):
        assert train(wanted, "shapes:count=60", out, stages=stages)  # type: ignore[arg-type]
        assert report(out, "--samples", "4", "--candidates", "2") == 0
        assert "8 samples between" in read(out / "report.html").text


def test_a_run_from_another_checkpoint_awaits_what_it_asks_for(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "run"
    save_bundle(tiny_bundle(), source)
    assert train(recipe(), "shapes:count=60", out, stages=["vae"], init_from=str(source))
    record = read_run(out)
    states = {"vae": "finished", "clip": "taken over from --init-from", "dalle": "not begun"}
    assert {stage: record.stages[stage].progress for stage in record.stages} == states, "its DALL·E knows other ids"
    assert not record.is_finished


def test_training_pictures_are_not_shown_as_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is held out, evaluations use training pictures, and page and sheets called them held-out."""
    labels: set[str] = set()

    def noting(rows: Any) -> Any:
        labels.update(label for _, pictures in rows for _, label in pictures)
        return contact_sheet(rows)

    monkeypatch.setattr("dalle_mini_impl.training.evaluation.contact_sheet", noting)
    warning = "No picture was held out: what is called held-out or validation here are training pictures"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(20):
        Image.new("RGB", (16, 16), (12 * index, 100, 200)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"shade {index}")
    for fraction, times in ((0, 4), (0.5, 0)):
        out = tmp_path / str(fraction)
        wanted = recipe('train.stages=["vae","dalle"]', f"data.validation_fraction={fraction}")
        assert train(wanted, str(pictures), out)
        assert report(out, "--samples", "0") == 0
        assert read(out / "report.html").text.count(warning) == times
        assert labels == {"", "trained on" if times else "held out"}
        labels.clear()


def test_without_a_checker_the_own_clip_judges_the_other_rankers(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    known = json.loads((out / "data-report.json").read_text())
    (out / "data-report.json").write_text(json.dumps(known | {"kind": "pairs"}))
    assert report(out, "--samples", "6", "--candidates", "2") == 0
    text = read(out / "report.html").text
    assert "Judged by the run's own CLIP" in text
    assert "best by likelihood" in text and "best by CLIP" not in text
    assert report(out, "--judge", "emoji", "--samples", "4", "--candidates", "2") == 0
    assert "mean CLIP score by emoji" in read(out / "report.html").text


def test_what_cant_be_done_is_told(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path) == 2
    assert "holds no run (no run.json)" in capfd.readouterr().err
    assert report(finished, "--judge", "emoji") == 2
    assert "leave out --judge" in capfd.readouterr().err
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoint" / "clip.safetensors").unlink()
    assert report(out, "--distance", "clip") == 2
    assert "needs a CLIP" in capfd.readouterr().err
    assert report(finished, "--samples", "0", "--out", tmp_path / "none.html") == 0
    assert read(tmp_path / "none.html").text.count("ask for samples with --samples") == 3
    assert report(finished, "--samples", "4", "--candidates", "1", "--out", tmp_path / "one.html") == 0
    assert "raise --candidates" in read(tmp_path / "one.html").text


def scenes(start: int, count: int) -> Tensor:
    source = ShapesSource(count=start + count, image_size=32)
    arrays = [np.asarray(render(source.scene(index)[0], 32)) for index in range(start, start + count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def audited(
    ruler: Ruler,
    samples: Tensor,
    prompts: Sequence[int],
    from_training: Sequence[bool],
    training: Tensor,
    held_out: Tensor,
    **options: Any,
) -> Audit:
    """The audit between pictures instead of their features."""
    sides = (ruler.features(training), ruler.features(held_out))
    return audit(ruler, samples, prompts, from_training, *sides, **options)


def test_the_audit_finds_copies_and_clears_what_is_drawn_anew() -> None:
    training, held_out, fresh = scenes(0, 150), scenes(150, 150), scenes(300, 200)
    noise = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.03
    copies = (training[:40] + noise).clamp(0, 1)
    sides = [index % 2 == 0 for index in range(40)]
    copied = audited(pixel_ruler(), copies, range(40), sides, training, held_out, control=fresh)
    assert copied.samples.mean > 0.97 and copied.samples.low > 0.9 and copied.num_references == 150
    anew = audited(pixel_ruler(), fresh, range(200), [index % 2 == 0 for index in range(200)], training, held_out)
    assert anew.samples.chance is not None and copied.samples.chance is not None
    low, high = anew.samples.chance
    assert 0.35 < low < anew.samples.mean < high < 0.65
    assert copied.samples.mean > copied.samples.chance[1]
    assert anew.control is None and copied.control is not None and abs(copied.control.mean - 0.5) < 0.12
    swapped = audited(pixel_ruler(), copies, range(40), sides, held_out, training)
    assert swapped.samples.mean == pytest.approx(1 - copied.samples.mean)


def test_a_share_that_chance_explains_is_no_finding() -> None:
    """Of few pictures a side, 100 % with an interval of 100 % to 100 % stood beside "chance 50 %"."""
    few, many = scenes(0, 12), scenes(0, 300)
    sides = [index % 2 == 0 for index in range(20)]
    alike = audited(pixel_ruler(), few[:1].expand(20, -1, -1, -1), range(20), sides, few[:6], few[6:])
    assert (alike.samples.mean, alike.samples.low, alike.samples.chance) == (1.0, 1.0, (0.0, 1.0))
    words = plain(against_chance(alike))
    assert words == "chance alone gives 0 % to 100 %, so this can't be told apart from chance with 6 pictures a side"
    copied = audited(pixel_ruler(), many[:20], range(20), sides, many[:150], many[150:])
    assert against_chance(copied).endswith("so this is more than chance")
    strange = audited(pixel_ruler(), many[:20], range(20), sides, many[150:], many[:150])
    assert against_chance(strange).endswith("so this is less than chance")
    chart = share_chart([("all samples", alike.samples)], chance=0.5, x_label="nearer")
    assert "chance alone: 0 % to 100 %" in [plain(text.text or "") for text in chart.iter("text")]


def test_copies_are_found_by_clip_and_mirrored_too() -> None:
    bundle = tiny_bundle("data.image_size=32")
    assert bundle.clip is not None
    training, held_out = scenes(0, 30), scenes(30, 30)
    sides = [index % 2 == 0 for index in range(30)]
    ruler = clip_ruler(bundle.clip)
    assert audited(ruler, training, range(30), sides, training, held_out).samples.mean == 1.0
    mirrored = training.flip(-1)
    assert audited(pixel_ruler(), mirrored, range(30), sides, training, held_out).samples.mean < 0.9
    found = audited(pixel_ruler(), mirrored, range(30), sides, training, held_out, mirrored=True)
    assert found.samples.mean == 1.0


def test_sides_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="5 training and 4 held-out pictures: compare with as many"):
        audited(pixel_ruler(), scenes(0, 2), [0, 1], [True, False], scenes(2, 5), scenes(7, 4))


def test_ties_count_half_and_prompts_vary_together() -> None:
    same = scenes(0, 10)
    tied = audited(pixel_ruler(), scenes(20, 6), [0, 0, 1, 1, 2, 2], [True] * 2 + [False] * 4, same, same)
    assert tied.samples.mean == 0.5 and tied.samples.low == tied.samples.high == 0.5
    hits = np.array([1.0] * 8 + [0.0] * 8)
    apart, together = share_of(hits, range(16)), share_of(hits, [0] * 8 + [1] * 8)
    assert apart.mean == together.mean == 0.5
    assert together.high - together.low > apart.high - apart.low


def test_chance_is_wider_where_samples_share_a_nearest_picture() -> None:
    apart = chance_interval(np.arange(100), 1000)
    together = chance_interval(np.arange(100) // 10, 1000)
    assert abs(sum(apart) / 2 - 0.5) < 0.03 and abs(sum(together) / 2 - 0.5) < 0.05
    assert apart[1] - 0.5 == pytest.approx(1.96 * 0.05, abs=0.03), "a hundred tosses of a coin"
    assert together[1] - 0.5 == pytest.approx(1.96 * 0.158, abs=0.06), "ten tosses"


def test_the_nearest_is_that_of_comparing_all() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, references = torch.randn(7, 5, generator=generator), torch.randn(50, 5, generator=generator)
    numbers = np.arange(100, 150)
    parts = [(numbers[start : start + 8], references[start : start + 8]) for start in range(0, 50, 8)]
    distance, index = nearest(queries, iter(parts))
    for row, query in enumerate(queries):
        distances = (references - query).norm(dim=1)
        assert index[row] == 100 + int(distances.argmin())
        assert distance[row].item() == pytest.approx(distances.min().item(), rel=1e-5)


def test_as_many_captions_come_from_either_side(finished: Path) -> None:
    data = PreparedData.open(finished / "data")
    prompts = choose_prompts(data, 10)
    assert [prompt.from_training for prompt in prompts] == [True, False] * 5
    assert all((prompt.index in data.train) is prompt.from_training for prompt in prompts)
    assert all(len({prompt.text for prompt in side}) == 5 for side in (prompts[::2], prompts[1::2]))
    assert len(choose_prompts(data, 1000)) == 2 * len(data.validation), "no more than there are held-out captions"
    assert choose_prompts(data, 0) == []


def recaptioned(run: Path, out: Path, captions: Sequence[str]) -> Path:
    """A copy of a run whose pictures have these captions in turn; "" for none."""
    shutil.copytree(run, out)
    lines = [json.loads(line) for line in (out / "data" / "captions.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        caption = captions[index % len(captions)]
        line["captions"] = [caption] if caption else []
    (out / "data" / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.mark.parametrize("classes", [("a red circle",), ("a red circle", "a blue star", "a green heart")])
def test_class_names_are_drawn_for_on_both_sides(finished: Path, tmp_path: Path, classes: tuple[str, ...]) -> None:
    """The held-out side took every caption, and training, served after it, had none: nothing was drawn."""
    out = recaptioned(finished, tmp_path / "run", classes)
    data = PreparedData.open(out / "data")
    prompts = choose_prompts(data, 48)
    for is_training in (True, False):
        side = [prompt for prompt in prompts if prompt.from_training is is_training]
        assert sorted(prompt.text for prompt in side) == sorted(classes)
        assert all((prompt.index in data.train) is is_training for prompt in side)
    assert report(out, "--samples", "8", "--candidates", "2") == 0
    text = read(out / "report.html").text
    assert "Nothing was drawn" not in text
    assert f"{4 * len(classes)} samples between" in text


def test_nothing_drawn_has_its_true_reason(finished: Path, tmp_path: Path) -> None:
    bare = recaptioned(finished, tmp_path / "bare", [""])
    assert report(bare, "--samples", "8", "--candidates", "2") == 0
    text = read(bare / "report.html").text
    assert text.count("Nothing was drawn: no training picture has a caption.") == 3
    assert "ask for samples" not in text
    assert report(finished, "--samples", "1", "--candidates", "2", "--out", tmp_path / "one.html") == 0
    text = read(tmp_path / "one.html").text
    assert "A single caption can't come from both sides" in text and "No captioned picture is held out" not in text


def test_a_caption_of_both_sides_is_drawn_anew_for_each() -> None:
    model = TextToImage(tiny_bundle())
    prompts = ["a red circle", "a blue square", "A red circle"]
    first, _, again = (pictures for _, pictures in draw_candidates(model, prompts, 3))
    assert [picture.candidate for picture in (*first, *again)] == [0, 1, 2, 3, 4, 5]
    assert not any(torch.equal(one.tokens, other.tokens) for one in first for other in again)


def test_captions_cant_break_the_page() -> None:
    evil = '<script>alert("1")</script> & "quoted" \x00 </p>'
    text = to_html(tag("html", tag("body", tag("p", evil, title=evil), tag("img", alt=evil))))
    page = Page(text)
    assert "script" not in page.tags and page.tags == ["html", "body", "p", "img"]
    assert '<script>alert("1")</script> & "quoted"' in page.text and "\x00" not in text


def test_a_share_of_one_is_charted_from_zero_to_one() -> None:
    """With one held-out picture, recall and chance are 100 %, and the axis went on to 200 %."""
    recall = Line(label="recall", xs=[1, 2], ys=[1.0, 1.0])
    chart = line_chart([recall], x_label="steps", y_label="recall", levels=[Level("chance", 1.0)], percent=True)
    marks = [plain(text.text or "") for text in chart.iter("text") if text.get("class") == "tick"]
    assert {mark for mark in marks if "%" in mark} == {"0 %", "20 %", "40 %", "60 %", "80 %", "100 %"}


def test_a_codebook_of_a_recipe_that_works_is_not_condemned(finished: Path) -> None:
    """Half of the codes was the bound, and the best recipe's perplexity is 492 of 1,024."""
    rule = "below a quarter of"
    assert report(finished, "--samples", "0") == 0
    assert f"{rule} them, the codebook is badly used" in read(finished / "report.html").text
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"A perplexity {rule} `num_codes` is a bad codebook" in readme


def test_charts_show_every_line_and_level() -> None:
    lines = [
        Line(label="training", xs=range(5000), ys=[1e6, *[1.0] * 4999], pale=True),
        Line(label="validation", xs=[0, 10], ys=[2.0, float("nan")]),
        Line(label="empty", xs=[], ys=[]),
    ]
    chart = line_chart(lines, x_label="steps", y_label="nats", levels=[Level("floor", 3.0), Level("chance", 3.01)])
    text = to_html(chart)
    assert text.count("<polyline") == 2 and text.count("<circle") == 1 and "nan" not in text
    assert "floor: 3" in text and "chance: 3.01" in text and "empty" not in text
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:floor|chance)', text)] or [
        float(element.get("y", "nan")) for element in chart.iter("text") if element.get("class") == "level-name"
    ]
    assert len(heights) == 2 and abs(heights[0] - heights[1]) > 15, "names of near levels stand apart"
    assert len(thinned(lines[0]).xs) <= 600
    assert ticks(0.0, 6.24) == [0.0, 2.0, 4.0, 6.0, 8.0] and ticks(15.2, 32.1) == [15.0, 20.0, 25.0, 30.0, 35.0]


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"data": "shapes", "init_from": null}')
    with pytest.raises(ValueError, match=rf"{tmp_path}/run.json is damaged \(it has no recipe\)"):
        read_run(tmp_path)
