"""Scenes that fill the spans of their measures evenly, where the student's own keep to two sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import scenes
from .build_vae import decode_sampler, encode_sampler

# measure of `scenes.attributes` -> lowest and highest value
SPANS = {"horizon": (0.16, 0.84), "palette": (0.0, 1.0), "line": (1.0, 4.8)}


def any_measures(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Measures of scenes (see `scenes.attributes`) that fill `SPANS` evenly."""
    measures = scenes.attributes(torch.rand(count, len(scenes.FACTORS), generator=generator))
    for name, (low, high) in SPANS.items():
        measures[name] = low + (high - low) * torch.rand(count, generator=generator)
    measures["horizon_line"] = measures["line"]
    measures["sun_y"] = 0.1 + 0.8 * torch.rand(count, generator=generator)
    return measures


def share_of_span(name: str, value: Tensor) -> Tensor:
    """Where in its span a value lies, 0..1."""
    low, high = SPANS[name]
    return (value - low) / (high - low)


def through(vae: nn.Module, count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Measures of any scenes, and the scenes after encoding and decoding [N, 3, 64, 64]."""
    measures = any_measures(count, generator)
    with torch.no_grad():
        parts = [decode_sampler(vae, encode_sampler(vae, part)).float() for part in scenes.draw(measures).split(64)]
    return measures, torch.cat(parts)
