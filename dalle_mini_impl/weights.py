"""Weights on disk: safetensors that are written whole and know their own checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from dalle_mini_impl.files import write_atomically

_CHECKSUM = "sha256"


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, atomically, with the SHA-256 of their names and bytes in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {_CHECKSUM: _checksum(tensors)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_weights(path: Path, remedy: str = "copy or download it again") -> dict[str, Tensor]:
    """Reads a safetensors file; what others wrote has no checksum and is taken as it is.

    Raises ValueError that names the file, and the remedy, where it is cut off or has changed since it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupted ({error}): {remedy}") from None
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(tensors):
        raise ValueError(f"{path} is corrupted (its SHA-256 is not the one it was written with): {remedy}")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hex digits of the SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()
