"""The picture that ``--from`` names: what it says of itself, and which of its tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dalle_mini_impl.sheet import is_sheet, read_metadata

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dalle_mini_impl.pipeline import TextToImage

DEFAULT_SHARE = 0.5


def kept_parts(keep: float | None, origin: Path | None, mask: Path | None) -> tuple[int | None, float]:
    """What --keep means: (pictures to keep of each prompt, None if not said; share of --from that is kept).

    Raises ValueError for a share without a picture or beside a mask, and for anything but a share or a whole number.
    """
    if mask is not None and origin is None:
        raise ValueError("--mask belongs to --from: name the picture that it is laid over")
    if keep is None:
        return None, DEFAULT_SHARE
    if 0 < keep < 1:
        if origin is None or mask is not None:
            raise ValueError(f"--keep {keep:g} is a share of the picture of --from (without --mask)")
        return None, keep
    if keep != int(keep) or keep < 1:
        raise ValueError(f"--keep is {keep:g}; give a whole number of pictures, or with --from a share below 1")
    return int(keep), DEFAULT_SHARE


@dataclass(frozen=True)
class Origin:
    """A picture file: drawn here, with its settings inside, or any other."""

    path: Path
    metadata: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what the file says of itself. Raises ValueError that names it where it is no picture."""
        open_picture(path).close()
        try:
            return cls(path, read_metadata(path))
        except ValueError:
            return cls(path, {})

    @property
    def prompt(self) -> str | None:
        """What it was drawn for."""
        return self.metadata.get("prompt")

    def tokens(self, model: TextToImage) -> Tensor:
        """Its image ids (N,): the very ones it was drawn with, if by this model, else the VAE's.

        Raises ValueError for a sheet of pictures.
        """
        import torch

        check_single(self.path)
        if self.metadata.get("checkpoint_hash") == model.bundle.checkpoint_hash:
            return torch.tensor(self.metadata["tokens"])
        return model.tokens_of(open_picture(self.path))

    def known(self, model: TextToImage, share: float, mask: Path | None) -> Tensor:
        """The image ids (N,) that are kept of it, FREE for the rest."""
        from dalle_mini_impl.data.pictures import to_rgb
        from dalle_mini_impl.editing import keep_first, keep_outside, mask_as_seen

        ids = self.tokens(model)
        if mask is None:
            return keep_first(ids, share)
        size = to_rgb(open_picture(self.path)).size
        return keep_outside(ids, mask_as_seen(open_picture(mask), size, model.bundle.recipe.data.fit))


def check_single(path: Path) -> None:
    """Raises ValueError for a sheet of pictures."""
    if is_sheet(path):
        raise ValueError(f"{path} is a sheet of pictures: name one of the pictures beside it")


def open_picture(path: Path) -> Image.Image:
    """A picture of any kind and size; ValueError that names the file where it is none."""
    from dalle_mini_impl.config import DataConfig
    from dalle_mini_impl.data import pictures

    try:
        return pictures.open_picture(path, DataConfig(min_side_px=1))
    except pictures.PictureError as error:
        raise ValueError(f"{path} can't be read as a picture: {error.detail}") from None
