"""What the judge's answers are worth: log-likelihoods in, a loss out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    Args:
        questions: at least one; weights are relative.
        kind: ``LIKELIHOOD`` or ``MARGIN``.
        margin: log-odds at which a Yes/No question counts as won; 5 is a probability of 0.993.
    Raises:
        ValueError: no question.
    """

    questions: list[Question]
    kind: str = MARGIN
    margin: float = 5.0

    def __post_init__(self):
        if not self.questions:
            raise ValueError("No question is connected. Add a Question node and connect it to the trainer.")

    def __call__(self, judge, images: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and P(wanted answer) [B, Q], detached, of ``images`` [B, 3, H, W] in 0..1."""
        opposites = [q.opposite() if self.kind == MARGIN else None for q in self.questions]
        asked = [*self.questions, *(o for o in opposites if o is not None)]
        log_p = judge.log_likelihood(images, asked)
        wanted = log_p[:, : len(self.questions)]
        losses, following = [], len(self.questions)
        for i, opposite in enumerate(opposites):
            if opposite is None:
                losses.append(-wanted[:, i])
                continue
            losses.append(torch.relu(self.margin - (wanted[:, i] - log_p[:, following])))
            following += 1
        weights = log_p.new_tensor([q.weight for q in self.questions])
        loss = (torch.stack(losses, dim=1) * weights).sum(dim=1).mean() / weights.sum()
        return loss, wanted.detach().exp()
