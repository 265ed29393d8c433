"""What a judge thinks of an answer, and of Yes against No."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .question import Question

SELDOM = 0.1  # probability below which an answer is not one that the judge gives


def log_odds(
    judge, images: Tensor | Sequence[Tensor], questions: Sequence[Question], before: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Log-likelihood of each wanted answer, and how far it is ahead of its opposite; arguments as of
    ``Judge.log_likelihood``.

    Returns:
        log P(wanted) ``[B, Q]``, and for each question log P(wanted) - log P(other) ``[B]``, or None where the answer
        is neither Yes nor No.
    """
    opposites = [question.opposite() for question in questions]
    log_p = judge.log_likelihood(images, [*questions, *(o for o in opposites if o is not None)], before)
    wanted, others = log_p[:, : len(questions)], iter(log_p.T[len(questions) :])
    return wanted, [None if o is None else wanted[:, i] - next(others) for i, o in enumerate(opposites)]


@torch.no_grad()
def never_answered(judge, images: Tensor, questions: Sequence[Question]) -> list[Question]:
    """Yes/No questions that the judge hardly ever answers so: Yes and No together get less than ``SELDOM`` of its
    probability, as a mean over pictures ``[B, 3, H, W]``. A before/after question is shown each picture twice."""
    log_p, odds = log_odds(judge, images, questions, images)
    given = [(p.exp() + (p - ahead).exp()).mean() for p, ahead in zip(log_p.T, odds) if ahead is not None]
    closed = [question for question, ahead in zip(questions, odds) if ahead is not None]
    return [question for question, share in zip(closed, given) if share < SELDOM]
