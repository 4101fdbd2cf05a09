"""Two processes of `accelerate launch`, one of which is killed: the launcher ends with an error, the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_mini_impl.training.checkpoint import StateFolder
from tests.processes import steps_done, train_in_processes
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parents[1]
DATA = "shapes:count=40"
ENDLESS = ("train.vae.steps=100000", "train.vae.evaluations=50000", "train.vae.batch_size=4")
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


def wait(until: Callable[[], object], launcher: subprocess.Popen[str], timeout_sec: float = 240) -> None:
    end = time.monotonic() + timeout_sec
    while not until():
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc, which is Linux's")
def test_where_one_of_two_processes_is_killed_the_launcher_ends_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tmp_path / "tiny.toml"
    config.write_text(TOML)
    launch = "-m accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml --main_process_port 0 train.py"
    options = ["--config", config, "--data", DATA, "--out", out, "--stage", "vae"]
    options += [part for setting in ENDLESS for part in ("--set", setting)]
    arguments = [sys.executable, *launch.split(), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            wait(lambda: StateFolder(out / "state" / "vae").started, launcher)
            victim = process_of_rank(1, launcher.pid)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            _, error = launcher.communicate(timeout=120)
        finally:
            launcher.terminate()  # it takes its processes along
    assert launcher.returncode != 0
    assert "another process has ended" in error or "SIGKILL" in error
    done = steps_done(out, "vae")
    assert done >= 2
    recipe = tiny_recipe(*ENDLESS, 'name="tiny"')
    stop = {0: "stop-in-step:3"}
    assert train_in_processes(recipe, DATA, out, stop, world_size=2, stages=["vae"]) == [3, 3]
    assert steps_done(out, "vae") == done + 3
