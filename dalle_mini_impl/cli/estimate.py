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
    from dalle_mini_impl.estimate import ACHIEVED
    from dalle_mini_impl.estimate import estimate as estimate_recipe

    if hardware not in ACHIEVED:
        raise ValueError(f"nothing is known of hardware {hardware!r}; known: {', '.join(ACHIEVED)}")
    result = estimate_recipe(Recipe.from_toml(config, set_ or []), devices)
    if as_json:
        hours = {stage: part.hours(hardware, devices) for stage, part in result.stages.items()}
        facts = {**asdict(result), "hours": hours, "hardware": hardware, "devices": devices}
        typer.echo(json.dumps(facts, indent=2))
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
        "weights, gradients, averages": [
            _bytes(part.weight_bytes + part.gradient_bytes + part.average_bytes) for part in parts
        ],
        "optimiser": [_bytes(part.optimizer_bytes) for part in parts],
        "activations of a micro-batch": [_bytes(part.activation_bytes) for part in parts],
        "memory a device": [_bytes(part.device_bytes(devices)) for part in parts],
        "steps × batch": [f"{part.steps:,} × {part.batch_size}" for part in parts],
        "operations of the stage": [_flops(part.train_flops) for part in parts],
        "hours": [f"{part.hours(hardware, devices):,.2f}" for part in parts],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    Console().print(table)
    typer.echo(
        f"Drawing: {result.text_length} + {result.image_tokens} tokens, {_flops(result.draw_flops)} operations and "
        f"{_bytes(result.cache_bytes)} of cache a picture, "
        + ("without guidance" if result.guidance == 1 else "with guidance")
    )


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
