"""``dalle-mini search``: the pictures of an index that are nearest to a text, or to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from dalle_mini_impl.embed import Embedder
    from dalle_mini_impl.search import PictureIndex


def search(
    text: Annotated[str | None, typer.Argument(help='What to look for, "a red circle".')] = None,
    place: Annotated[Path, typer.Option("--index", help="An index, or the folder that was indexed.")] = Path(),
    like: Annotated[Path | None, typer.Option(help="Look for pictures like this one; with a text, for both.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Pictures to find.")] = 12,
    checkpoint: Annotated[str, typer.Option(help="The one that made the index.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help="The pretrained CLIP that made the index.")] = None,
    exact: Annotated[bool, typer.Option(help="Look at all pictures, even where the index has a graph.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results.jsonl and sheet.png.")] = None,
) -> None:
    """Find pictures by what they show: prints score and file, best first."""
    from dalle_mini_impl.cli.pictures import load_embedder, thumbnails
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import write_json_lines
    from dalle_mini_impl.sheet import contact_sheet, save_sheet

    if text is None and like is None:
        raise ValueError('give a text, dalle-mini search "a red circle", or a picture with --like')
    embedder = load_embedder(checkpoint, clip, process_state().device)
    hits = open_index(place, embedder).search(query_vector(embedder, text, like), top, exact=exact)
    for hit in hits:
        typer.echo(f"{hit.score:.4f}  {hit.path}")
    if gone := sum(not hit.path.is_file() for hit in hits):
        typer.echo(f"{gone} of them are no longer there: bring the index up to date with dalle-mini index", err=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    lines = [{"rank": rank, "score": hit.score, "file": str(hit.path)} for rank, hit in enumerate(hits, start=1)]
    write_json_lines(out / "results.jsonl", lines)
    cells = thumbnails((hit.path, f"{hit.score:.3f} {hit.path.name}") for hit in hits if hit.path.is_file())
    title = " + ".join([*([text] if text is not None else []), *([f"like {like.name}"] if like is not None else [])])
    save_sheet(contact_sheet([(title, cells)]), out / "sheet.png")


def open_index(place: Path, embedder: Embedder) -> PictureIndex:
    """An index, or that of an indexed folder; ValueError where there is none, or another CLIP made it."""
    from dalle_mini_impl.cli.index import default_place
    from dalle_mini_impl.search import ENTRIES, PictureIndex

    if not (place / ENTRIES).is_file():
        place = default_place(place)
    index = PictureIndex.load(place)
    if index.clip != embedder.name:
        raise ValueError(
            f"{place} was made by another CLIP, {index.clip}, not by {embedder.name}: give its --checkpoint or --clip, "
            f"or index again"
        )
    return index


def query_vector(embedder: Embedder, text: str | None, like: Path | None) -> Tensor:
    """The unit vector (E,) of a text, of a picture, or half-way between both."""
    import torch
    import torch.nn.functional as F

    from dalle_mini_impl.cli.pictures import read_pictures

    vectors = []
    if text is not None:
        vectors.append(embedder.encode_texts([text]))
    if like is not None:
        pictures = list(read_pictures([like], []))
        if not pictures:
            raise ValueError(f"{like} can't be read")
        vectors.append(embedder.encode_pictures(pictures))
    return F.normalize(torch.cat(vectors).sum(dim=0), dim=0)
