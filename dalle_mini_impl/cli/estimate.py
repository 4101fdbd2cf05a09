"""``dalle-mini estimate``: parameters, operations, memory and time of a recipe, without allocating any of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dalle_mini_impl.estimate import Estimate


def estimate(
    config: Annotated[Path, typer.Option(help="Recipe, configs/NAME.toml.")],
    hardware: Annotated[str, typer.Option(help="cpu2, cpu2-fp32, t4, rtx4090, a100, h100 or h200.")] = "cpu2",
    devices: Annotated[int, typer.Option(min=1, help="How many of them; weights are shared out among them.")] = 1,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Say what a recipe costs before it is trained: parameters, operations, memory a device, hours.

    Counted at the longest captions and the largest vocabulary that the recipe allows, with its own numbers of steps.
    """
    from dataclasses import asdict

    from dalle_mini_impl.config import Recipe
    from dalle_mini_impl.estimate import estimate as estimate_recipe

    result = estimate_recipe(Recipe.from_toml(config, set_ or []), hardware, devices)
    if as_json:
        hours = {stage: part.hours for stage, part in result.stages.items()}
        device_bytes = {stage: part.device_bytes for stage, part in result.stages.items()}
        facts = {**asdict(result), "hours": hours, "device_bytes": device_bytes}
        typer.echo(json.dumps({**facts, "hardware": hardware, "devices": devices}, indent=2))
        return
    _print(result, hardware, devices)


def _print(result: Estimate, hardware: str, devices: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *result.stages, title=f"On {devices} × {hardware}")
    parts = list(result.stages.values())
    rows = {
        "parameters": [f"{part.parameters:,}" for part in parts],
        "operations a picture, forward": [_flops(part.forward_flops) for part in parts],
        "without gradient": [_flops(part.no_grad_flops) for part in parts],
        "weights, gradients, averages": [
            _bytes(part.weight_bytes + part.gradient_bytes + part.average_bytes) for part in parts
        ],
        "optimiser": [_bytes(part.optimizer_bytes) for part in parts],
        "models of stages before": [_bytes(part.earlier_bytes) for part in parts],
        "activations of a micro-batch": [f"{_bytes(part.activation_bytes)}, {part.precision}" for part in parts],
        "gathered, with gradients": [_bytes(part.gathered_bytes) for part in parts],
        "whole, to evaluate": [_bytes(part.whole_bytes) for part in parts],
        "memory a device": [_bytes(part.device_bytes) for part in parts],
        "steps × batch": [f"{part.steps:,} × {part.batch_size}" for part in parts],
        "operations of the stage": [_flops(part.train_flops) for part in parts],
        "hours": [f"{part.hours:,.2f}" for part in parts],
    }
    if devices == 1:  # nothing is shared out
        del rows["gathered, with gradients"], rows["whole, to evaluate"]
    for name, values in rows.items():
        table.add_row(name, *values)
    Console().print(table)
    if devices > 1:
        typer.echo(_how_shared(result))
    for stage, what in result.not_counted.items():
        typer.echo(f"Not counted of {stage}: {what}")
    typer.echo(
        f"Drawing: {result.text_length} + {result.image_tokens} tokens, {_flops(result.draw_flops)} operations and "
        f"{_bytes(result.cache_bytes)} of cache a picture, "
        + ("without guidance" if result.guidance == 1 else "with guidance")
    )


def _how_shared(result: Estimate) -> str:
    whole = [stage for stage, part in result.stages.items() if not part.is_shared_out]
    text = (
        "Weights, gradients, optimiser and averages are shared out (FSDP2). An evaluation and the checkpoint that is "
        "kept put one whole fp32 copy of the weights on each device, beside its parts and instead of the activations."
    )
    return f"{text} Never shared out: {', '.join(whole)}." if whole else text


def _flops(count: float) -> str:
    return _with_unit(count, ("", "k", "M", "G", "T", "P", "E", "Z"), 1000)


def _bytes(count: float) -> str:
    return _with_unit(count, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024)


def _with_unit(number: float, units: tuple[str, ...], step: int) -> str:
    for unit in units[:-1]:
        if number < step:
            return f"{number:.3g} {unit}".strip()
        number /= step
    return f"{number:.3g} {units[-1]}"
