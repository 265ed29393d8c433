"""Measure pictures of landscapes with two balls from their pixels alone, and refuse what is no such picture.

Nothing here knows the judge, the renderer or the student. Lengths are px of a 64 px picture; pictures of another size
are measured at that size. A picture is *readable* when one horizon line, two inked balls (one white, one green), a
smooth sky and a smooth ground in colours of one palette are all that is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
_LUMA = (0.299, 0.587, 0.114)
_INK = 0.07  # luminance of a fully inked pixel
# mean colours of a cool and of a warm sky and ground; every picture's colours must lie between them
_SKY = ((0.48, 0.68, 0.91), (0.97, 0.67, 0.46))
_GROUND = ((0.33, 0.45, 0.70), (0.73, 0.45, 0.27))

_SUN, _FAINT = 12, 0.06  # a sky has a sun where so many pixels differ so much from their row
# property -> (measure, border, True when "the upper half" of the property lies above the border)
_BORDERS = {"horizon": ("horizon", 0.5, False), "palette": ("warmth", 0.0, True), "line": ("line", 2.45, True),
            "depth": ("depth", 0.0, True)}


def holds(images: Tensor, name: str, answer: str = "Yes") -> Tensor:
    """Whether pictures [B, 3, H, W] are readable and answer the question about property ``name`` with ``answer``.

    The questions: is the horizon high, the palette warm, the line thick, the white ball in front? Bool [B].
    """
    key, border, above = _BORDERS[name]
    measured = measure(images)
    upper = (measured[key] > border) == above
    return measured["readable"] & (upper if answer == "Yes" else ~upper)


def measure(images: Tensor) -> dict[str, Tensor]:
    """Measure pictures [B, 3, H, W] in 0..1; values outside are clipped.

    Returns tensors [B]: ``horizon`` (0 top .. 1 bottom), ``warmth`` (red minus blue: below 0 cool, above 0 warm),
    ``line`` (stroke in px at 64 px a side), ``depth`` (radius of the white ball minus that of the green one, px), and
    the bools ``sun`` and ``readable``. The measures of an unreadable picture mean nothing.
    """
    x = images.detach().float().clamp(0, 1)
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="area")
    parts = _parts(x)
    sky, ground = _mean(x, parts.sky), _mean(x, parts.ground)
    warmth = ((sky + ground)[:, 0] - (sky + ground)[:, 2]) / 2
    return {"horizon": parts.horizon / SIDE, "warmth": warmth, "line": parts.stroke,
            "depth": parts.white.radius - parts.green.radius,
            "sun": _patches(x, parts.sky, _FAINT) >= _SUN,
            "readable": torch.stack(list(checks(x, parts).values())).all(0)}


@dataclass
class Ball:
    """A disc found by its colour: where the colour is [B, H, W], row of the centre, radius inside the outline and
    to the middle of the outline [B], distance of every pixel to the centre [B, H, W]."""

    mask: Tensor
    y: Tensor
    inner: Tensor
    radius: Tensor
    distance: Tensor


@dataclass
class Parts:
    luma: Tensor
    horizon: Tensor
    stroke: Tensor
    white: Ball
    green: Ball
    near_line: Tensor
    near_balls: Tensor
    sky: Tensor
    ground: Tensor


def _parts(x: Tensor) -> Parts:
    luma = (x * x.new_tensor(_LUMA)[:, None, None]).sum(1)
    rows, columns = _grid(x)
    dips = _row_dips(luma.sort(2).values[:, :, SIDE * 45 // 100])
    horizon = _centroid(dips)
    place = horizon[:, None, None]
    below = rows > place + 0.5  # a pale sky is whitish too, and the middle of a ball never lies above the horizon
    whitish = below & (x.amin(1) > 0.57) & (x.amax(1) - x.amin(1) < 0.17)
    greenish = below & (x[:, 1] - torch.maximum(x[:, 0], x[:, 2]) > 0.10)
    masks = [mask.float() for mask in (whitish, greenish)]
    spans = [mask.amax(1) for mask in masks]
    beside = 1 - F.max_pool1d(torch.maximum(*spans)[:, None], 13, 1, 6)[:, 0]
    stroke = _stroke(luma, place, beside)
    white, green = (_ball(mask, stroke) for mask in masks)
    reach = stroke[:, None, None] / 2 + 2
    near_line = (rows - place).abs() < reach + 0.5
    around = reach + 1  # balls need not be perfect circles
    near_white, near_green = (ball.distance < ball.radius[:, None, None] + around for ball in (white, green))
    near_balls = near_white | near_green
    open_field = ~(near_line | near_balls)
    return Parts(luma, horizon, stroke, white, green, near_line, near_balls,
                 open_field & (rows < place), open_field & (rows > place))


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    line = torch.arange(SIDE, device=x.device) + 0.5
    return line[None, :, None], line[None, None, :]


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean colour [B, 3] of pixels under a mask [B, H, W]."""
    weight = mask.float()[:, None]
    return (x * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)


