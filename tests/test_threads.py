"""A launcher that leaves each process a single thread doesn't leave cores idle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_mini_impl.threads import use_all_cores

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "8"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, "4"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "16"}, "1"),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, "3"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({}, None),
    ],
)
def test_only_a_launchers_single_thread_is_changed(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    use_all_cores()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_the_commands_ask_before_torch_counts_its_threads() -> None:
    """Torch reads the variable when it is imported, so a verb that imported it first would be too late."""
    program = (
        "import sys, dalle_mini_impl.cli.app as app\n"
        "seen = []\n"
        "app.use_all_cores = lambda: seen.append('torch' in sys.modules)\n"
        "for run in (lambda: app.main(['train', '--help']), lambda: app.run_verb('sample', ['--help'])):\n"
        "    try:\n"
        "        run()\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    sys.modules.pop('torch', None)\n"
        "assert seen == [False, False], seen\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60)
