"""Rows of measured lessons in a JSON file, with their pictures and LoRAs beside it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dual_process.benchmarks.bundled import FEW, Lesson, measured, save_sheet
from dual_process.demo.measure import DRIFT_METRICS, share
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.scenes import PROPERTIES
from dual_process.trainers.guards import largest_fault

MEASURES = {"horizon": "horizon", "palette": "warmth", "line": "line", "depth": "depth"}  # of the oracle


class Table:
    """Rows in a JSON file, written one by one; their pictures beside it."""

    def __init__(self, file: Path):
        self.file = file
        self.rows = json.loads(file.read_text()) if file.exists() else []

    def has(self, name: str, seed: int) -> bool:
        return any((row["row"], row["seed"]) == (name, seed) for row in self.rows)

    def lora(self, name: str, seed: int) -> Path:
        """Where the LoRA of a row lies."""
        return self.file.with_name(f"{self.file.stem}_{name.replace(' ', '_')}_{seed}.safetensors")

    def add(self, name: str, seed: int, lesson: Lesson, goals: dict[str, str], more: dict | None = None) -> None:
        """Measure a lesson and write it down, with what ``more`` is known."""
        run = lesson.run
        row = {"row": name, "seed": seed, "pictures": len(lesson.after), "steps": len(run.loss), "stopped": run.stopped}
        row |= {"seconds": round(lesson.seconds, 1), "judge": run.checks[-1].scores if run.checks else None}
        row |= {"drift": max((largest_fault(check.changes) for check in run.checks if check.changes), default=None)}
        row |= {"strangeness": run.checks[-1].changes.get("strangeness") if run.checks else None}
        for about, answer in goals.items():
            row[f"{about} {answer}"] = measured(lesson.before, lesson.after, about, answer)
        row["others"] = {"before": others(lesson.before), "after": others(lesson.after)}
        self.rows.append(row | (more or {}))
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n")
        if lesson.lora:
            save_file(lesson.lora, self.lora(name, seed))
        save_sheet(lesson.after[:FEW], self.file, f"{name} {seed}")
        print(json.dumps(self.rows[-1]), flush=True)


def others(pictures: Tensor) -> dict[str, float]:
    """Share of the clean pictures that have each property, and a sun, which no question is about; empty if none is
    clean."""
    found = measure(pictures)
    clean = found["readable"]
    if not clean.any():
        return {}
    shares = {about: share(holds(pictures, about)[clean]) for about in PROPERTIES}
    return {**shares, "sun": share(found["sun"][clean])}


def largest_change(changes: list[dict[str, float]]) -> str:
    """The largest change of luminance, saturation, edges or colour entropy of several rows, in words."""
    size, guard = max((abs(one[guard]), guard) for one in changes for guard in DRIFT_METRICS)
    return f"{guard.replace('_', ' ')} {size:.0%}"
