"""Whether torch.compile would pay: what compiling the blocks costs once, and what it saves in every step.

    python3 dev.py bench compile --json compile.json

Generator and judge of about 100 M parameters each (``equal cost``, see ``step``), 256 x 256, run bare, forward and
backward, as they are and again with every one of their blocks compiled by inductor. CPU seconds of this process and of
the compilers it starts. ``pays_back_after_steps`` is what compiling took over what a forward and backward saves; none
where nothing is saved. The trainer compiles nothing: this is what the decision rests on.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from dual_process.benchmarks.pairs import start_comfyui
from dual_process.benchmarks.step import PAIRS
from dual_process.benchmarks.ways import Ideal, machine, report


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def blocks_of(ways: Ideal, name: str) -> list[torch.nn.Module]:
    """What the generator or the judge repeats."""
    from dual_process.trainers.checkpointing import stacked_blocks
    from dual_process.trainers.lora import repeated_blocks

    return list(stacked_blocks(ways.judge)) if name == "judge" else [b for _, b in repeated_blocks(ways.network)]


def measure(ways: Ideal, name: str, repeats: int) -> dict:
    """Compile the blocks of a model in place; seconds before, of compiling, and after, and the gradient's error."""

    def once() -> tuple[float, Tensor]:
        start = cpu_seconds()
        gradient = ways.there_and_back(name)
        return cpu_seconds() - start, gradient

    def median() -> float:
        return statistics.median(once()[0] for _ in range(repeats))

    _, gradient = once()
    before = median()
    for block in blocks_of(ways, name):
        block.compile()
    first, same = once()
    after = median()
    compiling, saved = first - after, before - after
    return {
        "cpu_seconds": before,
        "cpu_seconds_compiled": after,
        "cpu_seconds_to_compile": compiling,
        "gradient_error": ((same - gradient).norm() / gradient.norm()).item(),
        "pays_back_after_steps": compiling / saved if saved > 0 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=5, help="runs; medians are reported")
    parser.add_argument("--only", choices=PAIRS, default="equal cost", help="models to measure")
    arguments = parser.parse_args()
    start_comfyui()
    torch.set_num_threads(1)
    import torch._inductor.config as inductor

    from dual_process.trainers.comfy_memory import gradients

    inductor.compile_threads = 1  # in this process, whose seconds are counted
    result = {"machine": machine(), "models": arguments.only, "ratios": {}}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # so that nothing is found compiled
    with torch.inference_mode():
        ways = Ideal(PAIRS[arguments.only]())
        with gradients():
            for name in ("generator", "judge"):
                result[name] = one = measure(ways, name, arguments.repeats)
                ratio = one["cpu_seconds_compiled"] / one["cpu_seconds"]
                result["ratios"][f"{name}: compiled over as it is"] = ratio
                report(result, arguments.json)


if __name__ == "__main__":
    main()
