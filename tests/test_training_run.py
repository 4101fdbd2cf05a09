"""The trainer end to end on tiny made scenes: all stages, stopping and resuming to the bit, fine-tuning, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from pictures_on_disk import put
from PIL import Image
from safetensors.torch import load_file

from dalle_mini_impl.cli.train import train as train_command
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.files import FolderLock
from dalle_mini_impl.pretrained import load_bundle
from dalle_mini_impl.training import loop
from dalle_mini_impl.training import run as run_module
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.processes import check_settings, make_accelerator
from dalle_mini_impl.training.progress import MetricsLog
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.stages import ORDER
from tests.processes import launch_environment
from tests.tiny import TIMED, tiny_recipe

DATA = "shapes:count=60"
QUICK = ["batch_size=8", "evaluations=2", "warmup_steps=3", "precision=fp32"]

LOOKS = 'dalle.look_ahead=["right", "below"]'
FEATURES = "dalle.code_features=true"
OPTIMIZERS = ("train.vae.optimizer=adamw", "train.clip.optimizer=adamw", "train.dalle.optimizer=muon")


def recipe(*overrides: str, steps: int = 6) -> Recipe:
    """Muon in one stage alone: its bf16 products turn rounding into differences of 0.3 % within six steps."""
    settings = [f"train.{stage}.{value}" for stage in ORDER for value in (*QUICK, f"steps={steps}")]
    return tiny_recipe('data.views=["plain", "flip"]', LOOKS, FEATURES, *settings, *OPTIMIZERS, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages finished."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(recipe(), DATA, out)
    return out


def lines(out: Path, stage: Stage) -> list[dict[str, Any]]:
    """The metrics of a stage without what depends on the machine's speed."""
    every = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in every if line["stage"] == stage]


def pictures_in(folder: Path, count: int) -> Path:
    """A folder of captioned pictures that all differ."""
    for number in range(count):
        put(folder / f"{number}.png", "red", (20 + number, 20))
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def test_all_stages_make_a_checkpoint_that_loads(finished: Path) -> None:
    bundle = load_bundle(finished)
    assert bundle.vae is not None and bundle.clip is not None and bundle.dalle is not None
    assert bundle.dalle.num_views == 2
    assert bundle.dalle.look_ahead is None  # it serves training alone
    names = set(load_file(finished / "checkpoint" / "dalle.safetensors"))
    assert not any("look_ahead" in name or "parametrizations" in name for name in names)
    best = next((finished / "state" / "dalle").glob("best-*.safetensors"))
    assert any("parametrizations" in name for name in load_file(best)), "in training it learned by features"
    assert all(line["ahead_nll"] > 0 for line in lines(finished, "dalle") if "grad_norm" in line)
    assert set(bundle.metadata["metrics"]) == set(ORDER)
    assert bundle.metadata["metrics"]["dalle"]["steps"] == 6
    for name in ("run.json", "data-report.json", "metrics.jsonl", "checkpoint/README.md"):
        assert (finished / name).is_file()
    samples = {path.name for path in (finished / "samples").iterdir()}
    assert samples == {"vae-000003.png", "vae-000006.png", "dalle-000003.png", "dalle-000006.png"}
    report = json.loads((finished / "data-report.json").read_text())
    assert report["text"]["text_length"] == bundle.stream.text_length


