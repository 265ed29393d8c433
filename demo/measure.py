"""What the demo reports, computed from nothing but the pictures it saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..tiny.oracles import holds, measure
from ..trainers.guards import look
from ..trainers.sheet import grid
from ..vlm.judge import Judge
from ..vlm.question import Question

DRIFT_METRICS = ("luminance", "saturation", "edge_density", "colour_entropy")
SHEET_PAIRS, SHEET_COLUMNS, SHEET_SIDE = 16, 4, 192


def load_pictures(folder: Path, name: str) -> Tensor:
    """The pictures `<name>_*.png` of a folder in order of their names, [B, 3, H, W] in 0..1."""
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob(f"{name}_*.png"))]
    if not pictures:
        raise FileNotFoundError(f"There are no pictures '{name}_*.png' in {folder}.")
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255


def share(flags: Tensor) -> float:
    """Mean of a boolean tensor, 0..1."""
    return flags.float().mean().item()


def judge_probability(judge: Judge, pictures: Tensor, question: Question) -> float:
    """Mean probability (0..1) that the judge gives the wanted answer."""
    with torch.no_grad():
        return judge.log_likelihood(pictures, [question]).exp().mean().item()


def evaluate(pictures: Path, judge: Judge, question: Question, about: str) -> dict:
    """The measured part of the report, from `before_*.png` and `after_*.png` in one folder.

    Args:
        about: the property in question: horizon, palette, line or depth.

    Returns:
        Shares and probabilities in 0..1, and `drift`: for each metric the mean of those base pictures that had the
        wanted property anyway, the mean after, and the relative change between the two.
    """
    before, after = load_pictures(pictures, "before"), load_pictures(pictures, "after")
    had_it = holds(before, about, question.answer)
    reference, now = look(before[had_it]), look(after)
    changes = {}
    for metric in DRIFT_METRICS:
        x, y = reference[metric].mean().item(), now[metric].mean().item()
        changes[metric] = {"before_with_property": x, "after": y, "change": (y - x) / x}
    return {
        "judge_before": judge_probability(judge, before, question),
        "judge_after": judge_probability(judge, after, question),
        "oracle_before": share(had_it),
        "oracle_after": share(holds(after, about, question.answer)),
        "readable_after": share(measure(after)["readable"]),
        "drift": changes,
    }


def comparison_sheet(pictures: Path) -> Image.Image:
    """Sixteen pairs, LoRA off on the left and on on the right, the same seed in each pair."""

    def large(name: str, index: int) -> Image.Image:
        picture = Image.open(pictures / f"{name}_{index:02}.png").convert("RGB")
        return picture.resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.BICUBIC)

    names = ["before", "after"]
    starts = range(0, SHEET_PAIRS, SHEET_COLUMNS)
    rows = [[large(name, start + n) for n in range(SHEET_COLUMNS) for name in names] for start in starts]
    return grid(rows, names * SHEET_COLUMNS)
