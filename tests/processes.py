"""Training in processes of their own, which tests can kill: forked from a server that has loaded everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer loads it
from accelerate import Accelerator

from dalle_mini_impl.cli.app import run_verb
from dalle_mini_impl.cli.processes import leaving_together
from dalle_mini_impl.config import Recipe, Stage
from dalle_mini_impl.training import checkpoint, loop, run, task_builder
from dalle_mini_impl.training.processes import make_accelerator
from dalle_mini_impl.training.stages import ORDER
from dalle_mini_impl.training.tasks.clip import CLIPTask
from dalle_mini_impl.training.tasks.dalle import DALLETask
from dalle_mini_impl.training.tasks.vae import VAETask

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

Points = dict[int, str]
"""Where a process of some rank ends itself: "PLACE:N", at the N-th time that it comes by.

Or what else happens to it, "memory:N": a gradient of more than N pictures fails; "gradients:FOLDER": they are written.
"""


def launch_environment() -> dict[str, str]:
    """A person's environment, in which nobody has told Accelerate of CPUs: the training has to."""
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    return {**environment, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def train_in_processes(
    recipe: Recipe,
    data: str,
    out: Path,
    points: Points | None = None,
    *,
    world_size: int = 1,
    stages: Sequence[Stage] = ORDER,
    timeout_sec: float = 300,
) -> list[int]:
    """Trains, or goes on, and returns the exit status of each process.

    0: finished. 3: stopped, its state saved. 4: interrupted between stages. 1: failed. -9: killed.

    As under a launcher, where one process ends with an error the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (recipe.model_dump(mode="json"), data, out, points or {}, world_size, port, tuple(stages))
    processes = [_CONTEXT.Process(target=_train, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout_sec
    while any(process.exitcode is None for process in processes):
        failed = any(process.exitcode not in (None, 0, 3, 4) for process in processes)
        if failed or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    assert time.monotonic() < end, "the processes waited for each other"
    return [int(process.exitcode or 0) for process in processes]


def command_in_process(arguments: Sequence[str], point: str, timeout_sec: float = 300) -> int:
    """The exit status of ``train.py`` with some arguments, in a process that comes by a point."""
    process = _CONTEXT.Process(target=_command, args=(list(arguments), point))
    process.start()
    try:
        process.join(timeout_sec)
        assert process.exitcode is not None, "the process did not end"
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _command(arguments: Sequence[str], point: str) -> None:
    torch.set_num_threads(1)
    _come_by(point)
    run_verb("train", arguments)


def _come_by(point: str) -> None:
    place, _, number = point.partition(":")
    if place == "memory-in-evaluation":
        _before(VAETask, "evaluate", _raise_out_of_memory)
    elif place.startswith("memory"):
        _run_out_of_memory(int(number), only_in_steps=place == "memory-in-steps")
    elif place == "gradients":
        _keep_gradients(Path(number))
    else:
        by = signal.SIGTERM if place.startswith("stop") else signal.SIGKILL
        _PLACES[place](_countdown(int(number or 1), by))


def _train(
    rank: int,
    values: Any,
    data: str,
    out: Path,
    points: Points,
    world_size: int,
    port: int,
    stages: Sequence[Stage],
) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w") if points else sys.stderr  # noqa: SIM115
    if world_size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in {**ranks, **place}.items()})
        os.environ.pop("ACCELERATE_USE_CPU", None)  # no launcher of several processes sets it
    if rank in points:
        _come_by(points[rank])
    loop.SAVE_EVERY_SEC = 0.0
    try:
        with leaving_together():
            accelerator = make_accelerator()
            assert accelerator.num_processes == world_size
            finished = run.train(Recipe.parse(values), data, out, stages=stages, resume=True, accelerator=accelerator)
    except KeyboardInterrupt:
        sys.exit(4)
    sys.exit(0 if finished else 3)


def _countdown(number: int, by: signal.Signals) -> Callable[[], None]:
    """Something that ends this process when it is called for the number-th time."""
    left = number

    def come_by() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), by)

    return come_by


def _before(owner: Any, name: str, come_by: Callable[[], None]) -> None:
    """Has `come_by` called before each call of a function."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        come_by()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _half_written(come_by: Callable[[], None]) -> None:
    """In the middle of a state's bytes."""
    original = torch.save

    def save(state: Any, path: Path) -> None:
        original(state, path)
        os.truncate(path, path.stat().st_size // 2)
        come_by()
        original(state, path)

    torch.save = save


def _between_state_and_index(come_by: Callable[[], None]) -> None:
    original = checkpoint.write_json

    def write_json(path: Path, value: object) -> None:
        if path.name == "index.json":
            come_by()
        original(path, value)

    checkpoint.write_json = write_json


def _soon(come_by: Callable[[], None]) -> None:
    """While this process is busy or waits for another one."""
    threading.Timer(0.2, come_by).start()
    time.sleep(0.4)


def _raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _run_out_of_memory(most: int, only_in_steps: bool) -> None:
    """Lets a gradient of more than some pictures fail; only_in_steps: not where it is tried what fits."""
    for task in (VAETask, CLIPTask, DALLETask):
        loss = task.loss

        def failing(self: Any, model: Any, batch: Any, context: Any, loss: Any = loss) -> Any:
            if len(next(iter(batch.values()))) > most and not (only_in_steps and not model.training):
                _raise_out_of_memory()
            return loss(self, model, batch, context)

        task.loss = failing


def _keep_gradients(folder: Path) -> None:
    """Writes the gradients of each stage's first step."""
    original = loop.clip_gradients
    folder.mkdir()

    def clip_gradients(model: Any, max_norm: float) -> Any:
        path = folder / f"{type(model).__name__}.pt"
        if not path.exists():
            torch.save({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)
        return original(model, max_norm)

    loop.clip_gradients = clip_gradients


_PLACES: dict[str, Callable[[Callable[[], None]], None]] = {
    "step": lambda come_by: _before(loop.StageTrainer, "_one_step", come_by),
    "stop-in-step": lambda come_by: _before(loop.StageTrainer, "_one_step", come_by),
    "optimizer": lambda come_by: _before(loop.EMA, "update", come_by),
    "state": _half_written,
    "index": _between_state_and_index,
    "best": lambda come_by: _before(checkpoint.StateFolder, "save_best", come_by),
    "pictures": lambda come_by: _before(task_builder, "prepare", come_by),
    "stop-in-pictures": lambda come_by: _before(task_builder, "prepare", come_by),
    "encoding": lambda come_by: _before(task_builder.TokenCache, "build", come_by),
    "embedding": lambda come_by: _before(task_builder.EmbeddingCache, "build", come_by),
    "stop-in-encoding": lambda come_by: _before(task_builder.TokenCache, "build", come_by),
    "stop-in-evaluation": lambda come_by: _before(loop.StageTrainer, "_evaluate", come_by),
    "checkpoint": lambda come_by: _before(run, "save_bundle", come_by),
    "stop-in-checkpoint": lambda come_by: _before(run, "save_bundle", come_by),
    "finish": lambda come_by: _before(checkpoint.StateFolder, "finish", come_by),
    "stop-soon-in-pictures": lambda come_by: _before(task_builder, "prepare", lambda: _soon(come_by)),
    "stop-soon-waiting": lambda come_by: _before(
        Accelerator, "wait_for_everyone", lambda: threading.Timer(0.2, come_by).start()
    ),
    "next-stage": lambda come_by: _before(run.Run, "train_stage", come_by),
}


def steps_done(out: Path, stage: Stage) -> int:
    """Steps in the newest whole state of a stage, 0 where there is none."""
    states = checkpoint.StateFolder(out / "state" / stage)
    return int(states.load()["step"]) if states.started else 0
