"""Dual-process training (Luo et al., ICCV 2025, arXiv 2506.01955): a generator learns from a VLM's answers.

One step: draw a prompt and a noise, roll to a random step k without gradients, predict x0 with gradients, decode it,
ask the judge, take the gradient at the picture, let the judge's graph go, and carry it on through VAE and generator
into the LoRA.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import not_

import torch
from torch import Tensor

from ..vlm.judge import eased
from ..vlm.memory import out_of_memory
from .augment import varied, with_noise
from .average import Average
from .looks import Check, Looks, percent
from .objective import Objective

log = logging.getLogger(__name__)

TRAINING_SEEDS = 2**32  # training noises come from here on, so that seeds people type are never trained on
STRIKES = 4  # steps without a finite gradient that end a run; from the second on they are scaled by less
HELD_EVERY = 4  # of so many steps one holds pictures, so many times as strongly, see ``Settings.at``
STRAYED = 2.0  # strangeness of a look from which on every step holds pictures; see ``guards.STRANGE``
RETREATS = 3  # times that a run whose pictures drift goes back to its best look, each time at a third of the rate

# Which part of the sampler's steps is learned from, as shares of the schedule. Early steps decide what is where, late
# ones how it is drawn.
ANY_STEP, EARLY_STEPS, LATE_STEPS, FRESH_NOISE = "any step", "early steps", "late steps", "one draw, fresh noise"
PARTS = {ANY_STEP: (0.0, 1.0), EARLY_STEPS: (0.0, 0.5), LATE_STEPS: (0.75, 1.0)}
LEARN_AT = [*PARTS, FRESH_NOISE]


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimiser steps at most.
        learning_rate: of AdamW, without weight decay. The paper's 5e-5, at its LoRA's scale of 2.5 and with its A of
            standard deviation 1/16, moves layers 3072 wide as far in a step as 4.3e-4 does here, and layers 1280 wide
            as far as 2.8e-4. A third of it once a look at the held-out seeds holds, because what is left is to make
            pictures clean.
        seed: fixes noises, steps and augmentation; LoRA initialisation has the student's own seed.
        anchor: weight of the mean squared distance between x0 with and without the LoRA, in the model's latent units.
            What changes the whole picture, as colours do, needs a smaller one than a horizon.
        judge_noise: standard deviation at most of the noise laid over pictures before the judge, in 0..1 pixel units;
            it takes away the pixel patterns that fool a judge.
        augment: 0..1, how much pictures are cropped and changed in contrast and brightness before the judge,
            see ``augment.varied``.
        clip: gradient norm at most, larger in steps that hold, see ``at``.
        check_every: steps between looks at the held-out seeds; 0 never looks.
        stop_at: standing on the held-out seeds (``Objective.standing``) at which training stops, or does not begin, if
            ``check_every`` is not 0. With a second judge, both must reach it. Infinity: never.
        check_seeds: number of held-out seeds.
        learn_at: one of ``LEARN_AT``: the sampler's steps k that are learned from, see ``starts``. ``any step`` is the
            paper's choice.
        average: share of the LoRA's running average that a step keeps, 0 (the LoRA as it is) to 1. The average is what
            is checked on held-out seeds, and what is handed back.
        drift_limit: change of the held-out pictures (``guards.changes``) at which training goes back to its best look
            and on at a third of the rate, and after ``RETREATS`` times stops; 0 never does. What a LoRA that is
            continued has changed already may change by half of it more. Not read if ``check_every`` is 0.
        accumulate: passes of one batch, each with a noise of its own, whose gradients make one step.
        prior: weight of what the model without the LoRA would take out of pictures again, see ``holding``.
    """

    steps: int = 100
    learning_rate: float = 3e-4
    seed: int = 0
    anchor: float = 0.3
    judge_noise: float = 0.1
    augment: float = 0.0
    clip: float = 1.0
    check_every: int = 20
    stop_at: float = 0.97
    check_seeds: int = 2
    learn_at: str = ANY_STEP
    average: float = 0.7
    accumulate: int = 1
    drift_limit: float = 0.25
    prior: float = 4.0

    def learned_steps(self, steps: int) -> range:
        """The k to draw from, of a schedule of ``steps`` steps; never empty."""
        start, end = PARTS[self.learn_at]
        return range(math.floor(start * steps), math.ceil(end * steps))

    def at(self, step: int, strangeness: float = 0.0) -> Settings:
        """These settings for step number ``step``, from 1 on, after a look whose pictures had ``strangeness``.

        Anchor and prior, which cost as much as everything else of a step where the judge is small, come in the first of
        every ``HELD_EVERY`` steps only, and then so many times as strong: lazy regularisation (StyleGAN2, Karras et
        al., arXiv 1912.04958, appendix B). The norm may be as many times as large then, or clipping would let them be
        outweighed by the steps between; where it cuts those, pictures are held more strongly than in every step. Where
        there is a prior, and pictures are ``STRAYED`` already, both come in every step: at high rates three steps
        between are too far to stray.
        """
        if not (self.anchor or self.prior) or (self.prior and strangeness > STRAYED):
            return self
        if (step - 1) % HELD_EVERY:
            return replace(self, anchor=0.0, prior=0.0)
        return replace(
            self, anchor=HELD_EVERY * self.anchor, prior=HELD_EVERY * self.prior, clip=HELD_EVERY * self.clip
        )


