"""Pictures that a person names on the command line: files and folders in, vectors of a CLIP out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dalle_mini_impl.embed import Embedder

READ_AT_ONCE = 64
CLIP_HELP = "A pretrained CLIP or SigLIP whose cosine stands for that of the checkpoint's: a Hub id or a folder."


def load_embedder(checkpoint: str, clip: str | None, device: torch.device) -> Embedder:
    """The CLIP that --clip names, else the checkpoint's; ValueError where there is none."""
    if clip is not None:
        from dalle_mini_impl.pretrained_clip import PretrainedCLIP

        return PretrainedCLIP.load(clip, device)
    from dalle_mini_impl.pretrained import load_bundle

    bundle = load_bundle(checkpoint, device)
    if bundle.embedder is None:
        raise ValueError(
            f"checkpoint {bundle.recipe.name!r} has no clip.safetensors: train its clip stage, or name one by --clip"
        )
    return bundle.embedder


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """Files as given, and all pictures below folders in the order of their names; ValueError for what isn't there.

    Hidden files and folders are left out, and folders that can't be read with a word on standard error.
    """
    from dalle_mini_impl.data.pictures import EXTENSIONS
    from dalle_mini_impl.data.sources import walk

    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = (path for path in walk(place, _say_left_out) if path.suffix.lower() in EXTENSIONS)
            found += sorted(path for path in inside if path.is_file())
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place} is neither a picture nor a folder of pictures")
    return found


def _say_left_out(error: OSError) -> None:
    typer.echo(f"left out {error.filename}: {error.strerror}", err=True)


def read_pictures(paths: Sequence[Path], read: list[Path]) -> Iterator[Image.Image]:
    """The pictures that can be read, RGB, one after the other; `read` receives their paths.

    Others, and sheets of pictures that this package wrote, are named on standard error and left out.
    """
    from dalle_mini_impl.data.pictures import PictureError
    from dalle_mini_impl.sheet import is_sheet

    for path in paths:
        if is_sheet(path):
            typer.echo(f"left out {path}: a sheet of pictures, no picture", err=True)
            continue
        try:
            picture = read_picture(path)
        except PictureError as error:
            typer.echo(f"left out {path}: {error}", err=True)
            continue
        read.append(path)
        yield picture


def read_picture(path: Path) -> Image.Image:
    """A picture of any size, upright RGB; PictureError where it can't be read."""
    from dalle_mini_impl.config import DataConfig
    from dalle_mini_impl.data.pictures import open_picture, to_rgb

    return to_rgb(open_picture(path, DataConfig(min_side_px=1)))  # small is no reason to be left out


def thumbnails(found: Iterable[tuple[Path, str]], side: int = 512) -> list[tuple[Image.Image, str]]:
    """Small copies of pictures, each with its label; those that can't be read any more are named and left out."""
    copies = []
    for path, label in found:
        for picture in read_pictures([path], []):
            picture.thumbnail((side, side))
            copies.append((picture, label))
    return copies
