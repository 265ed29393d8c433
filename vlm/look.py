"""The choice between one look for all questions and one look for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .memory import out_of_memory
from .plain import plain_look, repeated
from .prompts import Prompt
from .shared import shared_look

log = logging.getLogger(__name__)

# How far two ways of computing one log-likelihood may lie apart (beyond -1: as a share of its size). Rounding of fp32,
# and of 16-bit or quantised layers: logits of 16 to 32 are 0.125 apart in bf16.
TOLERANCE_FP32 = 1e-4
TOLERANCE_HALF = 0.25
# Change of a logit, in standard deviations of the logits, that shows that a token was seen by one before it.
SEEN_AHEAD = 1e-2


class Look:
    """Scores prompts over one shared image prefix where the model allows it, else prompt by prompt.

    Whether it allows it is found out once, on the first pictures with several questions: the beginning of a prompt must
    not see its end, and both ways must give the same. A family whose image tokens attend to the question, or whose
    cache cannot be continued, fails that trial.

    Args:
        model: image-text-to-text model.
        name: what the judge is called in messages.
    """

    def __init__(self, model, name: str):
        self.model = model
        self.name = name
        self.shares: bool | None = None
        self.sees_ahead: bool | None = None

    def __call__(self, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> Tensor:
        """Mean log-likelihood per answer token ``[rows, len(prompts)]``, float32.

        Raises:
            ValueError: an answer has several tokens and the model lets its prompt see them.
        """
        several = len({prompt.ids + prompt.answer[:-1] for prompt in prompts}) > 1
        if several and self.shares is None:
            self.shares = self._try_sharing(pixels, prompts, rows)
        if several and self.shares:
            return shared_look(self.model, pixels, prompts, rows)
        longest = max(len(prompt.answer) for prompt in prompts)
        if longest > 1 and self._sees_ahead(pixels, prompts[0], rows):
            raise ValueError(
                f"{self.name} lets its prompt see the answer, so an answer of {longest} tokens cannot be scored: "
                "choose an answer of one token, such as Yes."
            )
        return plain_look(self.model, pixels, prompts, rows)

    @torch.no_grad()
    def _try_sharing(self, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> bool:
        reason = self._hindrance(pixels, prompts, rows)
        if reason:
            log.warning(
                "%s cannot share one look at the picture between questions (%s): every question costs a whole pass.",
                self.name,
                reason,
            )
        return not reason

    def _hindrance(self, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> str:
        """Why the prompts cannot share a look; empty when they can."""
        if self._sees_ahead(pixels, prompts[0], rows):
            return "the beginning of its prompt sees the end"
        try:
            shared = shared_look(self.model, pixels, prompts, rows)
        except Exception as error:  # every family fails in its own way, and all of them mean the same here
            if out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}"
        plain = plain_look(self.model, pixels, prompts, rows)
        gap = ((shared - plain).abs() / plain.abs().clamp(min=1)).max().item()
        return "" if gap <= self._tolerance() else f"log-likelihoods differ by {gap:.3g}"

    @torch.no_grad()
    def _sees_ahead(self, pixels: dict[str, Tensor], prompt: Prompt, rows: int) -> bool:
        """Whether another last token changes what the model says at the token before it.

        Where attention is causal the change is exactly 0 in every precision, because both prompts are equally long; the
        threshold is for quantised layers, which scale all tokens together.
        """
        if self.sees_ahead is None:
            last = prompt.ids[-1]
            other = next(token for token in (*prompt.answer, *reversed(prompt.ids)) if token != last)
            ids = prompt.inputs["input_ids"].clone()
            ids[:, -1] = other
            said = [
                self.model(**repeated(inputs, rows, self.model.device), **pixels, logits_to_keep=2, use_cache=False)
                .logits[:, -2]
                .float()
                for inputs in (prompt.inputs, {**prompt.inputs, "input_ids": ids})
            ]
            self.sees_ahead = ((said[0] - said[1]).abs().max() > SEEN_AHEAD * said[0].std()).item()
        return self.sees_ahead

    def _tolerance(self) -> float:
        exact = self.model.dtype == torch.float32 and getattr(self.model, "quantization_method", None) is None
        return TOLERANCE_FP32 if exact else TOLERANCE_HALF