@dataclass
class Run:
    """What happened: loss and mean score [Q] of every step taken, the checks, why it ended.

    ``skipped`` counts the steps that were not taken because their gradient was not finite. ``rate_falls`` tells when
    and why the rate fell to a third of what it was, in order; ``retreats`` counts how often that was because pictures
    had drifted, and training went back to its best look.

    The first check shows the model before training (without the LoRA, or with the one that is continued), the last
    one with the LoRA that was kept. ``unseen`` are two more, see ``Looks.unseen``, which whoever
    trains may take afterwards.
    """

    loss: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: int = 0
    retreats: int = 0
    rate_falls: list[str] = field(default_factory=list)
    stopped: str = "all steps done"
    unseen: tuple[Check, Check] | None = None

    def ended(self) -> str:
        """How many steps were taken and why no more, for people; without a full stop."""
        skipped = f" ({self.skipped} more had no finite gradient and were left out)" if self.skipped else ""
        return f"{len(self.loss)} steps{skipped}: {'; '.join([*self.rate_falls, self.stopped])}"

    def proved(self) -> str:
        """What judges say of the ``unseen`` pictures, for people; without a full stop, empty if there are none."""
        if self.unseen is None:
            return ""
        before, after = self.unseen
        second = f"; second judge: {percent(before.second)} and {percent(after.second)}" if after.second else ""
        found = f"{percent(before.scores)} without the LoRA, {percent(after.scores)} with it"
        return f"{len(after.pictures)} unseen pictures: {found}{second}"


