"""What a training step holds in memory beyond the weights, phase by phase, ours against the published way.

    python3 dev.py bench memory --json memory.json

Counted are the bytes of all tensors that a step makes and that live at the same time, after every operator, so the
numbers neither depend on the machine nor on its allocator; scratch space inside an operator is not seen. Three
questions; the pairs are those of ``bench step``. The LoRA's gradients are in, its optimiser's state is not (it is the
same in every way, and made by the first step).

* ``automatic``: the trainer's default settings where the device has ``TIGHT`` of the published way's peak free.
* ``predicted``: what the trainer foresees for ``plain`` and ``checkpointed`` before the first step, from one pass with
  recomputation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dual_process.benchmarks.pairs import Pair, start_comfyui
from dual_process.benchmarks.step import PAIRS, QUESTIONS, compare_all
from dual_process.benchmarks.ways import ANCHORED, Ours, Published, machine
from dual_process.trainers.live_memory import LiveMemory
from dual_process.trainers.memory_plan import MemoryPlan, predicted_peaks

MB = 2**20
TIGHT = 0.4


def peaks(way: Ours) -> dict[str, float]:
    """Megabytes at the peak of each phase of a step, and of the whole step; an earlier step has warmed up."""
    way.run(0)
    memory = LiveMemory()
    way.run(0, lambda: memory, memory.entered)
    found = {phase: peak / MB for phase, peak in memory.peaks.items() if phase}
    return {"whole": memory.peak / MB, **found}


def predicted(way: Ours) -> dict[str, float]:
    """Megabytes at the peak of a step that the trainer foresees."""
    student = way.student
    found = student.run(
        lambda: predicted_peaks(student, way.judge.judge, way.objective, way.settings), beside=[way.judge.patcher]
    )
    return {name: peak / MB for name, peak in zip(("plain", "checkpointed"), found)}


def compare(pair: Pair) -> dict:
    """Peaks of all ways to take a step with three questions, and their ratios."""
    ways = {
        "plain": Ours(pair, QUESTIONS, checkpointed=False),
        "checkpointed": Ours(pair, QUESTIONS, checkpointed=True),
        "default": Ours(pair, QUESTIONS, checkpointed=True, settings=ANCHORED),
        "published": Published(pair, QUESTIONS),
    }
    found = {name: peaks(way) for name, way in ways.items()}
    foreseen = predicted(ways["plain"])
    free = TIGHT * found["published"]["whole"]
    recomputes = MemoryPlan(foreseen["plain"], foreseen["checkpointed"], free).recompute
    found["automatic"] = peaks(Ours(pair, QUESTIONS, recomputes, ANCHORED))
    whole = {name: one["whole"] for name, one in found.items()}
    ratios = {f"{name}_over_published": whole[name] / whole["published"] for name in whole if name != "published"}
    ratios |= {f"{name}_predicted_over_measured": foreseen[name] / whole[name] for name in foreseen}
    return {"peak_mb": found, "predicted_mb": foreseen, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--only", choices=PAIRS, nargs="+", default=list(PAIRS), help="pairs to measure")
    arguments = parser.parse_args()
    start_comfyui()
    with torch.inference_mode():
        compare_all(arguments.only, compare, {"machine": machine()}, arguments.json)


if __name__ == "__main__":
    main()
