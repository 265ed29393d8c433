"""What a training step holds in memory beyond the weights, phase by phase, ours against the published way.

    python3 dev.py bench memory --json memory.json

Counted are the bytes of all tensors that a step makes and that live at the same time, after every operator, so the
numbers neither depend on the machine nor on its allocator; scratch space inside an operator is not seen. Three
questions; the pairs are those of ``bench step``. The LoRA's gradients are in, its optimiser's state is not (it is the
same in every way, and made by the first step).
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dual_process.benchmarks.pairs import Pair, start_comfyui
from dual_process.benchmarks.step import PAIRS, QUESTIONS, compare_all
from dual_process.benchmarks.ways import ANCHORED, Ours, Published, machine

MB = 2**20


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are alive, and the most of them in every phase.

    ``entered`` tells it that another phase begins.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self._known: dict[int, weakref.ref] = {}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def entered(self, phase: str) -> None:
        self.phase = phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            self._note(given, counts=False)  # what was there before the block; views of it are nothing new
        made = function(*args, **kwargs)
        for result in tree_leaves(made):
            self._note(result, counts=True)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        return made

    def _note(self, value, counts: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.live += size

        def freed(_) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


def peaks(way: Ours) -> dict[str, float]:
    """Megabytes at the peak of each phase of a step, and of the whole step; an earlier step has warmed up."""
    way.run(0)
    memory = LiveMemory()
    way.run(0, lambda: memory, memory.entered)
    found = {phase: peak / MB for phase, peak in memory.peaks.items() if phase}
    return {"whole": memory.peak / MB, **found}


def compare(pair: Pair) -> dict:
    """Peaks of all ways to take a step with three questions, and their ratios."""
    ways = {
        "plain": Ours(pair, QUESTIONS, checkpointed=False),
        "checkpointed": Ours(pair, QUESTIONS, checkpointed=True),
        "default": Ours(pair, QUESTIONS, checkpointed=True, settings=ANCHORED),
        "published": Published(pair, QUESTIONS),
    }
    found = {name: peaks(way) for name, way in ways.items()}
    whole = {name: one["whole"] for name, one in found.items()}
    ratios = {f"{name}_over_published": whole[name] / whole["published"] for name in whole if name != "published"}
    return {"peak_mb": found, "ratios": ratios}


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
