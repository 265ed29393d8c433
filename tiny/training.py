"""What the three training scripts share: a schedule, averaged weights, saving."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of ``peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Average:
    """Exponential moving average of a module's parameters; early on it is a plain mean of the recent steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        names, parameters = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.weights[name] for name in names], [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.weights[name])


def descend(loss: Tensor, parameters: Iterable[Tensor], optimiser: torch.optim.Optimizer, rate: float) -> None:
    """One clipped optimiser step at the given learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
    optimiser.step()


def save(weights: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write contiguous copies in ``dtype`` to a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: w.detach().to("cpu", dtype).contiguous() for name, w in weights.items()}, partial)
    partial.chmod(0o644)
    partial.replace(path)
