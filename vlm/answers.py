"""What a judge thinks of an answer, and of Yes against No."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .question import Question


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
