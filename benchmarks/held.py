"""Seconds until a control is held: until nine of ten held-out pictures have the property, by their pixels.

`python3 dev.py bench held --json FILE` teaches the bundled student as the template does and by the published recipe
(Luo et al., section 4: cross-entropy, a random step, nothing that holds the picture) at several learning rates, the
fastest of which counts. Seconds are those of the CPU. Ours include the looks at held-out seeds, which are part of it;
the published recipe is given its steps alone, and is not asked to keep anything: beside the share that has the property
stands the share that is clean.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from dual_process.benchmarks.bundled import BATCH, TEMPLATES, Laboratory, held_out, share
from dual_process.benchmarks.control import PUBLISHED
from dual_process.benchmarks.ways import machine
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS
from dual_process.trainers.dual_process import Run, Settings, train
from dual_process.trainers.objective import LIKELIHOOD, MARGIN, Objective
from dual_process.vlm.question import Question

ENOUGH = 0.9
EVERY, PICTURES = 5, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TAUGHT = ("horizon Yes", "palette No", "line No", "depth Yes")


class Held(Exception):
    """Ends a training whose control is held."""


def until_held(laboratory: Laboratory, taught: str, settings: Settings, objective: Objective) -> dict:
    """Steps and CPU seconds of a training until ``ENOUGH`` held-out pictures have the property (None: never).

    They are the pictures of its own looks, whose seconds count, as do those of the step after, or, where it takes none,
    pictures drawn here every ``EVERY`` steps, whose seconds do not.
    """
    about, answer = taught.split()
    seconds, steps, shares, clean = 0.0, 0, [], []

    def watch(run: Run, _) -> None:
        nonlocal seconds, steps, start
        seconds += time.process_time() - start
        pictures = None
        if settings.check_every == 0 and len(run.loss) % EVERY == 0:
            steps, pictures = len(run.loss), held_out(student, PICTURES)
        elif len(run.checks) > len(shares) + 1:
            steps, pictures = run.checks[-1].step, run.checks[-1].pictures
        if pictures is not None:
            shares.append(share(holds(pictures, about, answer)))
            clean.append(share(measure(pictures)["readable"]))
            if shares[-1] >= ENOUGH:
                raise Held
        start = time.process_time()

    with torch.inference_mode():
        student = laboratory.student(seed=settings.seed)
        start = time.process_time()
        try:
            student.run(
                lambda: train(student, laboratory.judge.judge, objective, settings, watch), [laboratory.judge.patcher]
            )
        except Held:
            pass
    held = round(seconds, 1) if shares[-1] >= ENOUGH else None
    return {"seconds": held, "steps": steps, "shares": shares, "clean": clean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--taught", nargs="+", default=TAUGHT, help="property and answer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laboratory = Laboratory()
    result = {"machine": machine(), "batch": BATCH, "ratios": {}}
    for taught in arguments.taught:
        about, answer = taught.split()
        asked = Question(QUESTIONS[about][0], answer)
        goal = Objective([asked, Question(KEEP_QUESTION, keep=True)], MARGIN)
        found = {"ours": until_held(laboratory, taught, TEMPLATES[about], goal)}
        for rate in RATES:
            recipe = replace(PUBLISHED, steps=TEMPLATES[about].steps, learning_rate=rate)
            theirs = until_held(laboratory, taught, recipe, Objective([asked], LIKELIHOOD))
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
