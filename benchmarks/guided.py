"""How closely pictures follow a guide that is drawn over them for the judge, said by functions that measure pixels.

A part of `python3 dev.py bench control`: the bundled student is taught with the question of each guide, one LoRA for
every value of it, as the templates do but with batches of 8, and with the questions that compare a picture with the one
before. The judge is the bundled one that reads guides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.utils import save_image

from dual_process.benchmarks.bundled import FEW, TEMPLATES, Laboratory, Lesson
from dual_process.benchmarks.markdown import table_of
from dual_process.benchmarks.table import MEASURES, Table, largest_change
from dual_process.demo.comfyui import PACK
from dual_process.demo.lessons import FOLLOWING, OUTLINED, TINY_GUIDED
from dual_process.demo.measure import share
from dual_process.tiny import scenes
from dual_process.tiny.oracles import measure
from dual_process.tiny.pairs import COMPARISONS
from dual_process.tiny.questions import KEEP_QUESTION
from dual_process.tiny.teach_guides import KINDS, sky_area
from dual_process.trainers.dual_process import Settings
from dual_process.trainers.guards import changes
from dual_process.trainers.objective import MARGIN, Objective
from dual_process.vlm.guides import Horizon, Palette, Stroke, palette_of
from dual_process.vlm.overlay import BeforeAfter, Drawing, Overlay
from dual_process.vlm.question import Question

SWATCHES, BATCH = 3, 8
# kind of guide -> what is drawn (of a scene that has the wanted value, and the value), values
GUIDES: dict[str, tuple[Callable[[Tensor, float], Drawing], tuple[float, ...]]] = {
    "horizon": (lambda scene, value: Horizon(1 - value), (0.3, 0.4, 0.5, 0.6, 0.7)),
    "palette": (lambda scene, value: Palette(palette_of(scene, SWATCHES)), (0.1, 0.3, 0.5, 0.7, 0.9)),
    "line": (lambda scene, value: Stroke(value), (1.5, 2.0, 2.5, 3.0, 3.5)),
    "area": (lambda scene, value: sky_area(value), (0.3, 0.4, 0.5, 0.6, 0.7)),
}
MOVED = {"horizon": 0.04, "palette": 0.1, "line": 0.3}  # what counts as different, in the oracle's units
TARGET = FOLLOWING["target"]
FOLLOWED = {name: FOLLOWING[name] for name in ("stop_at", "drift_limit", "learn_at")}
FOLLOWED["learning_rate"] = TINY_GUIDED.training["learning_rate"]
SETTINGS = {name: replace(TEMPLATES[KINDS[name].about], **FOLLOWED) for name in GUIDES}
SETTINGS["area"] = replace(SETTINGS["area"], prior=OUTLINED["prior"])
COMPARED = {about: replace(TEMPLATES[about], **FOLLOWED) for about in COMPARISONS}


def wanted_scene(about: str, value: float) -> Tensor:
    """A scene [1, 3, 64, 64] whose property has the value (as `scenes.attributes` has it)."""
    measures = scenes.attributes(torch.full((1, len(scenes.FACTORS)), 0.25))
    measures[about] = torch.tensor([value])
    measures["horizon_line"] = measures["line"]
    return scenes.draw(measures)


def guides(seldom: bool = False) -> Iterator[tuple[str, str, Tensor, Overlay]]:
    """Every value of every guide, or three of the five: a row's name, the kind, a scene [1, 3, 64, 64] that has what is
    wanted, the guide."""
    for kind, (drawing, values) in GUIDES.items():
        for value in values[:: 2 if seldom else 1]:
            scene = wanted_scene(KINDS[kind].about, value)
            yield f"guide, {kind} {value:g}", kind, scene, Overlay(drawing(scene[0], value))


def followed(pictures: Tensor, about: str, target: float) -> dict[str, float]:
    """How far clean pictures [N, 3, H, W] are from the target, as a mean; their mean; share that is clean. Where none
    is, nothing but that."""
    found = measure(pictures)
    values = found[MEASURES[about]][found["readable"]]
    if not len(values):
        return {"readable": 0.0}
    return {
        "error": (values - target).abs().mean().item(),
        "mean": values.mean().item(),
        "readable": share(found["readable"]),
    }


def moved(before: Tensor, after: Tensor, about: str, least: float) -> dict[str, float]:
    """Of pictures [N, 3, H, W] that are clean before and after, seed by seed: how far the measure moved as a mean, and
    the share in which it moved by ``least`` or more, whose sign is that of the wanted way; share of ``after`` that is
    clean. Where no pair is clean, nothing but that."""
    first, second = measure(before), measure(after)
    clean = first["readable"] & second["readable"]
    steps = (second[MEASURES[about]] - first[MEASURES[about]])[clean]
    readable = share(second["readable"])
    if not len(steps):
        return {"readable": readable}
    return {"mean": steps.mean().item(), "moved": share(steps / least >= 1), "readable": readable}


def teach_all(table: Table, laboratory: Laboratory, only: str = "", seldom: bool = False) -> None:
    """Add a row for every value of every guide and for every comparison, with three training seeds, unless it is there;
    ``only``: whose name begins so, ``seldom``: three of the five values, one seed."""
    laboratory.ask(PACK / "tiny" / "judge_of_guides")

    def learn(name: str, question: Question, settings: Settings) -> Lesson | None:
        """What came of a row's training, unless it is there or not asked for."""
        if not name.startswith(only) or table.has(name, settings.seed):
            return None
        goal = Objective([question, Question(KEEP_QUESTION, keep=True)], MARGIN, TARGET)
        return laboratory.learn(goal, settings, FEW, batch=BATCH)

    for seed, (name, kind, scene, guide) in itertools.product(range(1 if seldom else 3), guides(seldom)):
        if lesson := learn(name, Question(KINDS[kind].question, guide=guide), replace(SETTINGS[kind], seed=seed)):
            about = KINDS[kind].about
            target = measure(scene)[MEASURES[about]].item()
            before, after = (followed(pictures, about, target) for pictures in (lesson.before, lesson.after))
            changed = changes(lesson.before, lesson.after)
            table.add(name, seed, lesson, {}, {"target": target, "before": before, "after": after, "changes": changed})
    for seed, (about, comparison) in itertools.product(range(1 if seldom else 3), COMPARISONS.items()):
        name, settings = f"before and after, {about}", replace(COMPARED[about], seed=seed)
        if lesson := learn(name, Question(comparison.question, guide=BeforeAfter()), settings):
            least = math.copysign(MOVED[about], comparison.full)
            found = moved(lesson.before, lesson.after, about, least)
            table.add(name, seed, lesson, {}, {"moved": found, "changes": changes(lesson.before, lesson.after)})