def train(
    student, judge, objective: Objective, settings: Settings, on_step: Callable[[Run, Tensor], None], second=None
) -> Run:
    """Teach ``student`` (already running, see ``ComfyStudent.run``) what ``objective`` asks ``judge``.

    Args:
        on_step: called after every step that is taken with the run so far and the step's pictures [B, 3, H, W],
            unclamped.
        second: a judge that scores the held-out pictures too and chooses among them, see ``Looks``, or None.
    Returns:
        The run; the student's LoRA is left as it was at the best check (at the last step, if ``check_every`` is 0).
        If ``on_step`` raises, or anything fails, too; with ``check_every`` 0 it is then left as it began.
    Raises:
        RuntimeError: no gradient arrives at the LoRA, or none that is finite.
    """
    run = Run()
    looks = Looks(student, judge, second, objective, settings, run)
    looks.begin()
    objective = looks.objective
    if looks.holds(looks.best):
        run.stopped = "held before the first step: there is nothing to teach"
        return run

    parameters = list(student.lora.parameters())

    def rate() -> float:
        return settings.learning_rate / 3 ** len(run.rate_falls)

    def beginning() -> tuple[torch.optim.AdamW, Average]:
        return torch.optim.AdamW(parameters, lr=rate(), weight_decay=0.0), Average(parameters, settings.average)

    optimizer, average = beginning()
    rng = torch.Generator().manual_seed(settings.seed)
    finite, settled = [], False
    try:
        for step in range(1, settings.steps + 1):
            now = settings.at(step, looks.latest.changes.get("strangeness", 0.0))
            loss, scores, image = passes(student, judge, objective, now, rng)
            norm = torch.nn.utils.clip_grad_norm_(parameters, now.clip)
            # read together: the host waits for the GPU once a step
            norm, loss, *scores = torch.cat([norm[None], loss[None].to(norm), scores.to(norm)]).tolist()
            finite.append(math.isfinite(norm))
            if (norm == 0 and loss > 0) or strikes(finite) == STRIKES:
                lower = "lower the learning rate, or " if run.loss else ""
                raise RuntimeError(
                    f"Step {step}: the gradient that reaches the LoRA has norm {norm}; nothing can be learned from "
                    f"it. To go on, {lower}load model, VAE and judge in bf16 or fp32."
                )
            if not finite[-1]:
                run.skipped += 1
                if strikes(finite) > 1:
                    student.gradient_scale = eased(student.gradient_scale)
                    judge.gradient_scale = eased(judge.gradient_scale)
            else:
                optimizer.step()
                average.update()
                run.loss.append(loss)
                run.scores.append(scores)
                on_step(run, image)
            optimizer.zero_grad()
            if looks.due(step):
                with average.applied():
                    drift = looks.take(step)
                if drift and (run.retreats == RETREATS or step == settings.steps):
                    run.stopped = f"at step {step}, because pictures got {drift} (if they should, raise drift_limit)"
                    break
                if drift:
                    back = f"so it went back to the LoRA of step {looks.best.step}"
                    run.rate_falls.append(f"at step {step} pictures got {drift}, {back}")
                    run.retreats += 1
                    looks.go_back()
                    optimizer, average = beginning()
                elif looks.enough_hold():
                    run.stopped = f"held at step {step}"
                    break
                elif not settled and step < settings.steps and looks.holds(run.checks[-1]):
                    settled = True
                    run.rate_falls.append(f"first held at step {step}, from there on at a third of the rate")
                    optimizer.param_groups[0]["lr"] = rate()
    finally:
        looks.end()
    return run


def strikes(finite: list[bool]) -> int:
    """How many of the latest steps had no finite gradient: in a row, or ``HELD_EVERY`` apart, as those are that hold
    pictures, whose gradients are the largest.

    Args:
        finite: of every step so far, whether it had.
    """
    return max(sum(1 for _ in takewhile(not_, latest)) for latest in (finite[::-1], finite[::-HELD_EVERY]))


def passes(student, judge, objective: Objective, settings: Settings, rng: torch.Generator):
    """The passes of one step; leaves the mean of their gradients in the LoRA.

    Where memory runs out although it was foreseen to suffice, the step begins again with everything recomputed.

    Returns:
        Mean loss, mean score [Q], the last pass's pictures [B, 3, H, W], unclamped.
    """
    before = rng.get_state()
    try:
        return _passes(student, judge, objective, settings, rng)
    except RuntimeError as error:
        if not (out_of_memory(error) and student.recompute.give_way()):
            raise
    log.warning("Memory ran out: from here on everything is recomputed, which takes longer.")
    rng.set_state(before)
    for parameter in student.lora.parameters():
        parameter.grad = None
    return _passes(student, judge, objective, settings, rng)


def _passes(student, judge, objective: Objective, settings: Settings, rng: torch.Generator):
    losses, answers = [], []
    for noise, x, k in starts(student, settings, rng):
        loss, scores, image = one_pass(student, judge, objective.of(student.prompt), settings, rng, noise, x, k)
        losses.append(loss)
        answers.append(scores)
    for parameter in student.lora.parameters():
        if parameter.grad is not None:  # some layers of the last block reach no pixel
            parameter.grad /= student.gradient_scale * settings.accumulate
    return torch.stack(losses).mean(), torch.stack(answers).mean(dim=0), image


