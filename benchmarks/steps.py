"""Which of the sampler's steps to learn from: composition and line weight, taught at 4 and at 20 sampler steps.

`python3 dev.py bench steps --json FILE` teaches the bundled student with every `learn_at`; fresh noise takes two noises
a step and half of the steps, so that all are given as many judged pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

from dual_process.benchmarks.bundled import FEW, TEMPLATE, Laboratory, measured
from dual_process.trainers.dual_process import FRESH_NOISE, LEARN_AT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--sampler-steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--taught", nargs="+", default=["horizon Yes", "line No"], help="property and answer")
    parser.add_argument("--learn-at", nargs="+", choices=LEARN_AT, default=LEARN_AT)
    arguments = parser.parse_args()
    laboratory, rows = Laboratory(), []
    for taught in arguments.taught:
        about, answer = taught.split()
        for sampler_steps, learn_at in itertools.product(arguments.sampler_steps, arguments.learn_at):
            settings = replace(TEMPLATE, learn_at=learn_at)
            if learn_at == FRESH_NOISE:
                settings = replace(settings, accumulate=2, steps=settings.steps // 2)
            lesson = laboratory.teach({about: answer}, settings, sampler_steps=sampler_steps, count=FEW)
            found = measured(lesson.before, lesson.after, about, answer)
            row = {"sampler_steps": sampler_steps, "taught": taught, "learn_at": learn_at}
            row |= {name: found[name] for name in ("before", "oracle", "readable")}
            row |= {"judge": lesson.run.checks[-1].scores[0], "steps": len(lesson.run.loss)}
            rows.append(row | {"seconds": round(lesson.seconds, 1)})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
