"""One LoRA per row of a question list: does asking teach what a longer prompt does not?

    python3 dev.py bench commonsense --json FILE [--rows LIST.json] [--checkpoint FILE --judge FOLDER ...]

LIST holds rows ``{"prompt", "explicit", "question", "answer"}``: a prompt, the same prompt with what it implies spelled
out, a question about the picture, and the answer that common sense wants. Each row is taught on its prompt alone.
Held-out seeds are then scored three ways (prompt without a LoRA, explicit prompt without one, prompt with its LoRA) by
the judge that taught, by ``--second-judge`` that did not, and, where a row names a ``property`` of the bundled
scenes, by the oracle. Rows that are in FILE already are not taught again. Without ``--checkpoint`` the bundled
models and ``commonsense_scenes.json`` are used.

For CommonsenseT2I itself (Fu et al., arXiv 2406.07546) write one row for each of its 150 pairs' prompts, the expected
description as ``explicit`` and turned into a question. Its authors publish 48.92 % for DALL-E 3 and 24.92 % for SDXL,
by a stricter measure: both prompts of a pair must come out right. The numbers of this script are per row.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dual_process.benchmarks.bundled import BATCH, TEMPLATE, TEMPLATES, Laboratory, Lesson, save_sheet
from dual_process.benchmarks.markdown import table_of
from dual_process.demo.measure import share
from dual_process.tiny.oracles import holds
from dual_process.tiny.questions import KEEP_QUESTION
from dual_process.tiny.scenes import SIDE
from dual_process.trainers.guards import became, changes
from dual_process.trainers.objective import Objective
from dual_process.vlm.answers import log_odds
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question

HELD_OUT = 32
WAYS = ("prompt", "explicit prompt", "LoRA")  # of drawing


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results are added to this file, sheets lie beside it")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("commonsense_scenes.json"))
    parser.add_argument("--checkpoint", type=Path, help="as Load Checkpoint takes it; the bundled student if left out")
    parser.add_argument("--judge", type=Path, help="folder of the judge that teaches")
    parser.add_argument("--second-judge", type=Path, help="folder of a judge that only scores")
    parser.add_argument("--keep", help="question whose Yes has to stay; empty for none")
    parser.add_argument("--side", type=int, help="px a side")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--sampler-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=TEMPLATE.steps)
    parser.add_argument("--learning-rate", type=float)
    arguments = parser.parse_args()
    for name, bundled in {"keep": KEEP_QUESTION, "side": SIDE, "learning_rate": None}.items():
        if getattr(arguments, name) is not None:
            continue
        if arguments.checkpoint:
            parser.error(f"--checkpoint needs --{name.replace('_', '-')}: that of the bundled models will not suit it")
        setattr(arguments, name, bundled)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    laboratory = Laboratory(arguments.checkpoint, **({"judge": arguments.judge} if arguments.judge else {}))
    judges = {"judge": laboratory.judge.judge}
    if arguments.second_judge:
        judges["second judge"] = load_judge(arguments.second_judge)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    done = {(result["prompt"], result["question"]) for result in results}
    how = {name: getattr(arguments, name) for name in ("side", "batch", "sampler_steps")}
    for row in json.loads(arguments.rows.read_text()):
        if (row["prompt"], row["question"]) in done:
            continue
        asked = Question(row["question"], row["answer"])
        kept = [Question(arguments.keep, keep=True)] if arguments.keep else []
        template = TEMPLATES.get(row.get("property"), TEMPLATE)
        rate = arguments.learning_rate or template.learning_rate
        settings = replace(template, steps=arguments.steps, learning_rate=rate)
        lesson = laboratory.learn(Objective([asked, *kept]), settings, HELD_OUT, prompts=[row["prompt"]], **how)
        explicit = laboratory.draw(count=HELD_OUT, prompts=[row["explicit"]], **how)
        pictures = dict(zip(WAYS, (lesson.before, explicit, lesson.after)))
        result = {**row, "as wanted": scored(pictures, asked, judges, row.get("property")), **told(lesson)}
        results.append(result)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        save_sheet(torch.cat([lesson.before[:8], explicit[:8], lesson.after[:8]]), arguments.json, f"{len(results):03}")
        print(json.dumps(result), flush=True)
    print(table(results))


def scored(pictures: dict[str, Tensor], asked: Question, judges: dict, about: str | None) -> dict:
    """For each way of drawing, and each judge: the share of pictures whose more likely answer is the wanted one."""
    result = {}
    for way, drawn in pictures.items():
        with torch.no_grad():
            found = {name: share(_answers(judge, drawn, asked)) for name, judge in judges.items()}
        if about:
            found["oracle"] = share(holds(drawn, about, asked.answer))
        result[way] = found
    return result


def _answers(judge, pictures: Tensor, asked: Question) -> Tensor:
    """Whether the wanted answer is the more likely one, or, if it is not Yes or No, more likely than not; bool [B]."""
    log_p, (ahead,) = log_odds(judge, pictures, [asked])
    return log_p[:, 0].exp() > 0.5 if ahead is None else ahead > 0


def told(lesson: Lesson) -> dict:
    """How the LoRA came to be, and what became of the pictures apart from the answer."""
    found, looked = changes(lesson.before, lesson.after), lesson.run.checks[-1].changes
    strangeness = {"strangeness": looked["strangeness"]} if "strangeness" in looked else {}
    return {
        **{"steps": len(lesson.run.loss), "stopped": lesson.run.stopped, "seconds": round(lesson.seconds, 1)},
        **{"changes": found, **strangeness, "warning": became({**found, **strangeness}, {})},
    }


def table(results: list[dict]) -> str:
    """Markdown: means over rows of what each judge (and the oracle) says of each way of drawing."""
    judges = list(dict.fromkeys(name for result in results for name in result["as wanted"][WAYS[0]]))
    columns = [f"share of pictures as wanted, {len(results)} rows", *judges]
    lines = []
    for way in WAYS:
        means = []
        for judge in judges:
            scores = [result["as wanted"][way] for result in results]
            shares = [score[judge] for score in scores if judge in score]
            means.append(f"{sum(shares) / len(shares):.1%}")
        lines.append([way, *means])
    warned = sum(bool(result["warning"]) for result in results)
    return f"{table_of(columns, lines)}\n\n{warned} of {len(results)} rows carry a warning."


if __name__ == "__main__":
    main()
