"""What happens to pictures before a judge sees them: harmless disturbances, and ruins that are no scenes any more."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes

Ruin = Callable[[Tensor, torch.Generator], Tensor]


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """[count, 1, 1, 1] in low..high."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel in 0..1, broadcastable to images."""
    side = images.shape[-1]
    line = (torch.arange(side, device=images.device) + 0.5) / side
    return line[None, None, :, None], line[None, None, None, :]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``sigma`` px."""
    reach = max(1, round(3 * sigma))
    window = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    window = (window / window.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate" if reach >= images.shape[-1] else "reflect")
    return F.conv2d(F.conv2d(padded, window, groups=3), window.transpose(2, 3), groups=3)


# --- disturbances: the answer to every question stays the same ---------------------------------------------------

def noisy(images: Tensor, g: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=g).to(images.device)
    return images + _uniform(g, len(images), 0.0, 0.22).to(images.device) * noise


def soft(images: Tensor, g: torch.Generator) -> Tensor:
    return blurred(images, float(0.4 + 0.7 * torch.rand((), generator=g)))


def recontrasted(images: Tensor, g: torch.Generator) -> Tensor:
    contrast, brightness, gamma = (_uniform(g, len(images), *span).to(images.device)
                                   for span in ((0.7, 1.3), (-0.1, 0.1), (0.75, 1.33)))
    return ((images.clamp(0, 1) ** gamma - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def reframed(images: Tensor, g: torch.Generator) -> Tensor:
    """Cut off up to 1 px on every side and stretch back."""
    edges = 1 - 2 * torch.rand(len(images), 4, generator=g).to(images.device) / images.shape[-1]
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = edges[:, 0], edges[:, 1]
    theta[:, 0, 2] = (1 - edges[:, 0]) * (2 * edges[:, 2] - 1)
    theta[:, 1, 2] = (1 - edges[:, 1]) * (2 * edges[:, 3] - 1)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False),
                         padding_mode="border", align_corners=False)


DISTURBANCES: dict[str, Ruin] = {"noisy": noisy, "blurred": soft, "recontrasted": recontrasted, "reframed": reframed}


# --- ruins: the answer to every question is No ---------------------------------------------------------------------

def ladder(images: Tensor, g: torch.Generator) -> Tensor:
    """Several horizons: the picture's own rows repeated two to four times from top to bottom."""
    side = images.shape[-1]
    repeats = torch.randint(2, 5, (len(images),), generator=g)
    rows = (torch.arange(side)[None] * repeats[:, None]) % side
    return torch.stack([image[:, row] for image, row in zip(images, rows.to(images.device), strict=True)])


def extra_horizons(images: Tensor, g: torch.Generator) -> Tensor:
    """One to three more dark lines across the picture, each with its own band of sky or ground colour above it."""
    rows, _ = _grid(images)
    result = images
    columns = images.shape[-1]
    edge = images[..., [0, columns - 1]].mean(-1, keepdim=True)
    for k in range(3):
        count = len(images)
        centre = _uniform(g, count, 0.06, 0.94).to(images.device)
        stroke = _uniform(g, count, 1.5, 5.0).to(images.device) / columns
        shown = (torch.rand(count, 1, 1, 1, generator=g) < (1.0, 0.5, 0.5)[k]).to(images)
        band = shown * ((rows < centre) & (rows > centre - 0.12)).to(images) * 0.6
        result = result + band * (edge.flip(2) - result)
        ink = shown * ((stroke / 2 - (rows - centre).abs()) * columns + 0.5).clamp(0, 1)
        result = result * (1 - ink) + 0.08 * ink
    return result


def blobs(images: Tensor, g: torch.Generator) -> Tensor:
    """Dark or coloured ellipses anywhere."""
    rows, columns = _grid(images)
    count, result = len(images), images
    for k in range(4):
        y, x = (_uniform(g, count, 0, 1).to(images.device) for _ in range(2))
        height, width = (_uniform(g, count, 0.06, 0.24).to(images.device) for _ in range(2))
        distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
        shown = (torch.rand(count, 1, 1, 1, generator=g) < (1.0, 0.8, 0.5, 0.5)[k]).to(images)
        dark = (torch.rand(count, 1, 1, 1, generator=g) < 0.65).to(images)
        colour = 0.08 * dark + (1 - dark) * torch.rand(count, 3, 1, 1, generator=g).to(images.device)
        alpha = shown * ((1.2 - distance) * 2.5).clamp(0, 1)
        result = result + alpha * (colour - result)
    return result


