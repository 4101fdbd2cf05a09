"""The command ``dalle-mini``: one verb a file, loaded when it is asked for, so that ``--help`` comes at once."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import typer

from dalle_mini_impl.cli.processes import LostProcessError, ending_at_once, leaving_together
from dalle_mini_impl.memory import keep_freed_memory
from dalle_mini_impl.threads import use_all_cores

VERBS = {
    "sample": "Draw pictures for prompts and rank them.",
    "train": "Train on captioned pictures, every stage in turn.",
    "vary": "Draw variations of a picture.",
    "interpolate": "Draw the way from one picture to another.",
    "change": "Draw a picture changed as two captions say.",
    "guide": "Move a picture's codes to where CLIP finds the prompts in it (VQGAN+CLIP).",
    "rerank": "Rank a folder of pictures against a prompt, or plot quality against the number of candidates.",
    "classify": "Tell which of some labels pictures show, without training.",
    "score": "Say how well captions fit pictures.",
    "caption": "Write captions for pictures.",
    "index": "Embed a folder's pictures, so that they can be searched.",
    "search": "Find pictures of an index by what they show.",
    "web": "Serve a page to draw, watch, vary, classify, caption and search.",
    "replay": "Draw a picture again from the settings inside its file.",
    "evaluate": "Measure a checkpoint on made scenes, claim by claim.",
    "reconstruct": "Measure and show what a VAE gives back of held-out pictures, beside another's.",
    "report": "Write a page about a run: curves, samples, what it has learnt by heart.",
    "estimate": "Say what a recipe costs: parameters, memory, time.",
    "bench": "Measure how fast it is, beside peers and the machine's limits.",
    "export": "Copy a checkpoint with its weights in 16 bits, to ship or to share.",
}
"""Each verb is the function of its name in ``dalle_mini_impl.cli.<verb>``."""

_REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space, your quota is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may read and write"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "choose another name"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``dalle-mini VERB …`` with the given arguments (default those of the process), then exits."""
    use_all_cores()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    app = _typer(help="Captioned pictures in; new, ranked ones out.", no_args_is_help=True)
    app.callback()(_no_verb)
    for verb, summary in VERBS.items():
        asked_for = bool(arguments) and arguments[0] == verb
        app.command(verb, help=None if asked_for else summary)(_load(verb) if asked_for else _no_verb)
    app(args=arguments, prog_name="dalle-mini")


def run_verb(verb: str, arguments: Sequence[str] | None = None) -> None:
    """Runs one verb as a script of its own (``sample.py``, ``train.py``), then exits."""
    use_all_cores()
    app = _typer()
    app.command()(_load(verb))
    app(args=sys.argv[1:] if arguments is None else list(arguments))


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, **settings)


def _no_verb() -> None:
    """Stands for verbs that weren't asked for."""


def _load(verb: str) -> Callable[..., Any]:
    """The verb's function, ended by one clear message where a person can help.

    Exit status 2 says that something is wrong with the input, 1 that a file can't be read or
    written, that memory ran out, that another process was lost, or that a training has run out of its numbers.
    """
    command: Callable[..., Any] = getattr(import_module(f"dalle_mini_impl.cli.{verb}"), verb)

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        keep_freed_memory()
        with ending_at_once(), reporting_errors():
            return command(*args, **kwargs)

    return guarded


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Makes errors that a person can help one clear message and an exit status."""
    process = os.environ.get("LOCAL_RANK", "0")
    failed = "error" if process == "0" else f"error in process {process}"
    try:
        with leaving_together():
            yield
    except (ValueError, FloatingPointError) as error:
        if process == "0":  # all processes of a machine come to the same end: one speaks
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    except (typer.Exit, typer.Abort):
        raise
    except RuntimeError as error:
        from dalle_mini_impl.out_of_memory import first_line, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        logging.getLogger("dalle_mini_impl").debug("where it happened", exc_info=True)
        reason = f"too much for the memory ({first_line(error)})"
        typer.echo(f"{failed}: {reason}; ask for less at a time, or free some memory", err=True)
        raise typer.Exit(1) from None
    except (MemoryError, LostProcessError) as error:
        typer.echo(f"{failed}: {error or 'no memory'}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has enough of it
            raise
        logging.getLogger("dalle_mini_impl").debug("where it happened", exc_info=True)
        typer.echo(f"{failed}: {_explain(error)}", err=True)
        raise typer.Exit(1) from None


def _explain(error: OSError) -> str:
    """Which file, what is wrong with it, and what to do."""
    parts = [str(error) if error.filename is None else f"{error.filename}: {error.strerror}"]
    if error.errno in _REMEDIES:
        parts.append(_REMEDIES[error.errno])
    return "; ".join([*parts, *getattr(error, "__notes__", [])])
