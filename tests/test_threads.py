"""A launcher that leaves each process a single thread doesn't leave cores idle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_mini_impl import threads
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
    monkeypatch.setattr(threads, "_QUOTA", Path("nowhere"))
    use_all_cores()
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize(
    ("said", "environment", "expected"),
    [
        ("max 100000\n", {}, None),
        ("250000 100000\n", {}, "3"),
        ("50000 100000\n", {}, "1"),
        ("1600000 100000\n", {}, None),
        ("200000 100000\n", {"OMP_NUM_THREADS": "5"}, "5"),
        ("400000 100000\n", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, "2"),
        ("of another form", {}, None),
    ],
)
def test_a_container_s_share_of_the_cores_counts(
    said: str, environment: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cpu.max").write_text(said)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    use_all_cores()
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize("call", ["app.main(['train', '--help'])", "app.run_verb('train', ['--help'])"])
def test_the_commands_ask_before_torch_counts_its_threads(call: str) -> None:
    """Torch reads the variable when it is imported, which `train` does, so a verb that came first would be too late."""
    program = (
        "import sys, dalle_mini_impl.cli.app as app\n"
        "seen = []\n"
        "app.use_all_cores = lambda: seen.append('torch' in sys.modules)\n"
        f"try:\n    {call}\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' in sys.modules and seen == [False], seen\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=120)
