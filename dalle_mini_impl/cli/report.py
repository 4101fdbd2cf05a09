"""``dalle-mini report``: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, runs/NAME; it need not be finished.")],
    samples: Annotated[int, typer.Option(min=0, help="Captions to draw pictures for; 0 draws none.")] = 48,
    candidates: Annotated[int, typer.Option(min=1, help="Pictures drawn for each caption.")] = 8,
    distance: Annotated[
        Literal["pixels", "clip"], typer.Option(help="By what the nearest training picture is found.")
    ] = "pixels",
    judge: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Its CLIP judges best-of-N (shapes: their checker does).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of captions and pictures, and of the drawing.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write, *.html, or a folder. (default RUN/report.html)")
    ] = None,
) -> None:
    """Write a run's report: one HTML page, complete in itself.

    Curves of each stage with chance and floors, reconstructions and samples over time, the nearest training picture
    beside each sample and an audit of memorisation, the best-of-N curve, use of the codebook, data, time and settings.
    """
    from dalle_mini_impl.cli.curve import clip_judge, shapes_judge
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.cli.sample import progress_bar
    from dalle_mini_impl.data.checker import MIN_SIDE
    from dalle_mini_impl.files import write_text
    from dalle_mini_impl.report.measure import Options, measure
    from dalle_mini_impl.report.page import render
    from dalle_mini_impl.report.records import read_run
    from dalle_mini_impl.report.sections import against_chance
    from dalle_mini_impl.report.svg import percent_of

    state = process_state()
    if not state.is_main_process:
        return
    record = read_run(run)
    is_readable = record.recipe.data.image_size >= MIN_SIDE
    of_shapes = is_readable and (record.data_report or {}).get("kind") == "shapes"
    if of_shapes and judge is not None:
        raise ValueError("shapes are judged by their checker: leave out --judge")
    chosen = shapes_judge() if of_shapes else clip_judge(judge, str(run)) if judge is not None else None
    path = _page_path(run if out is None else out)
    total = samples * candidates * record.recipe.grid_size**2
    with progress_bar(total) as progress:
        options = Options(
            num_prompts=samples,
            candidates=candidates,
            seed=seed,
            distance=distance,
            judge=chosen,
            device=state.device,
            progress=progress,
        )
        findings = measure(record, options)
    page = render(record, findings)
    write_text(path, page)
    for audit in findings.audits:
        share = audit.samples
        text = (
            f"{audit.ruler}: {percent_of(share.mean)} of {share.num_samples} samples are nearer to a training than to "
            f"a held-out picture; {against_chance(audit)}"
        )
        typer.echo(text.replace("\N{NO-BREAK SPACE}", " "))
    for name, reason in findings.missing.items():
        typer.echo(f"no {name}: {reason}")
    typer.echo(str(path))


def _page_path(out: Path) -> Path:
    """A page's path where `out` names one or a file that is there, else report.html in the folder that `out` names."""
    is_page = not out.is_dir() and (out.suffix.lower() in {".html", ".htm"} or out.is_file())
    return out if is_page else out / "report.html"
