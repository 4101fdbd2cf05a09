"""``accelerate launch train.py --config configs/NAME.toml --data SOURCE --out runs/NAME`` (or plain ``python``)."""

from dalle_mini_impl.cli.app import run_verb

if __name__ == "__main__":
    run_verb("train")
