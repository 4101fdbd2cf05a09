"""The page: one HTML file that needs no network and no script, for light and dark screens, wide and narrow."""

from __future__ import annotations

from dalle_mini_impl import __version__
from dalle_mini_impl.report.curves import NAMES
from dalle_mini_impl.report.elements import Element, Node, tag, to_html
from dalle_mini_impl.report.measure import Findings
from dalle_mini_impl.report.records import RunRecord
from dalle_mini_impl.report.sections import SECTIONS, against_chance, without_held_out
from dalle_mini_impl.report.svg import number, percent_of
from dalle_mini_impl.training.budget import format_duration

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2127; --soft: #5b6470; --rule: #d9dee5; --card: #f5f7f9; --link: #0b62c4;
  --c0: #7b8794; --c1: #0b62c4; --c2: #c2410c; --c3: #0f7b4f; --c4: #8b3fb8; --level: #a1123c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e7eaee; --soft: #a3acb8; --rule: #343b44; --card: #1d2228; --link: #75b4ff;
    --c0: #8d99a6; --c1: #5aa5ff; --c2: #ff9457; --c3: #4cc38a; --c4: #cf8df5; --level: #ff7a9c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, nav { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 1.45rem; }
h3 { margin: 26px 0 6px; font-size: 1.15rem; }
h4 { margin: 0 0 4px; font-size: 1rem; }
section { margin: 44px 0 0; padding-top: 22px; border-top: 1px solid var(--rule); }
.lead, .note { max-width: 76ch; margin: 0 0 14px; color: var(--soft); }
.missing { padding: 10px 14px; border-left: 4px solid var(--rule); background: var(--card); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 0; padding: 0; list-style: none; }
a { color: var(--link); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0; }
.fact { padding: 10px 14px; border-radius: 8px; background: var(--card); }
.fact dt { color: var(--soft); font-size: 0.85rem; }
.fact dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.fact dd small { display: block; color: var(--soft); font-size: 0.8rem; font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px 28px; }
figure { margin: 0; min-width: 0; }
.figures > figure { max-width: 640px; padding: 14px; border-radius: 8px; background: var(--card); }
.scroll + .figures, .note { margin-top: 16px; }
figcaption { margin-top: 6px; color: var(--soft); font-size: 0.9rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 14px system-ui, sans-serif; }
svg .tick { fill: var(--soft); font-size: 13px; }
svg .level-name { fill: var(--level); font-size: 13px; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
@media (max-width: 560px) {
  svg text, svg .tick, svg .level-name { font-size: 18px; }
}
.grid { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--level); stroke-width: 1.5; stroke-dasharray: 6 4; }
polyline { fill: none; stroke: currentColor; stroke-linejoin: round; }
polyline.bold { stroke-width: 2.4; }
polyline.pale { stroke-width: 1.3; opacity: 0.85; }
.dot, .area { fill: currentColor; }
.area { opacity: 0.75; }
.band { fill: currentColor; opacity: 0.14; }
.interval { stroke: currentColor; stroke-width: 4; stroke-linecap: round; opacity: 0.45; }
.zone { fill: var(--level); opacity: 0.16; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 8px; font-size: 0.88rem; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key i { width: 20px; border-top: 3px solid currentColor; }
.key i.pale { border-top-width: 1.5px; }
details { margin: 0 0 8px; }
summary { cursor: pointer; padding: 4px 0; }
img { max-width: 100%; height: auto; border-radius: 4px; }
img.small { width: 100%; image-rendering: pixelated; }
img.sheet { display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.card { padding: 12px; border-radius: 8px; background: var(--card); }
.card p { margin: 0 0 8px; font-size: 0.92rem; line-height: 1.35; overflow-wrap: anywhere; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
.triple figcaption { font-size: 0.78rem; line-height: 1.25; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
footer { max-width: 1160px; margin: 48px auto 0; padding: 16px 20px 40px; color: var(--soft); font-size: 0.85rem; }
"""


def render(record: RunRecord, findings: Findings) -> str:
    """The whole page as HTML."""
    name = record.folder.resolve().name
    built = {label: make(record, findings) for label, make in SECTIONS.items()}
    links = [tag("li", tag("a", label, href=f"#{part.get('id')}")) for label, part in built.items()]
    # Nothing may be loaded, whatever a caption or a name says.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: report"),
        tag("style", _STYLE),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", name),
            tag("p", _state(record) + without_held_out(record), class_="lead"),
            _facts(record, findings),
        ),
        tag("nav", tag("ul", links), aria_label="Sections"),
        tag("main", list(built.values())),
        tag("footer", f"Written by dalle-mini report, dalle_mini_impl {__version__}."),
    )
    return to_html(_page(head, body))


def _page(head: Element, body: Element) -> Element:
    return tag("html", head, body, lang="en")


def _state(record: RunRecord) -> str:
    """Where the run stands, in a sentence."""
    recipe, source = record.recipe.name, record.note["data"]
    if all(stage.progress == "finished" for stage in record.stages.values()):
        return f"Recipe {recipe} on {source}: all stages are finished."
    states = []
    for name, stage in record.stages.items():
        steps = f" ({stage.steps:,} steps so far)" if stage.progress == "not finished" else ""
        states.append(f"{NAMES[name]} {stage.progress}{steps}")
    if record.is_finished:
        return f"Recipe {recipe} on {source}, finished: {', '.join(states)}."
    return f"Recipe {recipe} on {source}, under way: {', '.join(states)}. This page has what there is."


def _facts(record: RunRecord, findings: Findings) -> Element:
    """The numbers to know first."""
    report = record.data_report or {}
    facts: list[tuple[str, str | None, str]] = [
        (
            "training pictures",
            number(report["train"]) if "train" in report else None,
            _captions(report.get("text", {}).get("num_captions")),
        ),
        (
            "parameters",
            number(sum(findings.num_parameters.values())) if findings.num_parameters else None,
            " + ".join(NAMES[name] for name in findings.num_parameters),
        ),
        ("time in training", format_duration(sum(stage.train_sec for stage in record.stages.values())), "all stages"),
        (
            "VAE",
            _unit(record.last("vae", "psnr"), ".1f", "dB"),
            "" if findings.flat_psnr is None else f"flat colours: {findings.flat_psnr:.1f} dB",
        ),
        (
            "codes' perplexity",
            _unit(record.last("vae", "perplexity"), ",.0f", ""),
            f"of {record.recipe.vae.num_codes:,}",
        ),
        (
            "CLIP recall@1",
            _percent(record.last("clip", "text_to_image_recall_at_1")),
            _chance(record.last("clip", "chance_recall_at_1")),
        ),
        (
            "nats a token",
            _unit(record.last("dalle", "image_nll"), ".2f", ""),
            _beside(
                ("trained on", record.last("dalle", "image_nll_trained_on")),
                ("unigram", record.last("dalle", "image_nll_unigram")),
            ),
        ),
    ]
    if findings.audits:
        audit = findings.audits[0]
        facts.append(("nearer to training", percent_of(audit.samples.mean), against_chance(audit)))
    cells: list[Node] = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", beside)), class_="fact")
        for name, value, beside in facts
        if value is not None
    ]
    return tag("dl", cells, class_="facts")


def _captions(count: int | None) -> str:
    """How many captions the training pictures have."""
    return "" if count is None else f"{count:,} captions"


def _unit(value: float | None, form: str, unit: str) -> str | None:
    return None if value is None else f"{value:{form}} {unit}".strip()


def _beside(*values: tuple[str, float | None]) -> str:
    """What is there of some named numbers."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values if value is not None)


def _percent(value: float | None) -> str | None:
    return None if value is None else percent_of(value)


def _chance(value: float | None) -> str:
    return "" if value is None else f"chance {percent_of(value, 1)}"