def starts(student, settings: Settings, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Where the passes of one step start: the draw's noise, x_σk and k.

    ``one draw, fresh noise`` draws once to the end and lays ``accumulate`` noises of the last step over the result
    (DRaFT-LV, Clark et al., arXiv 2309.17400); otherwise every pass is a draw of its own, up to step k.
    """

    def draw(k: int) -> tuple[Tensor, Tensor]:
        student.use_prompt(int(torch.randint(student.prompts, (), generator=rng)))
        start = new_noise(student, rng)
        return start, student.roll(start, k)

    if settings.learn_at == FRESH_NOISE:
        (start, x0), k = draw(student.steps), student.steps - 1
        for _ in range(settings.accumulate):
            yield start, student.noised(x0, new_noise(student, rng), k), k
        return
    steps = settings.learned_steps(student.steps)
    for _ in range(settings.accumulate):
        k = int(torch.randint(steps.start, steps.stop, (), generator=rng))
        yield *draw(k), k


def new_noise(student, rng: torch.Generator) -> Tensor:
    """Unit Gaussian noise in the latent's shape, of a seed that no look draws."""
    return student.noise(TRAINING_SEEDS + int(torch.randint(2**31, (), generator=rng)))


def one_pass(
    student, judge, objective: Objective, settings: Settings, rng: torch.Generator, noise: Tensor, x: Tensor, k: int
):
    """One batch of pictures from ``x`` at σk, judged; adds ``gradient_scale`` times the loss's gradient to the LoRA's.

    ``noise`` is what the draw began with. Where student and judge take turns on the device, no graph of the student can
    wait for the judge's gradient, so that the picture is computed a second time.

    Returns:
        Loss, mean score [Q], pictures [B, 3, H, W], unclamped.
    """
    before = [untaught(student, noise, k)] if objective.compares else []
    with torch.set_grad_enabled(not student.takes_turns):
        x0 = student.predict(x, k)
        image = student.decode(x0)

    # The judge sees what a user will see; its graph ends here. Saturated pixels keep their gradient.
    seen = image.detach().clamp(0, 1).requires_grad_()
    *before, shot = shown([*before, seen], settings, rng)
    loss, scores = objective(judge, shot, *before)
    (loss * judge.gradient_scale).backward()
    if student.takes_turns:
        x0 = student.predict(x, k)
        image = student.decode(x0)
    pushed, pushes = [image], [seen.grad / judge.gradient_scale]
    if settings.anchor or settings.prior:
        pushed.append(x0)
        pushes.append(holding(student, settings, rng, x0.detach(), x, k))
    torch.autograd.backward(pushed, [push * student.gradient_scale for push in pushes])
    return loss.detach(), scores.mean(dim=0), image.detach()


@torch.no_grad()
def holding(student, settings: Settings, rng: torch.Generator, x0: Tensor, x: Tensor, k: int) -> Tensor:
    """What holds pictures: a gradient at ``x0``, which the student predicted from ``x`` at σk, in its shape.

    Without the LoRA the same x is predicted to be b. The anchor pulls at all of the change x0 - b, as the gradient of
    its mean square. The prior pulls at that part of the change which the model without the LoRA does not leave in a
    picture: (x0 - f(x0)) - (b - f(b)), where f is ``redrawn``. It is regularisation by denoising (Romano, Elad and
    Milanfar, arXiv 1611.02862), whose gradient is x0 - f(x0), as a difference like that of delta denoising scores
    (Hertz et al., arXiv 2304.07090): where the LoRA changes nothing it is 0, and what f blurs in any picture cancels.
    """
    with student.lora.disabled():
        b = student.predict(x, k)
        change = x0 - b
        push = settings.anchor * change
        if settings.prior:
            noise = new_noise(student, rng)
            push += settings.prior * (change - student.redrawn(x0, noise) + student.redrawn(b, noise))
    return 2 / x0.numel() * push


def shown(batches: list[Tensor], settings: Settings, rng: torch.Generator) -> list[Tensor]:
    """Batches of pictures [B, 3, H, W] as the judge gets them during training: all varied alike, so that it sees no
    change between them that is not the LoRA's."""
    alike, shots = rng.get_state(), []
    for images in batches:
        rng.set_state(alike)
        shots.append(varied(images, settings.augment, rng))
    return [with_noise(images, settings.judge_noise, rng) for images in shots]


@torch.no_grad()
def untaught(student, noise: Tensor, k: int) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 that the student predicts at step ``k`` from the same noise without its LoRA."""
    with student.lora.disabled():
        return student.decode(student.predict(student.roll(noise, k), k)).clamp(0, 1)
