"""What more questions cost than one: time and peak memory of a judge's forward and backward.

    python3 dev.py bench questions --json questions.json

A randomly initialised Qwen2.5-VL with the language model of the 0.5 B class looks at one 512 x 512 picture, which is
324 image tokens. Measured in one run: one, two, five and ten questions over one shared look, and five questions the way
of the reference implementation, which runs the whole model for each. A whole step, of which the judge is a part, grows
by less. The bundled judge, whose pictures are few tokens, is reported beside it. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path

import torch

from dual_process.benchmarks.pairs import QUESTIONS, qwen2_5_vl, start_comfyui
from dual_process.benchmarks.ways import machine, report
from dual_process.vlm.judge import Judge
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question

ROOT = Path(__file__).resolve().parent.parent
COUNTS = (1, 2, 5, 10)
SEPARATE = "5, the whole model for each"


def half_billion_judge() -> Judge:
    """Qwen2.5-0.5B's language model under a CLIP-B-sized tower, random weights, fp32."""
    vision = dict(depth=12, hidden_size=768, intermediate_size=2048, num_heads=12, fullatt_block_indexes=[2, 5, 8, 11])
    text = dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    return qwen2_5_vl(vision, text, tie=True)


class PeakMemory:
    """Highest resident memory of this process while the block ran, in MB; None where the system cannot reset it."""

    def __enter__(self) -> PeakMemory:
        self.megabytes = None
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
        except OSError:
            self._reset = False
        else:
            self._reset = True
        return self

    def __exit__(self, *_) -> None:
        if self._reset:
            mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.megabytes = int(mark[1]) / 1024


def measure(judge: Judge, picture: torch.Tensor, count: int, share: bool) -> dict[str, float | None]:
    """Seconds by the clock, seconds of CPU and peak megabytes of one forward and backward with ``count`` questions."""
    judge.look.shares = share
    picture = picture.clone().requires_grad_()
    questions = [Question(text, answer) for answer in ("Yes", "No") for text in QUESTIONS][:count]
    with PeakMemory() as peak:
        start, cpu_start = time.perf_counter(), time.process_time()
        judge.log_likelihood(picture, questions).mean().backward()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak.megabytes}


def compare(judge: Judge, picture: torch.Tensor, repeats: int) -> dict:
    """Medians over ``repeats`` rounds that take all ways in turn, and their ratios to one question."""
    ways = {str(count): (count, True) for count in COUNTS} | {SEPARATE: (5, False)}
    size = tuple(picture.shape[-2:])
    tokens = [len(judge.prompts.encode(text, "Yes", (size,)).ids) for text in QUESTIONS]
    rounds = [{way: measure(judge, picture, *case) for way, case in ways.items()} for _ in range(repeats)]

    def median(way: str, what: str) -> float | None:
        values = [one[way][what] for one in rounds]
        return None if None in values else statistics.median(values)

    measured = {what: {way: median(way, what) for way in ways} for what in rounds[0]["1"]}
    return {
        "judge": judge.name,
        "parameters": sum(parameter.numel() for parameter in judge.model.parameters()),
        "picture": list(size),
        "prompt_tokens": tokens,
        "rounds": repeats,
        **measured,
        "ratios": {what: to_one(measured[what]) for what in ("cpu_seconds", "peak_mb")},
    }


def to_one(found: dict[str, float | None]) -> dict[str, float] | None:
    """What each way took of what one question takes; None where it was not measured."""
    return {way: value / found["1"] for way, value in found.items()} if found["1"] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported")
    arguments = parser.parse_args()
    start_comfyui()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = compare(half_billion_judge(), torch.rand(1, 3, 512, 512), arguments.repeats)
    small = compare(load_judge(ROOT / "tiny" / "judge"), torch.rand(1, 3, 96, 96), arguments.repeats)
    del small["peak_mb"], small["ratios"]["peak_mb"]  # too little to see beside the interpreter
    report({"machine": machine(), **found, "bundled_judge": small}, arguments.json)


if __name__ == "__main__":
    main()
