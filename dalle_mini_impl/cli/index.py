"""``dalle-mini index``: embeds the pictures of a folder, once, so that they can be searched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures; those in folders below it, too.")],
    place: Annotated[Path | None, typer.Option("--index", help="Where the index goes. (default FOLDER/.index)")] = None,
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id, with a CLIP.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    approximate: Annotated[
        bool | None,
        typer.Option("--approximate/--exact", help="Add a graph of neighbours. (default from 500,000 pictures on)"),
    ] = None,
) -> None:
    """Embed a folder's pictures for `dalle-mini search`; again, and only what is new or changed is embedded."""
    from itertools import chain

    import torch

    from dalle_mini_impl.cli.pictures import READ_AT_ONCE, find_pictures, load_embedder, read_pictures
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import check_writable
    from dalle_mini_impl.nearest import WORTH_IT_FROM, NeighbourGraph
    from dalle_mini_impl.search import ENTRIES, PictureIndex
    from dalle_mini_impl.training.progress import counting

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of pictures")
    if approximate:
        NeighbourGraph.require()
    embedder = load_embedder(checkpoint, clip, process_state().device)
    folder, place = folder.resolve(), default_place(folder) if place is None else place
    check_writable(place)
    before = PictureIndex(folder, embedder.name, [], torch.zeros(0, 1))
    if (place / ENTRIES).is_file():
        found = PictureIndex.load(place)
        if found.folder == folder and found.clip == embedder.name:
            before = found
        else:
            what = f"of {found.folder}" if found.folder != folder else f"by {found.clip}"
            typer.echo(f"{place} is an index {what}: all pictures are embedded anew", err=True)
    paths = find_pictures([folder])
    with counting("embedding pictures") as progress:
        done = 0

        def embed(part: Sequence[Path]) -> tuple[list[Path], Tensor]:
            nonlocal done
            read: list[Path] = []
            pictures = read_pictures(part, read)
            first = next(pictures, None)
            # One after the other: 64 photographs at once are gigabytes.
            vectors = torch.zeros(0, 1) if first is None else embedder.encode_pictures(chain([first], pictures))
            done += len(part)
            progress(done, len(paths))
            return read, vectors

        after, changes = before.updated(paths, embed, READ_AT_ONCE)
    if approximate is None:
        approximate = before.graph is not None or len(after.entries) >= WORTH_IT_FROM
        if approximate and not NeighbourGraph.is_available():
            typer.echo("pip install 'dalle-mini-impl[search]': so many pictures are then found sooner", err=True)
            approximate = False
    if not approximate:
        after.graph = None
    after.save(place)  # first of all, since embedding took the longest
    if approximate and after.entries and after.graph is None:
        after.with_graph().save(place)
    typer.echo(
        f"{len(after.entries)} pictures in {place}: {changes.added} embedded, {changes.kept} as they were, "
        f"{changes.removed} gone, {changes.unreadable} left out"
    )


def default_place(folder: Path) -> Path:
    """Where the index of a folder is unless told otherwise."""
    return folder.resolve() / ".index"
