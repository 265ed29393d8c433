"""What the judge's answers are worth: log-likelihoods in, a loss out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..vlm.overlay import BeforeAfter
from ..vlm.question import Question

LIKELIHOOD = "answer likelihood"
MARGIN = "answer margin"


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of pictures under a list of questions.

    ``answer likelihood`` is the paper's loss (section 3): cross-entropy of the wanted answer, for any answer text.
    ``answer margin`` applies to Yes/No questions: ``relu(margin - (log P(wanted) - log P(other)))``. It cancels the
    judge's leaning to one answer and stops pushing once the answer is won, which is what keeps pictures from being
    burnt for a last per mille of probability. Questions with other answers fall back to cross-entropy.

    A question to keep pushes only as long as its answer is less likely than before training.

    Args:
        questions: at least one that is not to keep; weights are relative.
        kind: ``LIKELIHOOD`` or ``MARGIN``.
        margin: log-odds at which a Yes/No question counts as won; 4 is a probability of 0.982.
        before: scores of all questions before training, see ``start_from``; empty: nothing is known of it.
    Raises:
        ValueError: no question to teach.
    """

    questions: list[Question]
    kind: str = MARGIN
    margin: float = 4.0
    before: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.questions:
            raise ValueError("No question is connected. Add a Question node and connect it to the trainer.")
        if all(question.keep for question in self.questions):
            raise ValueError("Every question is one to keep. Add a Question with 'keep' off: what is to be taught.")

    def start_from(self, scores: list[float]) -> Objective:
        """The same objective, knowing that the questions had these scores before training."""
        return replace(self, before=tuple(scores))

    @property
    def compares(self) -> bool:
        """Whether a question compares the pictures with those of the untaught model."""
        return any(isinstance(question.guide, BeforeAfter) for question in self.questions)

    def __call__(self, judge, images: Tensor, untaught: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and scores [B, Q] in 0..1, detached, of ``images`` [B, 3, H, W] in 0..1.

        ``untaught``, of the same shape, is needed where a question ``compares``.
        A score is P(wanted answer); with ``MARGIN``, for a Yes/No question, P(wanted) / (P(wanted) + P(other)).
        """
        opposites = [q.opposite() if self.kind == MARGIN else None for q in self.questions]
        log_p = judge.log_likelihood(images, [*self.questions, *(o for o in opposites if o is not None)], untaught)
        others = iter(log_p.T[len(self.questions) :])
        losses, scores = [], []
        for i, opposite in enumerate(opposites):
            wanted = log_p[:, i]
            if opposite is None:
                losses.append(torch.relu(self._goal(i, torch.log, 0.0) - wanted))
                scores.append(wanted.exp())
            else:
                odds = wanted - next(others)
                losses.append(torch.relu(self._goal(i, torch.logit, self.margin) - odds))
                scores.append(odds.sigmoid())
        weights = log_p.new_tensor([q.weight for q in self.questions])
        loss = (torch.stack(losses, dim=1) * weights).sum(dim=1).mean() / weights.sum()
        return loss, torch.stack(scores, dim=1).detach()

    def _goal(self, i: int, scale: Callable[[Tensor], Tensor], won: float) -> float:
        """Where question ``i`` stops pushing, on the loss's own scale."""
        if not (self.questions[i].keep and self.before):
            return won
        return min(won, scale(torch.tensor(self.before[i], dtype=torch.float64)).item())

    def standing(self, scores: list[float]) -> float:
        """How well the worst question does, 0..1: its score, or the share that is left of the score to keep."""
        shares = [
            min(score / self.before[i], 1.0) if question.keep and self.before else score
            for i, (question, score) in enumerate(zip(self.questions, scores))
        ]
        return min(shares)
