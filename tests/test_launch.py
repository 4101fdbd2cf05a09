"""`accelerate launch` as a person uses it: one of two processes killed, Ctrl-C; the run goes on in either case."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dalle_mini_impl.training.checkpoint import StateFolder
from tests.processes import launch_environment, steps_done, train_in_processes
from tests.test_killed import assert_same
from tests.test_training_faults import assert_equal
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parents[1]
DATA = "shapes:count=40"
ENDLESS = ("train.vae.steps=100000", "train.vae.batch_size=4", "train.vae.evaluations=50000")
SAVES_ONLY_WHEN_TOLD = (*ENDLESS[:2], "train.vae.evaluations=1")
TOML = """
[data]
image_size = 16
[text]
vocab_size = 300
max_length = 16
[vae]
downsample = 4
patch = 2
width = 8
latent_width = 16
encoder_blocks = 1
decoder_blocks = 1
codebook_size = 32
code_dim = 4
[clip]
embed_dim = 16
stem_width = 8
width = 16
heads = 2
image_layers = 1
text_layers = 1
[dalle]
dim = 32
layers = 2
heads = 2
"""


def process_of_rank(rank: int, launcher: int) -> int | None:
    """The process that the launcher has given a rank."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"LOCAL_RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
    return None


def start(launch: str, tmp_path: Path, settings: Sequence[str]) -> subprocess.Popen[str]:
    """Starts train.py with a tiny recipe, by a launcher or directly, in a process group of its own."""
    config = tmp_path / "tiny.toml"
    config.write_text(TOML)
    options = ["--config", config, "--data", DATA, "--out", tmp_path / "run", "--stage", "vae"]
    options += [part for setting in settings for part in ("--set", setting)]
    arguments = [sys.executable, *launch.split(), "train.py", *map(str, options)]
    return subprocess.Popen(
        arguments, cwd=ROOT, env=launch_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def goes_on(tmp_path: Path, settings: Sequence[str]) -> bool:
    """Whether a resumed run takes three more steps from the saved one."""
    out, recipe, stop = tmp_path / "run", tiny_recipe(*settings, 'name="tiny"'), {0: "stop-in-step:3"}
    done = steps_done(out, "vae")
    codes = train_in_processes(recipe, DATA, out, stop, world_size=1, stages=["vae"])
    return codes == [3] and steps_done(out, "vae") == done + 3


def wait(until: Callable[[], object], launcher: subprocess.Popen[str], timeout_sec: float = 240) -> None:
    end = time.monotonic() + timeout_sec
    while not until():
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc, which is Linux's")
def test_where_one_of_two_processes_is_killed_the_launcher_ends_and_the_run_goes_on(tmp_path: Path) -> None:
    launch = "-m accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml --main_process_port 0"
    with start(launch, tmp_path, ENDLESS) as launcher:
        try:
            wait(lambda: StateFolder(tmp_path / "run" / "state" / "vae").started, launcher)
            victim = process_of_rank(1, launcher.pid)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            _, error = launcher.communicate(timeout=120)
        finally:
            launcher.terminate()  # it takes its processes along
    assert launcher.returncode != 0
    assert "another process has ended" in error or "SIGKILL" in error
    out = tmp_path / "run"
    done = steps_done(out, "vae")
    assert done >= 2
    recipe, whole = tiny_recipe(*ENDLESS, 'name="tiny"'), tmp_path / "whole"
    for folder, steps in ((out, 3), (whole, done + 3)):
        stop = {0: f"stop-in-step:{steps}"}
        assert train_in_processes(recipe, DATA, folder, stop, world_size=2, stages=["vae"]) == [3, 3]
    assert_same(out, whole)
    ours, expected = (StateFolder(folder / "state" / "vae").load() for folder in (out, whole))
    assert ours["step"] == done + 3
    for part in ("model", "ema", "optimizers", "running", "best_evaluation"):
        assert_equal(ours[part], expected[part])


@pytest.mark.parametrize(
    "launch",
    [
        "",
        "-m accelerate.commands.launch --cpu --num_processes 1",
        "-m accelerate.commands.launch --config_file configs/accelerate/gpu1.yaml",
    ],
    ids=["plain", "launch", "gpu1"],
)
def test_ctrl_c_saves_the_run(launch: str, tmp_path: Path) -> None:
    """A terminal sends it to the whole group: a launcher gives up at once, the training saves its state first."""
    with start(launch, tmp_path, SAVES_ONLY_WHEN_TOLD) as process:
        try:
            wait((tmp_path / "run" / "metrics.jsonl").is_file, process)
            assert steps_done(tmp_path / "run", "vae") == 0
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=120)  # until the last of the group has closed its standard error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "stopped; the same command with --resume goes on" in error, error[-3000:]
    assert launch or process.returncode == 0
    assert steps_done(tmp_path / "run", "vae") > 0
    assert goes_on(tmp_path, SAVES_ONLY_WHEN_TOLD)
