"""What a user asks the judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .overlay import Guide

TEACH, KEEP, WATCH = "teach", "keep", "watch"
_CLOSED = {"yes": "no", "no": "yes"}


@dataclass(frozen=True)
class Question:
    """A question about a picture and the answer that is wanted.

    Args:
        text: the question, as a user would type it.
        answer: the wanted answer; any text, "No" included.
        weight: share of this question in the loss. 0 only watches: it is asked, and nothing is done about the answer.
        keep: the answer has to stay as likely as it was before training; it is not taught.
        guide: what is shown over or beside the picture; None for the picture alone.

    Raises:
        ValueError: the text or the answer is empty, or the weight is negative.
    """

    text: str
    answer: str = "Yes"
    weight: float = 1.0
    keep: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("The question is empty: type what the judge is to be asked.")
        if not self.answer.strip():
            raise ValueError(f'The wanted answer to "{self.text}" is empty: type a word, for example Yes.')
        if not self.weight >= 0:
            raise ValueError(f'The weight of "{self.text}" is {self.weight}: it must be 0 or greater.')

    @property
    def role(self) -> str:
        """What the question is for: one of ``TEACH``, ``KEEP`` and ``WATCH``."""
        if self.weight == 0:
            return WATCH
        return KEEP if self.keep else TEACH

    @property
    def pictures(self) -> int:
        """How many pictures the judge is shown at once when one is asked about."""
        return 1 if self.guide is None else self.guide.pictures

    def opposite(self) -> Question | None:
        """The same question with Yes and No swapped (case and full stop kept), or None when the answer is neither."""
        answer = self.answer.strip()
        word = answer.rstrip(".!")
        other = _CLOSED.get(word.lower())
        if other is None:
            return None
        if word.isupper():
            other = other.upper()
        elif word[0].isupper():
            other = other.capitalize()
        return replace(self, answer=other + answer[len(word) :])
