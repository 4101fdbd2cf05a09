"""``dalle-mini rerank``: rank a folder of pictures against a prompt, or plot what the number of candidates is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP

if TYPE_CHECKING:
    from dalle_mini_impl.embed import Embedder

_SHEET_PICTURES = 64


def rerank(
    folder: Annotated[Path | None, typer.Argument(help="Folder of pictures to rank.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the pictures should show.")] = None,
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hugging Face Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Plot quality against the number of candidates.")] = False,
    prompts_from: Annotated[
        str | None, typer.Option(help='Curve: "shapes" (default), "emoji", "emoji-scenes" or a file.')
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=2, help="Curve: 100, or all of a file.")] = None,
    candidates: Annotated[int | None, typer.Option(min=1, help="Curve: pictures a prompt (default 64).")] = None,
    judge: Annotated[str | None, typer.Option(help="Curve of a file: the checkpoint whose CLIP judges.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Curve: seed of scenes and pictures (default 0).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; a ranking is printed anyway.")] = None,
) -> None:
    """Rank a folder of pictures against a prompt, or plot quality against the number of candidates.

    `dalle-mini rerank FOLDER --prompt "a red heart"` prints CLIP's score of each picture, best first.
    `dalle-mini rerank --curve --checkpoint NAME --out DIR` draws candidates for many prompts and plots how good the
    best of 1, 2, 4 … is, as told by a judge that is not the ranker: the checker of shapes, the true glyphs of emoji, or
    another CLIP.
    """
    of_curve = {"prompts-from": prompts_from, "num-prompts": num_prompts, "candidates": candidates}
    of_curve |= {"judge": judge, "seed": seed}
    if curve:
        if folder is not None or prompt is not None:
            raise ValueError("--curve draws its own pictures: leave out the folder and --prompt")
        from dalle_mini_impl.cli.curve import draw_curve

        draw_curve(
            checkpoint,
            clip,
            "shapes" if prompts_from is None else prompts_from,
            num_prompts,
            64 if candidates is None else candidates,
            judge,
            0 if seed is None else seed,
            Path("outputs/curve") if out is None else out,
        )
        return
    if given := [f"--{name}" for name, value in of_curve.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} belong to --curve: add it, or leave them out")
    if folder is None or prompt is None:
        raise ValueError('give a folder of pictures and --prompt "a red heart", or --curve')
    from dalle_mini_impl.cli.pictures import load_embedder
    from dalle_mini_impl.cli.processes import process_state

    _rank_folder(load_embedder(checkpoint, clip, process_state().device), folder, prompt, out)


def _rank_folder(embedder: Embedder, folder: Path, prompt: str, out: Path | None) -> None:
    """Prints the ranking and, with `out`, writes ranking.jsonl and sheet.png, the contact sheet of the best."""
    from dalle_mini_impl.cli.pictures import thumbnails
    from dalle_mini_impl.files import write_json_lines
    from dalle_mini_impl.sheet import contact_sheet, save_sheet

    ranking = score_folder(embedder, folder, prompt)
    for score, path in ranking:
        typer.echo(f"{score:.4f}  {path}")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        {"rank": rank, "clip_score": score, "file": str(path), "prompt": prompt}
        for rank, (score, path) in enumerate(ranking, start=1)
    ]
    write_json_lines(out / "ranking.jsonl", lines)
    cells = thumbnails((path, f"{score:.3f} {path.name}") for score, path in ranking[:_SHEET_PICTURES])
    save_sheet(contact_sheet([(prompt, cells)]), out / "sheet.png")


def score_folder(embedder: Embedder, folder: Path, prompt: str) -> list[tuple[float, Path]]:
    """CLIP scores of all pictures under a folder, best first.

    Pictures that can't be read, and sheets of pictures that were written by this package, are named and left out.

    Raises ValueError for a folder without a readable picture.
    """
    from dalle_mini_impl.cli.pictures import find_pictures, read_pictures
    from dalle_mini_impl.rerank import rank_pictures

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of pictures")
    paths: list[Path] = []
    scores = rank_pictures(embedder, read_pictures(find_pictures([folder]), paths), prompt).tolist()
    ranking = zip(scores, paths, strict=True)
    return sorted(ranking, key=lambda pair: (-pair[0], str(pair[1])))
