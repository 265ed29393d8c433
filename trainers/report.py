"""A training run on one page: pictures, curves, what changed besides, what was asked, and how to do it again."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean

from PIL import Image, ImageDraw
from torch import Tensor

from ..vlm.question import TEACH
from .dual_process import Run
from .guards import NOTICEABLE, RELATIVE, STRANGE, became, faults
from .looks import CHECK_SEEDS
from .sheet import GAP, INK, PAPER, font, grid, to_image

SMOOTHED_STEPS = 8  # a step sees only a few pictures, its own score jumps
SHEET_SIDE = 384  # px, the longer side of a picture on the sheet
SHEET_PAIRS = 8  # at most
COLOURS = ("#238551", "#1c7ed6", "#b7791f", "#d6336c", "#7048e8", "#d9480f")  # of questions, on white
ON_BLACK = ("#7bd88f", "#5ad4e6", "#fce566", "#fc618d", "#948ae3", "#fd9353")
MEASURES = {
    "luminance": "brightness",
    "saturation": "colourfulness",
    "edge_density": "edges",
    "colour_entropy": "number of colours",
    "diversity": "difference from each other",
    "clipped": "black or white parts",
}
Point = tuple[float, float]


def smoothed(scores: Sequence[float], steps: Iterable[int]) -> list[Point]:
    """Some of the steps, counted from 1, each with the mean of the last ``SMOOTHED_STEPS`` scores up to it."""
    return [(step, fmean(scores[max(0, step - SMOOTHED_STEPS) : step])) for step in steps]


@dataclass(frozen=True)
class Curve:
    """A question's scores as (step, 0..1): of every step, smoothed, and what each judge gave at the checks."""

    steps: list[Point]
    smooth: list[Point]
    checks: list[Point]
    second: list[Point]


class Report:
    """What is told about a run.

    Args:
        run: with at least one check. Only the pictures of the first and the last one are kept, so that a report that
            waits in ComfyUI's cache does not fill the memory.
        header: the LoRA's, see ``lora_metadata.metadata``.
    """

    def __init__(self, run: Run, header: dict[str, str]):
        self.header, self.story = header, json.loads(header["dual_process"])
        self.before, self.after = run.checks[0], run.checks[-1]
        looks = {check.step: replace(check, pictures=None) for check in run.checks}  # the kept one may come twice
        self.checks = [looks[step] for step in sorted(looks)]
        self.loss, self.scores = run.loss, run.scores
        self.ended, self.proved = run.ended(), run.proved()

    @property
    def title(self) -> str:
        """What was taught; what had only to stay, or was watched, is left out."""
        return self.header["modelspec.title"]

    @property
    def last_step(self) -> int:
        return max(1, len(self.loss), self.checks[-1].step)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Pictures [3, H, W] in 0..1 of one seed each, before and after."""
        return list(zip(self.before.pictures, self.after.pictures))

    def captions(self) -> list[str]:
        """How each pair is drawn again."""
        pictures = len(self.before.pictures)
        of_a_seed = pictures // self.story["settings"]["check_seeds"]
        seeds = [n // of_a_seed for n in range(pictures)]
        return [f"seed {CHECK_SEEDS + seed}, prompt {1 + seed % self.story['prompts']}" for seed in seeds]

    def curve(self, question: int) -> Curve:
        """The scores of a question, by its number from 0."""
        scores = [step[question] for step in self.scores]
        return Curve(
            list(enumerate(scores, 1)),
            smoothed(scores, range(1, len(scores) + 1)),
            [(check.step, check.scores[question]) for check in self.checks],
            [(check.step, check.second[question]) for check in self.checks if check.second],
        )

    def judged(self, question: int) -> list[tuple[str, float, float]]:
        """Name of each judge with the question's held-out score before and after."""
        rows = [(self.story["judge"], self.before.scores[question], self.after.scores[question])]
        if self.story["second_judge"]:
            rows.append((self.story["second_judge"], self.before.second[question], self.after.second[question]))
        return rows

    def outcome(self) -> str:
        """How the run ended, in a sentence."""
        return f"{self.ended}. Kept: the LoRA of step {self.after.step}." + (f" {self.proved}." if self.proved else "")

    def changed(self) -> str:
        """What became of the pictures besides, in a sentence."""
        noticed = became(self.after.changes, self.before.changes)
        return f"{noticed or f'No measure of the pictures changed by more than {NOTICEABLE:.0%}'}."


