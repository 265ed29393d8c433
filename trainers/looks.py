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
UNSEEN_SEEDS = CHECK_SEEDS + 2**30  # and those that are drawn but once, at the end
TIE = 0.005  # of two looks whose standings are closer than this, the later one is better
HOLDING = 8  # looks in a row, or half of all if fewer, before training stops: pictures get cleaner after the first


@dataclass(eq=False)
class Check:
    """A look at the held-out seeds: after which step, mean score [Q], pictures [N, 3, H, W] in 0..1.

    ``pictures`` become None once a later look is taken, except those of the first and the best look.
    ``changes``: how they differ from those of the model without the LoRA, see ``guards.changes``, and by which factor
    it takes more out of them again (``strangeness``, see ``guards.STRANGE``), unless it takes nothing out of its own;
    empty for these.
    ``second``: mean score [Q] that the second judge gives the same pictures; empty without one.
    ``by_prompt``: mean score [Q] of the pictures of each prompt that was drawn, by its number.
    ``taken_out``: mean square of what the model without the LoRA takes out of them again, in its latent units.
    """

    step: int
    scores: list[float]
    pictures: Tensor | None
    changes: dict[str, float] = field(default_factory=dict)
    second: list[float] = field(default_factory=list)
    by_prompt: dict[int, list[float]] = field(default_factory=dict)
    taken_out: float = 0.0


def percent(scores: list[float]) -> str:
    """The scores [Q] of all questions, for people."""
    return ", ".join(f"{score:.0%}" for score in scores)


class Looks:
    """The looks of one run, of which ``begin`` takes the first, before training.

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
        self.objective = objective

    def begin(self) -> None:
        """Take the first look, or the first two where a LoRA is continued."""
        lora, settings = self.student.lora, self.settings
        with lora.disabled():
            self._untaught = untaught = self._look(step=0)
        self._chooser = self.objective.start_from(untaught.second or untaught.scores)
        self.objective = self.objective.start_from(untaught.scores, untaught.by_prompt)
        first = untaught if lora.blank else self._look(0, untaught=untaught)
        self.run.checks.append(first)
        self._since = [first]  # the best look that training goes on from, and the fine ones since then
        self._enough = max(1, min(HOLDING, settings.steps // (settings.check_every or 1) // 2))
        self._keep(first)

    @property
    def latest(self) -> Check:
        """The latest look, but for those at which pictures had drifted, from whose LoRAs training went back."""
        return self._since[-1]

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
        look, watching = self._look(step, untaught=self._untaught), self.settings.check_every > 0
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

    def unseen(self) -> tuple[Check, Check]:
        """After the run: looks without the LoRA and with the one that was kept, at as many seeds by which nothing was
        chosen."""
        with self.student.lora.disabled():
            before = self._look(step=0, first=UNSEEN_SEEDS)
        return before, self._look(self.run.checks[-1].step, UNSEEN_SEEDS, before)

    def _standing(self, look: Check) -> float:
        return self._chooser.standing(look.second or look.scores)

    def _keep(self, look: Check) -> None:
        self.best, self._kept = look, self.student.lora.snapshot()

    @torch.no_grad()
    def _look(self, step: int, first: int = CHECK_SEEDS, untaught: Check | None = None) -> Check:
        """Draw seeds to the end, from ``first`` on, ask the judges about them and compare them with the same of the
        untaught model; None: these are."""
        latents = [self.student.finished(first + i, prompt) for i, prompt in enumerate(self._prompts)]
        batches = [self.student.decode(x0).clamp(0, 1).cpu() for x0 in latents]
        device = latents[0].device
        before = [None] * len(batches)
        if self.objective.compares:
            before = untaught.pictures.split(len(batches[0])) if untaught else batches

        def answers(judge) -> Tensor:
            """Mean scores [batches, Q], batch by batch, so that a look needs no more of the judge's memory than a
            step."""
            pairs = ([None if one is None else one.to(device) for one in pair] for pair in zip(batches, before))
            return torch.stack([self.objective(judge, *pair)[1].mean(dim=0) for pair in pairs])

        pictures, changed = torch.cat(batches), {}
        taken_out = self._taken_out(latents, first)
        if untaught:
            changed = changes(untaught.pictures, pictures)
            if untaught.taken_out:
                changed["strangeness"] = taken_out / untaught.taken_out
        second = [] if self.second is None else answers(self.second).mean(dim=0).tolist()
        found = answers(self.judge).cpu()
        numbers = torch.tensor(self._prompts)
        by_prompt = {prompt: found[numbers == prompt].mean(dim=0).tolist() for prompt in set(self._prompts)}
        return Check(step, found.mean(dim=0).tolist(), pictures, changed, second, by_prompt, taken_out)

    def _taken_out(self, latents: list[Tensor], first: int) -> float:
        """Mean square of what the model without the LoRA takes out of finished pictures, one prompt's after the other,
        of the seeds from ``first`` on."""
        gone = []
        with self.student.lora.disabled():
            for i, (x0, prompt) in enumerate(zip(latents, self._prompts)):
                self.student.use_prompt(prompt)
                gone.append((x0 - self.student.redrawn(x0, self.student.noise(first + len(latents) + i))).square())
        return torch.cat(gone).mean().item()

    @property
    def _prompts(self) -> list[int]:
        """The prompt of each batch of a look."""
        return [i % self.student.prompts for i in range(self.settings.check_seeds)]
