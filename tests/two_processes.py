"""What both processes of `test_scale.py` run: ``accelerate launch tests/two_processes.py FOLDER RECIPE.json DATA``.

FOLDER/whole is trained in one go; FOLDER/stopped breaks off in its last stage and goes on (what it had saved by then is
kept in FOLDER/saved). FOLDER/budget has a time instead of a number of steps; in FOLDER/skipped one process has a step
whose loss isn't a number.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dalle_mini_impl.cli.processes import leaving_together
from dalle_mini_impl.config import Recipe
from dalle_mini_impl.data.prepare import PreparedData
from dalle_mini_impl.training import evaluation, loop
from dalle_mini_impl.training.batches import Indices
from dalle_mini_impl.training.dtensors import local, part_like, whole
from dalle_mini_impl.training.muon import Muon
from dalle_mini_impl.training.optim import clip_gradients
from dalle_mini_impl.training.processes import make_accelerator
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.task import EvaluationContext, LossModule

SHAPES = [(5, 18), (18, 5), (1, 6), (5, 18), (3, 2, 3, 3), (3, 18), (6, 18)]
"""Rows that two processes can't share evenly, one that only one of them has, and a kernel beside a matrix."""


def main(folder: Path, recipe: Recipe, data: str) -> None:
    accelerator = make_accelerator()
    assert accelerator.num_processes == 2
    check_muon()
    with pytest.raises(ValueError, match="is not the same folder on all machines"):
        train(recipe, data, folder / f"apart{accelerator.process_index}", accelerator=accelerator)
    check_shares(folder, recipe, data, accelerator)
    break_off(folder, recipe, data, accelerator)
    assert train(recipe, data, folder / "stopped", accelerator=accelerator, stages=["dalle"], resume=True)
    check_budget(folder, recipe, data, accelerator)
    check_skip(folder, recipe, data, accelerator)


def check_shares(folder: Path, recipe: Recipe, data: str, accelerator: Accelerator) -> None:
    """Trains the whole run; each process evaluates half of the pictures, not all of them to the same numbers."""
    evaluated: list[list[int]] = []
    original = evaluation.share

    def share(indices: Indices, context: EvaluationContext) -> Indices:
        own = original(indices, context)
        evaluated.append(own.tolist())
        return own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "share", share)
        assert train(recipe, data, folder / "whole", accelerator=accelerator)
    ours, theirs = gather_object([evaluated])
    assert len(ours) == len(theirs) >= 2 * 4, "two evaluations of each stage, the transformer's of two sets"
    for one, two in zip(ours, theirs, strict=True):
        assert not set(one) & set(two) and len(one) - len(two) in (0, 1), (one, two)
    held_out = evaluation.held_out(PreparedData.open(folder / "whole" / "data"))
    assert sorted([*ours[0], *theirs[0]]) == held_out.tolist()


def check_skip(folder: Path, recipe: Recipe, data: str, accelerator: Accelerator) -> None:
    """One process's loss isn't a number, though all gradients are: none takes the step, and its pictures are named."""
    forward, one_step = LossModule.forward, loop.StageTrainer._one_step
    steps: list[tuple[int, bool]] = []

    def poisoned(self: LossModule, *arguments: Any, **options: Any) -> Any:
        result = forward(self, *arguments, **options)
        is_now = len(steps) == 2 and accelerator.process_index == 1 and not options
        return (result[0] + math.nan, result[1]) if is_now else result

    def step(self: loop.StageTrainer, prefetcher: Any) -> None:
        before = [local(p).clone() for p in self.task.model.parameters()]
        one_step(self, prefetcher)
        after = [local(p) for p in self.task.model.parameters()]
        moved = any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
        steps.append((self.skipped, moved))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossModule, "forward", poisoned)
        patch.setattr(loop.StageTrainer, "_one_step", step)
        assert train(recipe, data, folder / "skipped", stages=["vae"], accelerator=accelerator)
    ours, theirs = gather_object([steps])
    assert ours == theirs == [(0, True), (0, True), (1, False), *[(1, True)] * (len(ours) - 3)]
    lines = [json.loads(line) for line in (folder / "skipped" / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if "skipped" in line)
    assert line["step"] == 3 and len(set(line["pictures"])) == recipe.train.vae.batch_size, "those of both"


def check_budget(folder: Path, recipe: Recipe, data: str, accelerator: Accelerator) -> None:
    """Each process measures its own speed, yet all take the same number of steps."""
    steps: list[int] = []
    original = loop.StageTrainer._finish

    def finish(self: loop.StageTrainer) -> None:
        steps.append(self.step)
        original(self)

    loop.StageTrainer._finish = finish  # type: ignore[method-assign]
    assert train(recipe, data, folder / "budget", stages=["vae"], budget_sec=5.0, accelerator=accelerator)
    both = gather_object(steps)
    assert len(both) == 2 and both[0] == both[1] > 0, both


def check_muon() -> None:
    """Matrices that are shared out move as whole ones do, under clipped gradients."""
    torch.manual_seed(0)
    plain = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in SHAPES)
    shared = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in plain)
    fully_shard(shared)
    groups = [[{"params": p[:-1]}, {"params": p[-1:], "stacked": 3}] for p in map(list, (plain, shared))]
    muons = [Muon(group, lr=0.1, beta2=0.9, weight_decay=0.1) for group in groups]
    for _ in range(3):
        gradients = [torch.randn(p.shape) for p in plain]
        for parameters in (plain, shared):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = part_like(gradient.clone(), parameter)
        norms = [clip_gradients(parameters, 1.0) for parameters in (plain, shared)]
        assert torch.allclose(*norms)
        for muon in muons:
            muon.step()
    for one, two in zip(plain, shared, strict=True):
        assert isinstance(two, DTensor) and (len(two) == 1 or len(local(two)) < len(two))
        assert torch.allclose(one, whole(two), atol=2e-3), (one - whole(two)).abs().max()


def break_off(folder: Path, recipe: Recipe, data: str, accelerator: Accelerator) -> None:
    """Trains a copy of the run until its transformer has done three steps and begins a fourth."""
    stopped = folder / "stopped"
    if accelerator.is_main_process:
        shutil.copytree(folder / "whole", stopped)
        shutil.rmtree(stopped / "state" / "dalle")
    accelerator.wait_for_everyone()
    loop.LOG_EVERY, loop.SAVE_EVERY_SEC = 1, 0.0
    original = loop.StageTrainer._one_step

    def one_step(self: loop.StageTrainer, prefetcher: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        original(self, prefetcher)

    loop.StageTrainer._one_step = one_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, stopped, accelerator=accelerator, stages=["dalle"])
    loop.StageTrainer._one_step = original  # type: ignore[method-assign]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.copytree(stopped, folder / "saved")
        state = torch.load(folder / "saved" / "state" / "dalle" / "step-00000003.pt", weights_only=True)
        assert all(type(tensor) is Tensor for tensor in state["model"].values())


if __name__ == "__main__":
    with leaving_together():
        main(Path(sys.argv[1]), Recipe.parse(json.loads(Path(sys.argv[2]).read_text())), sys.argv[3])
