"""What the judge's answers are worth: log-likelihoods in, a loss out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..vlm.answers import log_odds
from ..vlm.overlay import BeforeAfter
from ..vlm.question import KEEP, TEACH, WATCH, Question

LIKELIHOOD = "answer likelihood"
MARGIN = "answer margin"
TARGET = "answer target"


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of pictures under a list of questions.

    ``answer likelihood`` is the paper's loss (section 3): cross-entropy of the wanted answer, for any answer text.
    ``answer target`` is the same up to a probability: ``relu(log target - log P(wanted))``. A won question stops
    pushing, which is what keeps pictures from being burnt for a last per mille of probability.
    ``answer margin`` applies to Yes/No questions: ``relu(logit target - (log P(wanted) - log P(other)))``. It also
    cancels the judge's leaning to one answer. Other answers have no opposite: they go up to the target instead.

    A question to keep pushes only as long as its answer is less likely than before training and than the target; one of
    weight 0 never does.

    Args:
        questions: at least one to teach; weights are relative.
        kind: ``LIKELIHOOD``, ``TARGET`` or ``MARGIN``.
        target: probability, between 0 and 1, at which an answer counts as won; 0.982 are log-odds of 4.
        before: scores of all questions before training, see ``start_from``; empty: nothing is known of it.
        by_prompt: the same by the number of the prompt, as far as they are known.
    Raises:
        ValueError: no question to teach.
    """

    questions: list[Question]
    kind: str = MARGIN
    target: float = 0.982
    before: tuple[float, ...] = ()
    by_prompt: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        if not any(question.role == TEACH for question in self.questions):
            raise ValueError(
                "No question teaches: each is one to keep or only watched (weight 0). Add a Question with 'keep' off."
            )

    def start_from(self, scores: list[float], by_prompt: dict[int, list[float]] | None = None) -> Objective:
        """The same objective, knowing that the questions had these scores before training, and of which prompt."""
        return replace(self, before=tuple(scores), by_prompt=by_prompt or {})

    def of(self, prompt: int) -> Objective:
        """As it is for pictures of one prompt, which have to keep what that prompt had."""
        return replace(self, before=tuple(self.by_prompt.get(prompt, self.before)))

    @property
    def compares(self) -> bool:
        """Whether a question compares the pictures with those of the untaught model."""
        return any(isinstance(question.guide, BeforeAfter) for question in self.questions)

    def __call__(self, judge, images: Tensor, untaught: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and scores [B, Q] in 0..1, detached, of ``images`` [B, 3, H, W] in 0..1.

        ``untaught``, of the same shape, is needed where a question ``compares``.
        A score is P(wanted answer); with ``MARGIN``, for a Yes/No question, P(wanted) / (P(wanted) + P(other)).
        """
        if self.kind == MARGIN:
            log_p, odds = log_odds(judge, images, self.questions, untaught)
        else:
            log_p, odds = judge.log_likelihood(images, self.questions, untaught), [None] * len(self.questions)
        losses, scores = [], []
        for i, (question, wanted, ahead) in enumerate(zip(self.questions, log_p.T, odds)):
            if ahead is None:
                won = 1.0 if self.kind == LIKELIHOOD else self.target
                loss = torch.relu(self._goal(i, torch.log, won) - wanted)
                scores.append(wanted.exp())
            else:
                loss = torch.relu(self._goal(i, torch.logit, self.target) - ahead)
                scores.append(ahead.sigmoid())
            if question.role != WATCH:
                losses.append(loss * question.weight)
        loss = torch.stack(losses, dim=1).sum(dim=1).mean() / sum(question.weight for question in self.questions)
        return loss, torch.stack(scores, dim=1).detach()

    def _goal(self, i: int, scale: Callable[[Tensor], Tensor], won: float) -> float:
        """Where question ``i`` stops pushing, on the loss's own scale: at ``won``, a probability, or, if it is to keep,
        where it was before training if that is less."""
        if self.questions[i].role == KEEP and self.before:
            won = min(won, self.before[i])
        return scale(torch.tensor(won, dtype=torch.float64)).item()

    def standing(self, scores: list[float]) -> float:
        """How well the worst question does, 0..1: its score, or the share that is left of the score to keep; what is
        only watched is left out."""
        shares = list(scores)
        for i, question in enumerate(self.questions):
            if question.role == KEEP and self.before:
                shares[i] = 1.0 if scores[i] >= self.before[i] else scores[i] / self.before[i]
        return min(share for share, question in zip(shares, self.questions) if question.role != WATCH)
