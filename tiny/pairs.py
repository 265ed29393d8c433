"""Pairs of pictures for a judge that compares the second with the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..vlm.guides import BEFORE_AFTER_QUESTION
from . import scenes
from .build_judge import FULL_ODDS, Pictures
from .pictures import RUINS
from .questions import HIGHER, THICKER
from .wide_scenes import SPANS, any_measures


@dataclass(frozen=True)
class Comparison:
    """What is asked, about which measure of `scenes.attributes`, and the difference (second less first) at which the
    answer is as sure as it can be."""

    question: str
    about: str
    full: float

    def odds(self, first: Tensor, second: Tensor) -> Tensor:
        """Wanted log-odds of Yes: they rise evenly with the difference, and are 0 where there is none."""
        return FULL_ODDS * ((second - first) / self.full).clamp(-1, 1)


WARMER = Comparison(BEFORE_AFTER_QUESTION, "palette", 0.5)
COMPARISONS = {
    asked.about: asked
    for asked in (WARMER, Comparison(HIGHER, "horizon", -0.3), Comparison(THICKER, "line", 2.0))
}


class Pairs:
    """Endless pairs of scenes: a third are any two out of autoencoder or generator; of the others two thirds are one
    scene with one measure changed, the rest any two. In an eighth of all the second picture is ruined."""

    def __init__(self, pictures: Pictures, wide: tuple[dict[str, Tensor], Tensor]) -> None:
        self.pictures, self.wide = pictures, wide

    def next(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pictures [B, 2, 3, 64, 64], rows [B] of `COMPARISONS`, wanted log-odds [B])"""
        g, comparisons = self.pictures.generator, list(COMPARISONS.values())
        rows = (torch.arange(count) % len(comparisons))[torch.randperm(count, generator=g)]
        first, second = any_measures(count, g), any_measures(count, g)
        for row in (torch.rand(count, generator=g) < 2 / 3).nonzero().flatten().tolist():
            asked = comparisons[rows[row]]
            for name in second:
                second[name][row] = first[name][row]
            step = 3 * abs(asked.full) * (torch.rand((), generator=g) - 0.5)
            second[asked.about][row] = (first[asked.about][row] + step).clamp(*SPANS[asked.about])
        shown = torch.stack((scenes.draw(first), scenes.draw(second)), 1)
        for row in range(0, count, 3):  # out of autoencoder or generator, the two in turn
            known, pool = self.wide if row % 2 else self.pictures.known_pool()
            chosen = torch.randint(0, len(pool), (2,), generator=g)
            shown[row] = pool[chosen]
            for name in scenes.PROPERTIES:
                first[name][row], second[name][row] = known[name][chosen]
        wanted = torch.stack([asked.odds(first[asked.about], second[asked.about]) for asked in comparisons])
        odds = wanted.gather(0, rows[None])[0]
        for row in torch.randperm(count, generator=g)[: count // 8].tolist():
            shown[row, 1:] = self.pictures.pick(RUINS)(shown[row, 1:], g)
            odds[row] = -FULL_ODDS
        for place in (0, 1):
            self.pictures.disturb(shown[:, place], 1 / 3, 1)
        return shown, rows, odds
