"""What `vary`, `interpolate` and `change` share: pictures in; PNGs to replay, results.jsonl and a sheet out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from dalle_mini_impl.config import SamplingConfig
    from dalle_mini_impl.drawn import RankedPicture
    from dalle_mini_impl.pipeline import TextToImage

_COLUMNS = 9
Checkpoint = Annotated[
    str, typer.Option(help="A folder or a Hub id; trained with dalle.image_prefix, as configs/shapes-unclip.toml is.")
]
Prompt = Annotated[str, typer.Option(help="A caption that DALL·E is told besides. (default none)")]
Candidates = Annotated[int, typer.Option(min=1, help="Pictures to draw for each embedding.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same pictures.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of embedding and prompt; 1 is none.")]
Temperature = Annotated[float | None, typer.Option(help="Below 1 is safer, above 1 wilder.")]
Upscale = Annotated[
    bool | None, typer.Option("--upscale", help="Pictures of twice the size, where the checkpoint has an upscaler.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures drawn at once. (default what fits)")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def load(checkpoint: str, out: Path, **settings: Any) -> tuple[TextToImage, SamplingConfig]:
    """The checkpoint, which has to draw by picture embeddings, and its settings with some changes.

    out: where the pictures are to go; OSError where nothing can be written, before anything is drawn.
    """
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import check_writable
    from dalle_mini_impl.pipeline import TextToImage
    from dalle_mini_impl.unclip import embedding_clip

    model = TextToImage.from_pretrained(checkpoint, process_state().device)
    embedding_clip(model.bundle)
    changed = model.settings(**settings)
    check_writable(out)
    return model, changed


def read_picture(path: Path) -> Image.Image:
    """A picture of any kind; ValueError that names the file where it is none, or a sheet of several."""
    from dalle_mini_impl.cli.origin import check_single, open_picture

    image = open_picture(path)
    check_single(path)
    return image


def write(
    rows: Sequence[Sequence[RankedPicture]],
    facts: Sequence[dict[str, Any]],
    out: Path,
    name: str,
    common: dict[str, Any],
) -> None:
    """Writes the pictures of each row with its own facts beside the common ones, and results.jsonl."""
    from dalle_mini_impl.cli.sample import write_picture
    from dalle_mini_impl.files import naming, write_json_lines

    out.mkdir(parents=True, exist_ok=True)
    with naming(out):
        lines = [
            write_picture(picture, number, out, common, title=name, **own)
            for number, (pictures, own) in enumerate(zip(rows, facts, strict=True), start=1)
            for picture in pictures
        ]
    write_json_lines(out / "results.jsonl", lines)


def write_sheet(title: str, cells: Sequence[tuple[Image.Image, str]], out: Path) -> None:
    """Writes sheet.png: pictures, each with what stands under it."""
    from dalle_mini_impl.files import naming
    from dalle_mini_impl.sheet import contact_sheet, save_sheet

    with naming(out):
        save_sheet(contact_sheet([(title, cells)], columns=_COLUMNS), out / "sheet.png")
    typer.echo(f"{out / 'sheet.png'}")
