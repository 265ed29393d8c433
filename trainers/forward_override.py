"""Replacing a module's ``forward`` for a while."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def override_forward(module: nn.Module, wrap: Callable[[Callable], Callable]) -> Callable[[], None]:
    """Put ``wrap(module.forward)`` in place of ``module.forward``; the returned function undoes it exactly.

    Overrides nest: undo them in reverse order.
    """
    before = module.__dict__.get("forward")
    module.forward = wrap(module.forward)

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo
