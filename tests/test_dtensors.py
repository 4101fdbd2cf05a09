"""Tensors of which each process holds a part are put together as they were, whatever their sizes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import distributed

from dalle_mini_impl.training.dtensors import is_shared, local, part_like, whole, whole_on_cpu, whole_stack

NUM_PROCESSES = 3
SHAPES = [(6, 2), (7, 4), (2, 3), (1,), (4,)]  # some that three can't share out evenly, some with less than a row each


def tensors() -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(index)) for index, shape in enumerate(SHAPES)]


def _take_part(rank: int, meeting: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_PROCESSES)
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    for tensor in tensors():
        shared = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        rows = tensor.chunk(NUM_PROCESSES)
        assert is_shared(shared)
        assert torch.equal(local(shared), rows[rank] if rank < len(rows) else tensor[:0])
        assert torch.equal(whole(shared), tensor)
        assert torch.equal(local(part_like(tensor, shared)), local(shared))
        kept = whole_on_cpu({"a": [shared, 1]}, keep=rank == 0)
        assert kept["a"][1] == 1
        assert torch.equal(kept["a"][0], tensor) if rank == 0 else kept["a"][0] is None
        if tensor.ndim == 2:
            stack = whole_stack([local(shared), 2 * local(shared)], shared)
            assert torch.equal(stack, torch.stack([tensor, 2 * tensor]))
    columns = distribute_tensor(tensors()[0], mesh, [Shard(1)], src_data_rank=None)
    assert torch.equal(whole(columns), tensors()[0])
    with pytest.raises(ValueError, match="gathered by rows"):
        whole_stack([local(columns)], columns)
    share = torch.tensor(float(rank + 1))
    assert whole(DTensor.from_local(share, mesh, [Partial()], run_check=False)) == 6
    distributed.barrier()
    distributed.destroy_process_group()


def test_what_three_processes_share_out_is_whole_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_take_part, args=(rank, tmp_path / "meeting")) for rank in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # one that still waits for the others
        process.join()
    assert [process.exitcode for process in processes] == [0] * NUM_PROCESSES


def test_a_plain_tensor_is_its_own_part_and_its_own_whole() -> None:
    tensor = torch.arange(6.0).view(3, 2)
    assert local(tensor) is tensor
    assert whole(tensor) is tensor
    assert part_like(tensor, tensor) is tensor
    assert torch.equal(whole_stack([tensor, tensor], tensor), torch.stack([tensor, tensor]))
