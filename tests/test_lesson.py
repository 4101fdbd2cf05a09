"""The lesson: its notebook runs from top to bottom, what it says comes true, and its committed form is up to date."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import nbformat

from docs.build_lesson import NOTEBOOK, execute, read_source, text_of

LARGEST_PICTURE_BYTES = 32_000
LARGEST_NOTEBOOK_BYTES = 1_500_000
FACTS = """
import json
print("FACTS", json.dumps(dict(
    captions_found=captions_found, accuracy=accuracy, first_found=first_found, perplexity=perplexity,
    share_inside=share_inside, same_ids=same_ids, sharp=sharp, gap_alone=gap_alone,
    guided=[[steps[0].score, steps[-1].score] for steps in (from_noise, to_blue, to_panda)],
    psnr_held_out=psnr(pixels[16:], rebuilt[16:]).tolist(),
    caption_saves=caption_saves, guided_scores=guided_scores, slow_shape=list(draw(prompt, 0).shape),
    ranked=[[picture.score, picture.read_score] for picture in ranked], margins=margins,
    told_apart=told_apart, read_apart=read_apart,
    prior_right=prior_right, metrics=metrics, before=first.tolist(), after=last.tolist(),
    captions=[[caption, *pair] for caption, pair in zip(written, truths)],
    trained_gradients=[p.grad is None for part in (vae, clip, dalle) for p in part.parameters()],
)))
"""


def test_the_notebook_runs_and_what_it_says_is_true() -> None:
    """One test, so that the notebook runs once however tests are shared out; a cell that fails fails it."""
    facts = _facts()
    for claim in (
        clip_classifies_and_finds,
        tokens_keep_the_picture_and_cover_their_cell,
        the_discriminator_sees_a_difference_and_sharpens,
        guidance_raises_the_score_and_trains_nothing,
        dalle_draws_what_it_is_told,
        what_is_trained_in_the_notebook_works,
    ):
        claim(facts)


def _facts() -> dict[str, Any]:
    """What the notebook has found, run in a kernel of its own."""
    notebook = read_source()
    cell = nbformat.v4.new_code_cell(FACTS)
    notebook.cells.insert(len(notebook.cells) - 1, cell)  # the last cell tidies up
    line = next(line for line in text_of(execute(notebook)).splitlines() if line.startswith("FACTS "))
    found: dict[str, Any] = json.loads(line.removeprefix("FACTS "))
    return found


def clip_classifies_and_finds(facts: dict[str, Any]) -> None:
    assert facts["captions_found"] >= 7 and facts["accuracy"] >= 0.9
    assert facts["first_found"]["a red heart"] == "red heart"
    assert facts["first_found"]["a frog"] == "frog"
    assert facts["read_apart"] >= 7 and facts["read_apart"] > facts["told_apart"]


def tokens_keep_the_picture_and_cover_their_cell(facts: dict[str, Any]) -> None:
    assert min(facts["psnr_held_out"]) > 20
    assert 0.05 < facts["share_inside"] < 0.9, "more than an even share, and not all of it"
    assert facts["perplexity"] > 100


def the_discriminator_sees_a_difference_and_sharpens(facts: dict[str, Any]) -> None:
    assert facts["gap_alone"] > 0.1
    assert facts["sharp"]["adversarial"] > facts["sharp"]["control"] + 0.02
    assert facts["same_ids"]


def guidance_raises_the_score_and_trains_nothing(facts: dict[str, Any]) -> None:
    for before, after in facts["guided"]:
        assert after > before + 0.1 and after > 0.75
    assert all(facts["trained_gradients"])


def dalle_draws_what_it_is_told(facts: dict[str, Any]) -> None:
    assert facts["caption_saves"] > 20
    assert facts["slow_shape"] == [1, 100]
    assert facts["guided_scores"]["1"] > facts["guided_scores"]["0"] + 0.2
    scores = [score for score, _ in facts["ranked"]]
    assert scores == sorted(scores, reverse=True)
    assert facts["ranked"][0][1] > facts["ranked"][-1][1] + 5, "nats of the prompt, read from the picture"
    assert sum(margin > 0 for margin in facts["margins"]) >= 4


def what_is_trained_in_the_notebook_works(facts: dict[str, Any]) -> None:
    metrics = facts["metrics"]
    assert metrics["vae"]["psnr"] > 18
    assert metrics["clip"]["text_to_image_recall_at_1"] > 0.7
    assert metrics["prior"]["cosine_drawn"] > metrics["prior"]["cosine_other"] + 0.5
    assert metrics["dalle"]["image_bits"] < 5
    assert facts["prior_right"] >= 3
    (red, _, blue), (red_after, _, blue_after) = facts["before"], facts["after"]
    assert red > blue and blue_after > red_after, "the change from red to blue"
    right = [(f" {colour} " in caption, caption.endswith(shape)) for caption, colour, shape in facts["captions"]]
    assert sum(colour for colour, _ in right) >= 4, facts["captions"]
    assert sum(shape for _, shape in right) >= 2, facts["captions"]


def test_the_committed_notebook_is_that_of_its_source() -> None:
    committed, source = nbformat.read(NOTEBOOK, as_version=4), read_source()
    nbformat.validate(committed)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], "run `make lesson`"


def test_the_committed_outputs_are_whole_small_and_of_no_machine() -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < LARGEST_NOTEBOOK_BYTES
    num_pictures = 0
    for cell in committed.cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, "a cell that was not run"
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
            if picture := output.get("data", {}).get("image/png"):
                num_pictures += 1
                assert len(base64.b64decode(picture)) < LARGEST_PICTURE_BYTES, cell.source[-200:]
    assert num_pictures > 15
    assert not re.search(r"/(?:home|root|tmp|usr|Users|var|opt)/|0x[0-9a-f]{6,}", text_of(committed))


def test_links_of_the_lesson_lead_somewhere() -> None:
    links = [link for cell in read_source().cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    local = {link for link in links if not link.startswith("https://")}
    assert len(local) > 10
    assert not [link for link in local if not (NOTEBOOK.parent / link).exists()]
