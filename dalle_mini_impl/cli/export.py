"""``dalle-mini export``: a checkpoint copied small, to ship or to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    checkpoint: Annotated[str, typer.Argument(help="A built-in name, a folder (a run's too) or a Hub id.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write: a new one, or that of another checkpoint.")],
    storage: Annotated[
        Literal["fp16", "bf16", "fp32"], typer.Option(help="Type the weights are stored in; they load as fp32.")
    ] = "fp16",
    push_to: Annotated[str | None, typer.Option(help="Also upload it to this Hub id, OWNER/NAME.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="sampling.KEY=VALUE", help="How it is to draw unless told otherwise."),
    ] = None,
) -> None:
    """Copy a checkpoint with its weights stored in 16 bits, half the size; optionally upload it to the Hub.

    Only what a checkpoint is made of is copied and uploaded: no training state, no data, no samples.
    """
    from dataclasses import replace

    from dalle_mini_impl.config import Recipe
    from dalle_mini_impl.pretrained import FILES, check_target, load_bundle, save_bundle

    check_target(folder, checkpoint)
    bundle = load_bundle(checkpoint)
    for override in set_ or []:
        if not override.startswith("sampling."):
            raise ValueError(f"--set {override}: of a trained model only sampling.… can still be set, not what it is")
    recipe = Recipe.parse(bundle.recipe.model_dump(mode="json"), set_ or [], where="--set")
    bundle = replace(bundle, recipe=recipe)
    save_bundle(bundle, folder, storage=storage)
    files = [folder / name for name in FILES if (folder / name).is_file()]
    for path in files:
        typer.echo(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    if push_to is not None:
        _upload(folder, push_to, [path.name for path in files])
        typer.echo(f"uploaded to {push_to}: use it with --checkpoint {push_to}")


def _upload(folder: Path, hub_id: str, names: list[str]) -> None:
    from huggingface_hub import HfApi

    from dalle_mini_impl.out_of_memory import first_line

    try:
        hub = HfApi()
        hub.create_repo(hub_id, exist_ok=True)
        hub.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=names)
    except Exception as error:  # without a network, the libraries below it raise errors of their own
        raise OSError(f"the Hub didn't take {hub_id} ({first_line(error)}); the copy in {folder} is whole") from None
