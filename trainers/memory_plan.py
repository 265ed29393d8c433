"""What a training step will hold in memory, and which blocks have to be recomputed for it to fit.

One pass is rehearsed in which every block is recomputed, and the bytes of living tensors are counted after every
operator. What a block holds while it is recomputed is what it would have held all along if kept, so the same pass can
be told again with any blocks kept: no formula per model, and the rehearsal takes as little memory as a step can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .checkpointing import DECODER, GENERATOR, JUDGE, WHOLE_VAE, Block, Call, Event
from .dual_process import Settings, one_pass
from .live_memory import LiveMemory
from .objective import Objective
from .self_check import SEED

NEED_LESS = (
    "To need less memory, draw smaller pictures or fewer at once ('accumulate' makes up for that), use a smaller judge "
    "or one in 4 bits, a smaller model or one in fp8 or GGUF, or a lower rank or fewer targets (such as 'attn')."
)
HEADROOM = 1.3  # of what is counted: scratch space of kernels, holes of the allocator


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a step holds at its peak beyond the weights, and what is recomputed.

    Attributes:
        keeping: with all activations kept.
        recomputing: with every block recomputed in backward.
        chosen: with those blocks recomputed that are.
        free: what the device has left for it.
        blocks: by part, how many blocks are recomputed, of how many; none where everything is kept.
        whole_vae: whether the VAE is recomputed as a whole, beside its blocks.
    """

    keeping: int
    recomputing: int
    chosen: int
    free: int
    blocks: dict[str, tuple[int, int]]
    whole_vae: bool

    def sentence(self) -> str:
        """The choice and its numbers, for people."""
        kept, chosen, free = (f"{size / 1e9:.2f} GB" for size in (self.keeping, self.chosen, self.free))
        parts = [f"{some} of {all} blocks of the {part}" for part, (some, all) in self.blocks.items() if some]
        parts += ["the VAE as a whole"] * self.whole_vae
        tight = f" It may run out of memory. {NEED_LESS}" if self.chosen * HEADROOM > self.free else ""
        if not parts:
            return f"Keeping everything: a step takes about {chosen} beyond the weights, and {free} are free.{tight}"
        return (
            f"Recomputing {', '.join(parts)}: a step takes about {chosen} beyond the weights; keeping everything would "
            f"take {kept}, and {free} are free.{tight}"
        )


def plan_memory(student, judge, objective: Objective, settings: Settings) -> MemoryPlan:
    """Rehearse one pass, and leave ``student.recompute`` so that as much is kept as surely fits.

    Models of others are evicted for it, and where not even recomputing fits beside all weights, student and judge take
    turns from here on. The LoRA is left as it was, without gradients.

    Args:
        student: a ``ComfyStudent`` that is being run.
        judge: what its ``in_turn`` makes of the judge, wherever they may have to take turns.
    """
    rehearsed, recompute, turns = (student, judge, objective, settings), student.recompute, student.turns
    rehearsal = turns.taken_if_needed(lambda: rehearse(*rehearsed))
    free = student.free_memory(wanted=rehearsal.peak(rehearsal.blocks) * HEADROOM)
    if turns.can_part and rehearsal.peak(frozenset()) * HEADROOM > free:
        turns.part()
        rehearsal = rehearse(*rehearsed)
        free = student.free_memory()
    everything = rehearsal.blocks
    kept = rehearsal.choose(free / HEADROOM)
    recompute.on, recompute.kept, recompute.foreseen = kept != everything, kept, True
    blocks = everything - {WHOLE_VAE}
    recomputed, there = (Counter(block.part for block in some) for some in (blocks - kept, blocks))
    return MemoryPlan(
        keeping=rehearsal.peak(everything),
        recomputing=rehearsal.peak(frozenset()),
        chosen=rehearsal.peak(kept),
        free=free,
        blocks={part: (recomputed[part], there[part]) for part in (GENERATOR, DECODER, JUDGE)} if recompute.on else {},
        whole_vae=WHOLE_VAE in everything - kept,
    )


def rehearse(student, judge, objective: Objective, settings: Settings) -> Rehearsal:
    """What one pass in which every block is recomputed held; nothing is changed by it."""
    recompute, rehearsal = student.recompute, Rehearsal()
    before = recompute.on, recompute.kept
    try:
        recompute.on, recompute.kept, recompute.tell = True, frozenset(), rehearsal.note
        with rehearsal.memory:
            try_pass(student, judge, objective, settings)
    finally:
        recompute.on, recompute.kept = before
        recompute.tell = type(recompute).tell
    rehearsal.evaluate()
    return rehearsal


