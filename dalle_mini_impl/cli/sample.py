"""``sample.py`` and ``dalle-mini sample``: prompts in; ranked PNGs, results.jsonl and a contact sheet out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_mini_impl.cli.pictures import CLIP_HELP

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

    from dalle_mini_impl.config import SamplingConfig
    from dalle_mini_impl.drawing import Progress
    from dalle_mini_impl.drawn import RankedPicture
    from dalle_mini_impl.pipeline import TextToImage

_PICTURES_AT_ONCE = 512  # drawn, then written, before the next prompts are begun
_SHEET_ROWS = 200


def sample(
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    checkpoint: Annotated[str, typer.Option(help="A built-in name, a folder or a Hugging Face Hub id.")] = "emoji",
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Pictures to draw for each prompt.")] = 16,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Best pictures to keep of each prompt (default 4); "
            "below 1: the share of --from's picture to keep (default 0.5)."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed draws the same pictures. (default 0, or one more than --from's)"),
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of the prompt; 1 is none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is safer, above 1 wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that add up to this.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest's chance.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, or auto: bf16 where the device computes in it.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="compiled, torch, or auto: code compiled on this machine where it can be.")
    ] = None,
    upscale: Annotated[
        bool | None, typer.Option("--upscale", help="Pictures of twice the size, where the checkpoint has an upscaler.")
    ] = None,
    unclip: Annotated[
        bool | None,
        typer.Option("--unclip/--no-unclip", help="By way of a picture embedding. (default where there is a prior)"),
    ] = None,
    prior_guidance: Annotated[
        float | None, typer.Option(help="Strength of the prompt in the prior; 1 is none.")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="A picture to vary; its own prompt is the default.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="With --from: white where it is to be drawn anew.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures drawn at once. (default what fits)")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs"),
) -> None:
    """Draw pictures for prompts and rank them.

    Writes the kept pictures as PNGs with their settings inside, results.jsonl with a line for each, and sheet.png,
    the ranked contact sheet. Under `accelerate launch` the processes share the work; the pictures are the same.

    `--from out.png --keep 0.4` draws variations that share the upper two fifths of a picture, drawn here or any other.
    """
    # Imported here: --help must not wait for torch.
    from dalle_mini_impl.cli.origin import Origin, kept_parts
    from dalle_mini_impl.cli.processes import process_state
    from dalle_mini_impl.drawn import check_counts
    from dalle_mini_impl.files import check_writable, naming
    from dalle_mini_impl.pipeline import TextToImage

    number, share = kept_parts(keep, from_, mask)
    origin = None if from_ is None else Origin.read(from_)
    if origin is not None and origin.prompt and not prompt and prompts is None:
        prompt = [origin.prompt]
    if seed is None:  # by its own seed a picture would be varied into itself
        seed = 0 if origin is None or "seed" not in origin.metadata else int(origin.metadata["seed"]) + 1
    texts = read_prompts(prompt, prompts)
    number = check_counts(candidates, number)
    state = process_state()
    model = TextToImage.from_pretrained(checkpoint, state.device, clip)
    settings = model.settings(
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        precision=precision,
        kernel=kernel,
        upscale=upscale,
        unclip=unclip,
        prior_guidance=prior_guidance,
    )
    known = None if origin is None else origin.known(model, share, mask)
    if state.is_main_process:
        _warn_of_cuts(model, texts)
        check_writable(out)
    started = time.perf_counter()
    total = len(texts) * candidates * model.dalle.stream.num_image_tokens // state.num_processes
    with progress_bar(total, shown=state.is_main_process) as progress:
        ranked = _draw(model, texts, candidates, number, seed, settings, known, batch_size, state, progress)
        if state.is_main_process:
            with naming(out):
                num_kept = _write(ranked, out, model, checkpoint, settings, known)
        else:
            for _ in ranked:
                pass
    seconds = time.perf_counter() - started
    if state.is_main_process:
        drawn = len(texts) * candidates
        shared = f" by {state.num_processes} processes" if state.num_processes > 1 else ""
        typer.echo(f"{drawn} pictures in {seconds:.1f} s{shared}: {drawn / seconds:.2f} pictures per second")
        typer.echo(f"{num_kept} kept, ranked by {model.ranked_by}: {out / 'sheet.png'}")


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of the options and of a file, in order, without empty lines; ValueError where there is none."""
    texts = [_as_text(text) for text in given or []]
    if file is not None:
        from dalle_mini_impl.data.columns import read_lines

        texts += read_lines(file, "prompts")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError('there is no prompt: give --prompt "a red heart" or --prompts FILE with a prompt a line')
    return texts


def _as_text(given: str) -> str:
    """An argument as a person wrote it: bytes that are no UTF-8, which Python hands on as lone surrogates, decoded."""
    from dalle_mini_impl.data.columns import decode_text

    return decode_text(given.encode("utf-8", "surrogateescape"))


