"""What a training step costs: against the least it could cost, and against the published way.

    python3 dev.py bench step --json step.json

Ratios of CPU seconds of one thread (of several, those that wait for work count too), medians of steps taken in turn, on
the bundled models and on random ones of about 100 M parameters each for generator and judge: SD3's form and SmolVLM's,
256 px, seen by the judge as 64 tokens, as SmolVLM does; one pair where generator and judge cost about the same, one
where the generator dominates. ``judge_over_generator`` is the judge's bare forward and backward with one question over
those of generator and VAE with the rollout before them: 1 is the same cost, and *about* the same means within a fifth
of it.

* ``plain``: everything kept. ``automatic``: recomputed what the trainer chooses where ``TIGHT`` of the published way's
  peak is free (``bench memory``). ``checkpointed``: everything recomputed, which is the least memory. ``default``: as
  automatic, and with anchor and prior, as the trainer is set by default: the mean of a ``holding`` step, which has
  both, and of those ``between``, which have neither. The others are without both.
* ``..._over_ideal``: one question, against bare forward and backward of generator, VAE and judge on the same tensors.
* ``..._over_published``: three questions, against one graph from the answers to the LoRA, with a whole pass of the
  judge for each question.
* ``outside_torch``: share of default steps that is spent in neither a torch operator nor the preparation of pictures
  for the judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from dual_process.benchmarks.pairs import Pair, bundled, parameters, random_pair, sd3, smol_judge, start_comfyui
from dual_process.benchmarks.ways import (
    DEFAULT,
    Ideal,
    Ours,
    Published,
    interleaved,
    machine,
    outside_torch,
    peaks,
    report,
)
from dual_process.trainers.dual_process import HELD_EVERY

QUESTIONS = 3
TIGHT = 0.4


def compare(pair: Pair, repeats: int) -> dict:
    """Seconds of all ways to take a step, and the ratios of their CPU seconds."""
    ideal, published = Ideal(pair), Published(pair, QUESTIONS)
    free = TIGHT * peaks(published)["whole"]
    steps, plans = {"published, three questions": published}, {}
    for count, asked in ((1, ""), (QUESTIONS, ", three questions")):
        steps |= {
            f"plain{asked}": Ours(pair, count, checkpointed=False),
            f"automatic{asked}": Ours(pair, count, checkpointed=True),
            f"checkpointed{asked}": Ours(pair, count, checkpointed=True),
            f"default{asked}": Ours(pair, count, checkpointed=True, settings=DEFAULT),
        }
        plans |= {f"{name}{asked}": steps[f"{name}{asked}"].settle(free) for name in ("automatic", "default")}
    ways = {name: lambda measured, way=way: way.run(0, measured) for name, way in steps.items()}
    for asked in ("", ", three questions"):
        default = ways.pop(f"default{asked}")
        ways[f"default, holding{asked}"] = default
        ways[f"default, between{asked}"] = lambda measured, way=steps[f"default{asked}"]: way.run(0, measured, step=2)
    taken = interleaved({"ideal": ideal.run, **ways}, repeats)
    cpu = {name: one["cpu_seconds"] for name, one in taken.items()}
    for asked in ("", ", three questions"):
        between = (HELD_EVERY - 1) * cpu[f"default, between{asked}"]
        cpu[f"default{asked}"] = (cpu[f"default, holding{asked}"] + between) / HELD_EVERY
    ratios = {}
    for name in ("plain", "automatic", "checkpointed", "default"):
        ratios[f"{name}_over_ideal"] = cpu[name] / cpu["ideal"]
        ratios[f"{name}_over_published"] = cpu[f"{name}, three questions"] / cpu["published, three questions"]
    ratios["outside_torch"] = outside_torch(steps["default"])
    bare = ideal.seconds_of_each()
    ratios["judge_over_generator"] = bare["judge"] / (bare["generator"] + bare["VAE"])
    student = steps["plain"].student
    return {
        "parameters": {
            "generator": parameters(student.model.model),
            "VAE": parameters(student.vae.first_stage_model),
            "judge": parameters(pair.judge.judge.model),
            "LoRA": parameters(student.lora),
        },
        "bare_cpu_seconds": bare,
        "chosen": {name: plan.sentence() for name, plan in plans.items()},
        "steps": taken,
        "ratios": ratios,
    }


def equal_cost() -> Pair:
    """About 100 M parameters each; generator, with its rollout and VAE, and judge take about as long."""
    return random_pair("equal cost", sd3(9), smol_judge((4, 512), (16, 576), 512), 256)


def generator_dominates() -> Pair:
    """The same generator with a judge of about a sixth of its cost."""
    return random_pair("generator dominates", sd3(9), smol_judge((2, 192), (4, 192), 512), 256)


PAIRS = {"bundled": bundled, "equal cost": equal_cost, "generator dominates": generator_dominates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are reported")
    parser.add_argument("--only", choices=PAIRS, nargs="+", default=list(PAIRS), help="pairs to measure")
    arguments = parser.parse_args()
    start_comfyui()
    torch.set_num_threads(1)
    result = {"machine": machine(), "rounds": arguments.repeats}
    with torch.inference_mode():
        compare_all(arguments.only, lambda pair: compare(pair, arguments.repeats), result, arguments.json)


def compare_all(names: list[str], compare: Callable[[Pair], dict], result: dict, path: Path | None) -> None:
    """Complete ``result`` by what ``compare`` finds out about each pair, and report it after every one."""
    result["ratios"] = {}
    for name in names:
        result[name] = compare(PAIRS[name]())
        result["ratios"] |= {f"{name}: {what}": ratio for what, ratio in result[name].pop("ratios").items()}
        report(result, path)


if __name__ == "__main__":
    main()
