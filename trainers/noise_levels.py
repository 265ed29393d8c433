"""The noise levels that pictures are drawn with, as ComfyUI's own nodes choose them."""

from __future__ import annotations

import comfy.samplers
import torch
from torch import Tensor


def noise_levels(
    model, steps: int, sampler_name: str, scheduler: str, sampler=None, sigmas: Tensor | None = None
) -> Tensor:
    """Sigmas ``[K + 1]``, falling. Given ones are returned as they are; with a connected ``sampler`` they are
    SamplerCustom's, otherwise KSampler's, which leaves a level out for some samplers.

    Args:
        model: MODEL whose schedule counts.
        steps: K, where no sigmas are given.
        sampler, sigmas: what is connected instead of the names, or None.
    """
    if sigmas is not None:
        return sigmas
    if sampler is not None:
        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    return comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler_name, scheduler).sigmas
