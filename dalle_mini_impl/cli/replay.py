"""``dalle-mini replay``: draw a picture again from the settings inside its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dalle_mini_impl.config import SamplingConfig
    from dalle_mini_impl.pipeline import TextToImage


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that was drawn here.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Where its checkpoint is now; default: where it was then.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the picture that was drawn again.")] = None,
) -> None:
    """Draw a picture again from the settings inside its file, and compare the tokens: they must be the same.

    Exit status 1 says that they are not. A machine without the kernel that drew draws by PyTorch's operations.
    """
    import torch
    from pydantic import ValidationError

    from dalle_mini_impl.cli.origin import Origin
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.config import SamplingConfig
    from dalle_mini_impl.pipeline import TextToImage
    from dalle_mini_impl.sheet import read_metadata, save_png

    Origin.read(picture)
    facts = read_metadata(picture)
    if facts.get("kind") == "guided":
        raise ValueError(f"{picture} was guided, not drawn: guide it again, from the same start, by the settings in it")
    if "tokens" not in facts:
        raise ValueError(f"{picture} is no single picture (a sheet of them?): replay one of the pictures beside it")
    # The compiled kernel draws on CPUs only, beside whatever other device there is.
    device = "cpu" if facts["settings"].get("kernel") == "compiled" else process_state().device
    model = TextToImage.from_pretrained(checkpoint or facts["checkpoint"], device)
    if model.bundle.checkpoint_hash != facts["checkpoint_hash"]:
        raise ValueError(
            f"{picture} was drawn by checkpoint {facts['checkpoint_hash']}; {checkpoint or facts['checkpoint']} is "
            f"{model.bundle.checkpoint_hash}: name the right one with --checkpoint"
        )
    try:
        # Without a word about it, a picture is of a time when PyTorch's operations drew.
        settings = SamplingConfig.model_validate({"kernel": "torch", **facts["settings"]})
    except ValidationError as error:
        raise ValueError(f"the settings inside {picture} are not those of this version: {error}") from None
    settings, doubt = _as_drawn(settings, model)
    known = None if facts.get("known") is None else torch.tensor(facts["known"])
    job = [(0, int(facts["candidate"]))]
    embeddings = None if facts.get("embedding") is None else torch.tensor([facts["embedding"]])
    (again,) = model.draw_jobs(
        [facts["prompt"]], job, facts["seed"], settings=settings, known=known, embeddings=embeddings
    )
    expected = torch.tensor(facts["tokens"])
    different = int((again.tokens != expected).sum())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_png(again.image, out, {**facts, "tokens": again.tokens.tolist()})
    if different:
        typer.echo(f"{different} of {len(expected)} tokens differ from those of {picture}{doubt}", err=True)
        raise typer.Exit(1)
    typer.echo(f"the same {len(expected)} tokens: {facts['prompt']!r}, seed {facts['seed']}, candidate {job[0][1]}")


def _as_drawn(settings: SamplingConfig, model: TextToImage) -> tuple[SamplingConfig, str]:
    """The settings to draw by here, and why tokens may differ although nothing is wrong; "" where they may not."""
    from dalle_mini_impl.sampling import resolve_kernel

    try:
        resolve_kernel(settings, model.dalle)
    except ValueError:
        why = "; the compiled kernel that drew it isn't to be had here, and PyTorch's operations round otherwise"
        return settings.model_copy(update={"kernel": "torch"}), why
    if model.dalle.image_head.weight.device.type != "cpu":
        return settings, "; on such a device products of one picture may round otherwise than those of many"
    return settings, ""
