"""What a training step holds in memory beyond the weights, phase by phase, ours against the published way.

    python3 dev.py bench memory --json memory.json

Counted are the bytes of all tensors that a step makes and that live at the same time, after every operator, so the
numbers neither depend on the machine nor on its allocator; scratch space inside an operator is not seen. Three
questions; the pairs are those of ``bench step``. The LoRA's gradients are in, its optimiser's state is not (it is the
same in every way, and made by the first step).

The ways are those of ``bench step``, ``default`` with anchor and prior; ``..._predicted_over_measured`` compares with
what the trainer foresees before the first step, from one pass in which everything is recomputed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dual_process.benchmarks.pairs import Pair, start_comfyui
from dual_process.benchmarks.step import PAIRS, QUESTIONS, TIGHT, compare_all
from dual_process.benchmarks.ways import DEFAULT, Ours, Published, machine, peaks

MB = 2**20


def compare(pair: Pair) -> dict:
    """Peaks of all ways to take a step with three questions, and their ratios."""
    ways = {
        "published": Published(pair, QUESTIONS),
        "plain": Ours(pair, QUESTIONS, checkpointed=False),
        "automatic": Ours(pair, QUESTIONS, checkpointed=True),
        "checkpointed": Ours(pair, QUESTIONS, checkpointed=True),
        "default": Ours(pair, QUESTIONS, checkpointed=True, settings=DEFAULT),
    }
    found = {"published": peaks(ways["published"])}
    free = TIGHT * found["published"]["whole"]
    plan = ways["automatic"].settle(free)
    default = ways["default"].settle(free)
    found |= {name: peaks(way) for name, way in ways.items() if name not in found}
    whole = {name: one["whole"] for name, one in found.items()}
    foreseen = {"plain": plan.keeping, "automatic": plan.chosen, "checkpointed": plan.recomputing}
    foreseen["default"] = default.chosen
    ratios = {f"{name}_over_published": whole[name] / whole["published"] for name in foreseen}
    ratios |= {f"{name}_predicted_over_measured": foreseen[name] / whole[name] for name in foreseen}
    return {
        "peak_mb": {name: {phase: size / MB for phase, size in one.items()} for name, one in found.items()},
        "predicted_mb": {name: size / MB for name, size in foreseen.items()},
        "chosen": {"automatic": plan.sentence(), "default": default.sentence()},
        "ratios": ratios,
    }


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
