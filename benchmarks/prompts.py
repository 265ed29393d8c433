"""Taught on eight prompts, asked on eight others: does a control hold where it was not trained?

`python3 dev.py bench prompts --json FILE` teaches the bundled student a high horizon on prompts that say nothing about
the horizon, and lets the oracle measure it on prompts and seeds that training never saw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from dual_process.benchmarks.bundled import FIRST_SEED, TEMPLATE, Laboratory, save_sheet
from dual_process.demo.measure import share
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS
from dual_process.tiny.scenes import prompt_for
from dual_process.trainers.dual_process import train
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question

PROMPTS = SEEDS = 8


def prompts() -> tuple[list[str], list[str]]:
    """Eight prompts to train on and eight others, each fixing up to three properties but never the horizon."""
    sides = (None, False, True)
    wanted = [
        {name: side for name, side in zip(("palette", "line", "depth"), chosen) if side is not None}
        for chosen in itertools.product(sides, repeat=3)
    ]
    texts = [prompt_for(one) for one in wanted]
    random.Random(0).shuffle(texts)
    return texts[:PROMPTS], texts[PROMPTS : 2 * PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here, and the pictures beside it")
    parser.add_argument("--steps", type=int, default=TEMPLATE.steps)
    arguments = parser.parse_args()
    laboratory = Laboratory()
    trained_on, unseen = prompts()
    objective = Objective([Question(QUESTIONS["horizon"][0]), Question(KEEP_QUESTION, keep=True)])
    settings = replace(TEMPLATE, steps=arguments.steps, accumulate=2, check_seeds=PROMPTS)
    with torch.inference_mode():
        student = laboratory.student([*trained_on, *unseen], batch=SEEDS)
        student.prompts = PROMPTS  # training draws from the first eight only

        def draw(when: str) -> dict[str, dict[str, float]]:
            def of(which: str, first: int) -> dict[str, float]:
                pictures = torch.cat([student.draw(FIRST_SEED, first + i) for i in range(PROMPTS)])
                pictures = (pictures * 255).round() / 255
                if arguments.json:
                    save_sheet(pictures, arguments.json, f"{which} {when}")
                had = holds(pictures, "horizon", "Yes")
                return {"oracle": share(had), "readable": share(measure(pictures)["readable"])}

            return {name: of(name, first) for name, first in (("trained prompts", 0), ("unseen prompts", PROMPTS))}

        def loop():
            before = draw("before")
            run = train(student, laboratory.judge.judge, objective, settings, lambda *_: None)
            return before, run, draw("after")

        before, run, after = student.run(loop, beside=[laboratory.judge.patcher])
    result = {"trained_on": trained_on, "unseen": unseen, "before": before, "after": after, "steps": len(run.loss)}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
