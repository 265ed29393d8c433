"""Pictures side by side, under words."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

GAP = 8  # px between pictures
PAPER, INK = "white", "black"


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, which has Latin letters only; ``size`` in px."""
    return ImageFont.load_default(size)


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0..1 (values outside are clipped)."""
    return Image.fromarray((picture.clamp(0, 1) * 255).byte().movedim(0, -1).cpu().numpy())


def from_image(image: Image.Image) -> Tensor:
    """As a ComfyUI IMAGE [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(image))[None].float() / 255


def contact_sheet(*batches: Tensor, most: int = 4) -> Image.Image:
    """The first pictures of batches [B, 3, H, W] in 0..1, a row for each; what is shorter ends in white."""
    rows = [torch.cat(list(batch[:most].cpu()), dim=-1) for batch in batches]
    width = max(row.shape[-1] for row in rows)
    return to_image(torch.cat([pad(row, [0, width - row.shape[-1]], value=1.0) for row in rows], dim=-2))


def grid(rows: list[list[Image.Image]], headings: list[str]) -> Image.Image:
    """Rows of pictures of one size, each column under its heading."""
    width, height = rows[0][0].size
    letters = font(max(12, min(width // 12, 48)))
    top = int(letters.size * 1.5) + GAP
    columns = len(headings)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = GAP + column * (width + GAP)
        draw.text((x + width / 2, top / 2), heading, fill=INK, font=letters, anchor="mm")
        for row, pictures in enumerate(rows):
            if column < len(pictures):
                sheet.paste(pictures[column], (x, top + row * (height + GAP)))
    return sheet
