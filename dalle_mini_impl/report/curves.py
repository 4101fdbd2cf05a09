"""The curves of each stage, with what chance and simple means would reach drawn in."""

from __future__ import annotations

import math
from typing import Literal

from dalle_mini_impl.report.elements import Element, tag
from dalle_mini_impl.report.measure import Findings
from dalle_mini_impl.report.records import RunRecord, StageRecord
from dalle_mini_impl.report.svg import Level, Line, line_chart

NAMES = {
    "vae": "Discrete VAE",
    "clip": "CLIP",
    "dalle": "DALL·E",
    "prior": "Prior of unCLIP",
    "distill": "Distillation of guidance",
    "vqgan": "Adversarial training",
    "upscale": "Upscaler",
}
JUDGED_BY = {
    "prior": ("nll", "nats per code"),
    "distill": ("guidance_kl", "nats per token"),
    "vqgan": ("rfd", "Fréchet distance"),
    "upscale": ("psnr", "PSNR in dB"),
}
"""The held-out metric that picks the weights of a stage that not every run has, and its unit."""
STEPS = "steps of training"


def figure(title: str, sentence: str, chart: Element) -> Element:
    """A chart with its title and the sentence that says how to read it."""
    return tag("figure", tag("h4", title), chart, tag("figcaption", sentence))


def vae_curves(stage: StageRecord, record: RunRecord, findings: Findings) -> list[Element]:
    """Reconstruction and use of the codebook."""
    steps, errors = stage.curve("l2")
    weight = record.recipe.vae.l2_weight
    trained = [(s, -10 * math.log10(e / weight)) for s, e in zip(steps, errors, strict=True) if e > 0 and weight > 0]
    held_out = stage.curve("psnr", "evaluations")
    levels = [Level("a flat colour a token", findings.flat_psnr)] if findings.flat_psnr is not None else []
    psnr = line_chart(
        [
            Line(label="training", xs=[s for s, _ in trained], ys=[p for _, p in trained], pale=True),
            Line(label="validation", xs=held_out[0], ys=held_out[1], colour=1),
        ],
        levels=levels,
        x_label=STEPS,
        y_label="PSNR in dB",
    )
    return [
        figure(
            "Reconstruction",
            "How close pictures come back from their tokens: 6 dB more is half the error. The dashed line is had "
            "without learning, by painting each token's square in its mean colour. What is lost here, no later stage "
            "can draw.",
            psnr,
        ),
        figure(
            "Codes in use",
            "How many codes would carry as much if all were used equally often (perplexity), of those that there are; "
            "below a quarter of them, the codebook is badly used.",
            line_chart(
                [_line(stage, "perplexity, validation", "perplexity", 1)],
                levels=[Level("all codes", float(record.recipe.vae.num_codes))],
                x_label=STEPS,
                y_label="codes",
            ),
        ),
    ]


def clip_curves(stage: StageRecord, record: RunRecord, findings: Findings) -> list[Element]:
    """Loss beside ln B and recall beside chance; and how captions are read, where they are."""
    chance = stage.last("loss_chance")
    has_captioner = bool(stage.curve("caption_nll")[0])
    loss = "contrast" if has_captioner else "loss"
    of_infonce = record.recipe.clip.loss == "infonce"
    levels = [Level("chance, ln B", chance)] if chance is not None and of_infonce else []
    recall = stage.last("chance_recall_at_1")
    pairs = stage.last("num_pairs") or 0
    return [
        figure(
            "Loss",
            "How surprised CLIP is by which caption belongs to which picture of a batch; guessing among B pairs costs "
            "ln B. Validation batches may be smaller than training's, and so easier.",
            line_chart(
                [
                    _line(stage, "training", loss, part="training"),
                    _line(stage, "validation", loss, 1),
                ],
                levels=levels,
                x_label=STEPS,
                y_label="nats",
            ),
        ),
        figure(
            "Finding the right one",
            f"How many held-out pictures find their own caption among {pairs:,.0f} at first try, and the other way "
            "round.",
            line_chart(
                [
                    _line(stage, "picture finds caption", "image_to_text_recall_at_1", 1),
                    _line(stage, "caption finds picture", "text_to_image_recall_at_1", 2),
                    _line(stage, "decoded picture finds caption", "decoded_to_text_recall_at_1", 3),
                ],
                levels=[Level("chance", recall)] if recall is not None else [],
                x_label=STEPS,
                y_label="recall@1",
                percent=True,
            ),
        ),
        *([_reading(stage)] if has_captioner else []),
    ]


