"""How a picture looks apart from what it shows: numbers that must stay put when one property is taught."""

from __future__ import annotations

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def drift(images: Tensor) -> dict[str, Tensor]:
    """Measure pictures [B, 3, H, W] in 0..1 (values outside are clipped); every value is a float tensor [B].

    ``luminance`` and ``saturation`` (largest minus smallest channel) are means in 0..1, ``edge_density`` is the mean
    luminance step between neighbouring pixels, ``colour_entropy`` the entropy in bits of colours in 8 x 8 x 8 bins, and
    ``clipped`` the share of pixels that are black or white in all channels.
    """
    x = images.detach().float().clamp(0, 1)
    luma = (x * x.new_tensor(_LUMA)[:, None, None]).sum(1)
    steps = luma.diff(dim=1).abs().mean((1, 2)) + luma.diff(dim=2).abs().mean((1, 2))
    bins = (x * 8).long().clamp(max=7)
    colours = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(x), 512, device=x.device).scatter_add_(1, colours, torch.ones_like(colours, dtype=x.dtype))
    share = counts / counts.sum(1, keepdim=True)
    return {
        "luminance": luma.mean((1, 2)),
        "saturation": (x.amax(1) - x.amin(1)).mean((1, 2)),
        "edge_density": steps / 2,
        "colour_entropy": -(share * share.clamp(min=1e-12).log2()).sum(1),
        "clipped": ((x.amin(1) >= 0.98) | (x.amax(1) <= 0.02)).float().mean((1, 2)),
    }
