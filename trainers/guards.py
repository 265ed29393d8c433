"""How pictures look apart from what they show: numbers that tell a control from a collapse, with no judge asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_SIDE = 64  # pictures are compared with one another at this size
# Changes of these measures are shares of what they were, or of the number here if that is more: grey pictures that get
# a little less grey have not lost their colours.
RELATIVE = {"luminance": 0.05, "saturation": 0.05, "edge_density": 0.005, "colour_entropy": 2.0, "diversity": 0.02}
NOTICEABLE = 0.15  # changes from here on are put into words for people
# Stains and false lines change none of these measures much, but the model itself knows that it would not have drawn
# them. Where it takes so many times as much out of pictures as out of its own (``ComfyStudent.redrawn``), people are
# told: LoRAs ruined without the prior had 6.4 and more, clean ones up to 1.9, or 4.7 where all colours change
# (docs/measured.md).
STRANGE = 5.0
WORDS = {
    "luminance": ("darker", "brighter"),
    "saturation": ("greyer", "more colourful"),
    "edge_density": ("emptier", "busier"),
    "colour_entropy": ("of fewer colours", "of more colours"),
    "diversity": ("more alike", "more different from each other"),
    "clipped": ("less black and white", "more burnt to black and white"),
}


def look(images: Tensor) -> dict[str, Tensor]:
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


def diversity(images: Tensor) -> float:
    """Mean root-mean-square distance (0..1) between every two of several pictures [B, 3, H, W], B > 1."""
    small = F.adaptive_avg_pool2d(images.detach().float(), _SIDE).flatten(1)
    return (torch.pdist(small).mean() / small.shape[1] ** 0.5).item()


def changes(before: Tensor, after: Tensor) -> dict[str, float]:
    """What became of pictures [B, 3, H, W] in 0..1, B > 1: for each of ``RELATIVE`` the change as a share of what it
    was, for ``clipped`` how much of the picture was added, and ``distance``, the mean difference of pixels (0..1) if
    both are of the same seeds. Where half precision overflowed, pictures count as black."""
    before, after = before.nan_to_num(), after.nan_to_num()
    was, now = ({name: value.mean().item() for name, value in look(x).items()} for x in (before, after))
    was["diversity"], now["diversity"] = diversity(before), diversity(after)
    result = {name: (now[name] - was[name]) / max(was[name], floor) for name, floor in RELATIVE.items()}
    result["clipped"] = now["clipped"] - was["clipped"]
    if before.shape == after.shape:
        result["distance"] = (before - after).abs().mean().item()
    return result


def warning(found: dict[str, float], limit: float, began: dict[str, float] | None = None) -> str:
    """What left its range of ± ``limit``, in words such as "60% darker, 52% more alike"; empty when all is well.

    ``began``: the changes there were at first; what had changed then may change by half of ``limit`` more.
    """
    return ", ".join(faults(found, limit, began).values())


def became(now: dict[str, float], first: dict[str, float]) -> str:
    """A sentence or two such as "Pictures got 30% greyer", without the last full stop; empty if nothing is
    ``NOTICEABLE`` or ``STRANGE``.

    ``now`` and ``first`` are the changes after and before training: there were some before, compared with the model
    without the LoRA, only if one is continued.
    """
    words = warning(now, NOTICEABLE) if now else ""
    said = [f"Pictures got {words}" + (", compared with the model without the LoRA" if first else "")] if words else []
    if now.get("strangeness", 0) > STRANGE:
        said.append(
            f"To the model without the LoRA the pictures look {now['strangeness']:.1f} times as dirty as its own: look "
            "for stains and false lines"
        )
    return ". ".join(said)


def faults(found: dict[str, float], limit: float, began: dict[str, float] | None = None) -> dict[str, str]:
    """The measures that left their range, see ``warning``, each with its words."""
    first = _harmful(began) if began else dict.fromkeys(WORDS, 0.0)
    most = {name: max(limit, abs(x) + limit / 2) for name, x in first.items()}
    return {name: f"{abs(x):.0%} {WORDS[name][x > 0]}" for name, x in _harmful(found).items() if abs(x) > most[name]}


def largest_fault(found: dict[str, float]) -> float:
    """How large ``limit`` has to be for no ``faults``."""
    return max(map(abs, _harmful(found).values()))


def _harmful(found: dict[str, float]) -> dict[str, float]:
    """The changes that can do harm: burning only if it grows, diversity only if it shrinks."""
    harmful = {name: max(found[name], 0) if name == "clipped" else found[name] for name in WORDS}
    return harmful | {"diversity": min(found["diversity"], 0)}
