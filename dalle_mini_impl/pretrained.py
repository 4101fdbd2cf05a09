"""The checkpoint folder: a model that describes itself and needs no flags.

emoji/
  config.json           the whole recipe, package version, text length, data fingerprint, metrics
  tokenizer.model       SentencePiece
  vae.safetensors  dalle.safetensors  clip.safetensors      each may be absent
  prior.safetensors                                         of those that draw by picture embeddings (unCLIP)
  upscale.safetensors                                       of those that draw at twice the size
  README.md             model card
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dalle_mini_impl import __version__
from dalle_mini_impl.clip import CLIP
from dalle_mini_impl.config import MODELS, OPTIONAL_STAGES, Recipe, Stage
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.embed import OwnCLIP
from dalle_mini_impl.files import write_atomically, write_json
from dalle_mini_impl.out_of_memory import first_line
from dalle_mini_impl.prior import Prior
from dalle_mini_impl.stream import Stream
from dalle_mini_impl.text import TextTokenizer
from dalle_mini_impl.vae.model import DiscreteVAE
from dalle_mini_impl.vae.upsampler import Upscaler
from dalle_mini_impl.weights import load_weights, save_weights

FORMAT = 1
DEFAULT_CHECKPOINT = "emoji"
BUILT_IN = Path(__file__).parent / "checkpoints"
CONFIG, TOKENIZER, CARD = "config.json", "tokenizer.model", "README.md"
FILES = (CONFIG, TOKENIZER, CARD, *(f"{model}.safetensors" for model in MODELS))
"""All that a checkpoint folder may hold."""
M = TypeVar("M", bound=nn.Module)
Storage = Literal["fp32", "fp16", "bf16"]
_RENAMED = {"above.weight": "neighbours.table.weight"}
"""Weights that earlier versions wrote under another name."""
_STORAGE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a checkpoint folder holds: the recipe, the tokenizer and the models that are trained so far.

    metadata: JSON values written into config.json beside the recipe, for example `data_fingerprint` and `metrics`.
    checkpoint_hash: short hash of the folder it was loaded from, or "unsaved".
    """

    recipe: Recipe
    tokenizer: TextTokenizer
    stream: Stream
    vae: DiscreteVAE | None = None
    dalle: DALLE | None = None
    clip: CLIP | None = None
    prior: Prior | None = None
    upscale: Upscaler | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_hash: str = "unsaved"

    @property
    def knows_text(self) -> bool:
        """Whether one of its models was trained on captions, as its tokenizer cuts them."""
        return any(model is not None for model in (self.clip, self.dalle, self.prior))

    def only(self, models: Sequence[Stage]) -> Bundle:
        """The same without its other models."""
        others: dict[str, Any] = {model: None for model in MODELS if model not in models}
        return replace(self, **others)

    @property
    def embedder(self) -> OwnCLIP | None:
        """Its CLIP as what ranks, classifies, searches and guides; None where there is none."""
        if self.clip is None:
            return None
        name = f"{self.recipe.name}@{self.checkpoint_hash}"
        return OwnCLIP(self.clip, self.tokenizer, name, self.recipe.data.fit)


def make_stream(recipe: Recipe, tokenizer: TextTokenizer, text_length: int) -> Stream:
    """The token stream of a recipe with a trained tokenizer and `text_length` text slots."""
    return Stream(
        text_length=text_length,
        grid_size=recipe.grid_size,
        text_vocab=tokenizer.vocab_size,
        image_vocab=recipe.vae.num_codes,
        slot_step=recipe.text.slot_step,
        image_prefix=recipe.dalle.image_prefix,
    )


def build_vae(recipe: Recipe) -> DiscreteVAE:
    """A fresh discrete VAE as the recipe says."""
    return DiscreteVAE(recipe.vae, recipe.data.image_size)


def build_dalle(recipe: Recipe, stream: Stream) -> DALLE:
    """A fresh DALL·E over `stream` with one view id for each of the recipe's views, for the recipe's CLIP's space."""
    return DALLE(recipe.dalle, stream, num_views=len(recipe.data.views), embed_dim=recipe.clip.embed_dim)


def build_clip(recipe: Recipe, stream: Stream) -> CLIP:
    """A fresh CLIP as the recipe says; it reads captions of the stream's text length."""
    return CLIP(recipe.clip, recipe.data.image_size, stream.text_length, stream.text_vocab)


def build_prior(recipe: Recipe, stream: Stream) -> Prior:
    """A fresh prior as the recipe says, from captions of the stream to embeddings of the recipe's CLIP."""
    return Prior(recipe.prior, stream.text_length, stream.text_vocab, recipe.clip.embed_dim)


