"""``python -m dalle_mini_impl VERB`` is ``dalle-mini VERB``."""

from dalle_mini_impl.cli.app import main

if __name__ == "__main__":
    main()
