"""Telling that memory ran out from other errors."""

from __future__ import annotations

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether a device's memory ran out: in torch's allocator or outside it (kernels, cuBLAS, a driver near its
    limit), which torch reports as ``AcceleratorError`` or a plain RuntimeError."""
    text = str(error).lower()
    outside = isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text)
    return outside or isinstance(error, torch.OutOfMemoryError)