def _reading(stage: StageRecord) -> Element:
    """What a token of a caption costs the captioner."""
    return figure(
        "Reading captions",
        "How surprised the captioner is by each token of a caption, in nats, once it has seen the picture. What stays "
        "is mostly what a picture doesn't decide: which words a caption uses.",
        line_chart(
            [_line(stage, "training", "caption_nll", part="training"), _line(stage, "validation", "caption_nll", 1)],
            x_label=STEPS,
            y_label="nats per token",
        ),
    )


def dalle_curves(stage: StageRecord, record: RunRecord, findings: Findings) -> list[Element]:
    """Negative log-likelihood beside its floors, and what captions are worth."""
    unigram, uniform = stage.last("image_nll_unigram"), stage.last("image_nll_uniform")
    named = (("knows how frequent each code is", unigram), ("knows nothing, ln V", uniform))
    return [
        figure(
            "Image tokens",
            "How surprised the transformer is by each token of a picture, in nats (0.69 nats are a bit). Below both "
            "dashed lines it has learnt more than how frequent codes are. What pictures it was trained on cost "
            "less than held-out ones, measured alike, is learned by heart: more pictures, or fewer passes over them, "
            "help there. Training itself looks harder than it is, with changed inputs and dropped captions.",
            line_chart(
                [
                    _line(stage, "training", "image_nll", part="training"),
                    _line(stage, "validation", "image_nll", 1),
                    _line(stage, "pictures trained on", "image_nll_trained_on", 2),
                ],
                levels=[Level(name, value) for name, value in named if value is not None],
                x_label=STEPS,
                y_label="nats per image token",
            ),
        ),
        figure(
            "What captions tell",
            "What a wrong caption costs, per image token: at 0 captions are ignored, whatever the loss says. A text "
            "token costs less once the picture is known, where the recipe teaches reading.",
            line_chart(
                [
                    _line(stage, "caption gain", "caption_gain", 1),
                    _line(stage, "text token", "text_nll", 2),
                    _line(stage, "text token, picture known", "read_nll", 3),
                ],
                levels=[Level("captions ignored", 0.0)],
                x_label=STEPS,
                y_label="nats",
            ),
        ),
    ]


def other_curves(stage: StageRecord, record: RunRecord, findings: Findings) -> list[Element]:
    """Loss, and what picks the weights, of a stage that not every run has."""
    name, unit = JUDGED_BY[stage.stage]
    loss = line_chart([_line(stage, "training", "loss", part="training")], x_label=STEPS, y_label="loss")
    judged = line_chart([_line(stage, "validation", name, 1)], x_label=STEPS, y_label=unit)
    return [
        figure("Loss", "What is minimised, on the batches that are learnt from.", loss),
        figure("Held out", "What is measured on held-out pictures; the best of these weights are kept.", judged),
    ]


def speed_curve(stages: list[StageRecord]) -> Element:
    """Speed over the run, each stage relative to its own median."""
    lines = []
    for colour, stage in enumerate(stages):
        _, (steps, speeds) = stage.speeds
        if len(speeds) > 1:
            middle = sorted(speeds)[len(speeds) // 2]
            shares = [speed / middle if middle else 0.0 for speed in speeds]
            lines.append(Line(label=NAMES[stage.stage], xs=steps, ys=shares, colour=colour, pale=True))
    return line_chart(lines, levels=[Level("median", 1.0)], x_label=STEPS, y_label="of the stage's median speed")


def _line(
    stage: StageRecord, label: str, name: str, colour: int = 0, part: Literal["training", "evaluations"] = "evaluations"
) -> Line:
    """A metric of a stage; what is measured in training is drawn thin."""
    steps, values = stage.curve(name, part)
    return Line(label=label, xs=steps, ys=values, colour=colour, pale=part == "training")
