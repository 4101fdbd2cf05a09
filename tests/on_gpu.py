"""What can only be seen on a GPU; see `test_gpu.py`."""

from __future__ import annotations

import pytest
import torch

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.decoding import FixedShapes
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.sampling import Samples, every_row, sample_rows
from tests.test_no_waits import TASKS, losses, moved
from tests.tiny import tiny_bundle, tiny_checkpoint

PROMPT = "a red circle"


def _draw(device: str, settings: SamplingConfig, fixed: FixedShapes) -> Samples:
    bundle = tiny_bundle('dalle.neighbours=["above","above_right"]')
    assert bundle.dalle is not None
    text = bundle.tokenizer.batch([PROMPT], bundle.stream.text_length)[0]
    rows = every_row(1, range(5))
    return sample_rows(bundle.dalle.to(device), text, [PROMPT], rows, seed=0, settings=settings, fixed=fixed)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_captured_graph_draws_what_steps_of_their_own_draw(guidance: float) -> None:
    settings = SamplingConfig(guidance=guidance, top_k=20)
    eager, graph, cpu = _draw("cuda", settings, "eager"), _draw("cuda", settings, "graph"), _draw("cpu", settings, None)
    assert torch.equal(eager.ids, graph.ids)
    assert eager.log_ratio is not None and graph.log_ratio is not None
    assert torch.allclose(eager.log_ratio, graph.log_ratio, atol=1e-3)
    assert (graph.ids == cpu.ids).float().mean() > 0.9, "other kernels round otherwise, and seldom enough to matter"


def test_a_pipeline_draws_on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    pictures = TextToImage.from_pretrained(folder, "cuda")(PROMPT, candidates=6, keep=2)
    assert [picture.rank for picture in pictures] == [1, 2]


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("name", TASKS)
def test_a_loss_waits_for_nothing(name: str, micro_batch_size: int | None) -> None:
    device = torch.device("cuda")
    task = moved(TASKS[name](), device)
    for mode in ("default", "error"):  # what is looked up or allocated only once is there after the first
        steps = losses(task, device, micro_batch_size)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            values = list(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(value.isfinite() for value in values)
