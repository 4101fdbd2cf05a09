"""The sections of a report: each a heading, a sentence that says what it shows, and what there is of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dalle_mini_impl.config import Recipe
from dalle_mini_impl.report.curves import (
    NAMES,
    clip_curves,
    dalle_curves,
    figure,
    other_curves,
    speed_curve,
    vae_curves,
)
from dalle_mini_impl.report.drawing import RANKERS
from dalle_mini_impl.report.elements import Element, Node, details, picture, sheet, table, tag
from dalle_mini_impl.report.measure import Findings
from dalle_mini_impl.report.memorisation import Audit, Share
from dalle_mini_impl.report.records import Progress, RunRecord, StageRecord
from dalle_mini_impl.report.svg import Level, Line, falling_histogram, line_chart, number, percent_of, share_chart
from dalle_mini_impl.training.budget import format_duration
from dalle_mini_impl.training.recipes import differences
from dalle_mini_impl.vae.quantizers import usage_and_perplexity

_MAX_SHEETS = 6
_MAX_NEIGHBOURS = 24
_MAX_NAMES = 10
_SIGN = "●"
_REASONS = {"bomb": "too many pixels", "tiny": "too small", "empty_caption": "no words in its caption"}
_WITHOUT_TRAINING: Mapping[Progress, str] = {
    "not begun": "this stage has not begun.",
    "taken over from --init-from": "the model is taken over from --init-from, and this stage has not run.",
    "not part of this recipe": "this stage is not part of this recipe.",
}
_NOTHING_HELD_OUT = (
    " No picture was held out: what is called held-out or validation here are training pictures, so that learning by "
    "heart doesn't show."
)
_RULERS = {"pixels": "by colours of small pictures", "clip": "by the run's CLIP"}


def section(key: str, title: str, sentence: str, *children: Node) -> Element:
    """A section of the page. key: what links to it say."""
    return tag("section", tag("h2", title), tag("p", sentence, class_="lead"), *children, id=key)


def without_held_out(record: RunRecord) -> str:
    """What has to be said beside held-out pictures where there are none; else nothing."""
    return "" if record.holds_out else _NOTHING_HELD_OUT


def nothing(reason: str) -> Element:
    """Stands where something is missing."""
    return tag("p", f"Not here: {reason}", class_="missing")


def curves(record: RunRecord, findings: Findings) -> Element:
    """Training and validation of each stage."""
    makers = {"vae": vae_curves, "clip": clip_curves, "dalle": dalle_curves}
    parts: list[Node] = []
    for name, stage in record.stages.items():
        parts.append(tag("h3", NAMES[name]))
        if not stage.training and not stage.evaluations:
            parts.append(nothing(_WITHOUT_TRAINING.get(stage.progress, "metrics.jsonl has no lines of this stage.")))
        else:
            parts.append(tag("div", makers.get(name, other_curves)(stage, record, findings), class_="figures"))
    sentence = (
        "Thin lines are measured on the batches that are learnt from, bold ones on held-out pictures with averaged "
        "weights; dashed lines say what chance or a simple rule would reach."
    )
    return section("curves", "Curves", sentence + without_held_out(record), parts)


def _sheets(stage: StageRecord, alt: str) -> Node:
    """The sheets of an evaluation's pictures, the last one open; of many, some evenly spaced."""
    if not stage.sheets:
        if stage.progress in ("not begun", "not finished"):
            return nothing("the first sheet of pictures comes with the first evaluation of this stage.")
        return nothing(_WITHOUT_TRAINING.get(stage.progress, "samples/ has no sheets of this stage."))
    places = np.linspace(0, len(stage.sheets) - 1, min(_MAX_SHEETS, len(stage.sheets))).round().astype(int)
    chosen = [stage.sheets[place] for place in places]
    return [
        details(f"after {step:,} steps", sheet(path, f"{alt} after {step} steps"), is_open=path == chosen[-1][1])
        for step, path in chosen
    ]


