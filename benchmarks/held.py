"""Seconds until a control is held: until nine of ten held-out pictures have the property, by their pixels.

`python3 dev.py bench held --json FILE` teaches the bundled student as the template does and by the published recipe
(Luo et al., section 4: cross-entropy, a random step, nothing that holds the picture) at several learning rates, the
fastest of which counts. Seconds are those of the CPU. Ours include the looks at held-out seeds, which are part of it,
every ten steps; the published recipe is given its steps alone, looked at every five, and is not asked to keep anything:
beside the share that has the property stands the share that is clean.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from dual_process.benchmarks.bundled import BATCH, TEMPLATES, Laboratory
from dual_process.benchmarks.control import PUBLISHED
from dual_process.benchmarks.ways import machine
from dual_process.demo.measure import share
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS
from dual_process.trainers.dual_process import Run, Settings, train
from dual_process.trainers.objective import LIKELIHOOD, MARGIN, Objective
from dual_process.vlm.question import Question

ENOUGH = 0.9
NEVER = {"stop_at": math.inf, "drift_limit": 0.0}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TAUGHT = ("horizon Yes", "palette No", "line No", "depth Yes")


class Held(Exception):
    """Ends a training whose control is held."""


def until_held(laboratory: Laboratory, taught: str, settings: Settings, objective: Objective, looks: bool) -> dict:
    """Steps and CPU seconds of a training until ``ENOUGH`` of the pictures of a look have the property (None: never).

    Args:
        looks: whether the seconds of looks count (then those of the step after the last one do, too).
    """
    about, answer = taught.split()
    ends, steps, shares, clean = [], [], [], []

    def see(run: Run) -> None:
        """Measure the look that is next, if it has been taken."""
        ends.append(time.process_time())
        if len(run.checks) > len(shares) + 1:
            look = run.checks[len(shares) + 1]
            steps.append(look.step)
            shares.append(share(holds(look.pictures, about, answer)))
            clean.append(share(measure(look.pictures)["readable"]))

    def watch(run: Run, _) -> None:
        see(run)
        if shares and shares[-1] >= ENOUGH:
            raise Held

    with torch.inference_mode():
        student, judge = laboratory.student(seed=settings.seed), laboratory.judge
        start = time.process_time()
        try:
            see(student.run(lambda: train(student, judge.judge, objective, settings, watch), [judge.patcher]))
        except Held:
            pass
    each = statistics.median(after - before for before, after in zip(ends, ends[1:]))
    seconds = ends[steps[-1]] - start if looks else steps[-1] * each
    held = round(seconds, 1) if shares[-1] >= ENOUGH else None
    return {"seconds": held, "steps": steps[-1], "shares": shares, "clean": clean, "step_seconds": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--taught", nargs="+", default=TAUGHT, help="property and answer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laboratory = Laboratory()
    laboratory.draw()  # what a process does but once
    result = {"machine": machine(), "batch": BATCH, "ratios": {}}
    for taught in arguments.taught:
        about, answer = taught.split()
        asked = Question(QUESTIONS[about][0], answer)
        goal = Objective([asked, Question(KEEP_QUESTION, keep=True)], MARGIN)
        found = {"ours": until_held(laboratory, taught, TEMPLATES[about], goal, looks=True)}
        for rate in RATES:
            recipe = replace(PUBLISHED, steps=TEMPLATES[about].steps, learning_rate=rate, check_every=5, **NEVER)
            theirs = until_held(laboratory, taught, recipe, Objective([asked], LIKELIHOOD), looks=False)
            found[f"published, rate {rate:g}"] = theirs
        result[taught] = found
        ours, *published = (one["seconds"] for one in found.values())
        if ours and any(published):
            result["ratios"][f"{taught}: ours over published"] = ours / min(filter(None, published))
        print(json.dumps({taught: found}), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