def try_step(student, judge, objective: Objective, settings: Settings) -> None:
    """One pass beside what training will keep, of which nothing is left: where memory does not suffice, it runs out
    here."""
    kept = torch.empty(student.kept_bytes, dtype=torch.uint8, device=next(student.lora.parameters()).device)
    try_pass(student, judge, objective, settings)
    del kept


def try_pass(student, judge, objective: Objective, settings: Settings) -> None:
    """One pass that leaves no gradient."""
    student.use_prompt(0)
    noise, rng = student.noise(SEED), torch.Generator().manual_seed(0)
    try:
        one_pass(student, judge, objective, settings, rng, noise, student.roll(noise, 0), 0)
    finally:
        for parameter in student.lora.parameters():
            parameter.grad = None


@dataclass
class Stretch:
    """A part of a pass between two events: the bytes alive at most, the event that ends it, of which call of a block,
    the work until then, and the bytes alive then."""

    peak: int
    event: Event
    call: Call
    work: int
    left: int = 0


@dataclass
class Rehearsal:
    """What was alive in a pass, from event to event of its recomputed calls."""

    memory: LiveMemory = field(default_factory=LiveMemory)
    stretches: list[Stretch] = field(default_factory=list)

    def note(self, event: Event, call: Call) -> None:
        """A stretch ends with an event of a call."""
        peak = self.memory.peaks.get(self.memory.phase, self.memory.live)
        self.stretches.append(Stretch(peak, event, call, self.memory.work))
        self.memory.entered(str(len(self.stretches)))

    def evaluate(self) -> None:
        """Find out, after the pass, what every call held when its recomputation was done, which calls are made within
        it, and what recomputing each block took."""
        for i, stretch in enumerate(self.stretches, 1):
            stretch.left = self.memory.starts.get(str(i), 0)
        self._grown: dict[Call, int] = {}
        self._inside: dict[Call, list[Call]] = {}
        self._work: Counter[Block] = Counter()
        running: list[Stretch] = []
        for stretch in self.stretches:
            if stretch.event is Event.AGAIN:
                running.append(stretch)
            elif stretch.event is Event.BACK:
                began = running.pop()
                self._grown[stretch.call] = stretch.left - began.left - stretch.call.passed_on
                self._work[stretch.call.block] += stretch.work - began.work
            elif running:
                self._inside.setdefault(running[-1].call, []).append(stretch.call)
        self.blocks = frozenset(self._work)

    def choose(self, most: float) -> frozenset[Block]:
        """The blocks to keep so that the peak stays below ``most`` bytes: those first whose recomputation is the most
        work for the memory it saves, and of equal ones the last, which are needed again first."""
        if self.peak(self.blocks) <= most:
            return self.blocks
        saved = Counter[Block]()
        for call, grown in self._grown.items():
            saved[call.block] += grown
        worth = {block: self._work[block] / max(saved[block], 1) for block in self.blocks}
        kept: frozenset[Block] = frozenset()
        for block in sorted(self.blocks, key=lambda block: (worth[block], block.number or 0), reverse=True):
            if self.peak(kept | {block}) <= most:
                kept |= {block}
        return kept

    def peak(self, kept: Collection[Block]) -> int:
        """Bytes at the peak of the same pass with these blocks kept."""
        peak = self.memory.peaks.get(self.memory.phase, 0)  # after the last event
        missing = 0  # what calls that are done would hold, and do not
        avoided = 0  # recomputations, one within the other, that would not be
        for stretch in self.stretches:
            if not avoided:
                peak = max(peak, stretch.peak + missing)
            if stretch.call.block in kept:
                held = self._held(stretch.call, kept)
                if stretch.event is Event.DONE:
                    missing += held
                elif stretch.event is Event.AGAIN:
                    missing -= held
                    avoided += 1
                else:
                    avoided -= 1
            if not avoided:
                peak = max(peak, stretch.left + missing)
        return peak

    def _held(self, call: Call, kept: Collection[Block]) -> int:
        """What a call would hold if kept, with the kept ones made within it."""
        inner = self._inside.get(call, [])
        return self._grown.get(call, 0) + sum(self._held(one, kept) for one in inner if one.block in kept)
