"""Trains a caption tokenizer by itself; `train.py` does the same as its first step.

python tokenizer/train_tokenizer.py --data emoji --config configs/emoji.toml --out tokenizer/emoji.model
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.data.columns import read_lines
from dalle_mini_impl.data.prepare import prepare
from dalle_mini_impl.data.tables import is_text_table
from dalle_mini_impl.text import TextTokenizer


def training_captions(data: str, recipe: Recipe, prepared: Path) -> list[str]:
    """All captions of the training pictures of a source, or the lines of a .txt file that is no table of pictures.

    prepared: the folder of the source's prepared pictures; made where it is missing or was made of something else.
    """
    path = Path(data)
    if path.is_file() and path.suffix == ".txt" and not is_text_table(path):
        return read_lines(path, "captions")
    pictures = prepare(data, recipe.data, prepared)
    return [caption for index in pictures.train for caption in pictures.captions[index]]


def train_tokenizer(
    data: Annotated[str, typer.Option(help="Captioned pictures as in train.py, or a .txt file with a caption a line.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")],
    config: Annotated[Path | None, typer.Option(help="The recipe; its text, data and seed are used.")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, any number of times.")] = None,
    prepared: Annotated[Path, typer.Option(help="Folder for the prepared pictures.")] = Path("runs/tokenizer/data"),
) -> None:
    """Trains a caption tokenizer and says how well it fits the captions."""
    console = Console()
    try:
        recipe = Recipe.from_toml(config, override or []) if config else Recipe.parse({}, override or [])
        captions = training_captions(data, recipe, prepared)
        tokenizer = TextTokenizer.train(captions, recipe.text.vocab_size, seed=recipe.seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    lengths = tokenizer.lengths(captions)
    slots = tokenizer.suggest_text_length(captions, recipe.text)
    console.print(f"{tokenizer.vocab_size} pieces from {len(captions)} captions → {out}", markup=False)
    console.print(f"{lengths.mean():.1f} text slots a caption, {lengths.max()} at most, begin and end included")
    console.print(f"a model gets {slots} slots; {(lengths > slots).sum()} captions are cut")
    console.print(f"sha256 {tokenizer.fingerprint}")


if __name__ == "__main__":
    typer.run(train_tokenizer)