def _row_dips(profile: Tensor) -> Tensor:
    """How much darker [B, H] each row of a luminance profile [B, H] is than the rows 4 to 6 px away."""
    padded = F.pad(profile[:, None], (6, 6), mode="replicate")[:, 0]
    above, below = padded[:, 0:SIDE + 2].unfold(1, 3, 1).mean(2), padded[:, 10:].unfold(1, 3, 1).mean(2)
    around = torch.minimum(above, below)
    return ((around - profile) / (around - _INK).clamp(min=0.1)).clamp(0, 1)


def _centroid(dips: Tensor) -> Tensor:
    """Row [B] of the deepest dip, to a fraction of a px."""
    rows = torch.arange(SIDE, device=dips.device) + 0.5
    near = ((rows - rows[dips.argmax(1)][:, None]).abs() <= 4).float() * dips
    return (near * rows).sum(1) / near.sum(1).clamp(min=1e-3)


def _stroke(luma: Tensor, place: Tensor, beside: Tensor) -> Tensor:
    """Thickness [B] of the horizon line: ink summed down the columns that no ball touches, median over columns."""
    rows = torch.arange(SIDE, device=luma.device)[None, :, None] + 0.5
    offset = rows - place
    ink = torch.zeros_like(luma)
    for side in (-1, 1):
        far = ((offset * side >= 4) & (offset * side <= 7)).float()
        around = (luma * far).sum(1, keepdim=True) / far.sum(1, keepdim=True).clamp(min=1)
        share = ((around - luma) / (around - _INK).clamp(min=0.1)).clamp(0, 1)
        ink += share * ((offset * side >= 0) & (offset * side < 4.5) & (offset != 0 if side < 0 else True))
    thickness = torch.where(beside > 0, ink.sum(1), torch.full_like(beside, torch.nan))
    return thickness.nanmedian(1).values.nan_to_num(0.0)


