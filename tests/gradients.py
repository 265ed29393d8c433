"""Autograd against finite differences, for any student."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def derivative_ratio(parameters: list[Tensor], loss: Callable[[], Tensor], reach=5e-4, points=9) -> float:
    """Autograd's derivative of ``loss()`` along its own gradient, divided by the finite difference.

    The difference is the slope of a cubic through many points, so that neither curvature nor rounding decides.
    """
    loss().backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    start = [p.detach().clone() for p in parameters]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient))
    size = math.sqrt(sum(p.double().square().sum().item() for p in start))

    @torch.no_grad()
    def at(distance: float) -> float:
        for p, p0, g in zip(parameters, start, gradient):
            p.copy_(p0 + g * (distance * size / norm))
        return loss().item()

    distances = np.linspace(-reach, reach, points)
    slope = np.polyfit(distances / reach, [at(d) for d in distances], 3)[2] / (reach * size)
    return norm / slope


def give_lora_a_value(lora) -> None:
    """Move B off zero, where half of the gradient vanishes."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in lora.adapters:
            adapter.B.copy_(0.05 * torch.randn(adapter.B.shape, generator=generator))


def picture_to_lora_ratio(student, k: int = 1) -> float:
    """``derivative_ratio`` of a random functional of the picture that ``student`` predicts at step ``k``."""

    def loop() -> float:
        give_lora_a_value(student.lora)
        x = student.roll(student.noise(3), k)
        like = student.decode(student.predict(x, k))
        weights = torch.randn(like.shape, generator=torch.Generator().manual_seed(6)).to(like)

        def loss() -> Tensor:
            image = student.decode(student.predict(x, k))
            return 100 * (image * weights).mean() + image.square().mean()

        return derivative_ratio(list(student.lora.parameters()), loss)

    return student.run(loop, beside=[])
