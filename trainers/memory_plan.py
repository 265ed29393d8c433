"""What a training step will hold in memory, with and without recomputation, and which of both fits.

One pass is rehearsed with recomputation, and the bytes of living tensors are counted after every operator. What every
block holds while it is recomputed is what it would have held all along without, so the same pass is told again as if
every block had kept its activations: no formula per model, and never more memory than recomputation takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .checkpointing import Event
from .dual_process import Settings, one_pass
from .live_memory import LiveMemory
from .objective import Objective
from .self_check import SEED

HEADROOM = 1.3  # of what is counted: scratch space of kernels, holes of the allocator, the optimiser's state


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a step holds at its peak beyond the weights.

    Attributes:
        keeping: with all activations kept.
        recomputing: with blocks recomputed in backward.
        free: what the device has left for it.
    """

    keeping: int
    recomputing: int
    free: int

    @property
    def recompute(self) -> bool:
        """Whether keeping everything would not surely fit."""
        return self.keeping * HEADROOM > self.free

    def sentence(self) -> str:
        """The choice and its numbers, for people."""
        kept, recomputed, free = (f"{size / 1e9:.2f} GB" for size in (self.keeping, self.recomputing, self.free))
        if self.recompute:
            return (
                f"Recomputing: a step takes about {recomputed} beyond the weights; keeping everything would take "
                f"{kept}, and {free} are free."
            )
        return f"Keeping everything: a step takes about {kept} beyond the weights, and {free} are free."


def plan_memory(student, judge, objective: Objective, settings: Settings) -> MemoryPlan:
    """Rehearse one pass with recomputation, and leave ``student.recompute`` as what fits needs.

    Models of others are evicted for it, and where not even recomputing fits beside all weights, student and judge take
    turns from here on. The LoRA is left as it was, without gradients.

    Args:
        student: a ``ComfyStudent`` that is being run.
        judge: what its ``in_turn`` makes of the judge, wherever they may have to take turns.
    """
    rehearsed = student, judge, objective, settings
    try:
        keeping, recomputing = predicted_peaks(*rehearsed)
        free = student.free_memory(wanted=keeping * HEADROOM)
        fits = recomputing * HEADROOM <= free
    except torch.OutOfMemoryError:
        if not student.turns.can_part:
            raise
        fits = False
    if not fits and student.turns.can_part:
        student.turns.part()
        keeping, recomputing = predicted_peaks(*rehearsed)
        free = student.free_memory()
    plan = MemoryPlan(keeping, recomputing, free)
    student.recompute.on = plan.recompute
    return plan


def predicted_peaks(student, judge, objective: Objective, settings: Settings) -> tuple[int, int]:
    """Bytes beyond the weights at the peak of a pass that keeps everything, and of one that recomputes."""
    recompute, rehearsal = student.recompute, Rehearsal()
    before = recompute.on
    student.use_prompt(0)
    noise = student.noise(SEED)
    rng = torch.Generator().manual_seed(0)
    try:
        recompute.on, recompute.tell = True, rehearsal.note
        with rehearsal.memory:
            one_pass(student, judge, objective, settings, rng, noise, student.roll(noise, 0), 0)
    finally:
        recompute.on, recompute.tell = before, type(recompute).tell
        for parameter in student.lora.parameters():
            parameter.grad = None
    return rehearsal.peak_when_kept(), rehearsal.memory.peak


@dataclass
class Stretch:
    """A part of a pass between two events: the bytes alive at most, the event that ends it, of which call of a block,
    and the bytes alive then."""

    peak: int
    event: Event
    call: object
    left: int = 0


@dataclass
class Rehearsal:
    """What was alive in a pass, from event to event of its recomputed calls."""

    memory: LiveMemory = field(default_factory=LiveMemory)
    stretches: list[Stretch] = field(default_factory=list)

    def note(self, event: Event, call: object) -> None:
        """A stretch ends with an event of a call."""
        self.stretches.append(Stretch(self.memory.peaks.get(self.memory.phase, self.memory.live), event, call))
        self.memory.entered(str(len(self.stretches)))

    def peak_when_kept(self) -> int:
        """Bytes at the peak of the same pass without recomputation."""
        for i, stretch in enumerate(self.stretches, 1):
            stretch.left = self.memory.starts.get(str(i), 0)
        held = self._held()
        peak = self.memory.peaks.get(self.memory.phase, 0)  # after the last event
        missing: dict[object, int] = {}  # what calls that are done would hold, and do not
        running: list[object] = []  # recomputations, the inner one last
        for stretch in self.stretches:
            if not running:
                peak = max(peak, stretch.peak + sum(missing.values()))
            if stretch.event is Event.DONE:
                missing[stretch.call] = held.get(stretch.call, 0)
            elif stretch.event is Event.AGAIN:
                missing.pop(stretch.call)
                running.append(stretch.call)
            else:
                running.pop()
            if not running:
                peak = max(peak, stretch.left + sum(missing.values()))
        return peak

    def _held(self) -> dict[object, int]:
        """What each call that was recomputed held by the end of that, with what the calls inside would hold."""
        grown: dict[object, int] = {}
        inside: dict[object, list[object]] = {}
        running: list[tuple[object, int]] = []
        for stretch in self.stretches:
            if stretch.event is Event.AGAIN:
                running.append((stretch.call, stretch.left))
            elif stretch.event is Event.BACK:
                call, start = running.pop()
                grown[call] = stretch.left - start
            elif running:
                inside.setdefault(running[-1][0], []).append(stretch.call)

        def held(call: object) -> int:
            return grown.get(call, 0) + sum(held(inner) for inner in inside.get(call, []))

        return {call: held(call) for call in grown}
