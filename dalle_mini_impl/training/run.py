"""A run: every stage in turn, from captioned pictures to a checkpoint folder.

runs/NAME/
  run.json           the recipe and the data that the run belongs to;  recipe.toml is what --config takes
  data/              pictures and captions, ready for training;  data-report.json
  data-large/        the same pictures at twice the size, where an upscaler is trained
  cache/             image ids of all pictures, and CLIP's embeddings of them where something is trained on those
  state/STAGE/       resumable state, and a mark when the stage is finished
  checkpoint/        the model so far: what --checkpoint and --init-from take
  samples/           reconstructions and sample sheets of each evaluation
  metrics.jsonl      tensorboard/ the same for TensorBoard, where it was asked for
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from dalle_mini_impl.config import Recipe, Stage, StageConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.files import FolderLock, check_writable, write_json, write_text
from dalle_mini_impl.pretrained import (
    Bundle,
    load_bundle,
    make_stream,
    save_bundle,
)
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training.budget import Budget
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.gradients import within_memory
from dalle_mini_impl.training.loop import StageTrainer
from dalle_mini_impl.training.processes import check_settings, check_shared, keep_to_this_run, make_accelerator
from dalle_mini_impl.training.progress import MetricsLog
from dalle_mini_impl.training.recipes import adopt_architecture, check_unchanged, read_note, with_views
from dalle_mini_impl.training.stages import FURTHER, asked_for, outdated_by, stage_order
from dalle_mini_impl.training.start import load_start
from dalle_mini_impl.training.stopping import StopSignal
from dalle_mini_impl.training.task_builder import TaskBuilder, read_pictures
from dalle_mini_impl.training.tasks.base import captioned, check_captioned
from dalle_mini_impl.training.tasks.distill import unguided
from dalle_mini_impl.training.tracking import Tracking, build_trackers, check_trackers, new_run_id

logger = logging.getLogger("dalle_mini_impl.training")
M = TypeVar("M", bound=nn.Module)


def _has_model(bundle: Bundle, stage: Stage) -> bool:
    """Whether a checkpoint has the model that a stage trains."""
    return getattr(bundle, FURTHER.get(stage, stage)) is not None


def train(
    recipe: Recipe,
    data_spec: str,
    out: str | Path,
    *,
    stages: Sequence[Stage] | None = None,
    resume: bool = False,
    init_from: str | None = None,
    budget_sec: float | None = None,
    already_sec: float = 0.0,
    reasons: Sequence[str] = (),
    accelerator: Accelerator | None = None,
    track: Sequence[str] = (),
) -> bool:
    """Trains the stages that aren't finished yet; True at the end, False when a signal stopped it (its state is saved).

    data_spec: anything `open_source` takes. stages: default those that the recipe asks for. init_from: a checkpoint
    whose tokenizer, architecture and weights the run starts from, or models of one, see `load_start`. budget_sec:
    wall-clock limit for everything from now on, of which already_sec have passed; a resumed run that is given none
    keeps to what is left of its own. reasons: lines on why the recipe is as it is, to be kept. track: experiment
    trackers that get all metrics, too, see `tracking.TRACKERS`; those of the accelerator (log_with) are served as well.
    Raises KeyboardInterrupt where a signal came outside of a stage's steps, when nothing was lost that wouldn't be made
    again, and ValueError where `out` belongs to another run, or holds an unfinished stage and resume is False.
    """
    check_trackers(track)
    accelerator = accelerator or make_accelerator()
    check_settings(accelerator)
    lock = FolderLock(Path(out))
    with StopSignal() as stop, closing(lock):
        try:
            keep_to_this_run(lock, accelerator)
            wanted = asked_for(recipe) if stages is None else stages
            run = Run(recipe, data_spec, lock, accelerator, init_from, stop, wanted, reasons)
            todo = run.unfinished(asked_for(run.recipe) if stages is None else stages, resume)
            run.begin(Budget(budget_sec, already_sec=already_sec), resume)
            if todo:
                run.start_tracking(track, todo[0])
            run.prepare(todo)
            return all(run.train_stage(stage, todo[index:]) for index, stage in enumerate(todo))
        except RuntimeError as error:
            if stop.is_requested():  # another process was told to stop, too, and was the first to go
                raise KeyboardInterrupt from error
            raise


class Run:
    """One run's folder, data, tokenizer and models."""

    data: PreparedData
    bundle: Bundle
    budget: Budget

    def __init__(
        self,
        recipe: Recipe,
        data_spec: str,
        lock: FolderLock,
        accelerator: Accelerator,
        init_from: str | None,
        stop: StopSignal,
        stages: Sequence[Stage],
        reasons: Sequence[str] = (),
    ) -> None:
        self.lock, self.out = lock, lock.folder
        self.data_spec, self.accelerator, self.stop = data_spec, accelerator, stop
        out = self.out
        self.is_main: bool = accelerator.is_main_process
        self.states = {stage: StateFolder(out / "state" / stage) for stage in stage_order(recipe)}
        self.tracking = Tracking(accelerator)
        self.log = MetricsLog(out / "metrics.jsonl", self.is_main, self.tracking)
        self._note_path = out / "run.json"
        self._note: dict[str, Any] = {}
        if self._note_path.is_file():
            self._note = read_note(self._note_path)
        self._tracking_id: str | None = self._note.get("tracking_id")
        self._reasons = list(reasons) or self._note.get("reasons", [])
        self._init_from = init_from if init_from is not None else self._note.get("init_from")
        initial = out / "initial"
        self._initial: Bundle | None = None
        if self._init_from is not None:
            self._initial = load_bundle(initial) if (initial / "config.json").is_file() else load_start(self._init_from)
            begun = [stage for stage, state in self.states.items() if state.started or state.finished]
            recipe = adopt_architecture(recipe, self._initial, [*stages, *begun])
            self._initial = with_views(self._initial, recipe)
        self.recipe = recipe

    def unfinished(self, stages: Sequence[Stage], resume: bool) -> list[Stage]:
        """The stages to train, in order; checks that the folder belongs to this run and may be gone on with."""
        if self._note:
            untouched = [stage for stage, state in self.states.items() if not (state.started or state.finished)]
            check_unchanged(self._note, self.recipe, self.data_spec, self._init_from, untouched, self.out)
        todo = [stage for stage in stage_order(self.recipe) if stage in stages and not self.states[stage].finished]
        stopped = [stage for stage in todo if self.states[stage].started]
        if stopped and not resume:
            raise ValueError(
                f"{self.out} holds a run that stopped in stage {stopped[0]}: add --resume to go on where it stopped, "
                f"or choose another --out"
            )
        for stage in set(stages) - set(todo):
            logger.info("%s is finished already", stage)
        return todo

    def begin(self, budget: Budget, resume: bool) -> None:
        """Sets the run's budget: a resumed run that is given none, or its own, has what earlier processes left of it.

        Another one counts from now on, for the stage that goes on as for those that follow.
        """
        noted = self._note.get("budget")
        self._is_new_budget = budget.total_sec is not None
        if resume and noted is not None and budget.total_sec in (None, noted["total_sec"]):
            self._is_new_budget = False
            budget = Budget(noted["total_sec"], already_sec=noted["used_sec"] + budget.elapsed_sec())
        self.budget = budget

    def start_tracking(self, names: Sequence[str], stage: Stage) -> None:
        """Starts the trackers that were asked for, before anything is read or trained; stage: the first to train."""
        known = self._tracking_id
        if names:
            self._tracking_id = known or new_run_id()
            first_step = self._steps_before(stage) + self.states[stage].step
            self.accelerator.log_with += build_trackers(names, self.out, self._tracking_id, first_step)
        if self.accelerator.log_with:
            self.tracking.start(self.recipe.model_dump(mode="json"), is_known=known is not None)

    def _steps_before(self, stage: Stage) -> int:
        """Steps of the run that came before a stage's first: those of the other stages that are finished."""
        others = (state for name, state in self.states.items() if name != stage and state.finished)
        return sum(int(state.summary()["steps"]) for state in others)

    def prepare(self, todo: Sequence[Stage]) -> None:
        """Pictures, captions, tokenizer and the models that there are; the main process first.

        todo: the stages to train, for which the pictures have to suffice.
        """
        if self.is_main:
            check_writable(self.out)
        keep_to_this_run(self.lock, self.accelerator)
        check_shared(self.out, self.accelerator)
        noted = self._note.get("data_fingerprint")
        self.data = read_pictures(self.data_spec, self.recipe.data, self.out, "data", self.accelerator, noted)
        self._check_data(todo)
        checkpoint = self.out / "checkpoint"
        if self.is_main and not (checkpoint / "config.json").is_file():
            if self._initial is not None:
                save_bundle(self._initial, self.out / "initial")
            save_bundle(self._first_bundle(), checkpoint)
        self._write_note()
        self.accelerator.wait_for_everyone()
        self.bundle = self._without_outgrown(load_bundle(checkpoint))
        if self.is_main:
            write_json(self.out / "data-report.json", {**self.data.report, "text": self.bundle.metadata["text"]})
        data, stream = self.data, self.bundle.stream
        logger.info(
            "%d training, %d validation pictures; %d text pieces, %d text slots, %d image tokens",
            len(data.train),
            len(data.validation),
            stream.text_vocab,
            stream.text_length,
            stream.num_image_tokens,
        )

    def _check_data(self, todo: Sequence[Stage]) -> None:
        report = self.data.report
        if not len(self.data.train):
            raise ValueError(f"{self.data_spec} has no training pictures; see {self.out / 'data' / 'data-report.json'}")
        for stage in ("clip", "prior"):
            if stage in todo:
                check_captioned(stage, captioned(self.data, self.data.train))
        if report["kept"] < report["pictures"]:
            skipped = {reason: facts["count"] for reason, facts in report["skipped"].items() if facts["count"]}
            listed = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            logger.warning(
                "%d of %d pictures are skipped (%s); %s names them",
                report["pictures"] - report["kept"],
                report["pictures"],
                listed,
                self.out / "data-report.json",
            )
        if report["duplicates_across_splits"]:
            logger.warning(
                "%d pictures have the very pixels of one in another split, as the source states them: what is measured "
                "on held-out pictures looks better than it is",
                report["duplicates_across_splits"],
            )
        if not len(self.data.validation):
            logger.warning("no picture is held out: evaluations use training pictures and don't show overfitting")

    def _write_note(self, before_sec: float = 0.0) -> None:
        """Notes what the run is and the time that it has used, without that of the stage that is not finished.

        before_sec: what this stage had trained before the budget was given, which must not count later on either.
        """
        budget, used_sec = self.budget, self.budget.elapsed_sec() - before_sec
        self._note = {
            "recipe": self.recipe.model_dump(mode="json"),
            "reasons": self._reasons,
            "data": self.data_spec,
            "init_from": self._init_from,
            "data_fingerprint": self.data.fingerprint,
            "tracking_id": self._tracking_id,
            "budget": budget.total_sec and {"total_sec": budget.total_sec, "used_sec": used_sec},
        }
        if self.is_main:
            text = self.recipe.to_toml([f"--data {self.data_spec}", *self._reasons])
            write_text(self.out / "recipe.toml", text)
            write_json(self._note_path, self._note)

    def _without_outgrown(self, bundle: Bundle) -> Bundle:
        """A checkpoint under this run's recipe, without the models that the recipe gives another part."""
        ours, theirs = self.recipe, bundle.recipe
        stream = replace(bundle.stream, image_prefix=ours.dalle.image_prefix)
        bundle = replace(bundle, recipe=ours, stream=stream)
        prefix_differs = ours.dalle.image_prefix != theirs.dalle.image_prefix
        if prefix_differs or bool(ours.dalle.reading_share) != bool(theirs.dalle.reading_share):
            logger.info("its DALL·E is left out until stage dalle has trained it with another prefix or reading")
            bundle = replace(bundle, dalle=None)
        if ours.clip.caption_layers != theirs.clip.caption_layers:
            logger.info("its CLIP is left out until stage clip has trained it with another captioner")
            bundle = replace(bundle, clip=None)
        return bundle

    def _first_bundle(self) -> Bundle:
        """The checkpoint before any stage: a tokenizer, and what --init-from brings along.

        Where that knows no text, the tokenizer is one of these captions.
        """
        captions = [caption for index in self.data.train for caption in self.data.captions[index]]
        config, initial = self.recipe.text, self._initial
        if initial is not None and (initial.knows_text or not captions):
            bundle = self._without_outgrown(initial)
        elif captions:
            tokenizer = TextTokenizer.train(captions, config.vocab_size, seed=self.recipe.seed)
            stream = make_stream(self.recipe, tokenizer, tokenizer.suggest_text_length(captions, config))
            bundle = Bundle(recipe=self.recipe, tokenizer=tokenizer, stream=stream)
            if initial is not None:
                bundle = replace(bundle, vae=initial.vae, upscale=initial.upscale)
        else:
            raise ValueError(
                f"none of the {len(self.data.train)} training pictures of {self.data_spec} has a caption, so there is "
                f"no text to learn: write x.txt beside x.jpg, or choose another form (docs/data.md)"
            )
        num_cut = bundle.tokenizer.num_cut(captions, bundle.stream.text_length)
        if num_cut:
            logger.info("%d of %d captions are cut to %d slots", num_cut, len(captions), bundle.stream.text_length)
        text = {
            "vocab_size": bundle.tokenizer.vocab_size,
            "text_length": bundle.stream.text_length,
            "num_captions": len(captions),
            "num_captions_cut": num_cut,
        }
        metadata = {"data_fingerprint": self.data.fingerprint, "metrics": self._metrics_before(bundle), "text": text}
        return replace(bundle, metadata=metadata)

    def _metrics_before(self, bundle: Bundle) -> dict[str, Any]:
        """Metrics of models that the first bundle has of --init-from, each with the data that it was measured on."""
        if self._initial is None:
            return {}
        known = self._initial.metadata.get("metrics", {})
        source = {"data_fingerprint": self._initial.metadata.get("data_fingerprint")}
        return {stage: {**source, **facts} for stage, facts in known.items() if _has_model(bundle, stage)}

    def _tasks(self) -> TaskBuilder:
        return TaskBuilder(
            recipe=self.recipe,
            data_spec=self.data_spec,
            data=self.data,
            out=self.out,
            accelerator=self.accelerator,
            bundle=self.bundle,
            initial=self._initial,
        )

    def train_stage(self, stage: Stage, remaining: Sequence[Stage]) -> bool:
        """Trains the first of the remaining stages and puts it into the checkpoint; False when a signal stopped it."""
        self._check_nothing_outdated(stage)
        with within_memory(stage, "getting its model and its data ready"):
            trainer = self._trainer(stage, remaining)
        with self.stop.waiting():
            with within_memory(stage, "training"):  # the trainer says more of what it knows to be dear
                is_finished = trainer.run()
            if is_finished:
                self._keep(stage, trainer.task.model, trainer.summary, remaining)
            else:
                logger.info("%s stopped at step %d, its state is saved; --resume goes on", stage, trainer.step)
            return is_finished and (len(remaining) == 1 or not self._all_stop())

    def _trainer(self, stage: Stage, remaining: Sequence[Stage]) -> StageTrainer:
        """What trains the first of the remaining stages, where its last state left it."""
        task, state = self._tasks().build(stage), self.states[stage]
        self.tracking.offset = self._steps_before(stage)
        shares: dict[str, float] = {name: getattr(self.recipe.train, name).budget_share for name in remaining}
        trainer = StageTrainer(
            task,
            self._stage_config(stage),
            accelerator=self.accelerator,
            seed=self.recipe.seed,
            state=state,
            log=self.log,
            samples=self.out / "samples",
            allotted_sec=self.budget.for_stage(stage, remaining, shares),
            stop=self.stop,
        )
        num_parameters = sum(p.numel() for p in task.model.parameters())
        logger.info("%s: %s parameters", stage, f"{num_parameters:,}")
        if state.started:
            trainer.load_state_dict(state.load(), has_new_time=self._is_new_budget)
            if self._is_new_budget:
                self._write_note(before_sec=trainer.trained_sec)
            else:
                self.budget.count(trainer.trained_sec)
            logger.info("%s goes on after step %d", stage, trainer.step)
        else:
            self.log.rewind(stage, -1)
        if self.budget.is_used_up():
            logger.warning("the budget is used up: %s gets a few steps; --resume --budget TIME gives it more", stage)
        return trainer

    def _stage_config(self, stage: Stage) -> StageConfig:
        """The recipe's settings of a stage, but what was trained before is not to be forgotten in this run's time."""
        config: StageConfig = getattr(self.recipe.train, stage)
        goes_on = stage in FURTHER or (self._initial is not None and _has_model(self._initial, stage))
        return config.model_copy(update={"muon_timescale": 0.0}) if goes_on else config

    def _check_nothing_outdated(self, stage: Stage) -> None:
        """Raises ValueError where a stage would make models useless that this run has trained already."""
        trained = [name for name in outdated_by(stage, self.recipe) if self.states[name].finished]
        if trained and not self.states[stage].started:
            remedy = "set vqgan.phase to decoder, or " if stage == "vqgan" else ""
            raise ValueError(
                f"training {stage} would change what {' and '.join(trained)} in {self.out} learned from: {remedy}"
                f"choose another --out, and start it from this one with --init-from"
            )

    def _all_stop(self) -> bool:
        """Whether any process has been told to stop, the same for all."""
        wish = torch.tensor([float(self.stop.requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum") > 0)

    def _keep(self, stage: Stage, model: nn.Module, summary: dict[str, Any], remaining: Sequence[Stage]) -> None:
        """Writes the checkpoint with a stage's model in it, then marks the stage as finished."""
        if isinstance(model, DALLE):
            model.end_training()
        metrics = {**self.bundle.metadata.get("metrics", {}), stage: summary}
        for later, name in FURTHER.items():
            if stage == name:
                metrics.pop(later, None)  # it was of another
        models: dict[str, Any] = {FURTHER.get(stage, stage): model}
        for name in (name for name in outdated_by(stage, self.recipe) if getattr(self.bundle, name) is not None):
            models[name] = None
            if name not in remaining:
                logger.warning(
                    "the %s that the run started from was made for another %s: it is left out of the checkpoint; "
                    "--stage %s trains it anew, from its weights",
                    name,
                    FURTHER.get(stage, stage),
                    name,
                )
        bundle = replace(self.bundle, **models)
        metrics = {name: facts for name, facts in metrics.items() if _has_model(bundle, name)}
        recipe = unguided(self.recipe) if "distill" in metrics else self.recipe
        self.bundle = replace(bundle, recipe=recipe, metadata={**bundle.metadata, "metrics": metrics})
        if self.is_main:
            save_bundle(self.bundle, self.out / "checkpoint")
            self.states[stage].finish(summary)
        self._write_note()
        self.accelerator.wait_for_everyone()
