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
from dalle_mini_impl.training.batches import (
    Batch,
    BatchOrder,
    Prefetcher,
    derive_seed,
    split_batch,
    to_device,
)
from dalle_mini_impl.training.budget import Plan, StageClock, format_duration
from dalle_mini_impl.training.checkpoint import StateFolder, load_weights, save_weights
from dalle_mini_impl.training.compiling import should_compile
from dalle_mini_impl.training.ema import EMA
from dalle_mini_impl.training.optim import build_optimizers, clip_gradients, learning_rate_share, set_learning_rate
from dalle_mini_impl.training.progress import MetricsLog, Reporter
from dalle_mini_impl.training.stopping import StopSignal
from dalle_mini_impl.training.task import EvaluationContext, LossModule, StepContext, Task, autocast, autocast_dtype

LOG_EVERY = 10
"""Steps between two lines of metrics; with several processes also between two agreements on saving and stopping."""
SAVE_EVERY_SEC = 180.0
MAX_SKIPPED_IN_A_ROW = 5


@dataclass
class Running:
    """Sums of metrics since the last line of the log."""

    sums: dict[str, Tensor]
    steps: int = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds one step's metrics, without waiting for the device."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1


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
        self.clock = StageClock(config, allotted_sec)
        self.order = BatchOrder(task.num_items, config.batch_size, derive_seed(seed, task.stage, "order"))
        self.order.positions(0, accelerator.process_index, accelerator.num_processes)  # refuses an uneven split early
        task.model.to(accelerator.device)
        self.dtype = autocast_dtype(config.precision, accelerator.device)
        self.ema = EMA(task.model, config.ema_decay)
        self.optimizers = build_optimizers(task.model, config)
        module = LossModule(task, accelerator.device, self.dtype)
        prepared: nn.Module = accelerator.prepare(module)
        self.module = prepared
        self.is_compiled = should_compile(task.stage, config, task.model, allotted_sec)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self.best: float | None = None
        self.best_evaluation: dict[str, float] = {}
        self.running = Running({})
        self.trained_sec = 0.0
        self._began = self._last_save = time.monotonic()
        self._last_log = (time.monotonic(), 0)

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
        with self.stop, Reporter(self.task.stage, self.task.unit, self.accelerator.is_main_process) as reporter:
            try:
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

    def _one_step(self, prefetcher: Prefetcher) -> None:
        """One optimiser step over the global batch."""
        self.clock.step_started()
        batch = to_device(prefetcher.get(self.step), self.accelerator.device)
        set_learning_rate(self.optimizers, learning_rate_share(self.step, self.plan.total_steps, self.config))
        self.task.model.train()
        metrics = self._backward(batch)
        norm = clip_gradients(self.task.model, self.config.max_grad_norm)
        if math.isfinite(norm.item()):  # the step's one wait for the device: a skipped step must leave no trace
            for optimizer in self.optimizers:
                optimizer.step()
            self.task.after_step(self.task.model, self._generator())
            self.ema.update(self.task.model)
            self.skipped_in_a_row = 0
            self.running.add({**metrics, "grad_norm": norm})
        else:
            self._skip()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.clock.step_done()

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the global batch's loss; returns this process's part of the metrics."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        counts = accelerator.reduce(self.task.counts(batch).to(accelerator.device), "sum")
        micro_batches = list(split_batch(batch, self.config.micro_batch_size))
        with autocast(accelerator.device, self.dtype):
            micro_batches = self.task.before_step(self.task.model, micro_batches, counts)
        total = self.plan.total_steps
        metrics: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            generator = self._generator(accelerator.process_index, index)
            torch.manual_seed(generator.initial_seed())  # dropout has no other source of randomness
            context = StepContext(counts, self.step / total if total else 0.0, generator)
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                loss, parts = self.module(micro_batch, context)
                accelerator.backward(loss * world)  # DDP averages over processes what has to be summed
            for name, value in {"loss": loss, **parts}.items():
                metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        return metrics

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
            self.log.write({**line, "skipped": "non-finite gradient", "items": self.order.items(positions).tolist()})
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self.task.stage}: the gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{self.step}; lower train.{self.task.stage}.learning_rate or set its precision to fp32. "
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
        stop, save = self._agree()
        if stop == "overrun" and self.step != self.plan.total_steps:
            reporter.say(f"stops at step {self.step}: its time has run out")
            self.plan.total_steps = self.step
            self._evaluate(reporter)
        elif stop == "signal" or save:
            self._save()
        return stop == "signal"

    def _agree(self) -> tuple[str, bool]:
        """What all processes do next: stop ("signal", "overrun" or ""), and whether to save."""
        several = self.accelerator.num_processes > 1
        if several and self.step % LOG_EVERY:
            return "", False
        wishes = torch.tensor(
            [self.stop.requested, self.clock.overrun(), time.monotonic() - self._last_save > SAVE_EVERY_SEC],
            dtype=torch.float32,
        )
        if several:
            wishes = self.accelerator.reduce(wishes.to(self.accelerator.device), "sum").cpu()
        signal_, overrun, save = (bool(wish) for wish in wishes)
        return ("signal" if signal_ else "overrun" if overrun else ""), save

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
        rate = (self.step - step) * self.config.batch_size * self.task.units_per_item / max(now - then, 1e-6)
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
                "skipped_steps": self.skipped,
            }
        )
        total, left_sec = self.plan.total_steps, None
        if total is not None:
            left_sec = (total - self.step) * self.config.batch_size * self.task.units_per_item / max(rate, 1e-6)
        reporter.numbers(self.step, total, self.task.describe(values), rate, left_sec)
        self.running = Running({})

    def _evaluate(self, reporter: Reporter) -> float:
        """Evaluates the averaged weights, keeps them if they are the best, saves; returns the seconds it took."""
        start = time.monotonic()
        self.plan.last_evaluation = self.step
        context = EvaluationContext(self.accelerator, self.samples, self.step, self.dtype)
        with self.ema.swapped_in(self.task.model) as model, torch.no_grad():
            values = self.task.evaluate(model, context)
            name = self.task.score
            score = -values[name[1:]] if name.startswith("-") else values[name]
            if self.best is None or math.isnan(self.best) or score >= self.best:  # of equals, the longest trained
                self.best, self.best_evaluation = score, values
                if self.accelerator.is_main_process:
                    save_weights(self.state.best_path, model.state_dict())
        line = {"stage": self.task.stage, "step": self.step, "time_sec": round(self._elapsed(), 3), "evaluation": True}
        self.log.write({**line, **values})
        self.log.sheet(self.task.stage, self.step, self.samples / f"{self.task.stage}-{self.step:06d}.png")
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        reporter.say(f"step {self.step}/{self.plan.total_steps or '?'}: {numbers}")
        self._save()
        duration_sec = time.monotonic() - start
        self._last_log = (self._last_log[0] + duration_sec, self._last_log[1])
        return duration_sec

    def _save(self) -> None:
        """Writes the resumable state on the main process; the others wait."""
        if self.accelerator.is_main_process:
            self.state.save(self.state_dict())
        self.accelerator.wait_for_everyone()
        self._last_save = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed stage needs; data and random numbers are functions of the step."""
        return {
            "step": self.step,
            "model": self.task.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "plan": self.plan.to_dict(),
            "best": self.best,
            "best_evaluation": self.best_evaluation,
            "skipped": self.skipped,
            "is_compiled": self.is_compiled,
            "running": {"sums": dict(self.running.sums), "steps": self.running.steps},
            "trained_sec": self._elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a saved state stopped."""
        self.step = state["step"]
        self.task.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["plan"]["total_steps"] is not None:
            self.clock.plan = Plan(**state["plan"])
        self.best, self.best_evaluation = state["best"], state["best_evaluation"]
        self.skipped = state["skipped"]
        self.is_compiled = state.get("is_compiled", False)  # other kernels give other bits
        device = self.accelerator.device
        sums = {name: value.to(device) for name, value in state["running"]["sums"].items()}
        self.running = Running(sums, state["running"]["steps"])
        self.trained_sec = state["trained_sec"]
        self.clock.start -= self.trained_sec
        self._last_log = (time.monotonic(), self.step)
        self.log.rewind(self.task.stage, self.step)

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
        self.accelerator.wait_for_everyone()
        self.task.model.load_state_dict(load_weights(self.state.best_path))
        self.task.model.eval()