def test_a_stage_s_way_of_computing_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that began as a copy of a compiled teacher would compute otherwise after a resumption."""
    kept: list[DALLE] = []
    save = run_module.save_bundle

    def noted(bundle: Any, folder: Path) -> Path:
        kept.append(bundle.dalle)
        return save(bundle, folder)

    monkeypatch.setattr(run_module, "save_bundle", noted)
    assert train(recipe("train.dalle.checkpoint_gradients=true", steps=2), DATA, tmp_path / "run")
    assert kept[-1] is not None and not kept[-1]._recomputes and kept[-1]._training_block is None


def test_metrics_come_with_chance_and_floors(finished: Path) -> None:
    evaluation = {stage: lines(finished, stage)[-1] for stage in ORDER}
    assert evaluation["vae"].keys() >= {"psnr", "ssim", "codes_used", "perplexity"}
    assert evaluation["clip"].keys() >= {"loss", "loss_chance", "image_to_text_recall_at_1", "chance_recall_at_1"}
    assert evaluation["dalle"].keys() >= {"image_nll", "image_bits", "image_nll_unigram", "caption_gain"}
    assert evaluation["dalle"]["image_nll_uniform"] == pytest.approx(torch.tensor(32.0).log().item())


def test_a_finished_run_is_not_repeated(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert train(recipe(), DATA, finished)
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_folder_of_another_run_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run \(dalle\.dim was 32, now 64\)"):
        train(recipe("dalle.dim=64"), DATA, finished)
    with pytest.raises(ValueError, match=r"data source was shapes:count=60, now shapes:count=61"):
        train(recipe(), "shapes:count=61", finished)


def test_the_same_folder_in_other_words_is_the_same_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures_in(tmp_path / "mine", 4)
    monkeypatch.chdir(tmp_path)
    first, out = str(finished), Path("run")
    assert train(recipe(steps=1), "mine", out, stages=["vae"], init_from=first)
    for data, checkpoint in (("mine/", f"{first}/"), (str(tmp_path / "mine"), os.path.relpath(first))):
        assert train(recipe(steps=1), data, out, stages=["vae"], init_from=checkpoint, resume=True)
    pictures_in(tmp_path / "theirs", 4)
    with pytest.raises(ValueError, match=r"data source was .*mine, now theirs"):
        train(recipe(steps=1), "theirs", out, stages=["vae"], init_from=first, resume=True)


def test_sampling_settings_and_stages_not_begun_may_change(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(out / "state" / "dalle")
    assert train(recipe("dalle.dim=64", "sampling.top_k=5"), DATA, out)
    bundle = load_bundle(out)
    assert bundle.dalle is not None and bundle.dalle.config.dim == 64


def test_what_memory_a_stage_takes_may_change(finished: Path) -> None:
    assert train(recipe("train.dalle.micro_batch_size=1", "train.dalle.checkpoint_gradients=true"), DATA, finished)
    with pytest.raises(ValueError, match=r"holds another run \(train\.dalle\.batch_size was"):
        train(recipe("train.dalle.batch_size=2"), DATA, finished)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, how: Callable[[], None]) -> None:
    """Lets `how` happen in the middle of the given step of the run, counted over all stages."""
    original = loop.StageTrainer._one_step
    count = 0

    def one_step(self: loop.StageTrainer, prefetcher: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            how()
        original(self, prefetcher)

    monkeypatch.setattr(loop.StageTrainer, "_one_step", one_step)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train_interrupted(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, out: Path, stage: Stage, step: int, how: Callable[[], None]
) -> None:
    """Trains one stage until it is stopped in the middle of a step."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SEC", 0.0)
    with monkeypatch.context() as patch:
        interrupt(patch, step, how)
        if how is terminate:
            assert train(recipe, DATA, out, stages=[stage]) is False
        else:
            with pytest.raises(Crash):
                train(recipe, DATA, out, stages=[stage])


