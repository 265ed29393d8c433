"""Procedural landscapes with two balls: four properties that vary independently, each described by a prompt.

A scene is one row ``u`` in [0, 1]^8, see `FACTORS`. The first four are the properties that people ask about; each maps
to its range through a *gap*, a band around the middle that only 3 % of ``u`` fall into, so that "high" and "low" never
mean nearly the same picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 64
FACTORS = ("horizon", "palette", "line", "depth", "white_x", "green_x", "hue", "sun_x")
PROPERTIES = FACTORS[:4]
GAP_SHARE = 0.03

# property -> (clause for the lower half of u, clause for the upper half)
CLAUSES = {
    "palette": ("cool", "warm"),
    "horizon": ("low horizon", "high horizon"),
    "line": ("thin lines", "thick lines"),
    "depth": ("the green ball in front", "the white ball in front"),
}

_INK = (0.07, 0.06, 0.10)
_WHITE = (0.96, 0.95, 0.92)
_GREEN = (0.20, 0.66, 0.28)
# (cool, warm): sky at the top, sky at the horizon, ground at the horizon, ground at the bottom, sun
_SKY_TOP = ((0.25, 0.50, 0.86), (0.95, 0.50, 0.36))
_SKY_LOW = ((0.72, 0.87, 0.97), (1.00, 0.84, 0.56))
_GROUND_FAR = ((0.42, 0.55, 0.78), (0.84, 0.58, 0.34))
_GROUND_NEAR = ((0.24, 0.34, 0.62), (0.62, 0.32, 0.20))
_SUN = ((0.95, 0.97, 1.00), (1.00, 0.93, 0.70))


def with_gap(u: Tensor, low: tuple[float, float], high: tuple[float, float]) -> Tensor:
    """Map u in [0, 1] to ``low`` (lower half) or ``high`` (upper half), crossing between them in `GAP_SHARE` of u."""
    edge = 0.5 - GAP_SHARE / 2
    lower = low[0] + (low[1] - low[0]) * (u / edge).clamp(max=1)
    crossing = (high[0] - low[1]) * ((u - edge) / GAP_SHARE).clamp(0, 1)
    upper = (high[1] - high[0]) * ((u - edge - GAP_SHARE) / edge).clamp(min=0)
    return lower + crossing + upper


def attributes(u: Tensor) -> dict[str, Tensor]:
    """Turn u [B, 8] into measures [B]: horizon (share of the side, from the top), palette (0 cool .. 1 warm),
    line and horizon_line (strokes in px at 64 px a side), depth (-1 green nearest .. 1 white nearest), ball and sun
    positions (``sun_y`` as a share of the sky, from the top)."""
    column = dict(zip(FACTORS, u.unbind(1), strict=True))
    line = with_gap(column["line"], (1.2, 1.9), (3.0, 4.2))
    return {
        "horizon": 1 - with_gap(column["horizon"], (0.22, 0.46), (0.54, 0.78)),
        "palette": with_gap(column["palette"], (0.0, 0.22), (0.78, 1.0)),
        "line": line,
        "horizon_line": line,
        "depth": with_gap(column["depth"], (-1.0, -0.3), (0.3, 1.0)),
        "white_x": 0.19 + 0.18 * column["white_x"],
        "green_x": 0.63 + 0.18 * column["green_x"],
        "hue": 2 * column["hue"] - 1,
        "sun_x": 0.15 + 0.7 * column["sun_x"],
        "sun_y": torch.full_like(column["sun_x"], 0.52),
    }


def _mix(pair: tuple[tuple[float, ...], tuple[float, ...]], share: Tensor, hue: Tensor) -> Tensor:
    """Colour [B, 3, 1, 1] between a cool and a warm one, with a small shift of red against blue."""
    cool, warm = (torch.tensor(c, dtype=share.dtype, device=share.device) for c in pair)
    shift = torch.tensor((0.04, 0.03, -0.04), dtype=share.dtype, device=share.device)
    colour = cool + (warm - cool) * share[:, None] + shift * hue[:, None]
    return colour[:, :, None, None]


def _over(image: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return image + (colour - image) * alpha


def _ball(image: Tensor, grid: tuple[Tensor, Tensor], x: Tensor, base: Tensor, radius: Tensor,
          stroke: Tensor, colour: tuple[float, ...]) -> Tensor:
    """Draw one shaded ball [B] with an inked outline that stands on ``base``; units are px."""
    columns, rows = grid
    x, base, radius, stroke = (v[:, None, None, None] for v in (x, base, radius, stroke))
    y = base - radius
    distance = ((columns - x) ** 2 + (rows - y) ** 2).sqrt()
    light = (((columns - x + radius * 0.35) ** 2 + (rows - y + radius * 0.4) ** 2).sqrt() / radius).clamp(max=1.6)
    body = torch.tensor(colour, dtype=image.dtype, device=image.device)[None, :, None, None] * (1.06 - 0.26 * light)
    image = _over(image, body, (radius - distance + 0.5).clamp(0, 1))
    ink = torch.tensor(_INK, dtype=image.dtype, device=image.device)[None, :, None, None]
    return _over(image, ink, (stroke / 2 - (distance - radius).abs() + 0.5).clamp(0, 1))


def render(u: Tensor, side: int = SIDE) -> Tensor:
    """Draw scenes u [B, 8] as pictures [B, 3, side, side] in 0..1, on the device of ``u``."""
    return draw(attributes(u), side)


def draw(a: dict[str, Tensor], side: int = SIDE, balls: tuple[bool, bool] = (True, True)) -> Tensor:
    """Draw scenes given by their measures (see `attributes`), with or without the (white, green) ball."""
    scale = side / 64
    horizon = (a["horizon"] * 64)[:, None, None, None]
    like = {"dtype": horizon.dtype, "device": horizon.device}
    pixels = (torch.arange(side, **like) + 0.5) / scale
    rows, columns = pixels[None, None, :, None], pixels[None, None, None, :]
    ground = ((rows - horizon) * scale + 0.5).clamp(0, 1)
    image = _over(_sky(a, rows, columns, horizon), _ground(a, rows, horizon), ground).expand(-1, -1, side, side)
    line = ((a["horizon_line"][:, None, None, None] / 2 - (rows - horizon).abs()) * scale + 0.5).clamp(0, 1)
    image = _over(image, torch.tensor(_INK, **like)[None, :, None, None], line)

    grid = (columns * scale, rows * scale)
    drawn = []
    for order in ((False, True), (True, False)):  # the nearer ball is drawn last
        picture = image
        for white in order:
            if balls[0 if white else 1]:
                picture = _place_ball(picture, grid, a, white, scale)
        drawn.append(picture)
    white_near = (a["depth"] > 0)[:, None, None, None]
    return torch.where(white_near, drawn[0], drawn[1]).clamp(0, 1)


def _sky(a: dict[str, Tensor], rows: Tensor, columns: Tensor, horizon: Tensor) -> Tensor:
    palette, hue = a["palette"], a["hue"]
    sky = _over(_mix(_SKY_TOP, palette, hue), _mix(_SKY_LOW, palette, hue), (rows / horizon).clamp(max=1))
    sun_x, sun_y = (a[name][:, None, None, None] for name in ("sun_x", "sun_y"))
    distance = ((columns - 64 * sun_x) ** 2 + (rows - sun_y * horizon) ** 2).sqrt()
    disc = 0.45 * torch.exp(-distance / 9) + 0.45 * (4.5 - distance).clamp(0, 1)
    return _over(sky, _mix(_SUN, palette, hue), disc)


def _ground(a: dict[str, Tensor], rows: Tensor, horizon: Tensor) -> Tensor:
    palette, hue = a["palette"], a["hue"]
    nearness = ((rows - horizon) / (64 - horizon)).clamp(0, 1)
    return _over(_mix(_GROUND_FAR, palette, hue), _mix(_GROUND_NEAR, palette, hue), nearness)


def _place_ball(image: Tensor, grid: tuple[Tensor, Tensor], a: dict[str, Tensor], white: bool, scale: float) -> Tensor:
    nearness = a["depth"] if white else -a["depth"]
    base = 63.5 - 64 * (1 - a["horizon"]) * (0.30 - 0.22 * nearness)
    x = 64 * a["white_x" if white else "green_x"]
    radius = 8.4 + 2.6 * nearness
    return _ball(image, grid, x * scale, base * scale, radius * scale, a["line"] * scale, _WHITE if white else _GREEN)


def prompt_for(wanted: dict[str, bool]) -> str:
    """Describe a scene; ``wanted`` names a property and True for the second clause of `CLAUSES`, absent means free."""
    clause = {name: CLAUSES[name][value] for name, value in wanted.items()}
    text = f"a {clause['palette']} landscape" if "palette" in clause else "a landscape"
    parts = [f"a {clause['horizon']}"] if "horizon" in clause else []
    parts += [clause[name] for name in ("line", "depth") if name in clause]
    return f"{text} with {', '.join(parts)}" if parts else f"{text} with two balls"
