"""How time and memory of our step grow with the size of the picture, of the batch, of the LoRA and of the model.

    python3 dev.py bench scaling --json scaling.json --plot scaling.png

One size is varied at a time, on a random FLUX of width 256 and a random judge of SmolVLM's form, with every block
recomputed, one question, and steps that have the trainer's anchor and prior. Reported is the exponent e of cost ~
size^e, fitted over all sizes, of CPU seconds (medians of steps taken in turn) and of the peak of live tensors beyond
the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from dual_process.benchmarks.memory import MB
from dual_process.benchmarks.pairs import Pair, flux, random_pair, smol_judge, start_comfyui
from dual_process.benchmarks.ways import DEFAULT, Ours, interleaved, machine, peaks, report

SIZES = {
    "image side": [256, 384, 512, 768, 1024],
    "batch": [1, 2, 4],
    "prompts": [1, 4, 16],
    "rank": [4, 16, 64],
    "blocks": [3, 6, 12],
}
BASE = {"image side": 256, "batch": 1, "prompts": 1, "rank": 16, "blocks": 3}
WHAT = ("cpu_seconds", "peak_mb")


def pair_of(sizes: dict[str, int]) -> Pair:
    """A student and a judge of these sizes; a third of the blocks are FLUX's double blocks."""
    double = sizes["blocks"] // 3
    architecture = flux(heads=4, double=double, single=sizes["blocks"] - double)
    judge = smol_judge((4, 256), (4, 256), side=256)
    return random_pair(
        "scaling", architecture, judge, sizes["image side"], batch=sizes["batch"], rank=sizes["rank"],
        prompts=sizes["prompts"],
    )  # fmt: skip


def sweep(name: str, values: list[int], repeats: int) -> dict:
    """CPU seconds and peak megabytes at every size, and their exponents."""
    steps = {value: Ours(pair_of({**BASE, name: value}), 1, True, DEFAULT) for value in values}
    taken = interleaved(
        {value: lambda measured, step=step: step.run(0, measured) for value, step in steps.items()}, repeats
    )
    measured = {
        "cpu_seconds": [taken[value]["cpu_seconds"] for value in values],
        "peak_mb": [peaks(step)["whole"] / MB for step in steps.values()],
    }
    return {"sizes": values, **measured, "exponents": {what: exponent(values, measured[what]) for what in WHAT}}


def exponent(sizes: list[int], costs: list[float]) -> float:
    """e of the best fit of ``costs ~ sizes^e``."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def plot(found: dict[str, dict], path: Path) -> None:
    """A picture with a panel for every size and kind of cost, on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(found), 6), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharey="row")
    for column, (name, one) in zip(panels.T, found.items()):
        for panel, what in zip(column, WHAT):
            panel.loglog(one["sizes"], one[what], "o-")
            panel.set_title(f"{name}^{one['exponents'][what]:.2f}")
            panel.set_xticks(one["sizes"], [str(size) for size in one["sizes"]])
            panel.xaxis.minorticks_off()
            panel.set_ylabel(what.replace("_", " "))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw the numbers into this PNG")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--only", choices=SIZES, nargs="+", default=list(SIZES), help="sizes to vary")
    arguments = parser.parse_args()
    start_comfyui()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = {name: sweep(name, SIZES[name], arguments.repeats) for name in arguments.only}
    ratios = {f"{name}: exponent of {what}": one["exponents"][what] for name, one in found.items() for what in WHAT}
    report({"machine": machine(), "rounds": arguments.repeats, "ratios": ratios, **found}, arguments.json)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