def reconstructions(record: RunRecord, findings: Findings) -> Element:
    """Originals beside what comes back."""
    sentence = (
        "Held-out pictures and, below each row of them, what the VAE makes of them through its tokens: what is gone "
        "here is gone for good."
    )
    sheets = _sheets(record.stages["vae"], "Reconstructions")
    return section("reconstructions", "Reconstructions over time", sentence + without_held_out(record), sheets)


def samples(record: RunRecord, findings: Findings) -> Element:
    """What was drawn at each evaluation."""
    sentence = (
        "The same held-out captions with the same random numbers at each evaluation: first the caption's own picture "
        "through the VAE, then single samples, not ranked."
    )
    sheets = _sheets(record.stages["dalle"], "Samples")
    return section("samples", "Samples over time", sentence + without_held_out(record), sheets)


def codebook(record: RunRecord, findings: Findings) -> Element:
    """How often each code occurs."""
    sentence = (
        "How often each code occurs in the training pictures, the most frequent first: the flatter the shape, the "
        "more each token tells."
    )
    counts = findings.code_counts
    if counts is None:
        return section("codebook", "Codebook", sentence, nothing(findings.missing["codebook"]))
    used, perplexity = usage_and_perplexity(torch.from_numpy(counts))
    total = max(1, int(counts.sum()))
    chart = falling_histogram(
        (100 * counts / total).tolist(),
        even=100 / len(counts),
        x_label="codes, by frequency",
        y_label="per cent of all tokens",
        even_label="if all were equal",
    )
    caption = (
        f"{round(used * len(counts)):,} of {len(counts):,} codes occur in {total:,} tokens; they carry as much as "
        f"{perplexity:,.0f} equally frequent ones (perplexity). The most frequent one makes "
        f"up {percent_of(counts.max() / total, 1)}."
    )
    return section(
        "codebook", "Codebook", sentence, tag("div", figure("Frequencies", caption, chart), class_="figures")
    )


def neighbours(record: RunRecord, findings: Findings) -> Element:
    """Samples beside the nearest training picture."""
    ways = {
        "pixels": "by the mean difference of colours at 16×16 pixels, which no training has bent",
        "clip": "by the angle between CLIP's vectors, which sees things wherever they stand",
    }
    sentence = (
        "The best of the candidates drawn for captions of training and of held-out pictures, beside the nearest of all "
        f"{findings.num_searched:,} training pictures ({ways[findings.distance]}): a copy would look the same."
    )
    if not findings.neighbours:
        sentence = "What is drawn beside the training picture that is most like it."
        return section("neighbours", "Nearest training pictures", sentence, nothing(findings.missing["neighbours"]))
    cards = []
    for item in findings.neighbours[:_MAX_NEIGHBOURS]:
        kind = "training" if item.prompt.from_training else "held-out"
        triple = (
            (item.own, f"its own, {kind}", "The caption's own picture"),
            (item.sample.image, "drawn", "The sample"),
            (item.training, f"nearest, {item.distance:.3f}", f"The nearest training picture: {item.training_caption}"),
        )
        figures = [tag("figure", picture(image, alt), tag("figcaption", text)) for image, text, alt in triple]
        cards.append(tag("div", tag("p", item.prompt.text), tag("div", figures, class_="triple"), class_="card"))
    return section("neighbours", "Nearest training pictures", sentence, tag("div", cards, class_="cards"))


def against_chance(audit: Audit) -> str:
    """What share of all samples chance alone would put nearer to training, and whether theirs can be told from it."""
    share = audit.samples
    assert share.chance is not None
    low, high = share.chance
    if low <= share.mean <= high:
        verdict = f"this can't be told apart from chance with {audit.num_references:,} pictures a side"
    else:
        verdict = "this is more than chance" if share.mean > high else "this is less than chance"
    return f"chance alone gives {percent_of(low)} to {percent_of(high)}, so {verdict}"