def _ball(mask: Tensor, stroke: Tensor) -> Ball:
    rows, columns = _grid(mask)
    inner = mask.sum(2).amax(1) / 2
    x = (mask * columns).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    y = (mask * (rows + 0.5)).amax((1, 2)) - inner
    distance = ((rows - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2).sqrt()
    return Ball(mask, y, inner, inner + stroke / 2, distance)


def checks(x: Tensor, parts: Parts) -> dict[str, Tensor]:
    """What makes a picture readable, each as a bool tensor [B]."""
    stroke = parts.stroke
    beside = parts.luma.masked_fill(parts.near_balls, torch.nan).nanquantile(0.45, dim=2).nan_to_num(0.0)
    dips = _row_dips(beside)  # large balls cover more than half of a row
    runs = F.pad((dips > 0.4).float(), (1, 0)).diff(dim=1).clamp(min=0).sum(1)
    ink = ((0.26 - parts.luma) / (0.26 - _INK)).clamp(0, 1)
    stray = (ink * ~(parts.near_line | parts.near_balls)).sum((1, 2))
    jumps = _jumps(x) > 0.09
    sky, ground = _mean(x, parts.sky), _mean(x, parts.ground)
    sky_share, sky_error = _between(sky, _SKY)
    ground_share, ground_error = _between(ground, _GROUND)
    result = {
        "one line": (runs == 1) & (dips.amax(1) > 0.45),
        "unbroken line": _unbroken(parts) > 0.9,
        "stroke": (stroke > 0.6) & (stroke < 5.5),
        "no stray ink": stray < 10,
        "smooth sky": (jumps & parts.sky).sum((1, 2)) < 75,
        "smooth ground": (jumps & parts.ground).sum((1, 2)) < 30,
        "clear sky": _patches(x, parts.sky) < 90,  # one sun has about 65
        "even ground": _patches(x, parts.ground) < 40,
        "colours": (sky_error < 0.17) & (ground_error < 0.17) & ((sky_share - ground_share).abs() < 0.45),
    }
    for name, ball in (("white", parts.white), ("green", parts.green)):
        result |= {f"{name} {key}": ok for key, ok in _ball_checks(ball, parts).items()}
    return result


def _unbroken(parts: Parts) -> Tensor:
    """Share [B] of the columns, without those where a ball hides the line, that are dark within 2 px of the horizon."""
    rows, _ = _grid(parts.luma)
    offset = (rows - parts.horizon[:, None, None]).abs()
    line, around = offset < 2, (offset >= 4) & (offset <= 7) & ~parts.near_balls
    free = ~(line & parts.near_balls).any(1)
    paler = (parts.luma * around).sum(1) / around.sum(1).clamp(min=1)
    darkest = parts.luma.masked_fill(~line, torch.inf).amin(1)
    inked = (paler - darkest) / (paler - _INK).clamp(min=0.1) > 0.3
    return (inked & free).sum(1) / free.sum(1).clamp(min=1)


def _ball_checks(ball: Ball, parts: Parts) -> dict[str, Tensor]:
    rows, _ = _grid(ball.mask)
    disc = (ball.distance < ball.inner[:, None, None]) & (rows > parts.horizon[:, None, None] + 0.5)
    common = (ball.mask * disc).sum((1, 2)) / torch.maximum(ball.mask, disc.float()).sum((1, 2)).clamp(min=1)
    ring = (ball.distance - ball.radius[:, None, None]).abs() < parts.stroke[:, None, None] / 2 + 0.5
    outline = (ring & (parts.luma < 0.42)).sum((1, 2)) / ring.sum((1, 2)).clamp(min=1)
    return {
        "size": (ball.inner > 2.2) & (ball.inner < 12.5),
        "round": common > 0.6,
        "on the ground": ball.y + ball.radius > parts.horizon + 2,
        "inked": outline > 0.35,
    }


def _jumps(x: Tensor) -> Tensor:
    """Largest colour difference [B, H, W] to the next pixel right or below."""
    right = F.pad(x.diff(dim=3).abs().amax(1), (0, 1))
    down = F.pad(x.diff(dim=2).abs().amax(1), (0, 0, 0, 1))
    return torch.maximum(right, down)


def _patches(x: Tensor, mask: Tensor, step: float = 0.12) -> Tensor:
    """Number [B] of pixels under a mask whose colour is not that of most of their row, by more than ``step``."""
    values = x.masked_fill(~mask[:, None], torch.nan)
    difference = (values - values.nanmedian(3, keepdim=True).values).abs().amax(1)
    return (difference > step).sum((1, 2))


def _between(colour: Tensor, ends: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    """Where along the way between two colours [B] and how far off it [B] a colour [B, 3] lies."""
    start, end = (colour.new_tensor(c) for c in ends)
    way = end - start
    share = ((colour - start) @ way / way.square().sum()).clamp(0, 1)
    return share, (colour - start - share[:, None] * way).norm(dim=1)
