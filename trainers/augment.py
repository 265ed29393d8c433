"""What is done to a picture before the judge sees it, so that no pattern of single pixels can fool it.

All of it is differentiable and drawn from the generator that is handed in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROP, CONTRAST, BRIGHTNESS = 0.1, 0.2, 0.1  # at most, at strength 1: share of a side, share, share of white


def with_noise(images: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """``images`` plus Gaussian noise whose standard deviation is drawn from 0..``strength`` for each picture."""
    sigma = strength * torch.rand(images.shape[0], 1, 1, 1, generator=rng)
    return images + (sigma * torch.randn(images.shape, generator=rng)).to(images)


def varied(images: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """``images`` [B, 3, H, W], each cropped, scaled back to its size, and changed in contrast and brightness.

    Args:
        strength: 0 (nothing happens, nothing is drawn) to 1.
    """
    if strength == 0:
        return images

    def either_way() -> Tensor:
        """[B], uniform in -strength..strength."""
        return strength * (2 * torch.rand(len(images), generator=rng) - 1)

    crop = CROP * either_way().abs()
    window = torch.zeros(len(images), 2, 3)
    window[:, 0, 0] = window[:, 1, 1] = 1 - crop
    window[:, 0, 2], window[:, 1, 2] = crop * either_way(), crop * either_way()
    grid = F.affine_grid(window, list(images.shape), align_corners=False).to(images)
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = ((most * either_way())[:, None, None, None].to(images) for most in (CONTRAST, BRIGHTNESS))
    mean = cropped.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (cropped - mean) * (1 + contrast) + brightness