def memorisation(record: RunRecord, findings: Findings) -> Element:
    """Shares of samples nearer to training than to held-out pictures."""
    sentence = (
        "Is a sample nearer to a picture that the model has learnt from, or to one of as many that it has never seen? "
        "A model that copies lands on the first side; one that draws anew on either as often, 50 %."
    )
    title = "Memorisation audit"
    if not findings.audits:
        return section("memorisation", title, sentence, nothing(findings.missing["memorisation"]))
    charts = []
    for audit in findings.audits:
        rows: list[tuple[str, Share]] = [
            ("all samples", audit.samples),
            ("for training captions", audit.of_training),
            ("for held-out captions", audit.of_held_out),
        ]
        if audit.control is not None:
            rows.append(("control: real held-out pictures", audit.control))
        caption = (
            f"{audit.samples.num_samples:,} samples between {audit.num_references:,} training and "
            f"{audit.num_references:,} held-out pictures: {percent_of(audit.samples.mean)} of them are nearer to a "
            f"training picture; {against_chance(audit)}. Bars are 95\N{NO-BREAK SPACE}% intervals over captions; "
            "the shaded zones are where chance alone would put 95\N{NO-BREAK SPACE}% of the shares."
        )
        chart = share_chart(rows, chance=0.5, x_label="nearer to a training picture")
        charts.append(figure(f"Measured {_RULERS[audit.ruler]}", caption, chart))
    why = (
        "Both sides have the same number of pictures, because the larger one would win by its size alone, and as many "
        "captions come from either, because a good model draws near to a caption's own picture: that moves the two "
        "rows below the first apart, not the first. The control is neither: it has to come out near 50 %, or the two "
        "sides differ in themselves. Colours are the main measure: CLIP has learnt from the training pictures, so it "
        "may see them in another way than the rest."
    )
    return section("memorisation", title, sentence, tag("div", charts, class_="figures"), tag("p", why, class_="note"))


def best_of_n(record: RunRecord, findings: Findings) -> Element:
    """What ranking is worth."""
    sentence = "How good the best-ranked of N candidates is, on average, for a judge that is not the ranker."
    found = findings.best_of_n
    if found is None:
        return section("best-of-n", "Best of N", sentence, nothing(findings.missing["best-of-n"]))
    shaded = next((name for name in ("rank", "reading") if name in found.curves), next(iter(found.curves)))
    lines = [
        Line(
            label=RANKERS[name],
            xs=[point.size for point in points],
            ys=[point.mean for point in points],
            low=[point.low for point in points] if name == shaded else None,
            high=[point.high for point in points] if name == shaded else None,
            colour=min(index, 4),
        )
        for index, (name, points) in enumerate(found.curves.items())
    ]
    sizes = [float(point.size) for point in next(iter(found.curves.values()))]
    single = next(iter(found.curves.values()))[0].mean
    chart = line_chart(
        lines,
        x_label="candidates N",
        y_label="quality",
        levels=[Level("a single sample", single)],
        log_x=True,
        x_ticks=sizes,
    )
    caption = (
        f"Judged by {found.judged_by}; {found.num_prompts} captions, and the 95 % interval of "
        f"'{RANKERS[shaded]}' is shaded. "
        "A ranker that knows nothing stays on the dashed line; none can beat the judge's own choice."
    )
    return section("best-of-n", "Best of N", sentence, tag("div", figure("Quality", caption, chart), class_="figures"))


def data(record: RunRecord, findings: Findings) -> Element:
    """What was read and skipped."""
    sentence = "What was found in the source, what became of it, and what was left out and why."
    report = record.data_report
    if report is None:
        return section("data", "Data", sentence, nothing("the pictures are not read yet."))
    text, lengths = report.get("text", {}), report.get("caption_length_characters", {})
    rows: list[tuple[str, Any]] = [
        ("source", f"{report['source']} ({report['kind']})"),
        ("pictures found", report["pictures"]),
        ("kept", report["kept"]),
        ("for training, validation, test", [report["train"], report["validation"], report["test"]]),
        ("how they were split", report["splits_from"]),
        ("pictures without a caption", report["uncaptioned"]),
        ("captions", report["captions"]),
        ("blank captions dropped", report["blank_captions_dropped"]),
        (
            "characters in a caption: shortest, median, longest",
            [lengths.get(key, "–") for key in ("min", "median", "max")],
        ),
        ("the same pixels again", report["duplicates"]),
        ("of those in another split", report["duplicates_across_splits"]),
        ("size, fit", f"{report['image_size']}×{report['image_size']} pixels, {report['fit']}"),
        ("text pieces, slots", [text.get("vocab_size", "–"), text.get("text_length", "–")]),
        ("training captions cut to the slots", text.get("num_captions_cut", "–")),
    ]
    skipped = [
        [_REASONS.get(reason, reason.replace("_", " ")), number(item["count"]), _some(item["names"])]
        for reason, item in report["skipped"].items()
    ]
    return section(
        "data",
        "Data",
        sentence,
        table(["", ""], [[name, _words(value)] for name, value in rows]),
        tag("h3", "Skipped"),
        table(["reason", "pictures", "which"], skipped, numbers=[1]),
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more:,} more, see data-report.json" if more > 0 else "")


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    return number(value) if isinstance(value, int | float) else str(value)


