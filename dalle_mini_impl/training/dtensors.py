"""Tensors of which each process holds a part (DTensor), and plain ones, by the same functions.

Elementwise work is done on the parts; what needs whole tensors gathers them. A tensor that isn't shared out is its own
part and its own whole.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:  # a second to import, which runs that share nothing out needn't wait for
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_shared(value: object) -> TypeGuard[DTensor]:
    """Whether it is a tensor of which each process holds a part; there are none before their module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part; writing to it writes to the tensor."""
    return tensor.to_local() if is_shared(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, for use without gradients; every process has to call it."""
    if not is_shared(tensor):
        return tensor
    rows = rows_of(tensor)
    return tensor.full_tensor() if rows is None else _gathered(tensor.to_local(), 0, tensor.shape[0], rows)


def rows_of(tensor: Tensor) -> ProcessGroup | None:
    """The processes of which each holds some rows; None where a tensor is shared out otherwise, or not at all."""
    if not is_shared(tensor):
        return None
    from torch.distributed.tensor import Shard

    is_cut = tensor.device_mesh.ndim == 1 and tensor.placements == (Shard(0),)
    return tensor.device_mesh.get_group() if is_cut else None


def _gathered(part: Tensor, dim: int, size: int, group: ProcessGroup) -> Tensor:
    """All of a tensor of `size` along `dim`, of which each process holds a chunk as torch.chunk cuts it.

    A plain collective: those that DTensor itself uses have crashed under Gloo, in torch's wait_tensor.
    """
    most = -(-size // group.size())  # the last chunks may be shorter, or empty
    if part.shape[dim] < most:
        filling = list(part.shape)
        filling[dim] = most - part.shape[dim]
        part = torch.cat([part.detach(), part.new_zeros(filling)], dim=dim)
    chunks = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(chunks, part.detach().contiguous(), group=group)
    return torch.cat(chunks, dim=dim).narrow(dim, 0, size).contiguous()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, shared out as `like` is; nothing is sent."""
    if not is_shared(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_stack(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """n matrices (n, R, C) of which each process holds some rows, as it does of `like`; gathered in one message."""
    stacked = torch.stack(list(parts))
    if not is_shared(like):
        return stacked
    rows = rows_of(like)
    if rows is None:
        raise ValueError(f"matrices are gathered by rows of one group of processes, not as {like.placements} are")
    return _gathered(stacked, 1, like.shape[0], rows)


def whole_on_cpu(tree: Any, keep: bool = True) -> Any:
    """Nested dictionaries and lists with every shared tensor made whole, on the CPU; None where it isn't to be kept.

    Every process has to call it; each tensor is dropped again before the next one where `keep` is False.
    """
    if is_shared(tree):
        full = whole(tree)
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole_on_cpu(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole_on_cpu(value, keep) for value in tree]
    return tree


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of a state with whole tensors, shared out as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shared = {
        index: {
            name: part_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared})
