"""What all tests share: no network, no GPU, one thread, nothing of the machine's own caches.

Tests that need a GPU stand in `on_gpu.py`, which `test_gpu.py` runs in a process of its own.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

_CACHE = tempfile.TemporaryDirectory(prefix="dalle-mini-tests-")
# Read by the libraries when they are imported, so set before any test is.
os.environ.update(
    HF_HOME=_CACHE.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="120",
    MPLCONFIGDIR=f"{_CACHE.name}/matplotlib",
    IPYTHONDIR=f"{_CACHE.name}/ipython",
    JUPYTER_RUNTIME_DIR=f"{_CACHE.name}/jupyter",
    GRADIO_TEMP_DIR=f"{_CACHE.name}/gradio",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)
if not os.environ.get("DALLE_MINI_TEST_GPU"):
    os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command leaves the tests' process as it is: what it asks of memory and threads would last to the end."""
    monkeypatch.setattr("dalle_mini_impl.cli.app.keep_freed_memory", lambda: False)
    monkeypatch.setattr("dalle_mini_impl.cli.app.use_all_cores", lambda: None)


@pytest.fixture(autouse=True)
def _own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's log goes to the standard error of the test that has run it, and of no other."""
    monkeypatch.setattr(logging.getLogger("dalle_mini_impl"), "handlers", [])


@pytest.fixture(autouse=True)
def _fixed_random_state() -> Iterator[None]:
    """Every test starts from the same global random state, and leaves gradients and number type as they were."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "the test left gradients turned off"
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype"