def numbers(report: Report) -> dict:
    """All of the run that is no picture, for programs: ``story`` as in the LoRA's header, ``loss`` and ``scores`` [Q]
    of every step, and ``checks``, the looks at held-out seeds in order."""
    checks = [
        {"step": check.step, "scores": check.scores, "second": check.second, "changes": check.changes}
        for check in report.checks
    ]
    return {"story": report.story, "loss": report.loss, "scores": report.scores, "checks": checks}


def page(report: Report) -> str:
    """One HTML file that needs no other: pictures and curves are in it, and nothing is loaded or run."""
    several = len(report.story["questions"]) > 1
    stop_at = report.story["settings"]["stop_at"]
    scores = [_score_lines(report.curve(n), n, report.last_step) for n in range(len(report.story["questions"]))]
    looks = _svg([*scores, _level(stop_at, "stop at"), _kept(report)], ["0%", "50%", "100%"], report.last_step)
    top = max(report.loss, default=0) or 1.0
    loss = [(step, value / top) for step, value in enumerate(report.loss, 1)]
    losses = _svg(
        [_line(loss, report.last_step, "loss"), _kept(report)], ["0", f"{top / 2:.3g}", f"{top:.3g}"], report.last_step
    )
    drawn = "".join(
        f"<figure><div><img src='{_data_uri(before)}' alt='before'><img src='{_data_uri(after)}' alt='after'></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for (before, after), caption in zip(report.pairs(), report.captions())
    )
    parts = [
        f"<header><p class='kind'>Dual-Process run report · {escape(report.header['modelspec.date'])}</p>"
        f"<h1>{escape(report.title)}</h1><p>{escape(report.outcome())} {escape(report.changed())}</p></header>",
        f"<section class='tiles'>{_tiles(report)}</section>",
        f"<section><h2>Before and after</h2><p>Seeds that were never trained on; left before this training, right with "
        f"the LoRA at strength 1.</p><div class='pairs'>{drawn}</div></section>",
        f"<section><h2>What was asked</h2>{_questions(report)}</section>",
        f"<section><h2>Wanted answer{'s' if several else ''}, step by step</h2>{looks}{_legend(report)}</section>",
        f"<section><h2>Loss</h2>{losses}</section>" if report.loss else "",
        f"<section><h2>What else changed</h2><p>{escape(report.changed())} No judge was "
        f"asked.</p>{_changes(report)}</section>",
        f"<section><h2>Settings</h2>{_settings(report)}</section>",
        f"<section><h2>How to do it again</h2>{AGAIN}</section>",
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(report.title)}</title><style>{_style()}</style>"
    )
    body = "\n".join(parts)
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head>\n<body>{body}</body></html>\n"


AGAIN = """<ol>
<li>Drop the PNG of the same name on ComfyUI's canvas: it holds the whole workflow (unless ComfyUI ran with
<code>--disable-metadata</code>).</li>
<li>Load the same model, VAE and judges; the versions are in the table above. On one CPU the same seed gives the
same LoRA, unless another part is recomputed for want of memory; on a GPU it gives a similar one.</li>
<li>To draw a pair: KSampler with the seed below it, the settings above, and the LoRA at strength 0 and 1.</li>
</ol>"""


def _tiles(report: Report) -> str:
    """The question taught that is least certain in the end, for each judge, in large numbers."""
    tiles = []
    for number, (judge, _, _) in enumerate(report.judged(0)):
        pairs = [report.judged(n)[number][1:] for n, q in enumerate(report.story["questions"]) if q["role"] == TEACH]
        before, after = min(pairs, key=lambda pair: pair[1])
        role = ("judge", "second judge, never trained against")[number]
        least = ", the question it is least sure of" if len(pairs) > 1 else ""
        tiles.append((f"{before:.0%} → {after:.0%}", f"{role}{least}", judge))
    tiles.append(
        (str(len(report.loss)), f"steps of {report.story['settings']['steps']} at most", report.story["model"])
    )
    return "".join(
        f"<div><b>{escape(a)}</b><span>{escape(b)}</span><small>{escape(c)}</small></div>" for a, b, c in tiles
    )


def _questions(report: Report) -> str:
    judges = [judge for judge, _, _ in report.judged(0)]
    rows = [
        [
            question["text"],
            question["answer"],
            f"{question['weight']:g}",
            question["role"],
            _told(question["guide"]) if question["guide"] else "none",
            *(f"{before:.1%} → {after:.1%}" for _, before, after in report.judged(n)),
        ]
        for n, question in enumerate(report.story["questions"])
    ]
    return _table(["question", "wanted", "weight", "role", "guide", *judges], rows, swatch=True)


