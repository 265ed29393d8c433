"""Products as exact as the model's number format, however ComfyUI was started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch
from torch import nn


@contextmanager
def multiplied_in_full(network: nn.Module) -> Iterator[None]:
    """While the context lasts, fp8 weights are multiplied in the precision that the model computes in, and products in
    fp16, whose gradients are scaled up, are summed in fp32 (``--fast`` sums them in fp16, from torch 2.7 on).

    ComfyUI 0.3.75's products in fp8 have no backward. Those of ``--fast`` and ``fp8_e4m3fn_fast`` are left out only in
    passes with gradients, so the anchor would compare an exact pass with a rounded one. Newer ComfyUIs have gradients
    of their own for files with scales; these are left alone.
    """
    fp8_linear, comfy.ops.fp8_linear = comfy.ops.fp8_linear, lambda *_: None  # as where it cannot
    fast = [module for module in network.modules() if getattr(module, "_full_precision_mm", True) is False]
    fast = [] if hasattr(comfy.ops, "QuantLinearFunc") else fast
    for module in fast:
        module._full_precision_mm = True
    matmul = torch.backends.cuda.matmul
    summed_in_fp16 = getattr(matmul, "allow_fp16_accumulation", False)
    try:
        if summed_in_fp16:
            matmul.allow_fp16_accumulation = False
        yield
    finally:
        if summed_in_fp16:
            matmul.allow_fp16_accumulation = True
        comfy.ops.fp8_linear = fp8_linear
        for module in fast:
            module._full_precision_mm = False
