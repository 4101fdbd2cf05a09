"""``dalle-mini reconstruct``: what a checkpoint's VAE gives back of held-out pictures, beside another checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dalle_mini_impl.data.prepare import PreparedData
    from dalle_mini_impl.pretrained import Bundle

_SHEET_CELL_PX = 160


def reconstruct(
    data: Annotated[str, typer.Option(help="Pictures: the data folder of a run (runs/NAME/data), or as for train.")],
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder (a run's too) or a Hub id.")] = "emoji",
    before: Annotated[str | None, typer.Option(help="Another checkpoint, to compare with.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Checkpoint whose CLIP measures the Fréchet distance. (default --checkpoint)")
    ] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Held-out pictures at most.")] = 512,
    out: Annotated[Path, typer.Option(help="Folder of results.json and sheet.png.")] = Path("outputs/reconstruct"),
) -> None:
    """Measure a VAE on held-out pictures: PSNR, SSIM, sharpness and Fréchet distance (rFD), and show them.

    The distance is measured in the eyes of a CLIP. One that took part in training (vqgan.perceptual) may be
    too kind: give another checkpoint of the same data as --judge.
    """
    from accelerate import Accelerator

    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import write_json
    from dalle_mini_impl.pretrained import load_bundle
    from dalle_mini_impl.training.evaluation import held_out
    from dalle_mini_impl.training.fidelity import eyes_of, fidelity, through
    from dalle_mini_impl.training.task import EvaluationContext

    state = process_state()
    bundles = {name: load_bundle(name, state.device) for name in dict.fromkeys((before or checkpoint, checkpoint))}
    judging = load_bundle(judge, state.device) if judge is not None else bundles[checkpoint]
    clip = judging.clip
    if clip is None:
        name = judge or checkpoint
        raise ValueError(f"checkpoint {name!r} has no clip.safetensors: train its clip stage, or name another --judge")
    source = _open(data, bundles[checkpoint], out, state.is_main_process, state.wait_for_everyone)
    size = source.pictures.shape[1]
    for name, bundle in {**bundles, judge or checkpoint: judging}.items():
        if bundle.recipe.data.image_size != size:
            raise ValueError(
                f"{name} is made for pictures of {bundle.recipe.data.image_size} pixels, those of {data} have {size}"
            )
    indices = held_out(source, pictures)
    context = EvaluationContext(Accelerator(cpu=state.device.type == "cpu"), out, 0, None)
    results = {}
    for name, bundle in bundles.items():
        if bundle.vae is None:
            raise ValueError(f"checkpoint {name!r} has no vae.safetensors: train its vae stage")
        results[name] = fidelity(through(bundle.vae), eyes_of(clip), source, indices, context)
    if not state.is_main_process:
        return
    facts = {
        "data": data,
        "data_fingerprint": source.fingerprint,
        "num_pictures": len(indices),
        "judge": judge or checkpoint,
        "judge_hash": judging.checkpoint_hash,
        "checkpoints": {name: {"hash": bundles[name].checkpoint_hash, **values} for name, values in results.items()},
    }
    write_json(out / "results.json", facts)
    _write_sheet(bundles, source, out / "sheet.png")
    _print_table(results, len(indices), judge or checkpoint)
    typer.echo(f"{out / 'sheet.png'} shows them")


def _open(data: str, bundle: Bundle, out: Path, is_main: bool, wait: Callable[[], None]) -> PreparedData:
    """The data folder of a run as it is; any other source is read into OUT/data first."""
    from dalle_mini_impl.data.prepare import PreparedData, prepare
    from dalle_mini_impl.training.progress import counting

    folder = Path(data)
    if not (folder / "index.json").is_file():
        folder = out / "data"
        if is_main:
            with counting("reading pictures") as progress:
                prepare(data, bundle.recipe.data, folder, progress=progress)
        wait()
    return PreparedData.open(folder)


def _write_sheet(bundles: dict[str, Bundle], source: PreparedData, path: Path) -> None:
    """Originals above what each checkpoint gives back."""
    import torch

    from dalle_mini_impl.sheet import comparison_sheet, save_sheet
    from dalle_mini_impl.training.evaluation import NUM_RECONSTRUCTIONS, held_out
    from dalle_mini_impl.training.fidelity import through

    images = source.images(held_out(source)[:NUM_RECONSTRUCTIONS])
    versions = {"originals": images}
    for name, bundle in bundles.items():
        assert bundle.vae is not None
        with torch.no_grad():
            versions[name] = through(bundle.vae)(images.to(next(bundle.vae.parameters()).device)).cpu()
    save_sheet(comparison_sheet(versions, cell_px=_SHEET_CELL_PX), path)


def _print_table(results: dict[str, dict[str, float]], count: int, judge: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *results, title=f"{count} held-out pictures, distances by the CLIP of {judge}")
    forms = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "sharpness": "{:.1%}"}
    for metric in next(iter(results.values())):
        form = forms.get(metric, "{:.3g}")
        table.add_row(metric, *(form.format(values[metric]) for values in results.values()))
    Console().print(table)
