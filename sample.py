"""Draws pictures for prompts: ``python sample.py --prompt "a red heart"``, also under ``accelerate launch``."""

from dalle_mini_impl.cli.app import run_verb

if __name__ == "__main__":
    run_verb("sample")
