"""Looks at held-out seeds during a run: they choose the LoRA that is kept, and say whether it is held or drifts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guards import changes, warning
from .objective import Objective

if TYPE_CHECKING:
    from .dual_process import Run, Settings

CHECK_SEEDS = 2**31  # the held-out seeds start here
TIE = 0.005  # of two looks whose standings are closer than this, the later one is better
HOLDING = 8  # looks in a row, or half of all if fewer, before training stops: pictures get cleaner after the first


@dataclass(eq=False)
class Check:
    """A look at the held-out seeds: after which step, mean score [Q], pictures [N, 3, H, W] in 0..1.

    ``pictures`` become None once a later look is taken, except those of the first and the best look.
    ``changes``: how they differ from those of the model without the LoRA, see ``guards.changes``; empty for these.
    ``second``: mean score [Q] that the second judge gives the same pictures; empty without one.
    """

    step: int
    scores: list[float]
    pictures: Tensor | None
    changes: dict[str, float] = field(default_factory=dict)
    second: list[float] = field(default_factory=list)


class Looks:
    """The looks of one run; making it takes the first, before training.

    What is to be kept, and what pictures may not drift from, are the answers and pictures of the model without the
    LoRA: where one is continued, a look without it comes before the first.

    A ``second`` judge is never trained against: what fools the first need not fool it. It therefore chooses the best
    look by its own standing alone, while training goes on until both judges hold.

    Attributes:
        objective: knows the scores without the LoRA.
        best: the look whose LoRA is kept.
    """

    def __init__(self, student, judge, second, objective: Objective, settings: Settings, run: Run):
        self.student, self.judge, self.second, self.settings, self.run = student, judge, second, settings, run
        self.objective, self._untaught = objective, None
        with student.lora.disabled():
            self._untaught = untaught = self._look(step=0)
        self.objective = objective.start_from(untaught.scores)
        self._chooser = objective.start_from(untaught.second or untaught.scores)
        first = untaught if student.lora.blank else self._look(step=0)
        run.checks.append(first)
        self._since = [first]  # the best look that training goes on from, and the fine ones since then
        self._enough = max(1, min(HOLDING, settings.steps // (settings.check_every or 1) // 2))
        self._keep(first)

    def due(self, step: int) -> bool:
        """Whether it is time for a look; after the last step it is."""
        every = self.settings.check_every
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def take(self, step: int) -> str:
        """Look, and keep the LoRA as it is now if it is the best; returns how the pictures drifted beyond the limit,
        in words, if they did."""
        for check in self.run.checks[1:]:
            if check is not self.best:
                check.pictures = None
        look, watching = self._look(step), self.settings.check_every > 0
        self.run.checks.append(look)
        limit, began = self.settings.drift_limit or math.inf, self.run.checks[0].changes
        drift = warning(look.changes, limit, began) if watching else ""
        if not drift:
            self._since.append(look)
            if not watching or self._standing(look) >= max(map(self._standing, self._since)) - TIE:
                self._keep(look)
        return drift

    def enough_hold(self) -> bool:
        """Whether enough looks in a row hold."""
        return len(self._since) > self._enough and all(map(self.holds, self._since[-self._enough :]))

    def holds(self, look: Check) -> bool:
        """Whether every judge's standing is what the settings call held."""
        if not self.settings.check_every:
            return False
        return min(self.objective.standing(look.scores), self._standing(look)) >= self.settings.stop_at

    def go_back(self) -> None:
        """Give the student the LoRA of the best look; the looks after that count no longer."""
        self.student.lora.load_state_dict(self._kept)
        self._since = [self.best]

    def end(self) -> None:
        """Give the student the LoRA of the best look, which becomes the run's last."""
        self.student.lora.load_state_dict(self._kept)
        if self.run.checks[-1] is not self.best:
            self.run.checks.append(self.best)

    def _standing(self, look: Check) -> float:
        return self._chooser.standing(look.second or look.scores)

    def _keep(self, look: Check) -> None:
        self.best, self._kept = look, self.student.lora.snapshot()

    @torch.no_grad()
    def _look(self, step: int) -> Check:
        """Draw the held-out seeds to the end, ask the judges about them and compare them with the untaught model's."""
        batches = self._draw()
        with self.student.lora.disabled():
            before = self._draw() if self.objective.compares else [None] * len(batches)

        def scores(judge) -> list[float]:
            """Batch by batch, so that a look needs no more of the judge's memory than a step."""
            answers = [self.objective(judge, *pair)[1] for pair in zip(batches, before)]
            return torch.cat(answers).mean(dim=0).tolist()

        pictures = torch.cat(batches).cpu()
        changed = changes(self._untaught.pictures, pictures) if self._untaught else {}
        second = [] if self.second is None else scores(self.second)
        return Check(step, scores(self.judge), pictures, changed, second)

    def _draw(self) -> list[Tensor]:
        count = self.settings.check_seeds
        return [self.student.draw(CHECK_SEEDS + i, i % self.student.prompts) for i in range(count)]