def build_upscaler(recipe: Recipe, vae: DiscreteVAE) -> Upscaler:
    """A fresh upscaler as the recipe says, of the ids of a VAE."""
    return Upscaler(recipe.upscale, recipe.vae, vae.quantizer.out_channels)


def save_bundle(bundle: Bundle, folder: str | Path, *, storage: Storage = "fp32") -> Path:
    """Writes a checkpoint folder, each file atomically, and returns its path.

    storage: type in which parameters are stored ("fp16" halves the file); buffers keep their type, and loading gives
    fp32 back. Weights of models that the bundle lacks are removed from the folder; other files are left alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage, model in _models(bundle).items():
        path = folder / f"{stage}.safetensors"
        if model is None:
            path.unlink(missing_ok=True)
        else:
            save_weights(path, _stored_tensors(model, _STORAGE_DTYPES[storage]))
    write_atomically(folder / TOKENIZER, bundle.tokenizer.save)
    write_atomically(folder / CARD, lambda part: part.write_text(model_card(bundle), encoding="utf-8"))
    write_json(folder / CONFIG, _config(bundle))
    return folder


def load_bundle(name: str | Path = DEFAULT_CHECKPOINT, device: torch.device | str | None = None) -> Bundle:
    """Loads a checkpoint by built-in name, folder or Hugging Face Hub id; models are in evaluation mode and fp32.

    Raises ValueError naming the file and the remedy where something is missing, corrupted or doesn't fit.
    """
    folder = resolve(name)
    config = _read_config(folder)
    recipe = Recipe.parse(config["recipe"], where=f"{folder / CONFIG}: recipe")
    tokenizer = _load_tokenizer(folder, config)
    stream = make_stream(recipe, tokenizer, config["text_length"])
    with torch.random.fork_rng(devices=[]):  # building draws initial weights: the global RNG must not notice
        vae = _load_model(folder / "vae.safetensors", lambda: build_vae(recipe), device)
        dalle = _load_model(folder / "dalle.safetensors", lambda: build_dalle(recipe, stream), device)
        clip = _load_model(folder / "clip.safetensors", lambda: build_clip(recipe, stream), device)
        prior = _load_model(folder / "prior.safetensors", lambda: build_prior(recipe, stream), device)
        upscale = _load_model(
            folder / "upscale.safetensors", lambda: build_upscaler(recipe, vae or build_vae(recipe)), device
        )
    metadata = {key: value for key, value in config.items() if key not in ("recipe", "format")}
    return Bundle(
        recipe=recipe,
        tokenizer=tokenizer,
        stream=stream,
        vae=vae,
        dalle=dalle,
        clip=clip,
        prior=prior,
        upscale=upscale,
        metadata=metadata,
        checkpoint_hash=checkpoint_hash(folder),
    )


def built_in_names() -> list[str]:
    """Names of the checkpoints that ship inside the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CONFIG}"))


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint: a built-in name, a local folder (or a run's folder), else a Hugging Face Hub id.

    Raises ValueError with the known names where there is no such checkpoint.
    """
    if str(name) in built_in_names():
        return BUILT_IN / str(name)
    for folder in (Path(name), Path(name) / "checkpoint"):
        if (folder / CONFIG).is_file():
            return folder
    known = f"built-in names: {', '.join(built_in_names()) or 'none'}"
    if Path(name).exists():
        raise ValueError(f"{name} is no checkpoint folder: it has no {CONFIG}; {known}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"no checkpoint {str(name)!r}: not a folder, not a hub id OWNER/NAME; {known}")
    return _download(str(name), known)


def check_target(folder: Path, source: str | Path) -> None:
    """Raises ValueError unless a checkpoint can go to a folder: a new or empty one, or that of another checkpoint."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if folder.resolve() == resolve(source).resolve():
        raise ValueError(f"{folder} is that checkpoint itself: choose another folder")
    try:
        _read_config(folder)
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds something else than a checkpoint: choose another folder") from None


def checkpoint_hash(folder: str | Path) -> str:
    """First 12 hex digits of the SHA-256 over config, tokenizer and weights of a checkpoint folder."""
    digest = hashlib.sha256()
    for name in (name for name in FILES if name != CARD):
        path = Path(folder) / name
        if path.is_file():
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def model_card(bundle: Bundle) -> str:
    """The README.md of a checkpoint: what it is, how it was trained, how it measured, how to draw with it."""
    recipe, stream = bundle.recipe, bundle.stream
    lines = [
        f"# {recipe.name}",
        "",
        f"Draws {recipe.data.image_size}×{recipe.data.image_size} pictures from captions; made by dalle_mini_impl "
        f"{__version__}.",
        "",
        "| model | parameters |",
        "|---|---|",
    ]
    for stage, model in _models(bundle).items():
        if model is None and stage in OPTIONAL_STAGES:
            continue
        count = "absent" if model is None else f"{sum(p.numel() for p in model.parameters()):,}"
        lines.append(f"| {stage} | {count} |")
    lines += [
        "",
        f"Captions: {stream.text_vocab:,} pieces, {stream.text_length} slots. Pictures: a {stream.grid_size}×"
        f"{stream.grid_size} grid of {stream.image_vocab:,} codes.",
        "",
        "```python",
        "from dalle_mini_impl import TextToImage",
        "",
        'TextToImage.from_pretrained("THIS FOLDER")("a red heart", candidates=32, keep=4, seed=0)',
        "```",
    ]
    if fingerprint := bundle.metadata.get("data_fingerprint"):
        lines += ["", f"Data fingerprint: `{fingerprint}`"]
    if metrics := bundle.metadata.get("metrics"):
        lines += ["", "## Metrics", "", "```json", json.dumps(metrics, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def _models(bundle: Bundle) -> dict[str, nn.Module | None]:
    models: dict[str, nn.Module | None] = {"clip": bundle.clip, "vae": bundle.vae, "dalle": bundle.dalle}
    return {**models, "prior": bundle.prior, "upscale": bundle.upscale}


def _config(bundle: Bundle) -> dict[str, Any]:
    """What config.json says: facts of the bundle, then its metadata where it doesn't speak of the same."""
    facts = {
        "format": FORMAT,
        "package_version": __version__,
        "text_length": bundle.stream.text_length,
        "num_views": len(bundle.recipe.data.views),
        "tokenizer_fingerprint": bundle.tokenizer.fingerprint,
        "recipe": bundle.recipe.model_dump(mode="json"),
    }
    metadata = {"data_fingerprint": None, "metrics": {}, **bundle.metadata}
    return facts | {key: metadata[key] for key in sorted(metadata) if key not in facts}


def _stored_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A contiguous copy of the state on the CPU, floating-point parameters in `dtype`."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {}
    for name, tensor in model.state_dict().items():
        kept = tensor.dtype if name not in parameters or not tensor.is_floating_point() else dtype
        stored[name] = tensor.detach().to("cpu", kept, copy=True).contiguous()
    return stored


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    required = {"format": int, "recipe": dict, "text_length": int}
    wrong = [key for key, kind in required.items() if not isinstance(config, dict) or type(config.get(key)) is not kind]
    if wrong:
        raise ValueError(f"{path} has no valid {', '.join(wrong)}: it is not the config of a checkpoint")
    if config["format"] > FORMAT:
        raise ValueError(f"{path} has format {config['format']}, this release reads up to {FORMAT}: update the package")
    assert isinstance(config, dict)
    return config


def _load_tokenizer(folder: Path, config: Mapping[str, Any]) -> TextTokenizer:
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{path} is missing: a checkpoint needs its tokenizer")
    tokenizer = TextTokenizer.load(path)
    expected = config.get("tokenizer_fingerprint", tokenizer.fingerprint)
    if tokenizer.fingerprint != expected:
        raise ValueError(f"{path} is not the tokenizer that this checkpoint was trained with: restore the original")
    return tokenizer


def _load_model(path: Path, build: Callable[[], M], device: torch.device | str | None) -> M | None:
    """Builds a model and fills it strictly from a safetensors file; None where there is no file."""
    if not path.is_file():
        return None
    tensors = {_RENAMED.get(name, name): tensor for name, tensor in load_weights(path).items()}
    model = build()
    expected = model.state_dict()
    _check_tensors(path, tensors, expected)
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}, strict=True)
    return model.to(device).eval()


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError listing what is missing, unknown or of another shape than the recipe says."""
    faults = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    faults += [f"unknown {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            faults.append(f"{name} is {found}, expected {wanted}")
    if faults:
        listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ValueError(f"{path} doesn't fit the recipe in its {CONFIG}: {listed}")


def _download(hub_id: str, known: str) -> Path:
    """Fetches a checkpoint from the Hugging Face Hub into its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ValueError(f"no folder {hub_id!r} here, and the hub didn't give it ({reason}); {known}") from None
    if not (folder / CONFIG).is_file():
        raise ValueError(f"hub repository {hub_id!r} is no checkpoint: it has no {CONFIG}")
    return folder
