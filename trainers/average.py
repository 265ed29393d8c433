"""A running average of parameters: steadier than the parameters themselves, which the last few batches push about."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Exponential moving average of ``parameters``, a plain mean while it is young.

    Args:
        decay: share of the old average that a step keeps, 0 (no averaging) <= decay < 1.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.count += 1
        new = max(1 - self.decay, 1 / self.count)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], new)

    @contextmanager
    def applied(self):
        """The parameters have their averages as values for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values):
            present = parameter.clone()
            parameter.copy_(value)
            value.copy_(present)
