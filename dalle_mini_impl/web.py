"""The web page: draw and watch, vary what is liked, ask CLIP. Gradio serves it; nothing leaves the machine.

build_page(TextToImage.from_pretrained("emoji"), "emoji").launch()
"""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from dalle_mini_impl.classify import ZeroShotClassifier
from dalle_mini_impl.cli.classify import split_labels
from dalle_mini_impl.cli.origin import Origin
from dalle_mini_impl.cli.pictures import read_picture, thumbnails
from dalle_mini_impl.cli.sample import common_facts, write_picture
from dalle_mini_impl.cli.search import query_vector
from dalle_mini_impl.data.pictures import PictureError
from dalle_mini_impl.pipeline import TextToImage
from dalle_mini_impl.search import PictureIndex

if TYPE_CHECKING:
    from torch import Tensor

Shown = list[tuple[Any, str]]
"""What a gallery takes: pictures, or files of them, with their labels."""

_MOST_CANDIDATES = 64
_IN_TURN: dict[str, Any] = {"concurrency_id": "model"}
"""All that a model does waits in one queue; with a queue each, drawing and classifying would share its memory."""
_SWEEP_SEC, _KEPT_SEC = 3600, 86400
"""How often Gradio's copies of what it has shown are looked through, and how old they become."""


