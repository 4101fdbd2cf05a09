"""Faults of the commands that are forbidden here: other pictures on more processes, tracebacks for typing errors."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle_mini_impl.cli import sample
from dalle_mini_impl.cli.app import VERBS, main
from dalle_mini_impl.cli.sample import read_prompts
from dalle_mini_impl.native import trunk
from dalle_mini_impl.native.kernel import kernel
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.sheet import read_metadata, save_png
from tests.processes import launch_environment
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red circle", "two/../small \N{SNOWMAN} stars"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "data.image_size=32")


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def _results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process for both prompts."""
    out = tmp_path_factory.mktemp("drawn")
    file = out / "prompts.txt"
    file.write_text(f"\ufeff{PROMPTS[0]}\n\n  {PROMPTS[1]}\r\n", encoding="utf-8")
    options = ("--prompts", file, "--candidates", 6, "--keep", 2, "--seed", 5, "--top-p", 0.9, "--top-k", 30)
    assert _run("sample", "--checkpoint", checkpoint, "--out", out, *options) == 0
    return out


def test_every_kept_picture_is_a_png_with_its_settings(drawn: Path) -> None:
    results = _results(drawn)
    assert [(line["prompt"], line["rank"]) for line in results] == [(p, rank) for p in PROMPTS for rank in (1, 2)]
    for line in results:
        assert set(line) == {
            "prompt", "rank", "score", "candidate", "seed", "file", "clip_score", "log_ratio", "log_likelihood",
            "read_score",
        }  # fmt: skip
        assert Path(line["file"]).name == line["file"]
        metadata = read_metadata(drawn / line["file"])
        assert line.items() <= metadata.items()
        assert metadata["settings"]["top_k"] == 30 and metadata["settings"]["top_p"] == 0.9
        assert len(metadata["checkpoint_hash"]) == 12 and len(metadata["tokens"]) == 64
    assert len(list(drawn.glob("*.png"))) == 5, "four pictures and the sheet"
    with Image.open(drawn / "sheet.png") as sheet:
        assert sheet.width > 2 * 128


