"""Sorting pictures by a judge's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .answers import log_odds
from .judge import Judge, beside
from .question import Question


@torch.no_grad()
def rank(
    judge: Judge,
    pictures: Tensor,
    questions: Sequence[Question],
    after_each: Callable[[], None],
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score pictures one at a time, so that a large batch needs no more memory than one picture.

    Args:
        judge: on the compute device.
        pictures: ``[B, 3, H, W]`` on the 0..1 scale.
        questions: what is asked; their weights weigh the mean.
        after_each: called after every picture; may raise to stop.
        reference: shown before each picture; see ``beside``.

    Returns:
        order: ``[B]`` indices, best first; equal scores keep the batch's order.
        scores: ``[B, Q]``, 0..1, as the trainer's with the answer margin: for Yes and No the probability of the
            wanted one against the other, else that of the answer (geometric mean over its tokens).
        means: ``[B]`` weighted mean of the scores.

    Raises:
        ValueError: no question has a weight.
    """
    weights = torch.tensor([question.weight for question in questions])
    if not weights.any():
        raise ValueError("Every question has the weight 0, by which nothing can be sorted: give one a weight.")
    rows = []
    for shown in beside(reference, pictures):
        log_p, odds = log_odds(judge, [picture[None] for picture in shown], questions)
        of_each = [wanted.exp() if ahead is None else ahead.sigmoid() for wanted, ahead in zip(log_p.T, odds)]
        rows.append(torch.stack(of_each, dim=1).cpu())
        after_each()
    scores = torch.cat(rows)
    means = (scores * weights).sum(dim=1) / weights.sum()
    return means.sort(descending=True, stable=True).indices, scores, means


def score_table(order: Tensor, scores: Tensor, means: Tensor, questions: Sequence[Question]) -> str:
    """One line per picture, best first: its place in the batch, its mean, and its score per question; below them the
    questions."""
    lines = ["picture  mean   " + "  ".join(f"q{n:<4}" for n in range(1, len(questions) + 1))]
    for i in order.tolist():
        cells = "  ".join(f"{score:.3f}" for score in scores[i].tolist())
        lines.append(f"{i:>7}  {means[i]:.3f}  {cells}")
    lines += [f"q{n}: {question.text.strip()} -> {question.answer}" for n, question in enumerate(questions, 1)]
    return "\n".join(lines)
