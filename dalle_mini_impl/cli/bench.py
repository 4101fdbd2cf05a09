"""``dalle-mini bench``: how fast it is, as ratios measured side by side in one run."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from dalle_mini_impl.bench.machine import Machine
    from dalle_mini_impl.bench.peers import Shape
    from dalle_mini_impl.bench.sample import Result


class What(enum.StrEnum):
    """What is measured."""

    sample = "sample"
    train = "train"


def bench(
    what: Annotated[What, typer.Argument(help="sample: drawing pictures. train: steps of the transformer.")],
    batches: Annotated[
        str | None, typer.Option(help="Pictures at once. (default 1,8,16,32,64 for sample, 16 for train)")
    ] = None,
    dim: Annotated[int, typer.Option(min=16, help="Width of the transformer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Its depth.")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="Its attention heads.")] = 4,
    grid: Annotated[int, typer.Option(min=2, help="Side of the token grid.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder for bench-WHAT.json and, of sample, a plot.")] = None,
) -> None:
    """Measure the sampler or the trainer beside peers that are installed, and beside the machine's limits.

    Let nothing else run meanwhile. sample gives image tokens per second and, for ours, the share of the roofline: the
    least time that the operations and the bytes of each step can take at the measured rates. train gives tokens of
    the whole stream per second, where the time of a step goes, and ours as a share of the measured matmul rate: with
    attention counted over the whole square of tokens, as is usual, and over its causal half. Each contestant's memory
    is the most that a process of its own takes; data is the time that a step waits for its batch.
    """
    from dalle_mini_impl.bench.machine import measure_machine
    from dalle_mini_impl.bench.peers import Shape
    from dalle_mini_impl.cli.curve import load_matplotlib
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.config import Recipe

    default = "16" if what is What.train else "1,8,16,32,64"
    sizes = _numbers(default if batches is None else batches)
    # What can't be built or drawn is told before minutes are spent on measuring.
    model = {"dim": dim, "layers": layers, "heads": heads}
    data = {"image_size": 8 * grid} if what is What.train else {}
    Recipe.parse({"dalle": model, "data": data}, where="bench")
    if out is not None and what is What.sample:
        load_matplotlib()
    shape = Shape(**model, grid_size=grid)
    device = process_state().device
    machine = measure_machine(device)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in machine.flops.items())
    typer.echo(f"{machine.device}, {machine.threads} threads: {rates}, {machine.read_rate / 1e9:.1f} GB/s; {shape}")
    measure = _bench_train if what is What.train else _bench_sample
    measure(shape, machine, device, sizes, out)


def _bench_train(shape: Shape, machine: Machine, device: torch.device, sizes: list[int], out: Path | None) -> None:
    from dalle_mini_impl.bench.train import as_json, compute_type, run

    kind = compute_type(device)
    typer.echo(f"all compute in {kind}, as training does here")
    typer.echo("of the matmul rate: attention over the whole square of tokens, in brackets over its causal half")
    facts = []
    for batch in sizes:
        results = []
        for result in run(shape, machine, device, batch):
            results.append(result)
            phases = ", ".join(f"{name} {share:.0%}" for name, share in result.shares.items())
            mfu = "" if result.mfu is None else f"  {result.mfu:.0%} ({result.mfu_causal:.0%}) of the matmul rate"
            typer.echo(
                f"{result.name:<36} batch {batch:>3}: {result.tokens_per_sec:>8.0f} tokens/s{mfu}  "
                f"({phases}; {result.peak_bytes / 1e9:.1f} GB by itself)"
            )
        facts.append(as_json(shape, machine, kind, results))
        for name, ratio in facts[-1]["ratios"].items():
            typer.echo(f"our best trains {ratio:.2f} times as fast as {name}")
    _hand_out({"runs": facts}, out, "train")


def _bench_sample(shape: Shape, machine: Machine, device: torch.device, sizes: list[int], out: Path | None) -> None:
    from dalle_mini_impl.bench.sample import as_json, ratios, run

    results = []
    for result in run(shape, machine, device, sizes):
        results.append(result)
        share = "" if result.roofline is None else f"  {result.roofline:.0%} of the roofline"
        typer.echo(f"{result.name:<36} batch {result.batch:>3}: {result.tokens_per_sec:>8.0f} tokens/s{share}")
    for name, by_batch in ratios(results).items():
        times = ", ".join(f"{ratio:.1f} times at batch {batch}" for batch, ratio in by_batch.items())
        typer.echo(f"ours draws as fast as {name}: {times}")
    _hand_out(as_json(shape, machine, results), out, "sample")
    if out is not None:
        _plot(shape, machine, results, out / "bench-sample.png")


def _hand_out(facts: dict[str, Any], out: Path | None, what: str) -> None:
    """Prints the facts as a JSON line, or writes them to the folder."""
    from dalle_mini_impl.files import write_json

    if out is None:
        typer.echo(json.dumps(facts))
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"bench-{what}.json", facts)
    typer.echo(f"{out / f'bench-{what}.json'}")


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

    figure = load_matplotlib().Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({result.batch for result in results})
    for dtype, style in ((torch.bfloat16, "--"), (torch.float32, ":")):
        limit = [n * shape.num_image_tokens / least_seconds(shape, machine, n, True, dtype) for n in sizes]
        axes.plot(sizes, limit, style, color="black", label=f"roofline, {str(dtype).removeprefix('torch.')}")
    for index, name in enumerate(dict.fromkeys(result.name for result in results)):
        own = [result for result in results if result.name == name]
        marker = "os"[index // 10 % 2]  # there are ten colours
        axes.plot([r.batch for r in own], [r.tokens_per_sec for r in own], marker=marker, color=f"C{index}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="pictures drawn at once", ylabel="image tokens per second")
    axes.set_title(f"{shape} on {machine.device}, {machine.threads} threads", fontsize=9)
    figure.legend(fontsize=7, loc="outside right upper")
    with naming(path):
        figure.savefig(path, dpi=120)
