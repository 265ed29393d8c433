"""Rotary embeddings that gradients pass: newer ComfyUIs leave them to comfy-kitchen, where they have no derivative.

In training ComfyUI computes them otherwise for most models, but not for all: Cosmos Predict2, Anima, JoyImage, Ernie.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rope_in_torch() -> Iterator[None]:
    """While it lasts, comfy-kitchen's rotary embeddings (but for those in place) are the ones it has in plain torch."""
    kitchen, plain = (sys.modules.get(name) for name in ("comfy_kitchen", "comfy_kitchen.backends.eager.rope"))
    rotary = ("apply_rope", "rms_rope")
    names = [name for name in dir(plain) if name.startswith(rotary) and name[-1] != "_" and hasattr(kitchen, name)]
    fused = {name: getattr(kitchen, name) for name in names}
    try:
        for name in names:
            setattr(kitchen, name, getattr(plain, name))
        yield
    finally:
        for name, function in fused.items():
            setattr(kitchen, name, function)
