"""``dalle-mini evaluate``: how many prompts of made scenes a checkpoint draws right, as a table and as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from dalle_mini_impl.config import SamplingConfig
    from dalle_mini_impl.drawn import RankedPicture
    from dalle_mini_impl.evaluate import Judged, Pairs, PairsReport, Share
    from dalle_mini_impl.evaluate_clip import ClipReport
    from dalle_mini_impl.pipeline import TextToImage

_SHEET_PROMPTS = 24
_SHEET_CELL_PX = 192


def evaluate(
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hub id; trained on shapes.")],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 200,
    candidates: Annotated[int, typer.Option(min=1, help="Above 1, the best ranked is judged as well.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the scenes and of the drawing.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Strength of the prompt; 1 is none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is safer, above 1 wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that add up to this.")] = None,
    unclip: Annotated[
        bool | None,
        typer.Option("--unclip/--no-unclip", help="By way of a picture embedding. (default where there is a prior)"),
    ] = None,
    prior_guidance: Annotated[
        float | None, typer.Option(help="Strength of the prompt in the prior; 1 is none.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures drawn at once. (default what fits)")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG of the first pictures, with what the checker says.")] = None,
) -> None:
    """Measure a checkpoint on made scenes, claim by claim.

    Draws captions of held-out scenes of shapes, of colour-shape pairs that training showed ("seen") and others
    ("unseen"), and lets the checker judge each claim. The ceiling is what the VAE alone lets through. Of the CLIP it
    says how many single shapes it names right, and how many of 1,000 captions find their picture.
    """
    from dataclasses import asdict

    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.evaluate import PAIRS, evaluate_shapes
    from dalle_mini_impl.evaluate_clip import evaluate_clip
    from dalle_mini_impl.files import check_writable, write_json
    from dalle_mini_impl.pipeline import TextToImage

    device = process_state().device
    model = TextToImage.from_pretrained(checkpoint, device)
    settings = model.settings(
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        unclip=unclip,
        prior_guidance=prior_guidance,
    )
    for file in (out, sheet):
        if file is not None:
            check_writable(file.parent)
    started = time.perf_counter()
    with _progress_bar(len(PAIRS) * prompts) as progress:
        reports = evaluate_shapes(
            _WithSettings(model, settings, batch_size),
            model.vae,
            model.bundle.recipe.data.image_size,
            num_prompts=prompts,
            candidates=candidates,
            seed=seed,
            device=device,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    embedder, image_size = model.embedder, model.bundle.recipe.data.image_size
    of_clip = (
        {} if embedder is None else {pairs: evaluate_clip(embedder, pairs, image_size, seed=seed) for pairs in PAIRS}
    )
    facts = {
        "checkpoint": checkpoint,
        "checkpoint_hash": model.bundle.checkpoint_hash,
        "num_prompts": prompts,
        "candidates": candidates,
        "seed": seed,
        "settings": settings.model_dump(),
        "ranked_by": model.ranked_by,
        "interval": "95 % Wilson",
        "seconds": round(seconds, 1),
        "pairs": {pairs: _as_json(report) for pairs, report in reports.items()},
        "clip": {pairs: asdict(report) for pairs, report in of_clip.items()},
    }
    _print_table(reports, of_clip, candidates, model.ranked_by)
    if out is not None:
        write_json(out, facts)
    if sheet is not None:
        from dalle_mini_impl.sheet import save_sheet

        save_sheet(_sheet(reports), sheet)
    typer.echo(f"{len(PAIRS) * prompts * candidates} pictures in {seconds:.0f} s")


class _WithSettings:
    """A pipeline that draws with the command's settings."""

    def __init__(self, model: TextToImage, settings: SamplingConfig, batch_size: int | None) -> None:
        self.model, self.settings, self.batch_size = model, settings, batch_size

    def draw(
        self, prompts: Any, candidates: int = 1, keep: int | None = None, seed: int = 0
    ) -> list[list[RankedPicture]]:
        """As `TextToImage.draw`."""
        return self.model.draw(prompts, candidates, keep, seed, settings=self.settings, batch_size=self.batch_size)


def _progress_bar(total: int) -> Any:
    from dalle_mini_impl.cli.sample import progress_bar

    return progress_bar(total)


def _as_json(report: PairsReport) -> dict[str, Any]:
    """Everything but the pictures; each prompt with its failed claims."""
    from dataclasses import asdict

    values: dict[str, Any] = {
        name: None if share is None else asdict(share)
        for name, share in (("single", report.single), ("best", report.best), ("ceiling", report.ceiling))
    }
    for name, shares in (("by_claim", report.by_claim), ("by_number", report.by_number)):
        values[name] = {key: asdict(share) for key, share in shares.items()}
    values["prompts"] = [{"prompt": item.prompt, "wrong": _wrong(item)} for item in report.judged]
    return values


def _wrong(item: Judged) -> list[str]:
    verdict = item.single_verdict
    return [repr(claim) for claim, right in zip(verdict.claims, verdict.holds, strict=True) if not right]


def _print_table(
    reports: dict[Pairs, PairsReport], of_clip: dict[Pairs, ClipReport], candidates: int, ranked_by: str
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("share right", *(f"{pairs} pairs" for pairs in reports), title="Shapes, judged by the checker")
    rows: list[tuple[str, list[Share | None]]] = [("all claims, single sample", [r.single for r in reports.values()])]
    if candidates > 1:
        rows.append((f"best of {candidates} by {ranked_by}", [r.best for r in reports.values()]))
    rows.append(("ceiling: true pictures via the VAE", [r.ceiling for r in reports.values()]))
    for number in sorted({number for report in reports.values() for number in report.by_number}):
        rows.append((f"  single, {number} shapes", [report.by_number.get(number) for report in reports.values()]))
    for kind in sorted({kind for report in reports.values() for kind in report.by_claim}):
        rows.append((f"  claim: {kind}", [report.by_claim.get(kind) for report in reports.values()]))
    for name, what in (
        ("CLIP: colour of a single shape", "colours"),
        ("CLIP: shape of a single shape", "shapes"),
        ("CLIP: captions that find their picture", "pictures"),
    ):
        if of_clip:
            rows.append((name, [getattr(report, what) for report in of_clip.values()]))
    for name, shares in rows:
        table.add_row(name, *(_percent(share) for share in shares))
    Console().print(table)


def _percent(share: Share | None) -> str:
    if share is None:
        return "–"
    return f"{share.share:.1%} ({share.low:.0%}–{share.high:.0%})"


def _sheet(reports: dict[Pairs, PairsReport]) -> Image.Image:
    """The first single samples of each kind, each with the number of its wrong claims and its prompt."""
    from dalle_mini_impl.sheet import contact_sheet

    rows = []
    for pairs, report in reports.items():
        judged = report.judged[:_SHEET_PROMPTS]
        cells = [(item.single, f"{len(_wrong(item)) or 'none'} wrong: {item.prompt}") for item in judged]
        rows.append((f"{pairs} pairs", cells))
    return contact_sheet(rows, cell_px=_SHEET_CELL_PX, columns=6)
