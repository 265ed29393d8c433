"""Teach the judge drawn guides: is the horizon on the red line, do the colours match the swatches, is the line as thick
as the red stroke, does the sky fill the outlined area; and to compare a picture with the one before (`pairs.py`). What
it answered before without a guide is held. The letters of Depth Guide cannot be read at 64 px, by anybody.

Wanted log-odds fall evenly with the distance between picture and guide, so that they lead there from anywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from ..vlm.guides import (
    COMPOSITION_QUESTION,
    HORIZON_QUESTION,
    LINE_WEIGHT_QUESTION,
    PALETTE_QUESTION,
    Areas,
    Horizon,
    Palette,
    Stroke,
    palette_of,
)
from ..vlm.overlay import Drawing
from . import scenes
from .build_judge import (
    ASKED,
    FULL_ODDS,
    Pictures,
    Prompts,
    Texts,
    answer_ids,
    image_features,
    moved_where_it_errs,
    odds_of_yes,
)
from .build_student import Student, half_denoised
from .judge_folder import IMAGE_TOKENS, new_processor, save_judge
from .pairs import COMPARISONS, Pairs
from .pictures import RUINS
from .training import Average, descend, learning_rate
from .wide_scenes import SPANS, any_measures, share_of_span, through

log = logging.getLogger(__name__)

LOOK_STEPS, LOOK_RATE, STEPS, RATE, SHOWN, PLAIN, PAIRS = 1000, 1e-3, 3600, 5e-4, 24, 4, 12
POOL = 1024  # pictures that came through the generator, and as many through the autoencoder alone
ATTACK = 1.0  # L2 distance at most, over all channels and pixels
SWATCHES = 1024  # scenes of every palette, whose colours are made swatches of


@dataclass(frozen=True)
class Kind:
    """A guide: its question, which of `SPANS` it is about, and the distance between picture and guide at which the
    answer turns from Yes to No; at ``far`` it is as sure as it can be."""

    question: str
    about: str
    near: float
    far: float

    def odds(self, distance: Tensor) -> Tensor:
        """Wanted log-odds of Yes."""
        inside, outside = 1 - distance / self.near, -(distance - self.near) / (self.far - self.near)
        return FULL_ODDS * torch.where(distance < self.near, inside, outside.clamp(min=-1))


KINDS = {
    "horizon": Kind(HORIZON_QUESTION, "horizon", 0.06, 0.45),
    "palette": Kind(PALETTE_QUESTION, "palette", 0.2, 0.9),
    "line": Kind(LINE_WEIGHT_QUESTION, "line", 0.5, 3.0),
    "area": Kind(COMPOSITION_QUESTION, "horizon", 0.06, 0.45),
}
NAMES = list(KINDS)
# in turn: whether a line is on another or as thick as another is hardest to learn
ASKED_ABOUT = ("horizon", "palette", "line", "horizon", "area", "line")
SKY = "sky"  # what the outlined area is for


class Swatches:
    """Palettes of scenes; ``at`` draws one whose scene lies close to a value, 0 (cool) to 1 (warm)."""

    def __init__(self, generator: torch.Generator, count: int = SWATCHES) -> None:
        measures = scenes.attributes(torch.rand(count, len(scenes.FACTORS), generator=generator))
        pictures = scenes.draw(measures | {"palette": torch.linspace(0, 1, count)})
        counts = torch.randint(2, 6, (count,), generator=generator).tolist()
        self.palettes = [Palette(palette_of(picture, n)) for picture, n in zip(pictures, counts, strict=True)]

    def at(self, value: float) -> Palette:
        return self.palettes[round(value * (len(self.palettes) - 1))]


class Guided:
    """Endless pictures with guides: scenes of any height, colour and stroke, a quarter out of the autoencoder and three
    eighths out of the generator."""

    def __init__(self, pictures: Pictures, wide: tuple[dict[str, Tensor], Tensor]) -> None:
        self.pictures, self.wide, self.generator = pictures, wide, pictures.generator
        swatches = Swatches(self.generator)
        self.drawings: dict[str, Callable[[float], Drawing]] = {
            "horizon": lambda value: Horizon(1 - value), "palette": swatches.at, "line": Stroke,
            "area": sky_area}

    def next(self, count: int = SHOWN) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(pictures [B, 3, 64, 64], drawings [B, 4, 64, 64], kinds [B], wanted log-odds [B], values [B, 7] of
        picture (`SPANS`) and guide (`KINDS`), as shares of their spans; NaN for guides that are not there)"""
        g = self.generator
        images, values = self._pictures(count)
        kinds = torch.tensor([NAMES.index(name) for name in ASKED_ABOUT]).repeat(-(-count // len(ASKED_ABOUT)))[:count]
        drawings, odds = [], []
        shares = torch.full((count, len(SPANS) + len(NAMES)), torch.nan)
        shares[:, : len(SPANS)] = torch.stack([share_of_span(name, values[name]) for name in SPANS], 1)
        for row, name in enumerate(NAMES[kind] for kind in kinds.tolist()):
            kind = KINDS[name]
            value = values[kind.about][row]
            low, high = SPANS[kind.about]
            guide = low + (high - low) * torch.rand((), generator=g)
            if torch.rand((), generator=g) < 0.5:  # near the picture's own, where answers change
                guide = (value + 6 * kind.near * (torch.rand((), generator=g) - 0.5)).clamp(low, high)
            drawings.append(self.drawings[name](guide.item()).draw(scenes.SIDE, scenes.SIDE))
            odds.append(kind.odds((value - guide).abs()))
            shares[row, len(SPANS) + NAMES.index(name)] = share_of_span(kind.about, guide)
        for row in torch.randperm(count, generator=g)[: count // 8].tolist():
            images[row:row + 1] = self.pictures.pick(RUINS)(images[row:row + 1], g)
            odds[row] = torch.tensor(-FULL_ODDS)
            shares[row, : len(SPANS)] = torch.nan
        self.pictures.disturb(images, 1 / 2, 1)
        return images, torch.stack(drawings), kinds, torch.stack(odds), shares

    def _pictures(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scenes [B, 3, 64, 64] and their measures: drawn, through the autoencoder, and through the generator."""
        measures = any_measures(count, self.generator)
        images = scenes.draw(measures)
        ways = torch.randperm(count, generator=self.generator)
        decoded, generated = ways[: count // 4], ways[count // 4: count * 5 // 8]
        for rows, (known, pool) in ((decoded, self.wide), (generated, self.pictures.known_pool())):
            chosen = torch.randint(0, len(pool), (len(rows),), generator=self.generator)
            images[rows] = pool[chosen]
            for name in scenes.PROPERTIES:
                measures[name][rows] = known[name][chosen]
        return images, measures


def sky_area(bottom: float) -> Areas:
    """The part of the frame above this height, 0 (top) to 1, for the sky."""
    mask = torch.zeros(1, scenes.SIDE * 4, scenes.SIDE * 4)
    mask[:, : round(bottom * scenes.SIDE * 4)] = 1
    return Areas(mask, (SKY,))


def under(images: Tensor, drawings: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] with drawings [B, 4, 64, 64] over them."""
    return images * (1 - drawings[:, 3:]) + drawings[:, :3]


def teach_guides(first: Path, folder: Path, student: Path, vae: nn.Module, less: int = 1,
                 pool: int = POOL) -> dict[str, float]:
    """Go on with the judge in ``first``, on a CPU; writes it to ``folder``.

    Args:
        student: folder of the student, which a part of the pictures come through.
        less: how many times fewer steps are taken.
        pool: number of pictures that are made with it.
    """
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(19)
    start = time.time()
    pictures = Pictures(19, "cpu", half_denoised(Student(student, "cpu"), vae, pool, seed=14))
    wide = through(vae, pool, pictures.generator)
    guided, pairs = Guided(pictures, wide), Pairs(pictures, wide)
    before, model = (AutoModelForImageTextToText.from_pretrained(first, dtype=torch.float32) for _ in range(2))
    before.requires_grad_(False)
    processor = new_processor()
    learn_to_look(model, before, guided, LOOK_STEPS // less)
    learn_to_compare(model, before, processor, guided, pairs, STEPS // less).copy_to(model)
    save_judge(model.half(), processor, folder)
    return {"seconds": time.time() - start}


def learn_to_look(model: nn.Module, before: nn.Module, guided: Guided, steps: int) -> None:
    """Teach the vision tower to measure pictures and guides, read out by a linear layer that is then thrown away; what
    it makes of pictures without guides is held.

    Whether two measures agree is hard to learn from answers alone, for someone who cannot see them yet.
    """
    head = nn.Linear(model.config.text_config.hidden_size * IMAGE_TOKENS, len(SPANS) + len(NAMES))
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        images, drawings, _, _, shares = guided.next(SHOWN + PLAIN)
        plain, _, _ = guided.pictures.next(PLAIN)
        with torch.no_grad():
            held = image_features(before, plain)
        kept = (image_features(model, plain) - held).square().mean() / held.square().mean()
        known = ~shares.isnan()
        read = head(image_features(model, under(images, drawings)).flatten(1))
        error = (read - shares.nan_to_num()).square().mul(known).sum(0) / known.sum(0)
        descend(error.sum() + kept, parameters, optimiser, learning_rate(step, steps, LOOK_RATE))
        if step % 50 == 0:
            errors = [round(e, 3) for e in error.sqrt().tolist()]
            log.info("look %d/%d errors %s kept %.3f", step, steps, errors, kept.item())


def learn_to_compare(
        model: nn.Module, before: nn.Module, processor: Any, guided: Guided, pairs: Pairs, steps: int) -> Average:
    """Train the whole model on questions with and without guides, and about pairs; returns the average of its
    weights."""
    ids, pictures = answer_ids(processor), guided.pictures
    plain, texts = Prompts(processor, "cpu"), Texts(processor, [kind.question for kind in KINDS.values()], "cpu")
    compared = Texts(processor, [kind.question for kind in COMPARISONS.values()], "cpu", pictures=2)

    def judged(images: Tensor, drawings: Tensor, kinds: Tensor) -> Tensor:
        return odds_of_yes(model, texts, ids, under(images, drawings), kinds[:, None])[:, 0]

    parameters, average, recent = list(model.parameters()), Average(model, 0.995), []
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        known, _, _ = pictures.next(PLAIN)
        weights = plain.weights(1.0)
        asked = torch.multinomial(weights, PLAIN * ASKED, True, generator=pictures.generator).view(PLAIN, ASKED)
        images, drawings, kinds, wanted, _ = guided.next()
        if step > steps // 2 and step % 4 == 3:
            images = moved_where_it_errs(images, lambda moved, rows: fault(
                judged(moved, drawings[rows], kinds[rows]), wanted[rows]), ATTACK, pictures.generator)
        with torch.no_grad():
            held = odds_of_yes(before, plain, ids, known, asked)
        kept = smooth_l1_loss(odds_of_yes(model, plain, ids, known, asked), held)
        odds = judged(images, drawings, kinds)
        taught = fault(odds, wanted)
        shown, rows, wanted_told = pairs.next(PAIRS)
        told = odds_of_yes(model, compared, ids, shown, rows[:, None])[:, 0]
        loss = taught + 0.5 * fault(told, wanted_told) + 0.5 * kept
        descend(loss, parameters, optimiser, learning_rate(step, steps, RATE))
        average.update(model)
        kinds = torch.cat((kinds, len(NAMES) + rows))
        recent.append((torch.cat((odds, told)).detach(), torch.cat((wanted, wanted_told)), kinds))
        if step % 50 == 49:
            log.info("guides %d/%d taught %.3f kept %.3f %s", step + 1, steps, taught.item(), kept.item(),
                     correlations(*map(torch.cat, zip(*recent, strict=True))))
            recent.clear()
    return average


def fault(odds: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy against the graded answer, and the distance between log-odds, which slopes everywhere."""
    return binary_cross_entropy_with_logits(odds, torch.sigmoid(wanted)) + 0.3 * smooth_l1_loss(odds, wanted)


def correlations(odds: Tensor, wanted: Tensor, kinds: Tensor) -> dict[str, float]:
    """Of each guide and comparison, between the log-odds of a judge and those wanted."""
    return {name: round(torch.corrcoef(torch.stack((odds[kinds == i], wanted[kinds == i])))[0, 1].item(), 2)
            for i, name in enumerate((*NAMES, *(f"{name} of pairs" for name in COMPARISONS)))}