def test_a_picture_is_replayed_from_its_file(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in _results(drawn):
        assert _run("replay", drawn / line["file"], "--out", tmp_path / "again.png") == 0
        assert f"the same 64 tokens: {line['prompt']!r}" in capsys.readouterr().out
        with Image.open(tmp_path / "again.png") as again, Image.open(drawn / line["file"]) as before:
            pixels = [np.asarray(image, dtype=int) for image in (again, before)]
            assert abs(pixels[0] - pixels[1]).max() <= 1, "the same tokens; a batch of another size rounds otherwise"
    facts = read_metadata(drawn / line["file"])
    with Image.open(drawn / line["file"]) as picture:
        save_png(picture, tmp_path / "other.png", {**facts, "tokens": [*facts["tokens"][:-2], -5, -5]})
        save_png(picture, tmp_path / "older.png", {**facts, "checkpoint_hash": "0" * 12})
    assert _run("replay", tmp_path / "other.png") == 1
    assert "2 of 64 tokens differ" in capsys.readouterr().err
    assert _run("replay", tmp_path / "older.png") == 2
    assert "was drawn by checkpoint 000000000000" in capsys.readouterr().err
    assert _run("replay", drawn / "sheet.png") == 2
    assert "is no single picture" in capsys.readouterr().err


def test_variations_keep_a_part_of_a_picture_and_can_be_replayed(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = drawn / _results(drawn)[0]["file"]
    tokens = read_metadata(origin)["tokens"]
    options = ("--checkpoint", checkpoint, "--candidates", 3, "--seed", 9)
    assert _run("sample", *options, "--from", origin, "--keep", 0.4, "--out", tmp_path / "share") == 0
    lines = _results(tmp_path / "share")
    assert {line["prompt"] for line in lines} == {PROMPTS[0]}, "the prompt of the picture is the default"
    assert len(lines) == 3
    for line in lines:
        ours = read_metadata(tmp_path / "share" / line["file"])["tokens"]
        assert ours[:26] == tokens[:26] and ours[26:] != tokens[26:]
        assert _run("replay", tmp_path / "share" / line["file"]) == 0
    mask = Image.new("L", (64, 64))
    mask.paste(255, (40, 56, 64, 64))  # the last row of cells, from the sixth column on
    mask.save(tmp_path / "mask.png")
    masked = ("--from", origin, "--mask", tmp_path / "mask.png", "--keep", 2, "--prompt", "blue")
    assert _run("sample", *options, *masked, "--out", tmp_path / "masked") == 0
    lines = _results(tmp_path / "masked")
    assert [line["prompt"] for line in lines] == ["blue", "blue"]
    for line in lines:
        assert read_metadata(tmp_path / "masked" / line["file"])["tokens"][:61] == tokens[:61]
    photo = Image.new("RGB", (50, 40), "red")
    photo.save(tmp_path / "photo.jpg")
    foreign = ("--from", tmp_path / "photo.jpg", "--keep", 0.5, "--out", tmp_path / "foreign")
    capsys.readouterr()
    assert _run("sample", *options, *foreign) == 2
    assert "there is no prompt" in capsys.readouterr().err
    assert _run("sample", *options, *foreign, "--prompt", "red") == 0
    halves = [read_metadata(path)["tokens"][:32] for path in (tmp_path / "foreign").glob("0*.png")]
    assert len(halves) == 3 and halves[0] == halves[1] == halves[2]


def test_two_processes_draw_what_one_draws(checkpoint: Path, drawn: Path, tmp_path: Path) -> None:
    launch = "-m accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml --main_process_port 0"
    options = ["--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", tmp_path]
    options += ["--candidates", 6, "--keep", 2, "--seed", 5, "--top-p", 0.9, "--top-k", 30]
    done = subprocess.run(
        [sys.executable, *launch.split(), "sample.py", *map(str, options)],
        cwd=ROOT,
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures per second") == 1, "every process reported"
    assert "by 2 processes" in done.stdout
    expected, found = _results(drawn), _results(tmp_path)
    for theirs, ours in zip(expected, found, strict=True):
        scores = {"score": 0, "clip_score": 0, "log_ratio": 0, "log_likelihood": 0}
        assert {**theirs, **scores} == {**ours, **scores}
        assert ours["clip_score"] == pytest.approx(theirs["clip_score"], abs=1e-5)
        tokens = [read_metadata(folder / theirs["file"])["tokens"] for folder in (drawn, tmp_path)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", "   "], "there is no prompt"),
        (["--prompts", "nowhere.txt"], "can't be read from nowhere.txt"),
        (["--prompt", "x", "--keep", "0.5"], "--keep 0.5 is a share of the picture of --from"),
        (["--prompt", "x", "--keep", "2.5"], "--keep is 2.5; give a whole number"),
        (["--prompt", "x", "--keep", "0"], "--keep is 0; give a whole number"),
        (["--prompt", "x", "--mask", "m.png"], "--mask belongs to --from"),
        (["--prompt", "x", "--from", "nowhere.png"], "nowhere.png can't be read as a picture"),
        (["--prompt", "x", "--keep", "20"], "keep is 20, but of 16 candidates"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "x", "--checkpoint", "nothing-here"], "no checkpoint 'nothing-here'"),
    ],
)
def test_a_bad_option_is_one_clear_line(
    checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _run("sample", "--checkpoint", checkpoint, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_type_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("sample", "--prompt", "x", "--checkpoint", checkpoint, "--top-k", "0.5") == 2
    assert "--top-k" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "red circle " * 100, "--candidates", 1, "--out", tmp_path)
    assert _run("sample", "--checkpoint", checkpoint, *options) == 0
    assert "1 of 1 prompts are cut to the 16 tokens" in capsys.readouterr().err


def test_help_doesnt_load_torch() -> None:
    code = "import sys; from dalle_mini_impl.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    check = "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_rerank_orders_a_folder(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(pictures / "clear.png")
    Image.new("L", (7, 9)).save(pictures / "sub" / "small.bmp")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert _run("rerank", pictures, "--prompt", PROMPTS[0], "--checkpoint", checkpoint, "--out", out) == 0
    captured = capsys.readouterr()
    assert "left out" in captured.err and "broken.jpg" in captured.err
    ranking = [json.loads(line) for line in (out / "ranking.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["rank"] for line in ranking] == [1, 2]
    assert ranking[0]["clip_score"] >= ranking[1]["clip_score"]
    assert (out / "sheet.png").is_file()


def test_rerank_leaves_out_the_sheets_that_sample_and_rerank_wrote(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(drawn, tmp_path / "drawn")
    own = {path.name for path in folder.glob("*.png")} - {"sheet.png"}
    shutil.copy(next(folder.glob("0*.png")), folder / "sheet-of-paper.png")  # a picture, whatever its name
    for _ in range(2):
        assert _run("rerank", folder, "--prompt", PROMPTS[0], "--checkpoint", checkpoint, "--out", folder) == 0
        assert f"left out {folder / 'sheet.png'}" in capsys.readouterr().err
        lines = (folder / "ranking.jsonl").read_text(encoding="utf-8").splitlines()
        assert {Path(json.loads(line)["file"]).name for line in lines} == own | {"sheet-of-paper.png"}


def test_the_curve_is_judged_by_somebody_else(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    judge = tiny_checkpoint(tmp_path / "judge", "data.image_size=32", seed=1)
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n", encoding="utf-8")
    options = (
        "--curve",
        "--checkpoint",
        checkpoint,
        "--prompts-from",
        file,
        "--candidates",
        4,
        "--out",
        tmp_path / "out",
    )
    assert _run("rerank", *options, "--judge", checkpoint) == 2
    assert "is the ranker itself" in capsys.readouterr().err
    assert _run("rerank", *options, "--judge", judge) == 0
    facts = json.loads((tmp_path / "out" / "curve.json").read_text(encoding="utf-8"))
    assert set(facts["curves"]) == {"clip", "likelihood", "log_ratio", "rank", "oracle"}
    assert [point["size"] for point in facts["curves"]["clip"]] == [1, 2, 4]
    means = [point["mean"] for point in facts["curves"]["oracle"]]
    assert means == sorted(means)
    with Image.open(tmp_path / "out" / "curve.png") as plot:
        assert plot.width > 400


def test_the_curve_of_shapes_is_judged_by_the_checker(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--curve", "--checkpoint", checkpoint, "--num-prompts", 2, "--candidates", 2, "--out", tmp_path)
    assert _run("rerank", *options) == 0
    facts = json.loads((tmp_path / "curve.json").read_text(encoding="utf-8"))
    assert facts["judge"].startswith("the checker of shapes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a folder of pictures"),
        (["nowhere", "--prompt", "x"], "nowhere is no folder"),
        (["nowhere", "--prompt", "x", "--judge", "y", "--seed", "3"], "--judge, --seed belong to --curve"),
        (["nowhere", "--curve"], "--curve draws its own pictures"),
        (["--curve", "--judge", "x"], "judged by their checker"),
        (["--curve", "--prompts-from", "x.txt"], "need --judge"),
    ],
)
def test_rerank_explains_what_it_cant_do(
    checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("rerank", "--checkpoint", checkpoint, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_kernel_that_drew_is_written_down_and_replayed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = "torch" if kernel() is None else "compiled"
    for asked, found in ((None, here), ("torch", "torch")):
        out = tmp_path / str(asked)
        options = ("--prompt", PROMPTS[0], "--candidates", 1, *([] if asked is None else ["--kernel", asked]))
        assert _run("sample", "--checkpoint", checkpoint, "--out", out, *options) == 0
        (line,) = _results(out)
        facts = read_metadata(out / line["file"])
        assert facts["settings"]["kernel"] == found
        assert _run("replay", out / line["file"], "--checkpoint", checkpoint) == 0
    del facts["settings"]["kernel"]  # as pictures had it before there was a choice
    save_png(Image.open(out / line["file"]), tmp_path / "old.png", facts)
    assert _run("replay", tmp_path / "old.png", "--checkpoint", checkpoint) == 0
    monkeypatch.setattr(trunk, "kernel", lambda: None)
    capsys.readouterr()
    assert _run("sample", "--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--kernel", "compiled") == 2
    error = capsys.readouterr().err
    assert "set kernel to auto or torch" in error and error.count("\n") == 1


def test_the_precision_that_was_drawn_in_is_written_down(checkpoint: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        options = ("--prompt", PROMPTS[0], "--candidates", 1, "--precision", precision)
        assert _run("sample", "--checkpoint", checkpoint, "--out", out, *options) == 0
        (line,) = _results(out)
        assert read_metadata(out / line["file"])["settings"]["precision"] == precision
        assert _run("replay", out / line["file"], "--checkpoint", checkpoint) == 0
    assert _run("sample", "--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--precision", "fp8") == 2


def test_a_replay_without_the_kernel_that_drew_draws_otherwise_and_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel() is None:
        pytest.skip("no kernel on this machine")
    options = ("--prompt", PROMPTS[0], "--candidates", 1, "--precision", "fp32", "--out", tmp_path)
    assert _run("sample", "--checkpoint", checkpoint, *options) == 0
    (line,) = _results(tmp_path)
    facts = read_metadata(tmp_path / line["file"])
    assert facts["settings"]["kernel"] == "compiled"
    monkeypatch.setattr(trunk, "kernel", lambda: None)
    assert _run("replay", tmp_path / line["file"]) == 0, "in fp32 both draw the same"
    other = {**facts, "tokens": [*facts["tokens"][:-1], -5]}
    save_png(Image.open(tmp_path / line["file"]), tmp_path / "other.png", other)
    capsys.readouterr()
    assert _run("replay", tmp_path / "other.png") == 1
    assert "the compiled kernel that drew it isn't to be had here" in capsys.readouterr().err


def test_other_pictures_in_the_folder_are_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--candidates", 2, "--keep", 2, "--out", tmp_path)
    found: list[dict[str, Any]] = []
    for guidance in (1.5, 1.5, 6.0):
        assert _run("sample", *options, "--guidance", guidance) == 0
        found.append({line["file"]: read_metadata(tmp_path / line["file"]) for line in _results(tmp_path)})
    assert found[0] == found[1], "the same pictures are the same files"
    assert found[1].keys().isdisjoint(found[2])
    for name, facts in (found[1] | found[2]).items():
        assert read_metadata(tmp_path / name) == facts
        assert _run("replay", tmp_path / name) == 0


def test_results_stay_where_the_next_call_draws_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--candidates", 2, "--keep", 2)
    assert _run("sample", *options, "--out", tmp_path) == 0
    before = (tmp_path / "results.jsonl").read_bytes()

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("all of it")

    monkeypatch.setattr(TextToImage, "draw_jobs", fails)
    assert _run("sample", *options, "--out", tmp_path) == 1
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "file").touch()
    capsys.readouterr()
    for verb in (("sample", *options), ("rerank", "--curve", *options[:2])):
        assert _run(*verb, "--out", tmp_path / "file" / "out") == 1
        assert "nothing has been done yet" in capsys.readouterr().err, "before anything is drawn"


def test_a_variation_without_a_seed_is_another_picture(checkpoint: Path, drawn: Path, tmp_path: Path) -> None:
    origin = drawn / _results(drawn)[0]["file"]
    options = ("--from", origin, "--keep", 0.4, "--candidates", 6, "--top-p", 0.9, "--top-k", 30)
    assert _run("sample", "--checkpoint", checkpoint, *options, "--out", tmp_path) == 0
    tokens = read_metadata(origin)["tokens"]
    for line in _results(tmp_path):
        assert line["seed"] == 6 and read_metadata(tmp_path / line["file"])["tokens"] != tokens


def test_a_sheet_is_no_picture_to_begin_with(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (("sample", "--prompt", "x"), ("guide", "x")):
        assert _run(*verb, "--checkpoint", checkpoint, "--from", drawn / "sheet.png", "--out", tmp_path / "out") == 2
        assert "is a sheet of pictures" in capsys.readouterr().err


def test_very_many_candidates_are_drawn_some_at_a_time(
    checkpoint: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_at_once: list[int] = []
    draw_jobs = TextToImage.draw_jobs

    def counted(self: TextToImage, prompts: Any, jobs: Any, *more: Any, **options: Any) -> Any:
        drawn_at_once.append(len(jobs))
        return draw_jobs(self, prompts, jobs, *more, **options)

    monkeypatch.setattr(TextToImage, "draw_jobs", counted)
    monkeypatch.setattr(sample, "_PICTURES_AT_ONCE", 4)
    options = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--candidates", 6, "--keep", 2, "--seed", 5)
    options += ("--top-p", 0.9, "--top-k", 30)
    assert _run("sample", "--checkpoint", checkpoint, *options, "--out", tmp_path) == 0
    assert drawn_at_once == [4, 2, 4, 2]
    assert [line["file"] for line in _results(tmp_path)] == [line["file"] for line in _results(drawn)]


def test_a_picture_takes_no_others_along(checkpoint: Path) -> None:
    one, *_ = TextToImage.from_pretrained(checkpoint)(PROMPTS[0], candidates=64)
    assert len(pickle.dumps(one.tokens)) < 2 * 8 * len(one.tokens)


def test_every_option_of_the_sampler_arrives(checkpoint: Path, tmp_path: Path) -> None:
    asked = {"guidance": 1.5, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
    options = [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)]
    drawn = ("--prompt", "x", "--candidates", 2, "--keep", 2, "--out", tmp_path)
    for batch_size in (1, 2):
        more = ("--batch-size", batch_size, *options)
        assert _run("sample", "--checkpoint", checkpoint, *drawn, *more) == 0
        for line in _results(tmp_path):
            assert asked.items() <= read_metadata(tmp_path / line["file"])["settings"].items()
    assert len(list(tmp_path.glob("0*.png"))) == 2, "the same pictures, whatever the batch"


def test_prompts_come_in_any_encoding(tmp_path: Path) -> None:
    assert read_prompts([b"a caf\xe9".decode("utf-8", "surrogateescape"), "ein B\xe4r"], None) == ["a café", "ein Bär"]
    (tmp_path / "prompts.txt").write_bytes("a café\n\n ein Bär".encode("cp1252"))
    assert read_prompts(None, tmp_path / "prompts.txt") == ["a café", "ein Bär"]
