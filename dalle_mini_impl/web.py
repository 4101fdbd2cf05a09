"""The web page: draw and watch, vary what is liked, ask CLIP. Gradio serves it; nothing leaves the machine.

build_page(TextToImage.from_pretrained("emoji"), "emoji").launch()
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from dalle_mini_impl.classify import ZeroShotClassifier
from dalle_mini_impl.cli.classify import read_labels
from dalle_mini_impl.cli.origin import Origin
from dalle_mini_impl.cli.pictures import read_picture
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
        seed: float,
        guidance: float,
        temperature: float,
        top_p: float,
    ) -> Iterator[tuple[Shown, str]]:
        """Pictures while they are drawn, then the best of them, with a line that says how far it is."""
        settings = {"guidance": guidance, "temperature": temperature, "top_p": top_p}
        yield from self._draw(prompt, int(candidates), int(keep), int(seed), settings, None)

    def vary(
        self, origin: str | None, prompt: str, share: float, candidates: float, keep: float, seed: float
    ) -> Iterator[tuple[Shown, str]]:
        """Variations that share the upper part of a picture, drawn here or any other."""
        if not origin:
            raise gr.Error("choose a picture first: select a drawn one, or load a file", print_exception=False)
        picture = _checked(Origin.read, Path(origin))
        known = _checked(picture.known, self.model, share, None)
        yield from self._draw(prompt or picture.prompt or "", int(candidates), int(keep), int(seed), {}, known)

    def _draw(
        self, prompt: str, candidates: int, keep: int, seed: int, changes: dict[str, Any], known: Tensor | None
    ) -> Iterator[tuple[Shown, str]]:
        if not prompt.strip():
            raise gr.Error("write what is to be drawn", print_exception=False)
        settings = _checked(self.model.settings, **changes)
        drawings = self.model.stream(
            prompt.strip(), candidates, min(keep, candidates), seed, settings=settings, known=known
        )
        for drawing in drawings:
            if drawing.ranked is None:
                pictures: Shown = [(_enlarged(image), "") for image in drawing.images]
                yield pictures, f"{drawing.done / drawing.total:.0%}"
                continue
            self._drawn += 1
            facts = common_facts(self.model, self.checkpoint, settings, known)
            files = [
                self.files / write_picture(picture, self._drawn, self.files, facts)["file"]
                for picture in drawing.ranked
            ]
            labels = [f"{picture.rank}: {picture.score:.2f}" for picture in drawing.ranked]
            shown: Shown = [(str(file), label) for file, label in zip(files, labels, strict=True)]
            yield shown, f"the best {len(shown)} of {candidates}, ranked by {self.model.ranked_by}"

    def classify(self, picture: str | None, labels: str) -> dict[str, float]:
        """Probability of each label for a picture."""
        if not picture:
            raise gr.Error("load a picture first", print_exception=False)
        names = _checked(read_labels, labels.replace("\n", ","))
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
        return [(read_picture(hit.path), f"{hit.score:.3f} {hit.path.name}") for hit in hits]


def build_page(
    model: TextToImage, checkpoint: str, *, index: PictureIndex | None = None, files: Path | None = None
) -> gr.Blocks:
    """The page of a checkpoint; with an index also a search in its pictures.

    files: folder for the PNGs that are drawn, default a temporary one.
    """
    page = Page(model, checkpoint, Path(tempfile.mkdtemp(prefix="dalle-mini-")) if files is None else files, index)
    settings = model.settings()
    blocks: gr.Blocks
    with gr.Blocks(title=f"dalle-mini: {checkpoint}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# dalle-mini: {checkpoint}")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="What to draw", placeholder="a red heart", autofocus=True)
            with gr.Row():
                candidates = gr.Slider(1, _MOST_CANDIDATES, 16, step=1, label="Candidates")
                keep = gr.Slider(1, 16, 4, step=1, label="Keep the best")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            with gr.Accordion("Sampler", open=False), gr.Row():
                guidance = gr.Slider(0, 10, settings.guidance, label="Guidance: strength of the prompt")
                temperature = gr.Slider(0, 2, settings.temperature, label="Temperature")
                top_p = gr.Slider(0.05, 1, settings.top_p, label="Top-p")
            button = gr.Button("Draw", variant="primary")
            status = gr.Markdown()
            gallery = _gallery("Pictures, best first; select one to vary it")
            inputs: list[Any] = [prompt, candidates, keep, seed, guidance, temperature, top_p]
            gr.on([button.click, prompt.submit], page.draw, inputs, [gallery, status], api_name="draw")
        with gr.Tab("Vary"):
            with gr.Row():
                origin = gr.Image(type="filepath", label="Picture", height=256)
                with gr.Column():
                    new_prompt = gr.Textbox(label="What to draw (empty: what it was drawn for)")
                    share = gr.Slider(0, 0.95, 0.4, label="Share to keep, from the top")
                    new_seed = gr.Number(1, precision=0, minimum=0, label="Seed")
                    vary = gr.Button("Vary", variant="primary")
            new_status = gr.Markdown()
            variations = _gallery("Variations, best first")
            parts: list[Any] = [origin, new_prompt, share, candidates, keep, new_seed]
            vary.click(page.vary, parts, [variations, new_status], api_name="vary")
        gallery.select(_selected, None, origin, api_visibility="private")
        if model.embedder is not None:
            with gr.Tab("Classify"):
                picture = gr.Image(type="filepath", label="Picture", height=256)
                labels = gr.Textbox(label="Labels, a comma or a line between them", lines=3)
                answer = gr.Label(label="What CLIP says")
                gr.Button("Classify", variant="primary").click(
                    page.classify, [picture, labels], answer, api_name="classify"
                )
        if model.captioning_clip is not None:
            with gr.Tab("Caption"):
                seen = gr.Image(type="filepath", label="Picture", height=256)
                number = gr.Slider(1, 32, 8, step=1, label="Captions to write")
                captions = gr.Dataframe(headers=["caption", "score"], label="Captions, best first", interactive=False)
                gr.Button("Caption", variant="primary").click(
                    page.caption, [seen, number], captions, api_name="caption"
                )
        if index is not None:
            with gr.Tab(f"Search {len(index.entries)} pictures"):
                text = gr.Textbox(label="What to look for")
                like = gr.Image(type="filepath", label="or a picture like it", height=192)
                top = gr.Slider(1, 60, 12, step=1, label="Pictures to find")
                found = _gallery("Nearest first")
                look = gr.Button("Search", variant="primary")
                gr.on([look.click, text.submit], page.search, [text, like, top], found, api_name="search")
    return blocks


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