def in_thread(thread: ThreadPoolExecutor, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, or generator function, but computed in that one thread.

    Gradio calls from a thread of its own each time. Each would get OpenMP workers of its own, and with more workers
    than cores the barriers between them become slow.
    """
    if not inspect.isgeneratorfunction(function):
        return functools.wraps(function)(lambda *args: thread.submit(function, *args).result())

    @functools.wraps(function)
    def drawn_there(*args: Any) -> Iterator[Any]:
        steps, end = function(*args), object()
        while (step := thread.submit(next, steps, end).result()) is not end:
            yield step

    return drawn_there


class Page:
    """What the page's buttons do; no part of it knows Gradio but for its errors.

    files: where drawn PNGs are kept, with their settings inside, as long as the page lives.
    """

    def __init__(self, model: TextToImage, checkpoint: str, files: Path, index: PictureIndex | None = None) -> None:
        self.model, self.checkpoint, self.files, self.index = model, checkpoint, files, index
        self._drawn = 0

    def draw(
        self,
        prompt: str,
        candidates: float,
        keep: float,
        seed: float | None,
        guidance: float,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[Shown, str]]:
        """Pictures while they are drawn, then the best of them, with a line that says how far it is."""
        yield from self._draw(prompt, int(candidates), int(keep), seed, (guidance, temperature, top_p), None)

    def vary(
        self,
        origin: str | None,
        prompt: str,
        share: float,
        candidates: float,
        keep: float,
        seed: float | None,
        guidance: float,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[Shown, str]]:
        """Variations that share the upper part of a picture, drawn here or any other, by the same sampler."""
        if not origin:
            raise gr.Error("choose a picture first: select a drawn one, or load a file", print_exception=False)
        picture = _checked(Origin.read, Path(origin))
        known = _checked(picture.known, self.model, share, None)
        prompt, sampler = prompt or picture.prompt or "", (guidance, temperature, top_p)
        yield from self._draw(prompt, int(candidates), int(keep), seed, sampler, known)

    def _draw(
        self,
        prompt: str,
        candidates: int,
        keep: int,
        seed: float | None,
        sampler: tuple[float, float, float],
        known: Tensor | None,
    ) -> Iterator[tuple[Shown, str]]:
        if seed is None:
            raise gr.Error("give a seed, a whole number", print_exception=False)
        if not prompt.strip():
            raise gr.Error("write what is to be drawn", print_exception=False)
        guidance, temperature, top_p = sampler
        settings = _checked(self.model.settings, guidance=guidance, temperature=temperature, top_p=top_p)
        drawings = self.model.stream(
            prompt.strip(), candidates, min(keep, candidates), int(seed), settings=settings, known=known
        )
        for drawing in drawings:
            if drawing.ranked is None:
                pictures: Shown = [(_enlarged(image), "") for image in drawing.images]
                yield pictures, f"{drawing.done / drawing.total:.0%}"
                continue
            self._drawn += 1
            number = self._drawn
            facts = common_facts(self.model, self.checkpoint, settings, known)
            files = [
                self.files / write_picture(picture, number, self.files, facts)["file"] for picture in drawing.ranked
            ]
            labels = [f"{picture.rank}: {picture.score:.2f}" for picture in drawing.ranked]
            shown: Shown = [(str(file), label) for file, label in zip(files, labels, strict=True)]
            yield shown, f"the best {len(shown)} of {candidates}, ranked by {self.model.ranked_by}"

    def classify(self, picture: str | None, labels: str) -> dict[str, float]:
        """Probability of each label for a picture."""
        if not picture:
            raise gr.Error("load a picture first", print_exception=False)
        names = split_labels(labels.replace("\n", ","))  # never read_labels: it opens files, this text is a visitor's
        classifier = _checked(ZeroShotClassifier, self.model.embedder, names)
        shares = classifier.probabilities([_checked(read_picture, Path(picture))])[0].tolist()
        return dict(zip(names, shares, strict=True))

    def caption(self, picture: str | None, candidates: float) -> list[list[str]]:
        """Captions for a picture with their scores, best first."""
        if not picture:
            raise gr.Error("load a picture first", print_exception=False)
        found = _checked(self.model.caption, _checked(read_picture, Path(picture)), int(candidates))
        return [[item.caption, f"{item.score:.2f}"] for item in found]

    def search(self, text: str, like: str | None, top: float) -> Shown:
        """The pictures of the index that are nearest to a text, a picture, or both."""
        if not text.strip() and not like:
            raise gr.Error("write what to look for, or load a picture that is like it", print_exception=False)
        assert self.index is not None
        query = _checked(query_vector, self.model.embedder, text.strip() or None, Path(like) if like else None)
        hits = [hit for hit in self.index.search(query, int(top)) if hit.path.is_file()]
        return [*thumbnails((hit.path, f"{hit.score:.3f} {hit.path.name}") for hit in hits)]


def build_page(
    model: TextToImage, checkpoint: str, *, index: PictureIndex | None = None, files: Path | None = None
) -> gr.Blocks:
    """The page of a checkpoint; with an index also a search in its pictures.

    files: folder for the PNGs that are drawn, default a temporary one, which ends with the process.
    """
    if files is None:
        files = Path(tempfile.mkdtemp(prefix="dalle-mini-"))
        atexit.register(shutil.rmtree, files, ignore_errors=True)
    page = Page(model, checkpoint, files, index)
    there = functools.partial(in_thread, ThreadPoolExecutor(1, "model"))
    settings = model.settings()
    blocks: gr.Blocks
    title = f"dalle-mini: {checkpoint}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_SWEEP_SEC, _KEPT_SEC)) as blocks:
        gr.Markdown(f"# dalle-mini: {checkpoint}")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="What to draw", placeholder="a red heart", autofocus=True)
            with gr.Row():
                candidates = gr.Slider(1, _MOST_CANDIDATES, 16, step=1, label="Candidates")
                keep = gr.Slider(1, 16, 4, step=1, label="Keep the best")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            with gr.Accordion("Sampler, for Draw and Vary", open=False), gr.Row():
                guidance = gr.Slider(0, 10, settings.guidance, label="Guidance: strength of the prompt")
                temperature = gr.Slider(0, 2, settings.temperature, label="Temperature")
                top_p = gr.Slider(0.05, 1, settings.top_p, label="Top-p")
            button = gr.Button("Draw", variant="primary")
            status = gr.Markdown()
            gallery = _gallery("Pictures, best first; select one to vary it")
            inputs: list[Any] = [prompt, candidates, keep, seed, guidance, temperature, top_p]
            shown: list[Any] = [gallery, status]
            gr.on([button.click, prompt.submit], there(page.draw), inputs, shown, api_name="draw", **_IN_TURN)
        with gr.Tab("Vary"):
            with gr.Row():
                origin = _picture("Picture")
                with gr.Column():
                    new_prompt = gr.Textbox(label="What to draw (empty: what it was drawn for)")
                    share = gr.Slider(0, 0.95, 0.4, label="Share to keep, from the top")
                    new_seed = gr.Number(1, precision=0, minimum=0, label="Seed")
                    vary = gr.Button("Vary", variant="primary")
            new_status = gr.Markdown()
            variations = _gallery("Variations, best first")
            parts: list[Any] = [origin, new_prompt, share, candidates, keep, new_seed, guidance, temperature, top_p]
            vary.click(there(page.vary), parts, [variations, new_status], api_name="vary", **_IN_TURN)
        gallery.select(_selected, None, origin, api_visibility="private")
        if model.embedder is not None:
            with gr.Tab("Classify"):
                picture = _picture("Picture")
                labels = gr.Textbox(label="Labels, a comma or a line between them", lines=3)
                answer = gr.Label(label="What CLIP says")
                gr.Button("Classify", variant="primary").click(
                    there(page.classify), [picture, labels], answer, api_name="classify", **_IN_TURN
                )
        if model.captioning_clip is not None:
            with gr.Tab("Caption"):
                seen = _picture("Picture")
                number = gr.Slider(1, 32, 8, step=1, label="Captions to write")
                captions = gr.Dataframe(headers=["caption", "score"], label="Captions, best first", interactive=False)
                gr.Button("Caption", variant="primary").click(
                    there(page.caption), [seen, number], captions, api_name="caption", **_IN_TURN
                )
        if index is not None:
            with gr.Tab(f"Search {len(index.entries)} pictures"):
                text = gr.Textbox(label="What to look for")
                like = _picture("or a picture like it", 192)
                top = gr.Slider(1, 60, 12, step=1, label="Pictures to find")
                found = _gallery("Nearest first")
                look = gr.Button("Search", variant="primary")
                inputs = [text, like, top]
                gr.on([look.click, text.submit], there(page.search), inputs, found, api_name="search", **_IN_TURN)
    return blocks


def _picture(label: str, height: int = 256) -> gr.Image:
    """A file as it is: in Gradio's own mode, RGB, what is transparent would come as black."""
    return gr.Image(type="filepath", image_mode=None, label=label, height=height)


def _gallery(label: str) -> gr.Gallery:
    return gr.Gallery(label=label, columns=8, object_fit="contain", height="auto")


def _selected(event: gr.SelectData) -> str:
    """The file of the picture that was selected in a gallery."""
    path: str = event.value["image"]["path"]
    return path


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures as large as a gallery shows them, without being blurred."""
    scale = max(1, 256 // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _checked(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function; what it has to say of bad input is shown on the page."""
    try:
        return function(*args, **kwargs)
    except (ValueError, PictureError) as error:
        raise gr.Error(str(error), print_exception=False) from None