def _changes(report: Report) -> str:
    """How the kept pictures differ from those before, with a bar to either side for each measure."""
    found = report.after.changes
    if not found:
        kept = "The LoRA that was kept changes nothing." if report.loss else "Nothing was trained."
        return f"<p>{kept}</p>"
    noticed = faults(found, NOTICEABLE)
    widest = max(NOTICEABLE, *(abs(found[name]) for name in MEASURES))
    rows = []
    for name, measure in MEASURES.items():
        change, unit = found[name], "of what it was" if name in RELATIVE else "of the picture"
        width = 50 * abs(change) / widest
        side = f"left:{50 - width if change < 0 else 50:.1f}%;width:{width:.1f}%"
        mark, words = (" class='bad'", noticed[name]) if name in noticed else ("", "fine")
        rows.append(
            f"<tr{mark}><td>{measure}</td><td class='number'>{change:+.1%}</td>"
            f"<td class='bar'><i style='{side}'></i></td><td>{unit}</td><td>{words}</td></tr>"
        )
    strange = ""
    if times := found.get("strangeness"):
        mark = " class='bad'" if times > STRANGE else ""
        strange = (
            f"<p{mark}>To the model without the LoRA these pictures look {times:.1f} times as dirty as its own (by "
            "what it cleans out of them, given a little noise); "
            f"above {STRANGE:g}, look for stains and false lines.</p>"
        )
    moved = f"<p>A pixel differs by {found['distance']:.1%} on average.</p>" if "distance" in found else ""
    return f"<table>{''.join(rows)}</table>{strange}{moved}"


def _settings(report: Report) -> str:
    story, header = report.story, report.header
    size = f"{header['modelspec.resolution']}, {header['ss_batch_size_per_device']} per step"
    about = {
        "model": story["model"],
        "judge": story["judge"],
        "second judge": story["second_judge"] or "none",
        "pictures": size,
        "prompts": story["prompts"],
        "prompt texts": "; ".join(story["prompt_texts"]),
        **story["choices"],
        "sampler steps": story["sampler_steps"],
        "sigmas": ", ".join(f"{sigma:.4g}" for sigma in story["sigmas"]),
        "cfg": story["cfg"],
        "LoRA": f"rank {header['ss_network_dim']}, alpha {story['alpha']:g}, {story['layers']} layers",
        "checkpointing": header["ss_gradient_checkpointing"],
        "objective": f"{story['objective']}, target {story['target']:g}",
        **story["settings"],
        "Dual-Process": story["version"],
        **story["made_with"],
    }
    return "<div class='settings'>" + _table(None, [[key, str(value)] for key, value in about.items()]) + "</div>"


def _told(value) -> str:
    """Nested dicts as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_told(inner)}" for key, inner in value.items())
    return str(value)


def _table(headings: list[str] | None, rows: list[list[str]], swatch: bool = False) -> str:
    """Rows of plain text; ``swatch`` puts the colour of the row's question before its first cell."""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in headings)}</tr>" if headings else ""
    lines = []
    for n, row in enumerate(rows):
        mark = f"<i class='swatch q{n % len(COLOURS)}'></i>" if swatch else ""
        lines.append(f"<tr>{''.join(f'<td>{mark * (i == 0)}{escape(cell)}</td>' for i, cell in enumerate(row))}</tr>")
    return f"<table>{head}{''.join(lines)}</table>"


# Curves, in a box of 720 x 260 with room for numbers at the left and below.
LEFT, RIGHT, TOP, BOTTOM = 46.0, 712.0, 12.0, 226.0


def _at(point: Point, last: int) -> tuple[float, float]:
    """Where a (step, 0..1) lies in the box."""
    return LEFT + (RIGHT - LEFT) * point[0] / last, BOTTOM - (BOTTOM - TOP) * point[1]


def _line(points: Sequence[Point], last: int, kind: str) -> str:
    places = " ".join("{:.1f},{:.1f}".format(*_at(point, last)) for point in points)
    return f"<polyline class='{kind}' points='{places}'/>"


def _score_lines(curve: Curve, question: int, last: int) -> str:
    """Steps faint, smoothed steps solid, the judge's looks as discs, the second judge's as rings on a dashed line."""
    discs = "".join(
        "<circle class='disc' cx='{:.1f}' cy='{:.1f}' r='4.5'/>".format(*_at(p, last)) for p in curve.checks
    )
    rings = "".join(
        "<circle class='ring' cx='{:.1f}' cy='{:.1f}' r='4.5'/>".format(*_at(p, last)) for p in curve.second
    )
    lines = _line(curve.steps, last, "raw") + _line(curve.smooth, last, "smooth") + _line(curve.second, last, "second")
    return f"<g class='q{question % len(COLOURS)}'>{lines}{discs}{rings}</g>"


