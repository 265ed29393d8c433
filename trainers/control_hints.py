"""ControlNets that encode their picture with a VAE (those of SD3 and FLUX): as if it had been encoded beforehand.

ComfyUI encodes in the first pass that needs it. During training that may be one with gradients, which the VAE's weights
refuse, and to make room for it ComfyUI may move the models away that a training step holds on to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class EncodesApart:
    """A VAE that encodes without gradients and then has ``bring_back`` called; otherwise it is the VAE."""

    def __init__(self, vae, bring_back: Callable[[], None]):
        self._vae, self._bring_back = vae, bring_back

    def __getattr__(self, name: str):
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor) -> Tensor:
        with _disable_current_modes():  # what it takes is no part of a training step
            with torch.inference_mode():
                latent = self._vae.encode(pixels)
            self._bring_back()
            return latent.clone()


def hints_encoded_apart(conds: dict[str, list], bring_back: Callable[[], None]) -> ExitStack:
    """Let all ControlNets of ComfyUI conditionings encode that way; closing the returned stack undoes it."""
    stack = ExitStack()
    for control in set(_controls(conds)):
        if (vae := getattr(control, "vae", None)) is not None:
            control.vae = EncodesApart(vae, bring_back)
            stack.callback(setattr, control, "vae", vae)
    return stack


def _controls(conds: dict[str, list]) -> Iterator:
    for entries in conds.values():
        for _, values in entries:
            control = values.get("control")
            while control is not None:
                yield control
                control = control.previous_controlnet
