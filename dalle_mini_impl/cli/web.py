"""``dalle-mini web``: the web page of a checkpoint, served on this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP


def web(
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hugging Face Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    place: Annotated[Path | None, typer.Option("--index", help="An index, or the folder that was indexed.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 7860,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures. (default a temporary one)")] = None,
) -> None:
    """Serve a page to draw, watch, vary, classify, caption and search; Ctrl-C ends it."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("the page is served by Gradio: pip install 'dalle-mini-impl[web]'") from None
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.cli.search import open_index
    from dalle_mini_impl.pipeline import TextToImage
    from dalle_mini_impl.web import build_page

    device = process_state().device
    with ThreadPoolExecutor(1) as loader:  # whose OpenMP workers end with it: the page computes in another thread
        model = loader.submit(TextToImage.from_pretrained, checkpoint, device, clip).result()
    if place is not None and model.embedder is None:
        raise ValueError(
            f"checkpoint {checkpoint!r} has no CLIP to search with: name one by --clip, or leave out --index"
        )
    index = None if place is None or model.embedder is None else open_index(place, model.embedder)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    page = build_page(model, checkpoint, index=index, files=out)
    allowed = [str(out.resolve())] if out is not None else []
    page.queue(default_concurrency_limit=1).launch(server_name=host, server_port=port, allowed_paths=allowed)