def _level(height: float, name: str) -> str:
    y = _at((0, height), 1)[1]
    return (
        f"<line class='mark' x1='{LEFT}' x2='{RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{LEFT + 6}' y='{y + 14:.1f}'>{name} {height:.0%}</text>"
    )


def _kept(report: Report) -> str:
    x = _at((report.after.step, 0), report.last_step)[0]
    text, anchor = (x - 6, "end") if x > (LEFT + RIGHT) / 2 else (x + 6, "start")
    return (
        f"<line class='mark' x1='{x:.1f}' x2='{x:.1f}' y1='{TOP}' y2='{BOTTOM}'/>"
        f"<text x='{text:.1f}' y='{BOTTOM - 8}' text-anchor='{anchor}'>kept</text>"
    )


def _svg(lines: list[str], heights: list[str], last: int) -> str:
    """Curves over a grid with numbers at its sides; ``heights`` are written at even distances, from below."""
    back = []
    for n, height in enumerate(heights):
        y = _at((0, n / (len(heights) - 1)), 1)[1]
        back.append(f"<line class='grid' x1='{LEFT}' x2='{RIGHT}' y1='{y}' y2='{y}'/>")
        back.append(f"<text x='{LEFT - 8}' y='{y + 4}' text-anchor='end'>{height}</text>")
    for step in sorted({0, last // 2, last}):
        x = _at((step, 0), last)[0]
        back.append(f"<text x='{x:.1f}' y='{BOTTOM + 20}' text-anchor='middle'>{step}</text>")
    return f"<svg viewBox='0 0 720 252' role='img'>{''.join(back)}{''.join(lines)}</svg>"


def _legend(report: Report) -> str:
    words = [f"{question['text']} {question['answer']}" for question in report.story["questions"]]
    questions = "".join(
        f"<span><i class='swatch q{n % len(COLOURS)}'></i>{escape(text)}</span>" for n, text in enumerate(words)
    )
    second = (
        f"; ring and dashes: {report.story['second_judge']}, the second judge" if report.story["second_judge"] else ""
    )
    judge = report.story["judge"]
    how = f"Line: pictures of training, over {SMOOTHED_STEPS} steps. Disc: held-out seeds, {judge}{second}."
    return f"<p class='legend'>{questions}</p><p class='legend'>{escape(how)}</p>"


def _data_uri(picture: Tensor) -> str:
    file = io.BytesIO()
    to_image(picture).save(file, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _style() -> str:
    def colours(names: Sequence[str]) -> str:
        return "".join(f".q{n}{{--q:{name}}}" for n, name in enumerate(names))

    return STYLE + colours(COLOURS) + f"@media (prefers-color-scheme:dark){{{DARK}{colours(ON_BLACK)}}}"


STYLE = """
:root{color-scheme:light dark;--paper:#f6f6f4;--card:#fff;--ink:#1b1c1e;--quiet:#6b6f76;--rule:#e3e3df;--bad:#c92a2a}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:1080px;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 .6rem;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .5rem}
header p{margin:0;max-width:60rem}
p{margin:.3rem 0 .8rem}
.kind,.legend,figcaption,small,.tiles span{color:var(--quiet);font-size:.86rem}
section{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:1.2rem 1.35rem;margin-top:1.1rem;
overflow-x:auto}
.tiles{background:none;border:0;padding:0;display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:1.1rem}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:1rem 1.35rem;display:grid}
.tiles b{font-size:1.75rem;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.1rem}
figure{margin:0}figure div{display:grid;grid-template-columns:1fr 1fr;gap:3px;border-radius:10px;overflow:hidden}
img{display:block;width:100%}
figcaption{margin-top:.35rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{color:var(--quiet);font-weight:500;font-size:.86rem}
th,td{text-align:left;vertical-align:top;padding:.45rem 1rem .45rem 0;border-top:1px solid var(--rule);
white-space:pre-line;overflow-wrap:break-word}
tr:first-child>*{border-top:0}
.settings table{display:block;columns:2 20rem;column-gap:2.5rem}
.settings tbody{display:contents}.settings tr{display:grid;grid-template-columns:9rem 1fr;break-inside:avoid}
.settings td:first-child{color:var(--quiet)}
.settings td{min-width:0;overflow-wrap:anywhere;border-top:0;border-bottom:1px solid var(--rule)}
.number{text-align:right}
.bar{position:relative;width:34%;background:linear-gradient(var(--rule),var(--rule)) 50%/1px 100% no-repeat}
.bar i{position:absolute;top:.85rem;height:.5rem;border-radius:3px;background:var(--quiet)}
.bar+td{padding-left:1rem;color:var(--quiet)}
.bad{color:var(--bad);font-weight:600}.bad .bar i{background:var(--bad)}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--q);margin-right:.5em}
.legend{margin:.4rem 0 0}.legend span{margin-right:1.2rem}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--quiet);font-size:11px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
polyline{fill:none;stroke:var(--q);stroke-linejoin:round}
.raw{stroke-width:1;opacity:.28}.smooth{stroke-width:2.2}.second{stroke-width:1.4;stroke-dasharray:5 4}
.disc{fill:var(--q)}.ring{fill:var(--card);stroke:var(--q);stroke-width:2}
.loss{stroke:var(--ink);stroke-width:1.4}
.grid{stroke:var(--rule)}.mark{stroke:var(--quiet);stroke-dasharray:2 4}
code{font-size:.92em}
"""
DARK = ":root{--paper:#151618;--card:#1e2023;--ink:#eceae6;--quiet:#9a9ea6;--rule:#31343a;--bad:#ff8787}"


def sheet(report: Report) -> Image.Image:
    """The page's pictures and curves as one picture: questions and scores above, pairs, and the curves below."""
    small = [[_on_sheet(picture) for picture in pair] for pair in report.pairs()[:SHEET_PAIRS]]
    across = min(2, len(small))
    rows = [sum(small[n : n + across], []) for n in range(0, len(small), across)]
    pictures = grid(rows, ["before", "after"] * across)
    letters = font(20)
    words = _lines(report, int((pictures.width - 4 * GAP) / letters.getlength("n")))
    above = 2 * GAP + 28 * len(words)
    width, below = pictures.width, int(pictures.width * 252 / 720)
    whole = Image.new("RGB", (width, above + pictures.height + below), PAPER)
    draw = ImageDraw.Draw(whole)
    for n, (text, colour) in enumerate(words):
        draw.text((2 * GAP, 2 * GAP + 28 * n), text, fill=colour, font=letters)
    whole.paste(pictures, (0, above))
    _draw_curves(draw, report, above + pictures.height, width / 720)
    return whole


def _on_sheet(picture: Tensor) -> Image.Image:
    image = to_image(picture)
    scale = SHEET_SIDE / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _lines(report: Report, letters: int) -> list[tuple[str, str]]:
    """What stands above the pictures, in lines of so many letters, with their colours."""
    lines = []
    for n, question in enumerate(report.story["questions"]):
        judged = ", ".join(f"{judge} {before:.0%} to {after:.0%}" for judge, before, after in report.judged(n))
        text = f"{question['text']} {question['answer']}   ({judged})"
        lines += [(line, COLOURS[n % len(COLOURS)]) for line in textwrap.wrap(" ".join(text.split()), letters)]
    return lines + [(line, INK) for line in textwrap.wrap(f"{report.outcome()} {report.changed()}", letters)]


def _draw_curves(draw: ImageDraw.ImageDraw, report: Report, top: int, scale: float) -> None:
    """The page's curves, at ``scale`` times their size."""
    letters, grey, last = font(int(11 * scale)), "#999999", report.last_step

    def at(point: Point) -> tuple[float, float]:
        x, y = _at(point, last)
        return x * scale, top + y * scale

    for height in (0, 0.5, 1):
        draw.line([at((0, height)), at((last, height))], fill="#dddddd")
        x, y = at((0, height))
        draw.text((x - GAP, y), f"{height:.0%}", fill=grey, font=letters, anchor="rm")
    for step in sorted({0, last // 2, last}):
        x, y = at((step, 0))
        draw.text((x, y + GAP), str(step), fill=grey, font=letters, anchor="mt")
    draw.line([at((report.after.step, 0)), at((report.after.step, 1))], fill=grey)
    for question in range(len(report.story["questions"])):
        curve, colour = report.curve(question), COLOURS[question % len(COLOURS)]
        draw.line([at(point) for point in curve.smooth], fill=colour, width=round(2 * scale), joint="curve")
        for points, inside in ((curve.checks, colour), (curve.second, PAPER)):
            for point in points:
                draw.circle(at(point), 4 * scale, fill=inside, outline=colour, width=round(2 * scale))