@pytest.mark.parametrize("how", [crash, terminate])
@pytest.mark.parametrize(("stage", "step"), [("vae", 2), ("clip", 4), ("dalle", 5)])
def test_resuming_loses_neither_a_step_nor_a_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, step: int, how: Callable[[], None]
) -> None:
    out = tmp_path / "resumed"
    if stage != "vae":  # what comes before is the same run
        shutil.copytree(finished, out)
        for later in ORDER[ORDER.index(stage) :]:
            shutil.rmtree(out / "state" / later)
    train_interrupted(monkeypatch, recipe(), out, stage, step, how)
    with pytest.raises(ValueError, match="add --resume"):
        train(recipe(), DATA, out, stages=[stage])
    assert train(recipe(), DATA, out, stages=[stage], resume=True)
    assert lines(out, stage) == lines(finished, stage)
    ours, theirs = (load_file(run / "checkpoint" / f"{stage}.safetensors") for run in (out, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_stage_stays_compiled(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "resumed", []
    shutil.copytree(finished, out)
    shutil.rmtree(out / "state" / "dalle")
    monkeypatch.setattr(DALLE, "compile_blocks", lambda self: calls.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "should_compile", lambda *_: True)
        interrupt(patch, 3, terminate)
        assert train(recipe(), DATA, out, stages=["dalle"]) is False
    assert train(recipe(), DATA, out, stages=["dalle"], resume=True)
    assert len(calls) == 2, "other kernels give other bits"


def test_a_new_vae_leaves_no_dalle_that_knows_other_ids(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"training vae would change what dalle in .* learned from: choose"):
        shutil.rmtree(shutil.copytree(finished, tmp_path / "same") / "state" / "vae")
        train(recipe(), DATA, tmp_path / "same", stages=["vae"])
    out = tmp_path / "other"
    with caplog.at_level("WARNING", "dalle_mini_impl"):
        assert train(recipe(), DATA, out, stages=["vae"], init_from=str(finished))
    assert "the dalle that the run started from was made for another vae" in caplog.text
    bundle = load_bundle(out)
    assert bundle.vae is not None and bundle.clip is not None and bundle.dalle is None
    caplog.clear()
    with caplog.at_level("WARNING", "dalle_mini_impl"):  # where it is trained again, there is nothing to say
        assert train(recipe(), DATA, tmp_path / "all", init_from=str(finished))
        assert train(recipe(), DATA, out, stages=["dalle"])
    assert "left out" not in caplog.text
    assert load_bundle(out).dalle is not None and load_bundle(tmp_path / "all").dalle is not None


def test_a_checkpoint_learns_to_read_by_fine_tuning(finished: Path, tmp_path: Path) -> None:
    still = ("train.dalle.learning_rate=1e-9", "train.dalle.muon_learning_rate=1e-9", "dalle.reading_share=0.25")
    assert train(recipe(*still), DATA, tmp_path / "reads", stages=["dalle"], init_from=str(finished))
    before, after = load_bundle(finished).dalle, load_bundle(tmp_path / "reads").dalle
    assert before is not None and after is not None
    assert before.reading is None and after.reading is not None
    for name, value in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], value, atol=1e-6), name
    assert "read_nll" in lines(tmp_path / "reads", "dalle")[-1]
    # And to read no more, where the recipe says so; one that says nothing leaves it reading.
    for share, reads in ((["dalle.reading_share=0"], False), ([], True)):
        out = tmp_path / f"then-{reads}"
        own = {"train": {"dalle": {"learning_rate": 1e-9, "muon_learning_rate": 1e-9, "steps": 2}}}
        assert train(Recipe.parse(own, share), DATA, out, stages=["dalle"], init_from=str(tmp_path / "reads"))
        then = load_bundle(out).dalle
        assert then is not None and (then.reading is not None) == reads
        for name, value in then.state_dict().items():
            assert torch.allclose(after.state_dict()[name], value, atol=1e-6), name


def test_a_checkpoint_gains_a_captioner_by_fine_tuning(finished: Path, tmp_path: Path) -> None:
    still = ("train.clip.learning_rate=1e-9", "train.clip.muon_learning_rate=1e-9", "clip.caption_layers=1")
    assert train(recipe(*still), DATA, tmp_path / "reads", stages=["clip"], init_from=str(finished))
    before, after = load_bundle(finished), load_bundle(tmp_path / "reads")
    assert before.clip is not None and after.clip is not None and after.dalle is not None
    assert before.clip.captioner is None and after.clip.captioner is not None
    for name, value in before.clip.state_dict().items():
        assert torch.allclose(after.clip.state_dict()[name], value, atol=1e-6), name
    assert {"caption_nll", "contrast"} <= lines(tmp_path / "reads", "clip")[-2].keys()
    assert "caption_nll" in lines(tmp_path / "reads", "clip")[-1]
    # What is known of the others is kept, with the data that they were measured on; they were trained in another run.
    known, measured = before.metadata["metrics"], after.metadata["metrics"]
    assert set(measured) == set(known)
    for stage in ("vae", "dalle"):
        assert measured[stage] == {"data_fingerprint": before.metadata["data_fingerprint"], **known[stage]}
    assert "data_fingerprint" not in measured["clip"]
    # Where another stage alone is trained, CLIP stays as it is, whatever the recipe would have of a new one.
    assert train(recipe(*still), DATA, tmp_path / "without", stages=["dalle"], init_from=str(finished))
    without = load_bundle(tmp_path / "without")
    assert without.clip is not None and without.clip.captioner is None
    # The folder that has gained one goes on with its other stages, and one that has not may gain it later.
    for out, stages, layers in ((tmp_path / "reads", ["dalle"], 1), (tmp_path / "without", ["clip"], 1)):
        assert train(recipe(*still), DATA, out, stages=stages, init_from=str(finished))
        clip = load_bundle(out).clip
        assert clip is not None and clip.config.caption_layers == layers
    assert train(
        recipe("clip.caption_layers=0"), DATA, tmp_path / "no", stages=["clip"], init_from=str(tmp_path / "reads")
    )
    no_more = load_bundle(tmp_path / "no")
    assert no_more.clip is not None and no_more.clip.captioner is None


def test_fine_tuning_keeps_the_tokenizer_and_starts_from_the_weights(finished: Path, tmp_path: Path) -> None:
    other = recipe("dalle.dim=64", "train.dalle.learning_rate=1e-12", "train.dalle.muon_learning_rate=1e-12", steps=2)
    out = tmp_path / "tuned"
    assert train(other, "shapes:count=40,seed=5", out, stages=["dalle"], init_from=str(finished))
    tuned, base = load_bundle(out), load_bundle(finished)
    assert tuned.recipe.dalle.dim == 32
    assert tuned.tokenizer.fingerprint == base.tokenizer.fingerprint
    assert tuned.stream == base.stream
    assert tuned.dalle is not None and base.dalle is not None
    for ours, theirs in zip(tuned.dalle.parameters(), base.dalle.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert train(other, "shapes:count=40,seed=5", out, stages=["clip"])  # what it started from is remembered
    assert load_bundle(out).recipe.dalle.dim == 32


def test_fine_tuning_can_add_views_of_few_pictures(finished: Path, tmp_path: Path) -> None:
    more = recipe('data.views=["plain", "down", "flip"]', "train.dalle.learning_rate=1e-12", OPTIMIZERS[0], steps=2)
    slow = Recipe.parse(more.model_dump(mode="json"), ["train.dalle.optimizer=adamw"])
    out, few = tmp_path / "tuned", "shapes:count=40,seed=5"
    assert train(slow, few, out, stages=["clip"], init_from=str(finished))  # another stage leaves drawings alone
    tuned, base = load_bundle(out), load_bundle(finished)
    assert base.recipe.data.views == ("plain", "flip") and tuned.recipe.data.views == ("plain", "flip", "down")
    assert tuned.dalle is not None and base.dalle is not None and tuned.dalle.num_views == 3
    assert train(slow, few, out, stages=["dalle"])
    known, learned = (bundle.dalle for bundle in (base, load_bundle(out)))
    assert known is not None and learned is not None
    for name, weight in known.state_dict().items():
        assert torch.allclose(learned.state_dict()[name][: len(weight)], weight, atol=1e-6), name


def test_dalle_without_a_vae_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train --stage vae first"):
        train(recipe(), DATA, tmp_path / "run", stages=["dalle"])


def test_a_gradient_that_is_not_finite_is_skipped_and_ends_the_run_after_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.StageTrainer._backward

    def broken(self: loop.StageTrainer, batch: Any) -> dict[str, torch.Tensor]:
        metrics = original(self, batch)
        if self.step >= 2:
            next(self.task.model.parameters()).grad.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(loop.StageTrainer, "_backward", broken)
    with pytest.raises(FloatingPointError, match="not finite in 5 steps in a row"):
        train(recipe(steps=20), DATA, tmp_path / "run", stages=["vae"])
    skipped = [line for line in lines(tmp_path / "run", "vae") if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 4, 5, 6, 7]
    assert all(len(line["pictures"]) == 8 for line in skipped)


def test_where_no_picture_can_be_used_the_report_names_each(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    (tmp_path / "in" / "a.txt").write_text("a red heart")
    report = tmp_path / "run" / "data-report.json"
    with pytest.raises(ValueError, match=rf"1 unreadable.*{report} names all"):
        train(recipe(), str(tmp_path / "in"), tmp_path / "run")
    assert json.loads(report.read_text())["skipped"]["unreadable"]["names"] == ["a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_utf8_are_written_as_they_can_be(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    folder = tmp_path / latin
    for number in range(4):
        put(folder / f"{latin} {number}.png", "red", (20 + number, 20))
        (folder / f"{latin} {number}.txt").write_text(f"picture {number}", encoding="utf-8")
    (folder / f"{latin}.jpg").write_bytes(b"no picture")
    out = tmp_path / "run"
    for _ in range(2):
        assert train(recipe(steps=1), str(folder), out, stages=["vae"])
    report = json.loads((out / "data-report.json").read_text(encoding="utf-8"))
    assert report["skipped"]["unreadable"]["names"] == [f"{latin}.jpg"]
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["data"] == str(folder)
    assert tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))["name"] == "tiny"
    MetricsLog(out / "metrics.jsonl").write({"stage": "vae", "pictures": [latin]})
    assert lines(out, "vae")[-1]["pictures"] == [latin]
    with pytest.raises(ValueError, match="no UTF-8: choose another name"):
        train(recipe(steps=1), str(folder), tmp_path / latin[:3] / f"run {latin}", stages=["vae"])
    assert not (tmp_path / latin[:3]).exists(), "it was told before anything was done"


def test_a_budget_replaces_the_steps(tmp_path: Path) -> None:
    assert train(recipe(steps=100_000), DATA, tmp_path / "run", stages=["vae"], budget_sec=4.0)
    bundle = load_bundle(tmp_path / "run")
    assert 25 <= bundle.metadata["metrics"]["vae"]["steps"] < 10_000
    assert bundle.metadata["metrics"]["vae"]["train_sec"] < 8.0


def test_a_resumed_run_keeps_to_what_is_left_of_its_budget(tmp_path: Path) -> None:
    out, endless = tmp_path / "run", recipe(steps=100_000)
    assert train(endless, DATA, out, stages=["vae"], budget_sec=10.0)
    noted = json.loads((out / "run.json").read_text())["budget"]
    assert noted["total_sec"] == 10.0
    assert 0.0 < noted["used_sec"] < 30.0, "it ends about when it should, on a loaded machine, too"
    assert train(endless, DATA, out, stages=["vae", "clip"], resume=True)
    after = json.loads((out / "run.json").read_text())["budget"]
    assert after["total_sec"] == 10.0
    assert noted["used_sec"] < after["used_sec"]
    assert 25 <= load_bundle(out).metadata["metrics"]["clip"]["steps"] < 10_000


def test_of_equal_evaluations_the_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One held-out pair costs InfoNCE nothing from the first evaluation on: its weights must not be the ones kept."""
    monkeypatch.setattr("dalle_mini_impl.training.tasks.vae.evaluation.reconstruct", lambda *_: {"psnr": 0.0})
    saved: list[int] = []
    save_best = StateFolder.save_best
    monkeypatch.setattr(StateFolder, "save_best", lambda *arguments: (saved.append(1), save_best(*arguments)))
    assert train(recipe(), DATA, tmp_path / "run", stages=["vae"])
    assert len(saved) == 2


def test_a_plan_is_shared_even_where_a_process_would_not_change_it() -> None:
    """Each process times itself: one that kept its plan to itself would leave the others waiting for good."""
    calls: list[str] = []
    trainer = SimpleNamespace(
        plan=SimpleNamespace(total_steps=50),
        step=40,
        clock=SimpleNamespace(review=lambda step: False),
        _share_plan=lambda: calls.append("share"),
        _say_plan=lambda reporter: calls.append("say"),
    )
    loop.StageTrainer._review(trainer, None)  # type: ignore[arg-type]
    assert calls == ["share"]


def test_a_folder_that_another_run_trains_in_is_refused_and_free_once_that_ends(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle_mini_impl.training.processes.LINGERING_SEC", 0.0)
    other = FolderLock(finished)
    assert other.take()
    with pytest.raises(ValueError, match=f"another process is still training in {finished}: end it first"):
        train(recipe(), DATA, finished)
    other.close()
    assert train(recipe(), DATA, finished)
    assert other.take(), "it has let go"
    monkeypatch.setattr("dalle_mini_impl.training.processes.LINGERING_SEC", 60.0)
    threading.Timer(0.5, other.close).start()
    assert train(recipe(), DATA, finished), "one that is just ending is waited for"


def test_two_runs_that_begin_in_one_folder_dont_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_mini_impl.training.processes.LINGERING_SEC", 0.0)
    out, other = tmp_path / "run", FolderLock(tmp_path / "run")

    def meanwhile(folder: Path) -> None:
        folder.mkdir()
        assert other.take()

    monkeypatch.setattr("dalle_mini_impl.training.run.check_writable", meanwhile)
    with pytest.raises(ValueError, match="still training"):
        train(recipe(), DATA, out)
    assert list(out.iterdir()) == []


def _as_if_trained_for(out: Path, trained_sec: float) -> None:
    """Makes the state of a stopped stage say so."""
    folder = StateFolder(out / "state" / "vae")
    folder.save({**folder.load(), "trained_sec": trained_sec})


def test_another_budget_counts_from_now_on_and_the_same_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, endless, stages = tmp_path / "run", recipe(steps=100_000), ["vae", "clip"]
    share = endless.train.vae.budget_share / (endless.train.vae.budget_share + endless.train.clip.budget_share)

    def stopped(budget_sec: float | None, resume: bool = True) -> tuple[float, float]:
        """Seconds that the VAE has altogether, and those that count as used, after some steps more."""
        with monkeypatch.context() as patched:
            interrupt(patched, 3, terminate)
            assert not train(endless, DATA, out, stages=stages, resume=resume, budget_sec=budget_sec)
        state, note = StateFolder(out / "state" / "vae").load(), json.loads((out / "run.json").read_text())
        return state["plan"]["allotted_sec"] / share, note["budget"]["used_sec"]

    assert stopped(3600.0, resume=False)[0] == pytest.approx(3600, rel=0.05)
    _as_if_trained_for(out, 600.0)
    for same in (3600.0, None):
        assert stopped(same)[0] == pytest.approx(3600, rel=0.05)
    allotted, used_sec = stopped(1000.0)
    assert allotted == pytest.approx(600 / share + 1000, rel=0.05)
    assert -620 < used_sec < 0, "what was trained before is taken off again where this stage's time is counted"


def test_a_budget_that_is_used_up_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, endless = tmp_path / "run", recipe(steps=100_000)
    assert train(endless, DATA, out, stages=["vae"], budget_sec=4.0)
    note = json.loads((out / "run.json").read_text())
    note["budget"]["used_sec"] = 5.0
    (out / "run.json").write_text(json.dumps(note))
    assert train(endless, DATA, out, stages=["vae", "clip"], resume=True)
    assert "the budget is used up: clip gets a few steps" in caplog.text


def test_pictures_that_changed_are_refused_and_those_of_the_run_stay(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "run"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (20, 20), (12 * index, 90, 30)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"number {index}")
    assert train(recipe(), str(folder), out, stages=["vae"])
    for path in folder.glob("1*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match=rf"{folder} changed since {out}/data was made, which stays as it is"):
        train(recipe(), str(folder), out, stages=["vae", "clip"])
    assert len(PreparedData.open(out / "data")) == 20
    folder.rename(tmp_path / "gone")
    assert train(recipe(), str(folder), out, stages=["vae", "clip"]), "the run has all that it needs"
    with pytest.raises(ValueError, match=str(folder)):
        train(recipe(), str(folder), tmp_path / "other", stages=["vae"])


def test_pictures_that_are_skipped_and_too_few_captions_are_told_before_anything_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("red")
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "b.txt").write_text("nothing")
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="clip needs at least 2 captioned training pictures; the data has 1") as error:
        train(recipe(), str(folder), out)
    assert not (out / "state").exists()
    (remedy,) = re.findall(r"train without clip: --set '(.*)'", str(error.value))
    assert recipe(remedy).train.stages == ("vae", "dalle")
    assert train(recipe(), str(folder), out, stages=["vae"])
    assert f"1 of 2 pictures are skipped (1 unreadable); {out / 'data-report.json'} names them" in caplog.text


def test_pictures_without_any_caption_say_what_to_do(tmp_path: Path) -> None:
    for text in pictures_in(tmp_path / "in", 3).glob("*.txt"):
        text.unlink()
    with pytest.raises(ValueError, match=r"none of the 2 training pictures of .* has a caption.* write x\.txt"):
        train(recipe(), str(tmp_path / "in"), tmp_path / "run", stages=["vae"])
    with pytest.raises(ValueError, match=r"the data has 0: write x\.txt"):
        train(recipe(), str(tmp_path / "in"), tmp_path / "run")


def test_a_held_out_picture_that_is_also_trained_on_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures_in(tmp_path / "in" / "train", 3)
    pictures_in(tmp_path / "in" / "val", 1)
    assert train(recipe(steps=1), str(tmp_path / "in"), tmp_path / "run", stages=["vae"])
    assert "1 pictures have the very pixels of one in another split" in caplog.text


@pytest.mark.parametrize("text", ["{", '{"recipf": {}, "data": "shapes", "init_from": null}', "[]"])
def test_a_damaged_note_is_named(finished: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{out}/run.json is damaged .* delete {out}, or choose another --out"):
        train(recipe(), DATA, out)
    with pytest.raises(ValueError, match=rf"{out}/run.json is damaged"):
        train_command(DATA, out)


def test_only_the_recipe_says_what_numbers_are_computed_in() -> None:
    code = "from dalle_mini_impl.training.processes import make_accelerator; print(make_accelerator().mixed_precision)"
    environment = {**launch_environment(), "ACCELERATE_MIXED_PRECISION": "bf16"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "no"  # in a process of its own: Accelerate asks once in each
    check_settings(make_accelerator())
    theirs = SimpleNamespace(distributed_type=DistributedType.NO, mixed_precision="fp16")
    with pytest.raises(ValueError, match=r"mixed_precision 'fp16': set it to .no.; train\.STAGE\.precision"):
        check_settings(theirs)  # type: ignore[arg-type]
    theirs = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, mixed_precision="no")
    with pytest.raises(ValueError, match="DEEPSPEED isn't supported here: take one of configs/accelerate"):
        check_settings(theirs)  # type: ignore[arg-type]


def test_accumulation_that_the_launcher_is_set_to_changes_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(recipe(), DATA, tmp_path / "one", stages=["vae"])
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(recipe(), DATA, tmp_path / "other", stages=["vae"])
    assert lines(tmp_path / "one", "vae") == lines(tmp_path / "other", "vae")