def time(record: RunRecord, findings: Findings) -> Element:
    """How long each stage took and how fast it was."""
    rows = []
    for name, stage in record.stages.items():
        config = getattr(record.recipe.train, name)
        unit, (_, speeds) = stage.speeds
        speeds = sorted(speeds)
        pictures = stage.steps * config.batch_size
        parameters = findings.num_parameters.get(name)
        rows.append(
            [
                NAMES[name],
                stage.progress,
                number(parameters) if parameters is not None else "–",
                number(stage.steps),
                number(pictures),
                format_duration(stage.train_sec),
                f"{speeds[len(speeds) // 2]:,.0f} {unit}" if speeds else "–",
                number(stage.skipped_steps),
            ]
        )
    head = ["stage", "state", "parameters", "steps", "pictures seen", "time", "median speed a second", "skipped steps"]
    budget = record.note.get("budget")
    spent = ""
    if budget:
        spent = (
            f" Of a budget of {format_duration(budget['total_sec'])}, {format_duration(budget['used_sec'])} were used."
        )
    sentence = (
        "Time in training steps and evaluations, over all resumes; a step is skipped where its gradient is not "
        f"finite.{spent}"
    )
    began = [stage for stage in record.stages.values() if stage.training]
    chart: list[Node] = []
    if began:
        caption = (
            "A speed that falls while a stage runs means that another program took the machine, or that it grew hot."
        )
        chart = [tag("div", figure("Speed", caption, speed_curve(began)), class_="figures")]
    return section("time", "Time and speed", sentence, table(head, rows, numbers=range(2, len(head))), chart)


def settings(record: RunRecord, findings: Findings) -> Element:
    """The whole recipe, with what differs from the defaults marked."""
    ours, defaults = record.recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
    changed = differences(defaults, ours)
    sentence = f"The whole recipe; what differs from the defaults is listed first and marked with {_SIGN}."
    rows = [
        [f"{_SIGN}\N{NO-BREAK SPACE}{key}", _setting(own), _setting(default)] for key, (default, own) in changed.items()
    ]
    parts: list[Node] = [table(["setting", "this run", "default"], rows)] if rows else [tag("p", "All are defaults.")]
    for name, values in ours.items():
        if not isinstance(values, Mapping):
            continue
        flat = _flat(values, f"{name}.")
        marked = [
            [f"{_SIGN}\N{NO-BREAK SPACE}{key}" if key in changed else key, _setting(value)]
            for key, value in flat.items()
        ]
        parts.append(details(f"[{name}]", table(["setting", "value"], marked)))
    note = [["data", str(record.note["data"])], ["init-from", str(record.note.get("init_from") or "–")]]
    note += [["data fingerprint", str(record.note.get("data_fingerprint", "–"))]]
    parts.append(details("This run", table(["", ""], note)))
    return section("settings", "Settings", sentence, parts)


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


SECTIONS: Mapping[str, Callable[[RunRecord, Findings], Element]] = {
    "Curves": curves,
    "Reconstructions": reconstructions,
    "Samples": samples,
    "Neighbours": neighbours,
    "Memorisation": memorisation,
    "Best of N": best_of_n,
    "Codebook": codebook,
    "Data": data,
    "Time": time,
    "Settings": settings,
}
"""What links to them say, in the order of the page."""
