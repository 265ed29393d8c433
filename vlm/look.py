"""The choice between one look for all questions and one look for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .plain import answer_logp, plain_look
from .prompts import Prompt
from .shared import shared_look

log = logging.getLogger(__name__)

# How far two ways of computing one log-likelihood may lie apart: rounding of fp32, and of 16-bit or quantised layers.
TOLERANCE_FP32 = 1e-3
TOLERANCE_HALF = 0.25


class Look:
    """Scores prompts over one shared image prefix where the model allows it, else prompt by prompt.

    Whether it allows it is found out by doing both once, on the first pictures with several questions. A family whose
    cache cannot be continued, or whose image tokens attend to the question, fails that trial.

    Args:
        model: image-text-to-text model.
        name: how the judge is called in messages.
    """

    def __init__(self, model, name: str):
        self.model = model
        self.name = name
        self.shares: bool | None = None
        self._causal = False

    def __call__(self, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> Tensor:
        """Mean log-likelihood per answer token ``[rows, len(prompts)]``, float32.

        Raises:
            ValueError: an answer has several tokens and the model lets its prompt see them.
        """
        if len({prompt.ids + prompt.answer[:-1] for prompt in prompts}) > 1:
            if self.shares is None:
                self.shares = self._try_sharing(pixels, prompts, rows)
            if self.shares:
                return shared_look(self.model, pixels, prompts, rows)
        for prompt in prompts:
            if len(prompt.answer) > 1 and not self._causal:
                self._check_causal(pixels, prompt, rows)
        return plain_look(self.model, pixels, prompts, rows)

    @torch.no_grad()
    def _try_sharing(self, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> bool:
        try:
            gap = (shared_look(self.model, pixels, prompts, rows) - plain_look(self.model, pixels, prompts, rows)).abs()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every family fails in its own way, and all of them mean the same here
            reason = f"{type(error).__name__}: {error}"
        else:
            if gap.max() <= self._tolerance():
                return True
            reason = f"log-likelihoods differ by {gap.max():.3g}"
        log.warning(
            "%s cannot share one look at the picture between questions (%s): every question costs a whole pass.",
            self.name,
            reason,
        )
        return False

    @torch.no_grad()
    def _check_causal(self, pixels: dict[str, Tensor], prompt: Prompt, rows: int) -> None:
        """The first answer token must be as likely with the rest of the answer fed as without."""
        first = Prompt(prompt.inputs, prompt.answer[:1])
        alone = answer_logp(self.model, pixels, first, rows)[:, 0]
        gap = (answer_logp(self.model, pixels, prompt, rows)[:, 0] - alone).abs().max()
        if gap > self._tolerance():
            raise ValueError(
                f"{self.name} lets its prompt see the answer, so an answer of {len(prompt.answer)} tokens cannot be "
                "scored: choose an answer of one token, such as Yes."
            )
        self._causal = True

    def _tolerance(self) -> float:
        exact = self.model.dtype == torch.float32 and getattr(self.model, "quantization_method", None) is None
        return TOLERANCE_FP32 if exact else TOLERANCE_HALF
