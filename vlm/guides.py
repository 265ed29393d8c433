"""The drawings of the paper's visual prompts, and the questions that go with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from .overlay import checked_share

# The wordings on the paper's project page (dual-process.github.io), with the paper's postfix.
_POSTFIX = " Answer with Yes or No."
HORIZON_QUESTION = "Is the overlaid red line aligned with the horizon of the scene?" + _POSTFIX
PALETTE_QUESTION = "Do the predominant colors of the image match the color palette overlaid at the bottom?" + _POSTFIX
LINE_WEIGHT_QUESTION = (
    "Ignoring the line color, does the line weight of the image match the red line overlaid at the bottom?" + _POSTFIX
)
DEPTH_QUESTION = "Is Point B in the foreground and Point A in the background?" + _POSTFIX
COMPOSITION_QUESTION = "Does the composition of the image match the overlaid red instructions?" + _POSTFIX
# ours
BEFORE_AFTER_QUESTION = "Are the colors of the second picture warmer than those of the first?" + _POSTFIX

RED, WHITE = (230, 25, 25), (255, 255, 255)
FINE = 4  # drawn this many times larger and then averaged, for smooth edges
LINE = 1 / 80  # thickness of lines, as a share of the frame's shorter side, but at least
THINNEST_LINE = 2  # px
DOT = 1 / 16  # radius of a marked point, likewise, but at least
SMALLEST_DOT = 4  # px
STRIP = 1 / 6  # height of the palette, as a share of the frame's height
MARGIN = 1 / 16  # from the stroke to the frame's edge, as a share of its shorter side

Colour = tuple[int, int, int]
MOST_SWATCHES = 32  # narrower ones could not be told apart


@dataclass(frozen=True)
class Horizon:
    """A red line from edge to edge.

    Args:
        height: 0 (the frame's bottom edge) to 1 (its top edge).

    Raises:
        ValueError: it lies outside the frame.
    """

    height: float

    def __post_init__(self) -> None:
        checked_share("height of the horizon", self.height)

    def draw(self, height: int, width: int) -> Tensor:
        """See ``overlay.Drawing``."""
        sheet = _Sheet(height, width)
        y = (1 - self.height) * height
        sheet.pen.rectangle(sheet.box(0, y - sheet.line / 2, width, y + sheet.line / 2), fill=RED)
        return sheet.drawing()


@dataclass(frozen=True)
class Palette:
    """A strip of equal swatches along the bottom edge, a white line above and between them.

    Args:
        colours: red, green and blue of each swatch, 0..255, left to right.

    Raises:
        ValueError: there is not a colour, or more than ``MOST_SWATCHES``.
    """

    colours: tuple[Colour, ...]

    def __post_init__(self) -> None:
        if not self.colours:
            raise ValueError("The palette is empty: give hex codes such as #e07a5f, or connect a reference picture.")
        if len(self.colours) > MOST_SWATCHES:
            raise ValueError(f"The palette has {len(self.colours)} colours: give {MOST_SWATCHES} at most.")

    def draw(self, height: int, width: int) -> Tensor:
        """See ``overlay.Drawing``."""
        sheet = _Sheet(height, width)
        top, gap, each = height * (1 - STRIP), sheet.line / 2, width / len(self.colours)
        sheet.pen.rectangle(sheet.box(0, top - gap, width, height), fill=WHITE)
        for i, colour in enumerate(self.colours):
            left = i * each + (gap / 2 if i else 0)
            sheet.pen.rectangle(sheet.box(left, top, (i + 1) * each - gap / 2, height), fill=colour)
        return sheet.drawing()


@dataclass(frozen=True)
class Stroke:
    """A red horizontal stroke with round ends, above the bottom edge.

    Args:
        weight: its thickness in pixels of the frame.
    """

    weight: float

    def draw(self, height: int, width: int) -> Tensor:
        """See ``overlay.Drawing``."""
        sheet = _Sheet(height, width)
        margin = MARGIN * min(height, width)
        bottom = height - margin
        box = sheet.box(margin, bottom - self.weight, width - margin, bottom)
        sheet.pen.rounded_rectangle(box, radius=self.weight * FINE / 2, fill=RED)
        return sheet.drawing()


@dataclass(frozen=True)
class Points:
    """Red dots with the letters A and B.

    Args:
        a, b: x (from the left) and y (from the top) of their centres, as shares of the frame.

    Raises:
        ValueError: one lies outside the frame.
    """

    a: tuple[float, float]
    b: tuple[float, float]

    def __post_init__(self) -> None:
        for letter, point in (("A", self.a), ("B", self.b)):
            for axis, value in zip("xy", point):
                checked_share(f"{axis} of Point {letter}", value)

    def draw(self, height: int, width: int) -> Tensor:
        """See ``overlay.Drawing``."""
        sheet = _Sheet(height, width)
        radius = max(SMALLEST_DOT, DOT * min(height, width))
        rim = radius / 5
        for letter, (x, y) in (("A", self.a), ("B", self.b)):
            x, y = x * width, y * height
            for size, colour in ((radius, WHITE), (radius - rim, RED)):
                sheet.pen.ellipse(sheet.box(x - size, y - size, x + size, y + size), fill=colour)
            sheet.write(letter, x, y, 1.3 * radius, WHITE)
        return sheet.drawing()


@dataclass(frozen=True, eq=False)
class Areas:
    """Areas outlined in red, each with what belongs in it written in its middle.

    Args:
        masks: ``[N, h, w]``, 1 inside the area, stretched over the frame.
        labels: a text for each of the first masks; empty for none.

    Raises:
        ValueError: a mask is empty, there are more labels than masks, or a label has characters that cannot be drawn.
    """

    masks: Tensor
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for i, mask in enumerate(self.masks, 1):
            if mask.max() <= 0.5:
                raise ValueError(f"Mask {i} of the composition is empty: paint the area that it stands for.")
        if len(self.labels) > len(self.masks):
            raise ValueError(
                f"There are {len(self.labels)} labels for {len(self.masks)} masks: give one line of text per mask."
            )
        for label in self.labels:
            if lacking := _lacking(label):
                raise ValueError(
                    f"The label '{label}' has characters that cannot be drawn ({', '.join(map(repr, lacking))}): write "
                    "it with the letters A to Z, or number the areas and explain the numbers in the question."
                )

    def draw(self, height: int, width: int) -> Tensor:
        """See ``overlay.Drawing``.

        Raises:
            ValueError: nothing of a mask is left at this size.
        """
        sheet = _Sheet(height, width)
        for i, (mask, label) in enumerate(zip_longest(self.masks, self.labels, fillvalue=""), 1):
            area = interpolate(mask[None, None].float(), (height * FINE, width * FINE), mode="bicubic")[0, 0] > 0.5
            if not area.any():
                raise ValueError(
                    f"Mask {i} of the composition, {mask.shape[1]} x {mask.shape[0]} px, is too small to be seen in a "
                    f"picture of {width} x {height} px: paint a larger area."
                )
            rim = _rim(area.numpy(), round(sheet.line * FINE))
            sheet.image.paste(RED, mask=Image.fromarray(rim))
            y, x = (where.float().mean().item() / FINE for where in area.nonzero(as_tuple=True))
            sheet.write(label, x, y, min(height, width) / 14, RED)
        return sheet.drawing()


def parse_colours(text: str) -> tuple[Colour, ...]:
    """Colours of hex codes, with or without #, separated by commas, spaces or lines.

    Raises:
        ValueError: one is no hex code.
    """
    return tuple(_parse_colour(code) for code in re.split(r"[\s,;]+", text.strip()) if code)


def _parse_colour(code: str) -> Colour:
    digits = code.removeprefix("#")
    if not re.fullmatch("[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        raise ValueError(f'"{code}" is not a colour: write hex codes of six digits such as #e07a5f.')
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return tuple(bytes.fromhex(digits))


def palette_of(image: Tensor, count: int) -> tuple[Colour, ...]:
    """The ``count`` (or fewer) colours that stand best for a picture ``[3, h, w]``, 0..1, the most frequent first.

    Median cut, then k-means, both PIL's.
    """
    picture = Image.fromarray((image * 255).round().byte().movedim(0, -1).cpu().numpy())
    reduced = picture.quantize(count, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    colours = np.array(reduced.getpalette()).reshape(-1, 3)
    frequent = sorted(reduced.getcolors(), reverse=True)
    return tuple(tuple(colours[index].tolist()) for _, index in frequent)


class _Sheet:
    """Clear paper, drawn on in pixels of the frame at ``FINE`` times its size."""

    def __init__(self, height: int, width: int):
        self.image = Image.new("RGBA", (width * FINE, height * FINE))
        self.pen = ImageDraw.Draw(self.image)
        self.line = max(THINNEST_LINE, LINE * min(height, width))

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, ...]:
        """Corners for PIL, which counts the last pixel in."""
        return round(left * FINE), round(top * FINE), round(right * FINE) - 1, round(bottom * FINE) - 1

    def write(self, text: str, x: float, y: float, size: float, colour: Colour) -> None:
        """``text`` with its middle at x, y, ``size`` pixels high."""
        font = ImageFont.load_default(size * FINE)
        self.pen.text((x * FINE, y * FINE), text, fill=colour, font=font, anchor="mm")

    def drawing(self) -> Tensor:
        """See ``overlay.Drawing``."""
        pixels = np.asarray(self.image.reduce(FINE).convert("RGBa"), dtype=np.float32) / 255
        return torch.from_numpy(pixels).movedim(-1, 0)


def _lacking(text: str) -> list[str]:
    """The characters of ``text`` that PIL's font has only a box for, as it has for U+FFFF, which is no character."""
    font = ImageFont.load_default(16)
    box = bytes(font.getmask("\uffff"))
    return [character for character in dict.fromkeys(text) if bytes(font.getmask(character)) == box]


def _rim(area: np.ndarray, thickness: int) -> np.ndarray:
    """The outermost ``thickness`` pixels of an area [h, w]; beyond the frame is outside."""
    padded = ImageOps.expand(Image.fromarray(area.astype(np.uint8) * 255), thickness)
    blurred = ImageOps.crop(padded.filter(ImageFilter.BoxBlur(thickness)), thickness)
    return area & (np.asarray(blurred) < 255)
