"""Thumbnails of the templates: pairs of pictures where there are results, sketches with the guide where there are none.

A sketch is drawn with lines and flat greys and says that it is one: no thumbnail pretends to be a result.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..tiny.oracles import holds
from ..vlm.guides import Areas, Horizon, Palette, Points, Stroke, parse_colours
from ..vlm.overlay import Drawing, Overlay

SIDE, EDGE, BAR = 512, 8, 40  # px of a thumbnail, of its gaps, of its line of text
PAPER, INK, SKY, GROUND, LIGHT, DARK = "#f4f2ee", "#333333", "#dfe3e6", "#b9bdb6", "#cfd2cc", "#8e948f"
NIGHT = "#202020"
FRAME = SIDE - BAR  # px of a sketch


def pairs(before: list[Image.Image], after: list[Image.Image], wanted: dict[str, str]) -> Image.Image:
    """The first eight pairs in which the after picture is the first to hold the wanted answers (property -> answer, see
    ``tiny.oracles``), or the first eight of all where none are wanted; before on the left."""
    found = []
    for pair in zip(before, after):
        small = torch.stack([_pixels(_fitted(picture, 64)) for picture in pair])
        held = [holds(small, name, answer) for name, answer in wanted.items()]
        if not held or torch.stack(held).all(dim=0).tolist() == [False, True]:
            found.append(pair)
    sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
    cell = (SIDE - BAR) // 4 - EDGE // 2
    gap = (SIDE - 4 * cell) // 3
    lefts = [gap, gap + cell, 2 * gap + 2 * cell, 2 * gap + 3 * cell]
    for n, pair in enumerate(found[:8]):
        row, column = divmod(n, 2)
        for half, picture in enumerate(pair):
            sheet.paste(_fitted(picture, cell), (lefts[2 * column + half], BAR + row * (cell + EDGE // 2)))
    for left, text in zip(lefts, ("before", "after") * 2):
        _write(sheet, text, left + cell // 2, BAR // 2)
    return sheet


def ranking(pictures: list[Image.Image]) -> Image.Image:
    """The first 16 pictures, the very first with a frame."""
    sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
    cell = (SIDE - EDGE) // 4
    for n, picture in enumerate(pictures[:16]):
        row, column = divmod(n, 4)
        sheet.paste(_fitted(picture, cell - EDGE), (EDGE + column * cell, EDGE + row * cell))
    frame = (EDGE // 2, EDGE // 2, cell + EDGE // 2, cell + EDGE // 2)
    ImageDraw.Draw(sheet).rectangle(frame, outline="#ffd54a", width=5)
    return sheet


def sketch(lesson: str, label: str) -> Image.Image:
    """A drawing of what a template is about, with its guide, for the models named in the label."""
    sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
    scene, guide = SKETCHES[lesson]
    picture = Image.new("RGB", (SIDE, FRAME), PAPER)
    scene(ImageDraw.Draw(picture), picture)
    sheet.paste(_under(guide, picture) if guide else picture, (0, 0))
    _write(sheet, f"{label}  -  a sketch, not a result", SIDE // 2, SIDE - BAR // 2)
    return sheet


def _lake(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    pen.rectangle((0, 0, SIDE, 280), fill=SKY)
    pen.polygon([(0, 280), (0, 230), (90, 170), (170, 235), (280, 120), (400, 240), (512, 190), (512, 280)], fill=LIGHT)
    pen.rectangle((0, 280, SIDE, FRAME), fill=GROUND)
    for x, y, length in ((60, 320, 90), (260, 345, 130), (120, 390, 160), (340, 425, 110)):
        pen.line((x, y, x + length, y), fill=DARK, width=4)


def _market(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    pen.rectangle((0, 0, SIDE, 270), fill=SKY)
    pen.rectangle((0, 270, SIDE, FRAME), fill=GROUND)
    for x, shade in ((20, DARK), (190, "#a7aca6"), (360, DARK)):
        pen.rectangle((x + 10, 220, x + 122, 320), fill=LIGHT, outline=INK, width=3)
        pen.polygon([(x, 220), (x + 132, 220), (x + 112, 130), (x + 20, 130)], fill=shade, outline=INK, width=3)
        for n in range(4):
            pen.ellipse((x + 16 + 26 * n, 196, x + 40 + 26 * n, 232), fill=PAPER if n % 2 else shade)
        for n in range(3):
            pen.ellipse((x + 22 + 32 * n, 240, x + 46 + 32 * n, 264), fill=shade, outline=INK, width=2)


def _house(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    pen.line((20, 370, 492, 370), fill=INK, width=3)
    pen.rectangle((140, 200, 340, 370), outline=INK, width=3)
    pen.line([(115, 205), (240, 90), (365, 205)], fill=INK, width=3)
    pen.rectangle((215, 270, 265, 370), outline=INK, width=3)
    for x in (160, 290):
        pen.rectangle((x, 230, x + 32, 262), outline=INK, width=3)
        pen.line((x + 16, 230, x + 16, 262), fill=INK, width=3)
    pen.line((430, 370, 430, 290), fill=INK, width=3)
    pen.ellipse((390, 200, 470, 295), outline=INK, width=3)
    for x in range(30, 120, 22):
        pen.line((x, 330, x, 370), fill=INK, width=3)
    pen.line((20, 345, 125, 345), fill=INK, width=3)


def _chairs(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    pen.rectangle((0, 0, SIDE, 150), fill=SKY)
    pen.rectangle((0, 150, SIDE, FRAME), fill=LIGHT)
    for x, y, size, shade in ((110, 90, 0.75, DARK), (265, 170, 1.35, "#a7aca6")):
        seat, left, right = y + 105 * size, x, x + 100 * size
        for leg, foot in ((left, 85), (right, 85), (left + 22 * size, 60), (right + 22 * size, 60)):
            pen.line((leg, seat, leg, seat + foot * size), fill=INK, width=round(8 * size))
        pen.polygon([(left, seat), (right, seat), (right + 22 * size, seat - 25 * size),
                     (left + 22 * size, seat - 25 * size)], fill=shade, outline=INK, width=3)  # fmt: skip
        pen.rectangle((left + 22 * size, y, right + 22 * size, seat - 25 * size), fill=shade, outline=INK, width=3)


def _two_chairs(pen: ImageDraw.ImageDraw, picture: Image.Image) -> None:
    _chairs(pen, picture)
    _write(picture, "Is the blue chair in front of the red chair?", SIDE // 2, 40, INK, 22)
    _write(picture, "Yes", SIDE // 2, 75, INK, 30)


def _meadow(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    pen.rectangle((0, 0, SIDE, 190), fill=SKY)
    pen.ellipse((-120, 150, 360, 420), fill=LIGHT)
    pen.ellipse((220, 170, 700, 480), fill=LIGHT)
    pen.rectangle((0, 250, SIDE, FRAME), fill=GROUND)
    for x, y in ((340, 330), (400, 290), (450, 390), (330, 420), (80, 280), (480, 320)):
        pen.line([(x - 8, y - 16), (x, y), (x + 8, y - 16)], fill=DARK, width=4)


def _spilled_cup(pen: ImageDraw.ImageDraw, picture: Image.Image) -> None:
    pen.rectangle((0, 260, SIDE, FRAME), fill=LIGHT)
    pen.line((0, 260, SIDE, 260), fill=INK, width=3)
    _tipped_cup(pen, 0, 0, 1.0)
    _write(picture, "Is the water spilling out of the cup?", SIDE // 2, 60, INK, 26)
    _write(picture, "Yes", SIDE // 2, 105, INK, 34)


def _cups(pen: ImageDraw.ImageDraw, _: Image.Image) -> None:
    for n in range(8):
        left, top = 10 + (n % 4) * 125, 120 + (n // 4) * 130
        pen.rectangle((left, top, left + 115, top + 115), fill=LIGHT, outline=INK, width=2)
        if n == 5:
            _tipped_cup(pen, left - 26, top - 20, 0.3)
            pen.rectangle((left - 3, top - 3, left + 118, top + 118), outline="#e0a800", width=6)
        else:
            pen.rectangle((left + 37, top + 35, left + 75, top + 90), fill=PAPER, outline=INK, width=3)
            pen.arc((left + 66, top + 48, left + 92, top + 76), -90, 90, fill=INK, width=3)


def _tipped_cup(pen: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    def at(*numbers: float) -> list[tuple[float, float]]:
        return [(x + numbers[i] * size, y + numbers[i + 1] * size) for i in range(0, len(numbers), 2)]

    line = max(3, round(5 * size))
    pen.ellipse(at(60, 335, 330, 400), fill="#9fb3bd")
    pen.polygon(at(210, 245, 400, 220, 400, 360, 210, 350), fill=PAPER, outline=INK, width=line)
    pen.ellipse(at(180, 245, 240, 350), fill="#9fb3bd", outline=INK, width=line)
    pen.arc(at(270, 165, 350, 270), 170, 370, fill=INK, width=2 * line)


def _two_beaches(pen: ImageDraw.ImageDraw, picture: Image.Image) -> None:
    for left, title in ((12, "first: before"), (262, "second: now")):
        pen.rectangle((left, 110, left + 238, 348), fill=SKY, outline=INK, width=2)
        pen.ellipse((left + 150, 135, left + 195, 180), fill=PAPER, outline=DARK, width=3)
        pen.rectangle((left + 1, 215, left + 237, 275), fill=GROUND)
        shore = [(left + 1, 290), (left + 120, 262), (left + 237, 280)]
        pen.polygon([(left + 1, 347), *shore, (left + 237, 347)], fill=LIGHT)
        _write(picture, title, left + 119, 85, INK, 24)
    _write(picture, "Are the colors of the second", SIDE // 2, 385, INK, 26)
    _write(picture, "picture warmer?", SIDE // 2, 418, INK, 26)


def _left_corner() -> torch.Tensor:
    """The area of the template, as its mask."""
    mask = torch.zeros(1, 32, 32)
    mask[:, 14:30, 2:18] = 1
    return mask


SKETCHES = {
    "Teach the horizon with a guide": (_lake, Horizon(0.66)),
    "Teach a palette with a guide": (_market, Palette(parse_colours("#e07a5f, #3d405b, #f2cc8f"))),
    "Teach line weight with a guide": (_house, Stroke(14)),
    "Teach depth": (_two_chairs, None),
    "Teach depth with a guide": (_chairs, Points((0.3, 0.35), (0.65, 0.7))),
    "Teach a composition with a guide": (_meadow, Areas(_left_corner(), ("house",))),
    "Teach common sense": (_spilled_cup, None),
    "Compare before and after": (_two_beaches, None),
    "Best of N with the judge": (_cups, None),
}


def _under(drawing: Drawing, picture: Image.Image) -> Image.Image:
    (shown,) = Overlay(drawing).shown([_pixels(picture)[None]])
    return Image.fromarray((shown[0].movedim(0, -1).clamp(0, 1) * 255).round().byte().numpy())


def _pixels(picture: Image.Image) -> torch.Tensor:
    """``[3, h, w]``, 0..1."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).movedim(-1, 0)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _write(sheet: Image.Image, text: str, x: float, y: float, colour: str = "#e8e8e8", size: int = 20) -> None:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text((x, y), text, fill=colour, font=font, anchor="mm")