def bands(images: Tensor, g: torch.Generator) -> Tensor:
    """Stripes across the whole picture, in any direction."""
    rows, columns = _grid(images)
    count = len(images)
    angle = _uniform(g, count, 0, torch.pi).to(images.device)
    waves, phase = (_uniform(g, count, *span).to(images.device) for span in ((2, 10), (0, 6.28)))
    tint = torch.rand(count, 3, 1, 1, generator=g).to(images.device) * 2 - 1
    tint = tint / tint.abs().amax(1, keepdim=True)
    strength = _uniform(g, count, 0.2, 0.5).to(images.device)
    wave = torch.sin(6.2832 * waves * (rows * torch.cos(angle) + columns * torch.sin(angle)) + phase)
    return (images + strength * tint * torch.sign(wave) * wave.abs().sqrt()).clamp(0, 1)


def near_black(images: Tensor, g: torch.Generator) -> Tensor:
    return images * _uniform(g, len(images), 0.0, 0.22).to(images.device)


def burnt(images: Tensor, g: torch.Generator) -> Tensor:
    """Contrast so strong that most channels clip, or everything near white."""
    count = len(images)
    middle, contrast = (_uniform(g, count, *span).to(images.device) for span in ((0.35, 0.65), (6, 14)))
    hard = (images - middle) * contrast + 0.5
    pale = 1 - (1 - images) * _uniform(g, count, 0.0, 0.15).to(images.device)
    return torch.where((torch.rand(count, 1, 1, 1, generator=g) < 0.6).to(images.device), hard, pale).clamp(0, 1)


def pure_noise(images: Tensor, g: torch.Generator) -> Tensor:
    """Noise of any grain, with at most a trace of the picture."""
    count, side = len(images), images.shape[-1]
    coarse = int(2 ** torch.randint(1, 7, (), generator=g))
    noise = F.interpolate(torch.rand(count, 3, coarse, coarse, generator=g), side, mode="bilinear")
    fine = 0.3 * torch.randn(count, 3, side, side, generator=g)
    trace = _uniform(g, count, 0, 0.2).to(images.device)
    return (trace * images + (1 - trace) * (noise + fine).to(images.device)).clamp(0, 1)


def blend(images: Tensor, g: torch.Generator) -> Tensor:
    """Two different pictures at once: mixed, the darker of both, or side by side."""
    other = scenes.render(torch.rand(len(images), 8, generator=g).to(images.device), images.shape[-1])
    share = _uniform(g, len(images), 0.35, 0.65).to(images.device)
    _, columns = _grid(images)
    kind = torch.randint(0, 3, (len(images), 1, 1, 1), generator=g).to(images.device)
    mirrored = torch.minimum(images, images.flip(2))
    halves = torch.where(columns < share, images, other.flip(2))
    return torch.where(kind == 0, images * share + other * (1 - share), torch.where(kind == 1, mirrored, halves))


def huge_strokes(images: Tensor, g: torch.Generator) -> Tensor:
    """A scene whose lines are far thicker than any line."""
    a = scenes.attributes(torch.rand(len(images), 8, generator=g))
    a["line"] = a["horizon_line"] = _uniform(g, len(images), 7.5, 18).flatten()
    return scenes.draw(a, images.shape[-1]).to(images.device)


def colour_flood(images: Tensor, g: torch.Generator) -> Tensor:
    """Colours that no scene has: a flood of one colour, exchanged channels, or a negative."""
    count = len(images)
    colour = torch.rand(count, 3, 1, 1, generator=g).round().to(images.device)
    share = _uniform(g, count, 0.6, 1.0).to(images.device)
    flood = images + share * (colour - images)
    exchanged = images[:, [[1, 0, 2], [0, 2, 1], [1, 2, 0]][int(torch.randint(0, 3, (), generator=g))]]
    kind = torch.randint(0, 3, (count, 1, 1, 1), generator=g).to(images.device)
    return torch.where(kind == 0, flood, torch.where(kind == 1, exchanged, 1 - images))


