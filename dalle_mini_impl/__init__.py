"""A minimal DALL·E-style text-to-image transformer: train it on captioned pictures, sample from it, rank with CLIP.

Importing the package costs nothing: the public names load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_mini_impl.clip import CLIP
    from dalle_mini_impl.config import Recipe
    from dalle_mini_impl.dalle import DALLE
    from dalle_mini_impl.pipeline import TextToImage
    from dalle_mini_impl.text import TextTokenizer
    from dalle_mini_impl.vae.model import DiscreteVAE

__version__ = "0.1.0"
__all__ = ["CLIP", "DALLE", "DiscreteVAE", "Recipe", "TextToImage", "TextTokenizer", "__version__"]

_HOMES = {
    "CLIP": "clip",
    "DALLE": "dalle",
    "DiscreteVAE": "vae.model",
    "Recipe": "config",
    "TextToImage": "pipeline",
    "TextTokenizer": "text",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its module at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
