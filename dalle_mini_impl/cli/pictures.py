"""Pictures that a person names on the command line: files and folders in, tensors for a checkpoint's CLIP out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dalle_mini_impl.clip import CLIP
    from dalle_mini_impl.pretrained import Bundle

READ_AT_ONCE = 64


def clip_of(bundle: Bundle) -> CLIP:
    """A checkpoint's CLIP; ValueError for one without."""
    if bundle.clip is None:
        raise ValueError(f"checkpoint {bundle.recipe.name!r} has no clip.safetensors: train its clip stage")
    return bundle.clip


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """Files as given, and all pictures below folders in the order of their names; ValueError for what isn't there."""
    from dalle_mini_impl.data.pictures import EXTENSIONS

    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = (path for path in place.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
            found += sorted(inside)
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place} is neither a picture nor a folder of pictures")
    return found


def read_pictures(paths: Sequence[Path], bundle: Bundle) -> tuple[list[Path], Tensor]:
    """Those that can be read, as (n, 3, S, S) in [0, 1], as the checkpoint's CLIP sees them.

    Others, and sheets of pictures that this package wrote, are named on standard error and left out.
    """
    import numpy as np
    import torch

    from dalle_mini_impl.data.pictures import PictureError
    from dalle_mini_impl.sheet import is_sheet

    size = bundle.recipe.data.image_size
    arrays, read = [], []
    for path in paths:
        if is_sheet(path):
            typer.echo(f"left out {path}: a sheet of pictures, no picture", err=True)
            continue
        try:
            arrays.append(np.asarray(read_square(path, bundle)))
            read.append(path)
        except PictureError as error:
            typer.echo(f"left out {path}: {error}", err=True)
    if not read:
        return [], torch.zeros(0, 3, size, size)
    return read, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def read_in_parts(paths: Sequence[Path], bundle: Bundle) -> Iterator[tuple[list[Path], Tensor]]:
    """`read_pictures` of some at a time; parts without a readable one are left out."""
    for first in range(0, len(paths), READ_AT_ONCE):
        read, pictures = read_pictures(paths[first : first + READ_AT_ONCE], bundle)
        if read:
            yield read, pictures


def read_square(path: Path, bundle: Bundle) -> Image.Image:
    """A picture as the checkpoint's models see it, (S, S) RGB; PictureError where it can't be read."""
    from PIL import Image

    from dalle_mini_impl.data.pictures import open_picture, to_rgb, to_square

    data = bundle.recipe.data.model_copy(update={"min_side_px": 1})  # small is no reason to be left out
    return Image.fromarray(to_square(to_rgb(open_picture(path, data)), data.image_size, data.fit))