def missing_balls(images: Tensor, g: torch.Generator) -> Tensor:
    a = scenes.attributes(torch.rand(len(images), 8, generator=g))
    pair = [(False, False), (True, False), (False, True)][int(torch.randint(0, 3, (), generator=g))]
    return scenes.draw(a, images.shape[-1], pair).to(images.device)


def ink_flood(images: Tensor, g: torch.Generator) -> Tensor:
    """Everything above or below some row covered with ink."""
    rows, _ = _grid(images)
    edge = _uniform(g, len(images), 0.25, 0.75).to(images.device)
    upper = (torch.rand(len(images), 1, 1, 1, generator=g) < 0.5).to(images.device)
    covered = torch.where(upper, rows < edge, rows > edge).to(images)
    strength = _uniform(g, len(images), 0.75, 1.0).to(images.device) * covered
    return images * (1 - strength) + 0.07 * strength


def _patches(count: int, side: int, g: torch.Generator) -> Tensor:
    """Soft-edged random patches [count, 1, side, side] in 0..1 that cover a tenth to a half of a picture."""
    coarse = int(torch.randint(3, 9, (), generator=g))
    height = F.interpolate(torch.rand(count, 1, coarse, coarse, generator=g), side, mode="bicubic")
    level = height.flatten(1).quantile(float(0.5 + 0.35 * torch.rand((), generator=g)), dim=1)
    return ((height - level[:, None, None, None]) * float(3 + 12 * torch.rand((), generator=g))).clamp(0, 1)


