"""The training loop: one for all stages, through Accelerate. It knows a stage only as a `Task`."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.out_of_memory import FittingChunks
from dalle_mini_impl.training.batches import Batch, BatchOrder, Prefetcher, derive_seed
from dalle_mini_impl.training.budget import Plan, StageClock, format_duration
from dalle_mini_impl.training.checkpoint import StateFolder
from dalle_mini_impl.training.compiling import settling_steps, should_compile
from dalle_mini_impl.training.dtensors import load_optimizer, part_like, whole_on_cpu
from dalle_mini_impl.training.ema import EMA
from dalle_mini_impl.training.gradients import Gradients, within_memory
from dalle_mini_impl.training.optim import build_optimizers, clip_gradients, learning_rate_share, set_rates
from dalle_mini_impl.training.progress import MetricsLog, Reporter, Running
from dalle_mini_impl.training.sharding import Replica, Sharding, move_buffers
from dalle_mini_impl.training.stopping import StopSignal
from dalle_mini_impl.training.task import EVALUATED_AT_ONCE, EvaluationContext, LossModule, Task, autocast_dtype

LOG_EVERY = 10
"""Steps between two lines of metrics."""
SAVE_EVERY_SEC = 180.0
MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Agreement:
    """What all processes make of a step: whether its loss and gradient are finite, and what comes after it."""

    is_finite: bool
    stop: bool
    overrun: bool
    save: bool


class StageTrainer:
    """Trains one task from its first step, or the one it stopped at, to its last."""

    def __init__(
        self,
        task: Task,
        config: StageConfig,
        *,
        accelerator: Accelerator,
        seed: int,
        state: StateFolder,
        log: MetricsLog,
        samples: Path,
        allotted_sec: float | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.seed, self.state, self.log, self.samples = seed, state, log, samples
        self.stop = stop or StopSignal()
        self.order = BatchOrder(task.num_items, config.batch_size, derive_seed(seed, task.stage, "order"))
        self.order.positions(0, accelerator.process_index, accelerator.num_processes)  # refuses an uneven split early
        if config.checkpoint_gradients:
            cast(Any, task.model).checkpoint_blocks()
        self.dtype = autocast_dtype(config.precision, accelerator.device)
        self.module, self.replica = self._prepare()
        self.ema = EMA(task.model, config.ema_decay)
        self.optimizers = build_optimizers(task.model, config)
        rows = config.batch_size // accelerator.num_processes
        size = min(config.micro_batch_size or rows, rows)
        self.gradients = Gradients(task, self.module, accelerator, self.dtype, size, state.note_micro_batch_size)
        self.gradients.restrict(state.noted_micro_batch_size())
        self.is_compiled = not self.replica and should_compile(task.stage, config, task.model, allotted_sec)
        unlike_steps = task.unlike_steps + (settling_steps(task.model) if self.is_compiled else 0)
        self.clock = StageClock(config, allotted_sec, unlike_steps=unlike_steps)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self.agreed = Agreement(is_finite=True, stop=False, overrun=False, save=False)
        self.best: float | None = None
        self.best_file: str | None = None
        self.best_evaluation: dict[str, float] = {}
        self.chunks = FittingChunks(EVALUATED_AT_ONCE)
        self._has_evaluated = False
        self.running = Running({})
        self.trained_sec = 0.0
        self._began = self._last_save = time.monotonic()
        self._saved_step = -1
        self._last_log = (time.monotonic(), 0)

    def _prepare(self) -> tuple[nn.Module, Replica | None]:
        """The task's loss over all processes and, where they share its weights out, a place for the whole model."""
        module = LossModule(self.task, self.accelerator.device, self.dtype)
        sharding = Sharding.of(self.accelerator)
        if sharding is None:
            self.task.model.to(self.accelerator.device)
            prepared: nn.Module = self.accelerator.prepare(module)
            return prepared, None
        sharding.check(self.task.stage, self.task.model, self.config)
        move_buffers(self.task.model, self.accelerator.device)
        replica = Replica(self.task.model)
        sharding.apply(module)
        return module, replica

    @property
    def plan(self) -> Plan:
        """How long the stage runs."""
        return self.clock.plan

    def run(self) -> bool:
        """Trains; True when the stage is finished, False when it was asked to stop and has saved its state.

        At the end the task's model holds the averaged weights of the best evaluation.
        """
        if self.is_compiled:
            cast(Any, self.task.model).compile_blocks()
        prefetcher = Prefetcher(self._make_batch, pin_memory=self.accelerator.device.type == "cuda")
        reporting = Reporter(self.task.stage, self.task.unit, self.accelerator.is_main_process)
        with self.stop, self.stop.waiting(), reporting as reporter:
            try:
                self._fit_memory(prefetcher)
                if self.plan.evaluates_after(self.step):  # the evaluation that the process before was ended in
                    self._evaluate(reporter)
                while self.plan.total_steps is None or self.step < self.plan.total_steps:
                    self._one_step(prefetcher)
                    if self._after_step(reporter):
                        return False
            finally:
                prefetcher.close()
        self._finish()
        return True

    def _make_batch(self, step: int) -> Batch:
        accelerator = self.accelerator
        positions = self.task.positions(self.order, step, accelerator.process_index, accelerator.num_processes)
        return self.task.batch(self.order.items(positions), positions)

    def _fit_memory(self, prefetcher: Prefetcher) -> None:
        """Several processes agree on a micro-batch before they begin; a single one does as it goes."""
        alone = self.accelerator.num_processes == 1 or self.replica is not None  # no process holds a sharded model
        if not alone and self.step != self.plan.total_steps:
            size = self.gradients.micro_batch_size
            self.gradients.fit(prefetcher.get(self.step), self._generator)
            self._note_micro_batch(size)

    def _one_step(self, prefetcher: Prefetcher) -> None:
        """One optimiser step over the global batch."""
        self.clock.step_started()
        asked = time.monotonic()
        batch = prefetcher.get(self.step)
        self.running.waited_sec += time.monotonic() - asked
        set_rates(self.optimizers, self.step, self.plan.total_steps, self.config)
        self.task.model.train()
        metrics = self._backward(batch)
        with self._within_memory("the optimizer's step"):
            self._apply(metrics)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.clock.step_done()

    def _apply(self, metrics: dict[str, Tensor]) -> None:
        """Lets the gradient that is there change the weights, unless it isn't finite."""
        norm = clip_gradients(self.task.model, self.config.max_grad_norm)
        self.agreed = self._agree(norm + 0 * metrics["loss"])
        if not self.agreed.is_finite:
            self._skip()
            return
        for optimizer in self.optimizers:
            optimizer.step()
        self.task.after_step(self.task.model, self._generator())
        self.ema.update(self.task.model)
        self.skipped_in_a_row = 0
        self.running.add({**metrics, "grad_norm": norm})

    def _within_memory(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Where memory runs out, a clear error about what didn't fit, after how many steps."""
        return within_memory(self.task.stage, f"{doing} after {self.step} steps")

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the global batch's loss; returns this process's part of the metrics."""
        size, total = self.gradients.micro_batch_size, self.plan.total_steps
        metrics = self.gradients.backward(batch, self.step, self.step / total if total else 0.0, self._generator)
        self._note_micro_batch(size)
        return metrics

    def _note_micro_batch(self, before: int) -> None:
        """Says in the log where the micro-batch has become smaller for want of memory."""
        if self.gradients.micro_batch_size != before:
            line = {"stage": self.task.stage, "step": self.step + 1, "time_sec": round(self._elapsed(), 3)}
            self.log.write({**line, "micro_batch_size": self.gradients.micro_batch_size})

    def _generator(self, *part: int) -> torch.Generator:
        """Random numbers of this step, or of one part of it."""
        seed = derive_seed(self.seed, self.task.stage, self.step, *part)
        return torch.Generator(self.accelerator.device).manual_seed(seed)

    def _skip(self) -> None:
        """Notes a step whose gradient is not finite; raises FloatingPointError after a few in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        positions = self.task.positions(self.order, self.step, 0, 1)
        if self.accelerator.is_main_process:
            line = {"stage": self.task.stage, "step": self.step + 1, "time_sec": round(self._elapsed(), 3)}
            names = self.task.names(self.order.items(positions))
            self.log.write({**line, "skipped": "non-finite loss or gradient", "pictures": names})
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self.task.stage}: loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to "
                f"step {self.step + 1}; delete {self.state.folder} and start the stage over with a lower "
                f"train.{self.task.stage}.learning_rate, or with its precision set to fp32. "
                f"The batches' pictures are listed in {self.log.path}"
            )

    def _after_step(self, reporter: Reporter) -> bool:
        """Logs, plans, evaluates and saves as is due; True if the run was asked to stop and has saved itself."""
        reporter.step(self.step, self.plan.total_steps)
        if self.step % LOG_EVERY == 0 or self.step == 1 or self.step == self.plan.total_steps:
            self._log(reporter)
        due = self.plan.evaluates_after(self.step)
        if self.clock.wants_measurement():
            evaluation_sec = self._evaluate(reporter)
            self.clock.fix(self.step, evaluation_sec)
            self._share_plan()
            self._say_plan(reporter)
        elif due:
            self._evaluate(reporter)
        if self.clock.wants_review(self.step):
            self._review(reporter)
        agreed = self.agreed
        if agreed.overrun and not agreed.stop and self.step != self.plan.total_steps:
            reporter.say(f"stops at step {self.step}: its time has run out")
            self.plan.total_steps = self.step
            self._evaluate(reporter)
        elif (agreed.stop or agreed.save) and self._saved_step != self.step:
            self._save()
        return agreed.stop

    def _agree(self, guard: Tensor) -> Agreement:
        """One opinion for all processes; guard, 0-d, is finite where this one's loss and gradient are.

        The step's one wait for the device: a step that is skipped must leave no trace. What tasks decide by, they look
        up on the host; vqgan's discriminator alone, which has a guard of its own, waits once more.
        """
        is_late = time.monotonic() - self._last_save > SAVE_EVERY_SEC
        wishes = [float(self.stop.requested), float(self.clock.overrun()), float(is_late)]
        if self.accelerator.num_processes > 1:
            votes = torch.cat([guard.detach().float().reshape(1), torch.tensor(wishes).to(guard.device)])
            value, *wishes = self.accelerator.reduce(votes, "sum").tolist()
        else:
            value = guard.item()
        stop, overrun, save = (bool(wish) for wish in wishes)
        return Agreement(is_finite=math.isfinite(value), stop=stop, overrun=overrun, save=save)

    def _review(self, reporter: Reporter) -> None:
        """Puts the plan right. All processes share it, changed or not: each has timed itself and may see it its way."""
        before = self.plan.total_steps
        self.clock.review(self.step)
        self._share_plan()
        if self.plan.total_steps != before:
            self._say_plan(reporter)

    def _share_plan(self) -> None:
        """Every process follows the first one's plan."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            plans = [self.plan.to_dict()]
            broadcast_object_list(plans)
            self.clock.plan = Plan(**plans[0])

    def _say_plan(self, reporter: Reporter) -> None:
        plan = self.plan
        assert plan.allotted_sec is not None and plan.step_sec is not None
        reporter.say(
            f"{plan.total_steps} steps of {plan.step_sec * 1000:.0f} ms and {plan.num_evaluations} evaluations fit "
            f"into {format_duration(plan.allotted_sec)}"
        )

    def _elapsed(self) -> float:
        """Seconds of training of this stage, over all resumes."""
        return self.trained_sec + time.monotonic() - self._began

    def _log(self, reporter: Reporter) -> None:
        """One line of metrics: means over the steps since the last one."""
        if not self.running.steps:
            return
        names = sorted(self.running.sums)
        sums = torch.stack([self.running.sums[name] for name in names])
        world = self.accelerator.num_processes
        reduced = self.accelerator.reduce(sums, "sum") / self.running.steps
        values = dict(zip(names, reduced.tolist(), strict=True))
        values["grad_norm"] /= world  # the same on every process, while the others are parts of a sum
        now, (then, step) = time.monotonic(), self._last_log
        passed_sec = max(now - then, 1e-6)
        rate = (self.step - step) * self.config.batch_size * self.task.units_per_item / passed_sec
        waits = min(1.0, self.running.waited_sec / passed_sec)
        self._last_log = (now, self.step)
        share = learning_rate_share(self.step - 1, self.plan.total_steps, self.config)
        self.log.write(
            {
                "stage": self.task.stage,
                "step": self.step,
                "time_sec": round(self._elapsed(), 3),
                **values,
                "learning_rate": self.config.learning_rate * share,
                f"{self.task.unit}_per_sec": round(rate, 1),
                "data_wait_share": round(waits, 4),
                "skipped_steps": self.skipped,
            }
        )
        total, left_sec = self.plan.total_steps, None
        if total is not None:
            left_sec = (total - self.step) * self.config.batch_size * self.task.units_per_item / max(rate, 1e-6)
        reporter.numbers(self.step, total, self.task.describe(values), rate, left_sec, waits)
        self.running = Running({})

    def _evaluate(self, reporter: Reporter) -> float:
        """Evaluates the averaged weights, keeps them if they are the best, saves; returns the seconds it took.

        Saves before the process's first one as well: whether an evaluation fits the memory only shows in it, and a run
        that it ends goes on with it, instead of going through the same steps to the same end. Processes can't do so
        once one has failed: the others wait for it.
        """
        if not self._has_evaluated and self._saved_step != self.step:
            self._save()
        start = time.monotonic()
        with self._within_memory("evaluating"):
            values = self._measure()
        self._has_evaluated = True
        self.plan.last_evaluation = self.step
        line = {"stage": self.task.stage, "step": self.step, "time_sec": round(self._elapsed(), 3), "evaluation": True}
        self.log.write({**line, **values})
        self.log.sheet(self.task.stage, self.step, self.samples / f"{self.task.stage}-{self.step:06d}.png")
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        reporter.say(f"step {self.step}/{self.plan.total_steps or '?'}: {numbers}")
        self._save()
        duration_sec = time.monotonic() - start
        self._last_log = (self._last_log[0] + duration_sec, self._last_log[1])
        return duration_sec

    def _measure(self) -> dict[str, float]:
        """Metrics of the averaged weights, which are kept if they are the best."""
        context = EvaluationContext(self.accelerator, self.samples, self.step, self.dtype, self.chunks)
        with self._averaged() as model, torch.no_grad():
            values = self.task.evaluate(model, context)
            name = self.task.score
            score = -values[name[1:]] if name.startswith("-") else values[name]
            if self.best is None or math.isnan(self.best) or score >= self.best:  # of equals, the longest trained
                self.best, self.best_evaluation = score, values
                self.best_file = self.state.best_name(self.step)
                if self.accelerator.is_main_process:
                    self.state.save_best(self.best_file, model.state_dict())
        return values

    def _averaged(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The model with the averaged weights, whole on every process."""
        if self.replica is None:
            return self.ema.swapped_in(self.task.model)
        return self.replica.holding({**self.task.model.state_dict(), **self.ema.weights})

    def _save(self) -> None:
        """Writes the resumable state on the main process; the others give what they hold of it and wait."""
        is_main = self.accelerator.is_main_process
        with self._within_memory("saving"):
            state = whole_on_cpu(self.state_dict(), keep=is_main)
            running = self.running.gathered(self.accelerator)
        if is_main:
            self.state.save({**state, "running": running})
        self.accelerator.wait_for_everyone()
        self._last_save, self._saved_step = time.monotonic(), self.step

    def state_dict(self) -> dict[str, Any]:
        """What a resumed stage needs of one process; data and random numbers are functions of the step."""
        return {
            "step": self.step,
            "model": self.task.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "task": self.task.state_dict(),
            "plan": self.plan.to_dict(),
            "best": self.best,
            "best_evaluation": self.best_evaluation,
            "best_file": self.best_file,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "micro_batch_limit": self.gradients.limit,
            "is_compiled": self.is_compiled,
            "trained_sec": self._elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any], *, has_new_time: bool = False) -> None:
        """Goes on where a saved state stopped; has_new_time: what is allotted counts from now on."""
        self.step = state["step"]
        own = self.task.model.state_dict()
        shared = {name: part_like(value, own.get(name, value)) for name, value in state["model"].items()}
        self.task.model.load_state_dict(shared)
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.task.load_state_dict(state.get("task", {}))
        self.best, self.best_evaluation = state["best"], state["best_evaluation"]
        self.best_file = state["best_file"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state.get("skipped_in_a_row", 0)
        self.gradients.restrict(state.get("micro_batch_limit"))
        self.is_compiled = state.get("is_compiled", False) and not self.replica  # other kernels give other bits
        self.running = Running.own_part(state["running"], self.accelerator)
        self.trained_sec = state["trained_sec"]
        plan = None if state["plan"]["total_steps"] is None else Plan(**state["plan"])
        self.clock.go_on(self.trained_sec, plan, has_new_time=has_new_time)
        self._saved_step = self.step
        self._last_log = (time.monotonic(), self.step)
        self.log.rewind(self.task.stage, self.step, evaluates=self.plan.evaluates_after(self.step))

    @property
    def summary(self) -> dict[str, Any]:
        """What the checkpoint says about this stage: steps, time and the evaluation of the weights that are kept."""
        return {
            "steps": self.step,
            "train_sec": round(self._elapsed(), 1),
            "skipped_steps": self.skipped,
            **{name: round(value, 6) for name, value in self.best_evaluation.items()},
        }

    def _finish(self) -> None:
        """Leaves the best averaged weights in the model."""
        assert self.best_file is not None
        self.accelerator.wait_for_everyone()
        best = self.state.load_best(self.best_file)
        if self.replica is not None:
            self.task.model = self.replica.take(best).to(self.accelerator.device)
        else:
            self.task.model.load_state_dict(best)
        self.task.model.eval()