def _draw(
    model: TextToImage,
    prompts: Sequence[str],
    candidates: int,
    keep: int,
    seed: int,
    settings: SamplingConfig,
    known: Tensor | None,
    batch_size: int | None,
    state: PartialState,
    progress: Progress,
) -> Iterator[list[RankedPicture]]:
    """The kept pictures of each prompt in turn: every process draws its share, and they are ranked together."""
    from accelerate.utils import gather_object

    from dalle_mini_impl.drawn import rank

    at_once = max(1, _PICTURES_AT_ONCE // candidates)
    done = 0

    def advance(tokens: int, _: int) -> None:
        progress(done + tokens, 0)

    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        jobs = [(prompt, candidate) for prompt in range(len(part)) for candidate in range(candidates)]
        own_jobs = jobs[state.process_index :: state.num_processes]
        own: list[list[RankedPicture]] = [[] for _ in part]
        for begin in range(0, len(own_jobs), _PICTURES_AT_ONCE):
            some = own_jobs[begin : begin + _PICTURES_AT_ONCE]
            drawn = model.draw_jobs(
                part, some, seed, settings=settings, known=known, batch_size=batch_size, progress=advance
            )
            done += len(some) * model.dalle.stream.num_image_tokens
            for (prompt, _), picture in zip(some, drawn, strict=True):
                own[prompt].append(picture)
            # What a process would not keep of its own pictures can't be among the best of all.
            own = [rank(pictures, keep) for pictures in own]
        shares = gather_object([own])
        for prompt in range(len(part)):
            yield rank([picture for share in shares for picture in share[prompt]], keep)


def _write(
    ranked: Iterator[list[RankedPicture]],
    out: Path,
    model: TextToImage,
    checkpoint: str,
    settings: SamplingConfig,
    known: Tensor | None,
) -> int:
    """Writes PNGs, results.jsonl and the sheets as the pictures come; returns the number of pictures kept."""
    from dalle_mini_impl.sheet import Row, contact_sheet, save_sheet

    common = common_facts(model, checkpoint, settings, known)
    ranked = chain([next(ranked)], ranked)  # drawn before the results of an earlier call are overwritten
    rows: list[Row] = []
    num_kept = 0
    with (out / "results.jsonl").open("w", encoding="utf-8") as results:
        for number, pictures in enumerate(ranked, start=1):
            for picture in pictures:
                facts = write_picture(picture, number, out, common)
                results.write(json.dumps(facts, ensure_ascii=False) + "\n")
            num_kept += len(pictures)
            rows.append((pictures[0].prompt, [(picture.image, label(picture)) for picture in pictures]))
            if len(rows) == _SHEET_ROWS:
                save_sheet(contact_sheet(rows), _sheet_path(out, number))
                rows = []
    if rows:
        save_sheet(contact_sheet(rows), _sheet_path(out, number))
    return num_kept


def common_facts(
    model: TextToImage, checkpoint: str, settings: SamplingConfig, known: Tensor | None = None
) -> dict[str, Any]:
    """What a PNG says of how it was drawn, the same for all pictures of a call; `replay` reads it."""
    from dalle_mini_impl import __version__

    return {
        "settings": settings.model_dump(),
        "checkpoint": checkpoint,
        "checkpoint_hash": model.bundle.checkpoint_hash,
        "clip": None if model.embedder is None else model.embedder.name,
        "package_version": __version__,
        "known": None if known is None else known.tolist(),
    }


def write_picture(
    picture: RankedPicture, number: int, out: Path, common: dict[str, Any], *, title: str | None = None, **more: Any
) -> dict[str, Any]:
    """Writes one PNG of prompt `number` with its settings inside; returns its line of results.jsonl.

    A file of another picture is never overwritten: the name gets a number. title: for the file's name, default the
    prompt. more: facts for both.
    """
    from dalle_mini_impl.sheet import save_png, slug

    name = slug(picture.prompt if title is None else title)
    stem = f"{number:03d}-{name}-rank{picture.rank}-seed{picture.seed}-candidate{picture.candidate}"
    tokens = picture.tokens.tolist()
    file = _free_name(out, stem, {"prompt": picture.prompt, "tokens": tokens, **common})
    facts = {
        "prompt": picture.prompt,
        "rank": picture.rank,
        "score": picture.score,
        "candidate": picture.candidate,
        "seed": picture.seed,
        "file": file,
        "clip_score": picture.clip_score,
        "log_ratio": picture.log_ratio,
        "log_likelihood": picture.log_likelihood,
        "read_score": picture.read_score,
        **more,
    }
    embedding = None if picture.embedding is None else picture.embedding.tolist()
    save_png(picture.image, out / file, {**facts, **common, "tokens": tokens, "embedding": embedding})
    return facts


def _free_name(out: Path, stem: str, facts: dict[str, Any]) -> str:
    """The name of a PNG that isn't there yet, or holds the very picture of these facts: STEM, or STEM-2, STEM-3 …"""
    from dalle_mini_impl.sheet import read_metadata

    names = (f"{stem}.png" if number == 1 else f"{stem}-{number}.png" for number in count(1))
    for name in names:
        if not (out / name).exists():
            return name
        try:
            before = read_metadata(out / name)
        except (OSError, ValueError):
            continue
        if all(before.get(key) == facts[key] for key in ("prompt", "tokens", "settings", "checkpoint_hash")):
            return name
    raise AssertionError


def _sheet_path(out: Path, last_prompt: int) -> Path:
    """sheet.png, and for very many prompts sheet-2.png and so on."""
    sheet = -(-last_prompt // _SHEET_ROWS)
    return out / ("sheet.png" if sheet == 1 else f"sheet-{sheet}.png")


def label(picture: RankedPicture) -> str:
    """What stands under a picture in a sheet."""
    return f"{picture.score:.3f}  #{picture.candidate}"


def _warn_of_cuts(model: TextToImage, prompts: Sequence[str]) -> None:
    length = model.bundle.stream.text_length
    if cut := model.bundle.tokenizer.num_cut(prompts, length):
        typer.echo(f"warning: {cut} of {len(prompts)} prompts are cut to the {length} tokens the model reads", err=True)


@contextmanager
def progress_bar(total: int, *, shown: bool = True) -> Iterator[Progress]:
    """A progress bar on the error stream that counts image tokens; silent where it isn't shown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("drawing", total=total)
        yield lambda done, _: bar.update(task, completed=done)