def stains(images: Tensor, g: torch.Generator) -> Tensor:
    """Clouds of the picture's own colours where they do not belong: earth in the sky, sky in the ground."""
    count, side = len(images), images.shape[-1]
    moved = images.roll(int(torch.randint(side // 5, side * 4 // 5, (), generator=g)), dims=2)
    strength = _uniform(g, count, 0.5, 1.0).to(images.device)
    return images + strength * _patches(count, side, g).to(images.device) * (blurred(moved, 2.0) - images)


def ghosts(images: Tensor, g: torch.Generator) -> Tensor:
    """Pieces of another picture show through."""
    count, side = len(images), images.shape[-1]
    other = scenes.render(torch.rand(count, 8, generator=g).to(images.device), side)
    strength = _uniform(g, count, 0.5, 1.0).to(images.device)
    return images + strength * _patches(count, side, g).to(images.device) * (other - images)


def many_suns(images: Tensor, g: torch.Generator) -> Tensor:
    """One to three more suns, some of them faint."""
    rows, columns = _grid(images)
    count, result = len(images), images
    height, start, strength = (_uniform(g, count, *span).to(images.device)
                               for span in ((0.06, 0.45), (0.08, 0.4), (0.6, 1.1)))
    for k in range(3):
        y = height + _uniform(g, count, -0.06, 0.06).to(images.device)
        x = start + k * _uniform(g, count, 0.15, 0.27).to(images.device)
        distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt() * 64
        shown = (torch.rand(count, 1, 1, 1, generator=g) < (1.0, 0.6, 0.4)[k]).to(images)
        size = _uniform(g, count, 3.5, 5.0).to(images.device)
        disc = (strength * (0.4 * torch.exp(-distance / 7) + 0.5 * (size - distance).clamp(0, 1))).clamp(max=1)
        result = result + shown * disc * (torch.ones_like(result) - result)
    return result


def second_line(images: Tensor, g: torch.Generator) -> Tensor:
    """A second horizon line, thin or thick, across the picture or only part of it, dark or half faded."""
    rows, columns = _grid(images)
    count, side = len(images), images.shape[-1]
    centre, stroke, strength, start, length, slope = (
        _uniform(g, count, *span).to(images.device)
        for span in ((0.08, 0.92), (1.2, 4.5), (0.6, 1.0), (-0.6, 0.4), (0.6, 1.6), (-0.06, 0.06)))
    across = ((columns - start) * 12).clamp(0, 1) * ((start + length - columns) * 12).clamp(0, 1)
    ink = (stroke / 2 - (rows - centre - slope * (columns - 0.5)).abs() * side + 0.5).clamp(0, 1) * across * strength
    return images + ink * (0.08 - images)


def no_line(images: Tensor, g: torch.Generator) -> Tensor:
    """A scene whose horizon line is missing or fades away; the balls keep their ink."""
    a = scenes.attributes(torch.rand(len(images), 8, generator=g))
    line = _uniform(g, len(images), -1.0, 0.3).flatten()
    return scenes.draw({**a, "horizon_line": line}, images.shape[-1]).to(images.device)


def broken_line(images: Tensor, g: torch.Generator) -> Tensor:
    """A horizon that stands 3 to 9 px higher or lower in a part of the picture, with or without a line there."""
    count, side = len(images), images.shape[-1]
    _, columns = _grid(images)
    a = scenes.attributes(torch.rand(count, 8, generator=g))
    step, upward, drawn = (_uniform(g, count, *span).flatten() for span in ((3, 9), (-1, 1), (-1, 1)))
    horizon = (a["horizon"] + step / 64 * upward.sign()).clamp(0.15, 0.85)
    line = torch.where(drawn > 0, a["horizon_line"], -1.0)
    start, length = (_uniform(g, count, *span).to(images.device) for span in ((-0.2, 0.7), (0.25, 0.6)))
    part = ((columns - start) * 12).clamp(0, 1) * ((start + length - columns) * 12).clamp(0, 1)
    whole = scenes.draw(a, side).to(images.device)
    other = scenes.draw({**a, "horizon": horizon, "horizon_line": line}, side).to(images.device)
    return whole + part * (other - whole)


def missing_ink(images: Tensor, g: torch.Generator) -> Tensor:
    """A scene without lines."""
    a = scenes.attributes(torch.rand(len(images), 8, generator=g))
    a["line"] = a["horizon_line"] = _uniform(g, len(images), -1.0, 0.3).flatten()
    return scenes.draw(a, images.shape[-1]).to(images.device)


def melted(images: Tensor, g: torch.Generator) -> Tensor:
    return blurred(images, float(4 + 4 * torch.rand((), generator=g)))


def shuffled(images: Tensor, g: torch.Generator) -> Tensor:
    """The picture cut into 16 squares and laid out anew."""
    part = images.shape[-1] // 4
    squares = images.unfold(2, part, part).unfold(3, part, part)
    order = torch.randperm(16, generator=g).to(images.device)
    squares = squares.reshape(len(images), 3, 16, part, part)[:, :, order].reshape(len(images), 3, 4, 4, part, part)
    return squares.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def warped(images: Tensor, g: torch.Generator) -> Tensor:
    """Bent by up to some px: wavy horizons, lumpy balls."""
    count, side = len(images), images.shape[-1]
    bend = F.interpolate(torch.randn(count, 2, 5, 5, generator=g).to(images), (side, side), mode="bicubic")
    bend = bend / bend.flatten(1).abs().amax(1)[:, None, None, None] * _uniform(g, count, 0.32, 0.5).to(images)
    straight = F.affine_grid(torch.eye(2, 3).to(images).expand(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, straight + bend.movedim(1, 3), padding_mode="border", align_corners=False)


def hills(images: Tensor, g: torch.Generator) -> Tensor:
    """No horizon: the ground ends in hills without a line."""
    return warped(no_line(images, g), g)


RUINS: dict[str, Ruin] = {
    ruin.__name__: ruin for ruin in (ladder, extra_horizons, blobs, bands, near_black, burnt, pure_noise, blend,
                                     huge_strokes, colour_flood, missing_balls, missing_ink, ink_flood, stains,
                                     ghosts, many_suns, second_line, no_line, broken_line, melted, shuffled, warped,
                                     hills)
}
# what a generator does to please a judge, and a judge is slow to see
SUBTLE: dict[str, Ruin] = {
    ruin.__name__: ruin for ruin in (missing_balls, ghosts, many_suns, second_line, no_line, broken_line)
}
