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
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn

from dalle_mini_impl.config import DataConfig, Recipe, Stage
from dalle_mini_impl.data.array_cache import Workers, weights_digest
from dalle_mini_impl.data.embedding_cache import EmbeddingCache, embedding_fingerprint
from dalle_mini_impl.data.prepare import PreparedData, prepare
from dalle_mini_impl.data.report import NoPicturesError
from dalle_mini_impl.data.token_cache import TokenCache, cache_fingerprint
from dalle_mini_impl.files import check_writable, read_json, write_atomically, write_json
from dalle_mini_impl.pretrained import (
    Bundle,
    build_clip,
    build_dalle,
    build_prior,
    build_upscaler,
    build_vae,
    load_bundle,
    make_stream,
    save_bundle,
)
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.training.batches import derive_seed
from dalle_mini_impl.training.budget import Budget
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.loop import StageTrainer
from dalle_mini_impl.training.prior_task import PriorTask
from dalle_mini_impl.training.progress import MetricsLog, counting
from dalle_mini_impl.training.recipes import adopt_architecture, check_unchanged
from dalle_mini_impl.training.stopping import StopSignal
from dalle_mini_impl.training.task import Task, autocast, autocast_dtype
from dalle_mini_impl.training.tasks import CLIPTask, DALLETask, VAETask
from dalle_mini_impl.training.tracking import Tracking, build_trackers, check_trackers, new_run_id
from dalle_mini_impl.training.upscale_task import UpscaleTask
from dalle_mini_impl.training.vqgan import VQGANTask
from dalle_mini_impl.vae.discriminator import PatchDiscriminator
from dalle_mini_impl.vae.upsampler import FACTOR

logger = logging.getLogger("dalle_mini_impl.training")
M = TypeVar("M", bound=nn.Module)

ORDER: tuple[Stage, ...] = ("vae", "clip", "dalle")
"""What a recipe trains unless it says otherwise."""
LONGEST_WAIT = timedelta(hours=24)
"""How long processes wait for each other: the first one may read pictures for hours. One that dies ends the others."""


def stage_order(recipe: Recipe) -> tuple[Stage, ...]:
    """All stages in an order that serves them: part of CLIP's pictures pass through the VAE, the prior and DALL·E see
    CLIP's embeddings, the upscaler what the VAE decodes at last. Adversarial training changes no ids, but for the full
    phase, which comes before DALL·E.
    """
    if recipe.vqgan.phase == "full":
        return "vae", "clip", "vqgan", "prior", "dalle", "upscale"
    return "vae", "clip", "prior", "dalle", "vqgan", "upscale"