def save_examples(table: Table, laboratory: Laboratory) -> None:
    """Beside the table, as a picture: a column for each guide's value whose LoRA is there; on top what the judge is
    shown of a seed before training, then four seeds with the LoRA."""
    untaught, columns = laboratory.draw(count=1), []
    for name, _, _, guide in guides():
        lora = table.lora(name, 0)
        if lora.exists():
            pictures = torch.cat([*guide.shown([untaught]), laboratory.draw([load_file(lora)], 4, batch=4)])
            columns.append(torch.cat(list(pictures), dim=1))
    if columns:
        save_image(torch.stack(columns), table.file.with_name(f"{table.file.stem}_guides.png"), nrow=len(columns))


def summary(rows: list[dict]) -> str:
    """Markdown: a line for each guide, with the mean distance to it before and after, over all of its values at which a
    picture stayed clean, and all training seeds, beside the worst seed; then a line for each comparison, likewise."""
    columns = (
        "guide, targets, means after, distance before, after, less by, worst seed, correlation, worst seed, clean, "
        "largest change, diversity"
    )
    lines = []
    for kind in GUIDES:
        found = [row for row in rows if row["row"].startswith(f"guide, {kind} ") and "error" in row["after"]]
        seeds = [[row for row in found if row["seed"] == seed] for seed in sorted({row["seed"] for row in found})]
        if not seeds or min(map(len, seeds)) < 2:
            continue
        before, after = (mean(row[when]["error"] for row in found) for when in ("before", "after"))
        less = [
            1 - mean(row["after"]["error"] for row in one) / mean(row["before"]["error"] for row in one)
            for one in seeds
        ]
        follows = [correlation(one) for one in seeds]
        targets = sorted({row["target"] for row in found})
        means = [mean(row["after"]["mean"] for row in found if row["target"] == target) for target in targets]
        clean = mean(row["after"]["readable"] for row in found)
        listed = (", ".join(f"{value:.2f}" for value in values) for values in (targets, means))
        distances = [f"{before:.3f}", f"{after:.3f}", f"{mean(less):.0%}", f"{min(less):.0%}"]
        follow = [f"{mean(follows):.2f}", f"{min(follows):.2f}"]
        lines.append([kind, *listed, *distances, *follow, f"{clean:.1%}", *guarded(found)])
    values = table_of(columns.split(", "), lines)
    columns = "before and after, moved by, moved enough (of clean pairs), worst seed, clean, worst seed, steps, "
    columns = f"{columns}largest change, diversity"
    lines = []
    for about in COMPARISONS:
        found = [row for row in rows if row["row"] == f"before and after, {about}" and "mean" in row["moved"]]
        if found:
            by, enough, clean = ([row["moved"][key] for row in found] for key in ("mean", "moved", "readable"))
            shares = [f"{value:.1%}" for one in (enough, clean) for value in (mean(one), min(one))]
            steps = mean(row["steps"] for row in found)
            lines.append([about, f"{mean(by):+.2f}", *shares, f"{steps:.0f}", *guarded(found)])
    return f"{values}\n\n{table_of(columns.split(', '), lines)}"


def correlation(rows: list[dict]) -> float:
    """Of the rows' targets with what the pictures have as a mean."""
    pairs = [(row["target"], row["after"]["mean"]) for row in rows]
    return torch.corrcoef(torch.tensor(pairs).T)[0, 1].item()


def guarded(rows: list[dict]) -> tuple[str, str]:
    """The largest change of any row against base, whatever was asked for, and of diversity."""
    found = [row["changes"] for row in rows]
    return largest_change(found), f"{min(one['diversity'] for one in found):+.0%}"
