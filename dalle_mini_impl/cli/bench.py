"""``dalle-mini bench``: how fast it is, as ratios measured side by side in one run."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dalle_mini_impl.bench.machine import Machine
    from dalle_mini_impl.bench.peers import Shape
    from dalle_mini_impl.bench.sample import Result


class What(enum.StrEnum):
    """What is measured."""

    sample = "sample"


def bench(
    what: Annotated[What, typer.Argument(help="sample: drawing pictures.")],
    batches: Annotated[str, typer.Option(help="Numbers of pictures drawn at once.")] = "1,8,16,32,64",
    dim: Annotated[int, typer.Option(min=16, help="Width of the transformer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Its depth.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="Its attention heads.")] = 4,
    grid: Annotated[int, typer.Option(min=2, help="Side of the token grid.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder for bench-sample.json and bench-sample.png.")] = None,
) -> None:
    """Measure the sampler beside its slow reference, beside peers that are installed, and beside the machine's limits.

    Let nothing else run meanwhile. The table gives image tokens per second and, for ours, the share of the roofline:
    the least time that the operations and the bytes of each step can take at the measured rates.
    """
    from dalle_mini_impl.bench.machine import measure_machine
    from dalle_mini_impl.bench.peers import Shape
    from dalle_mini_impl.bench.sample import as_json, ratios, run
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.files import write_json

    sizes = _numbers(batches)
    shape = Shape(dim=dim, layers=layers, heads=heads, grid_size=grid)
    device = process_state().device
    machine = measure_machine(device)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in machine.flops.items())
    typer.echo(f"{machine.device}, {machine.threads} threads: {rates}, {machine.read_rate / 1e9:.1f} GB/s; {shape}")
    results = []
    for result in run(shape, machine, device, sizes):
        results.append(result)
        share = "" if result.roofline is None else f"  {result.roofline:.0%} of the roofline"
        typer.echo(f"{result.name:<36} batch {result.batch:>3}: {result.tokens_per_sec:>8.0f} tokens/s{share}")
    for name, by_batch in ratios(results).items():
        times = ", ".join(f"{ratio:.1f} times at batch {batch}" for batch, ratio in by_batch.items())
        typer.echo(f"ours draws as fast as {name}: {times}")
    facts = as_json(shape, machine, results)
    if out is None:
        typer.echo(json.dumps(facts))
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"bench-{what}.json", facts)
    _plot(shape, machine, results, out / f"bench-{what}.png")
    typer.echo(f"{out / f'bench-{what}.json'} and .png")


def _numbers(text: str) -> list[int]:
    """The batch sizes; ValueError for anything but whole numbers from 1 on."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--batches is {text!r}; write whole numbers like 1,8,32")
    return numbers


def _plot(shape: Shape, machine: Machine, results: list[Result], path: Path) -> None:
    """Tokens per second against the batch, with the roofline drawn in."""
    import torch

    from dalle_mini_impl.bench.sample import least_seconds
    from dalle_mini_impl.cli.curve import load_matplotlib
    from dalle_mini_impl.files import naming

    figure = load_matplotlib().Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({result.batch for result in results})
    for dtype, style in ((torch.bfloat16, "--"), (torch.float32, ":")):
        limit = [n * shape.num_image_tokens / least_seconds(shape, machine, n, True, dtype) for n in sizes]
        axes.plot(sizes, limit, style, color="black", label=f"roofline, {str(dtype).removeprefix('torch.')}")
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        axes.plot([r.batch for r in own], [r.tokens_per_sec for r in own], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="pictures drawn at once", ylabel="image tokens per second")
    axes.set_title(f"{shape} on {machine.device}, {machine.threads} threads", fontsize=9)
    axes.legend(fontsize=7)
    with naming(path):
        figure.savefig(path, dpi=120)