def asked_for(recipe: Recipe) -> list[Stage]:
    """Those of train.stages, the prior where DALL·E is trained on picture embeddings, an upscaler if it has one."""
    wanted = set(recipe.train.stages)
    if recipe.dalle.image_prefix and "dalle" in wanted:
        wanted.add("prior")
    if recipe.upscale.factor > 1:
        wanted.add("upscale")
    return [stage for stage in stage_order(recipe) if stage in wanted]


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
    whose tokenizer, architecture and weights the run starts from. budget_sec: wall-clock limit for everything from now
    on, of which already_sec have passed; a resumed run that is given none keeps to what is left of its own. reasons:
    lines on why the recipe is as it is, to be kept. track: experiment trackers that get all metrics, too, see
    `tracking.TRACKERS`; those of the accelerator (log_with) are served as well.
    Raises KeyboardInterrupt where a signal came outside of a stage's steps, when nothing was lost that wouldn't be made
    again, and ValueError where `out` belongs to another run, or holds an unfinished stage and resume is False.
    """
    check_trackers(track)
    with StopSignal() as stop:
        try:
            run = Run(recipe, data_spec, Path(out), accelerator or make_accelerator(), init_from, stop, reasons)
            todo = run.unfinished(asked_for(run.recipe) if stages is None else stages, resume)
            run.begin(Budget(budget_sec, already_sec=already_sec), resume)
            if todo:
                run.start_tracking(track, todo[0])
            run.prepare()
            return all(run.train_stage(stage, todo[index:]) for index, stage in enumerate(todo))
        except RuntimeError as error:
            if stop.is_requested():  # another process was told to stop, too, and was the first to go
                raise KeyboardInterrupt from error
            raise


def make_accelerator() -> Accelerator:
    """The launcher's devices and processes; Accelerate has to be told of CPUs, or processes on them stay strangers."""
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)  # the default of GPUs is ten minutes
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Raises ValueError on every process where one of them, on another machine, doesn't see the main process's folder.

    Pictures, image ids, states and the checkpoint are written once and read by all.
    """
    if accelerator.num_processes == 1:
        return
    mark = folder / ".shared"
    names = [uuid.uuid4().hex]
    broadcast_object_list(names)
    if accelerator.is_main_process:
        mark.write_text(names[0], encoding="utf-8")
    accelerator.wait_for_everyone()
    seen = mark.is_file() and mark.read_text(encoding="utf-8") == names[0]
    blind = [place for place in gather_object([("" if seen else socket.gethostname())]) if place]
    if accelerator.is_main_process:
        mark.unlink()
    if blind:
        raise ValueError(
            f"{folder} is not the same folder on all machines ({len(blind)} processes don't see it, on "
            f"{', '.join(sorted(set(blind)))}): choose an --out on a disk that they share"
        )


class Run:
    """One run's folder, data, tokenizer and models."""

    data: PreparedData
    bundle: Bundle
    budget: Budget

    def __init__(
        self,
        recipe: Recipe,
        data_spec: str,
        out: Path,
        accelerator: Accelerator,
        init_from: str | None,
        stop: StopSignal,
        reasons: Sequence[str] = (),
    ) -> None:
        self.out, self.data_spec, self.accelerator, self.stop = out, data_spec, accelerator, stop
        self.is_main: bool = accelerator.is_main_process
        self.states = {stage: StateFolder(out / "state" / stage) for stage in stage_order(recipe)}
        self.tracking = Tracking(accelerator)
        self.log = MetricsLog(out / "metrics.jsonl", self.is_main, self.tracking)
        self._note_path = out / "run.json"
        self._note: dict[str, Any] = {}
        if self._note_path.is_file():
            self._note = read_json(self._note_path, f"delete {out}, or choose another --out")
        self._tracking_id: str | None = self._note.get("tracking_id")
        self._reasons = list(reasons) or self._note.get("reasons", [])
        self._init_from = init_from if init_from is not None else self._note.get("init_from")
        initial = out / "initial"
        self._initial: Bundle | None = None
        if self._init_from is not None:
            self._initial = load_bundle(initial if (initial / "config.json").is_file() else self._init_from)
            recipe = adopt_architecture(recipe, self._initial)
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
        """Sets the run's budget: a resumed run that is given none has what earlier processes left of its own."""
        noted = self._note.get("budget")
        if resume and budget.total_sec is None and noted is not None:
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
            self.tracking.start(None if known else self.recipe.model_dump(mode="json"))

    def _steps_before(self, stage: Stage) -> int:
        """Steps of the run that came before a stage's first: those of the other stages that are finished."""
        others = (state for name, state in self.states.items() if name != stage and state.finished)
        return sum(int(state.summary()["steps"]) for state in others)

    def prepare(self) -> None:
        """Pictures, captions, tokenizer and the models that there are; the main process first."""
        if self.is_main:
            check_writable(self.out)
        check_shared(self.out, self.accelerator)
        self.data = self._read_pictures("data", self.recipe.data)
        self._check_data()
        checkpoint = self.out / "checkpoint"
        if self.is_main and not (checkpoint / "config.json").is_file():
            if self._initial is not None:
                save_bundle(self._initial, self.out / "initial")
            save_bundle(self._first_bundle(), checkpoint)
        self._write_note()
        self.accelerator.wait_for_everyone()
        self.bundle = replace(load_bundle(checkpoint), recipe=self.recipe)
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

    def _read_pictures(self, folder: str, config: DataConfig) -> PreparedData:
        """The pictures, prepared by all processes in a folder of the run."""
        accelerator = self.accelerator
        try:
            with counting("reading pictures", self.is_main) as progress:
                return prepare(
                    self.data_spec,
                    config,
                    self.out / folder,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    barrier=accelerator.wait_for_everyone,
                    progress=progress,
                )
        except NoPicturesError as error:
            path = self.out / "data-report.json"
            write_json(path, error.report)
            raise ValueError(f"{error}; {path} names all") from None

    def _check_data(self) -> None:
        noted = self._note.get("data_fingerprint")
        if noted is not None and noted != self.data.fingerprint:
            raise ValueError(f"the pictures or captions of {self.data_spec} changed since {self.out} was begun")
        if not len(self.data.train):
            raise ValueError(f"{self.data_spec} has no training pictures; see {self.out / 'data' / 'data-report.json'}")
        if not len(self.data.validation):
            logger.warning("no picture is held out: evaluations use training pictures and don't show overfitting")

    def _write_note(self) -> None:
        """Notes what the run is and, at the end of each stage, the time that it has used."""
        budget = self.budget
        self._note = {
            "recipe": self.recipe.model_dump(mode="json"),
            "reasons": self._reasons,
            "data": self.data_spec,
            "init_from": self._init_from,
            "data_fingerprint": self.data.fingerprint,
            "tracking_id": self._tracking_id,
            "budget": budget.total_sec and {"total_sec": budget.total_sec, "used_sec": budget.elapsed_sec()},
        }
        if self.is_main:
            text = self.recipe.to_toml([f"--data {self.data_spec}", *self._reasons])
            write_atomically(self.out / "recipe.toml", lambda path: path.write_text(text, encoding="utf-8"))
            write_json(self._note_path, self._note)

    def _first_bundle(self) -> Bundle:
        """The checkpoint before any stage: a tokenizer, and what --init-from brings along."""
        captions = [caption for index in self.data.train for caption in self.data.captions[index]]
        config = self.recipe.text
        if self._initial is not None:
            bundle = replace(self._initial, recipe=self.recipe)
            if self.recipe.dalle.image_prefix != self._initial.stream.image_prefix:  # its DALL·E gains a prefix first
                bundle = replace(bundle, dalle=None)
        elif captions:
            tokenizer = TextTokenizer.train(captions, config.vocab_size, seed=self.recipe.seed)
            stream = make_stream(self.recipe, tokenizer, tokenizer.suggest_text_length(captions, config))
            bundle = Bundle(recipe=self.recipe, tokenizer=tokenizer, stream=stream)
        else:
            raise ValueError(f"{self.data_spec} has no captions in its training split: there is no text to learn")
        num_cut = bundle.tokenizer.num_cut(captions, bundle.stream.text_length)
        if num_cut:
            logger.info("%d of %d captions are cut to %d slots", num_cut, len(captions), bundle.stream.text_length)
        text = {
            "vocab_size": bundle.tokenizer.vocab_size,
            "text_length": bundle.stream.text_length,
            "num_captions": len(captions),
            "num_captions_cut": num_cut,
        }
        return replace(bundle, metadata={"data_fingerprint": self.data.fingerprint, "metrics": {}, "text": text})

    def task(self, stage: Stage) -> Task:
        """A stage's task, with what it needs of the stages before. Raises ValueError where that is missing."""
        bundle, recipe = self.bundle, self.recipe
        if stage == "vae":
            return VAETask(self._model(stage, lambda: build_vae(recipe)), self.data, recipe)
        if stage == "clip":
            decoder = None
            if recipe.clip.reconstructed_share > 0:
                if bundle.vae is not None:
                    decoder = (bundle.vae, self.cache())
                else:
                    logger.warning("no VAE yet: clip.reconstructed_share has no effect, clip sees pictures only")
            clip = self._model(stage, lambda: build_clip(recipe, bundle.stream))
            return CLIPTask(clip, self.data, recipe, bundle.tokenizer, self.accelerator, decoder)
        if stage == "prior":
            return self._prior_task()
        if stage == "vqgan":
            return self._vqgan_task()
        if stage == "upscale":
            return self._upscale_task()
        if bundle.vae is None:
            raise ValueError("dalle needs a VAE: train --stage vae first, or start from a checkpoint with --init-from")
        dalle = self._model(stage, lambda: build_dalle(recipe, bundle.stream))
        embeddings = self.embeddings() if recipe.dalle.image_prefix else None
        return DALLETask(dalle, self.data, recipe, bundle.tokenizer, self.cache(), bundle.vae, embeddings)

    def _prior_task(self) -> PriorTask:
        bundle, recipe = self.bundle, self.recipe
        if not recipe.dalle.image_prefix:
            raise ValueError(
                "a prior draws picture embeddings for a DALL·E that is conditioned on them: set dalle.image_prefix, "
                "for example to 4"
            )
        embeddings = self.embeddings()
        assert bundle.clip is not None
        prior = self._model("prior", lambda: build_prior(recipe, bundle.stream))
        before = self._initial.clip if self._initial is not None else None
        if before is not None and weights_digest(before) != weights_digest(bundle.clip):
            prior.codec.forget()  # CLIP's space has moved since
        return PriorTask(prior, self.data, recipe, bundle.tokenizer, bundle.clip, embeddings)

    def _vqgan_task(self) -> Task:
        bundle, recipe = self.bundle, self.recipe
        if bundle.vae is None or bundle.clip is None:
            raise ValueError(
                "vqgan needs a trained VAE, and a CLIP to see with: train --stage vae and --stage clip first, or start "
                "from a checkpoint with --init-from"
            )
        if recipe.vqgan.phase == "full" and self.states["dalle"].finished:
            raise ValueError(
                f"vqgan.phase is full, which changes the ids that the DALL·E in {self.out} has learned: set it to "
                f"decoder, or train vqgan before dalle in another --out"
            )
        torch.manual_seed(derive_seed(recipe.seed, "vqgan", "weights"))
        discriminator = PatchDiscriminator(recipe.vqgan.discriminator_width, recipe.vqgan.discriminator_layers)
        return VQGANTask(bundle.vae, bundle.clip, discriminator, self.data, recipe, self.accelerator)

    def _upscale_task(self) -> UpscaleTask:
        bundle, recipe = self.bundle, self.recipe
        vae = bundle.vae
        if recipe.upscale.factor == 1:
            raise ValueError("upscale.factor is 1, which asks for no upscaler: set it to 2")
        if vae is None:
            raise ValueError("upscale needs a VAE: train --stage vae first, or start from one with --init-from")
        config = recipe.data.model_copy(update={"image_size": FACTOR * recipe.data.image_size})
        large = self._read_pictures("data-large", config)
        upscaler = self._model("upscale", lambda: build_upscaler(recipe, vae))
        return UpscaleTask(upscaler, self.data, large, recipe, self.cache(), vae)

    def _model(self, stage: Stage, build: Callable[[], M]) -> M:
        """The weights to start from: those of --init-from, else fresh ones drawn with the recipe's seed.

        A DALL·E that is given an image_prefix has that fresh and everything else from the checkpoint.
        """
        torch.manual_seed(derive_seed(self.recipe.seed, stage, "weights"))
        model = build()
        initial = getattr(self._initial, stage, None)
        if initial is not None:
            fresh = {name: value for name, value in model.state_dict().items() if name.startswith("prefix.")}
            model.load_state_dict({**fresh, **initial.state_dict()})
        return model

    def cache(self) -> TokenCache:
        """The id cache of the VAE as it is now, encoded if it isn't there yet."""
        vae, accelerator = self.bundle.vae, self.accelerator
        assert vae is not None
        vae.to(accelerator.device).eval()
        folder, views = self.out / "cache", self.recipe.data.views
        fingerprint = cache_fingerprint(vae, self.data.fingerprint, views)
        cache = TokenCache.open(folder, fingerprint)
        accelerator.wait_for_everyone()
        if cache is not None:
            return cache
        dtype = autocast_dtype(self.recipe.train.vae.precision, accelerator.device)
        with counting("encoding pictures", self.is_main) as progress:
            return TokenCache.build(
                folder,
                vae,
                self.data.pictures,
                views,
                fingerprint,
                autocast=lambda: autocast(accelerator.device, dtype),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                barrier=accelerator.wait_for_everyone,
                progress=progress,
            )

    def embeddings(self) -> EmbeddingCache:
        """CLIP's embeddings of all pictures, computed if they aren't there yet. Raises ValueError without a CLIP."""
        clip, accelerator = self.bundle.clip, self.accelerator
        if clip is None:
            raise ValueError(
                "picture embeddings (dalle.image_prefix) are CLIP's: train --stage clip first, or start from a "
                "checkpoint with --init-from"
            )
        clip.to(accelerator.device).eval()
        folder, views = self.out / "cache", self.recipe.data.views
        fingerprint = embedding_fingerprint(clip, self.data.fingerprint, views)
        cache = EmbeddingCache.open(folder, fingerprint)
        accelerator.wait_for_everyone()
        if cache is not None:
            return cache
        dtype = autocast_dtype(self.recipe.train.clip.precision, accelerator.device)
        workers = Workers(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        with counting("embedding pictures", self.is_main) as progress:
            return EmbeddingCache.build(
                folder,
                clip,
                self.data.pictures,
                views,
                fingerprint,
                autocast=lambda: autocast(accelerator.device, dtype),
                workers=workers,
                progress=progress,
            )

    def train_stage(self, stage: Stage, remaining: Sequence[Stage]) -> bool:
        """Trains the first of the remaining stages and puts it into the checkpoint; False when a signal stopped it."""
        task, state = self.task(stage), self.states[stage]
        self.tracking.offset = self._steps_before(stage)
        shares: dict[str, float] = {name: getattr(self.recipe.train, name).budget_share for name in remaining}
        trainer = StageTrainer(
            task,
            getattr(self.recipe.train, stage),
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
            trainer.load_state_dict(state.load())
            self.budget.count(trainer.trained_sec)
            logger.info("%s goes on after step %d", stage, trainer.step)
        else:
            self.log.rewind(stage, -1)
        with self.stop.waiting():
            is_finished = trainer.run()
            if is_finished:
                self._keep(stage, task.model, trainer.summary)
            else:
                logger.info("%s stopped at step %d, its state is saved; --resume goes on", stage, trainer.step)
            return is_finished and (len(remaining) == 1 or not self._all_stop())

    def _all_stop(self) -> bool:
        """Whether any process has been told to stop, the same for all."""
        wish = torch.tensor([float(self.stop.requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum") > 0)

    def _keep(self, stage: Stage, model: nn.Module, summary: dict[str, Any]) -> None:
        """Writes the checkpoint with a stage's model in it, then marks the stage as finished."""
        metrics = {**self.bundle.metadata.get("metrics", {}), stage: summary}
        metadata = {**self.bundle.metadata, "metrics": metrics}
        models: dict[str, Any] = {"vae" if stage == "vqgan" else stage: model}
        if stage == "vqgan" and self.recipe.vqgan.phase == "full" and self.bundle.dalle is not None:
            logger.warning("the DALL·E that the run started from knows other ids: it is left out of the checkpoint")
            models["dalle"] = None
        self.bundle = replace(self.bundle, **models, metadata=metadata)
        if self.is_main:
            save_bundle(self.bundle, self.out / "checkpoint")
            self.states[stage].finish(summary)
        self._write_note()
        self.accelerator.wait_for_everyone()
