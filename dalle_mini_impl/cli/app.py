"""The command ``dalle-mini``: one verb a file, loaded when it is asked for, so that ``--help`` comes at once."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import typer

from dalle_mini_impl.memory import keep_freed_memory

VERBS = {
    "sample": "Draw pictures for prompts and rank them.",
    "train": "Train on captioned pictures, every stage in turn.",
    "rerank": "Rank a folder of pictures against a prompt, or plot quality against the number of candidates.",
    "evaluate": "Measure a checkpoint on made scenes, claim by claim.",
    "export": "Copy a checkpoint with its weights in 16 bits, to ship or to share.",
}
"""Each verb is the function of its name in ``dalle_mini_impl.cli.<verb>``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``dalle-mini VERB …`` with the given arguments (default those of the process), then exits."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    app = _typer(help="Captioned pictures in; new, ranked ones out.", no_args_is_help=True)
    app.callback()(_no_verb)
    for verb, summary in VERBS.items():
        asked_for = bool(arguments) and arguments[0] == verb
        app.command(verb, help=None if asked_for else summary)(_load(verb) if asked_for else _no_verb)
    app(args=arguments, prog_name="dalle-mini")


def run_verb(verb: str, arguments: Sequence[str] | None = None) -> None:
    """Runs one verb as a script of its own (``sample.py``, ``train.py``), then exits."""
    app = _typer()
    app.command()(_load(verb))
    app(args=sys.argv[1:] if arguments is None else list(arguments))


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, **settings)


def _no_verb() -> None:
    """Stands for verbs that weren't asked for."""


def _load(verb: str) -> Callable[..., Any]:
    """The verb's function; what is wrong with a user's input ends it with one clear message and exit status 2."""
    command: Callable[..., Any] = getattr(import_module(f"dalle_mini_impl.cli.{verb}"), verb)

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        keep_freed_memory()
        try:
            return command(*args, **kwargs)
        except ValueError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on a machine, one speaks
                typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return guarded
