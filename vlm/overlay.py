"""Visual prompts (Dual-Process, section on visual prompting): what the judge is shown around the picture itself.

A question may carry one of three guides: ``Overlay`` lays a drawing over the picture, ``Beside`` shows a second picture
before it, ``BeforeAfter`` shows what the model drew before training. All are differentiable in the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

SOLID, TRANSPARENT, BESIDE, BEFORE_AFTER = "solid", "transparent", "beside", "before/after"
WHITE = 250 / 255  # a pixel counts as white paper from here on, in all three channels


class Drawing(Protocol):
    """A dataclass that can be drawn at any size."""

    def draw(self, height: int, width: int) -> Tensor:
        """``[4, height, width]``, 0..1: red, green and blue times alpha, and alpha."""


class Overlay:
    """A drawing over the picture.

    Args:
        drawing: what is laid over, drawn at the picture's own size.
        show: ``SOLID``: the drawing covers, the rest of it is clear. ``TRANSPARENT``: the drawing on white paper and
            the picture are mixed half and half over the whole frame, as the authors' code does by default.
        opacity: 0..1, share of the mode's full strength.
    """

    pictures = 1

    def __init__(self, drawing: Drawing, show: str = SOLID, opacity: float = 1.0):
        self.drawing, self.show = drawing, show
        self.opacity = checked_share("opacity", opacity)
        self.drawn = lru_cache(maxsize=1)(self._drawn)  # a run asks for one size again and again

    def shown(self, pictures: Sequence[Tensor], before: Tensor | None = None) -> list[Tensor]:
        """The pictures ``[B, 3, H, W]`` that are shown at once, with the drawing over the last of them."""
        *first, picture = pictures
        colour, alpha = (part.to(picture) for part in self.drawn(*picture.shape[-2:]))
        return [*first, picture * (1 - alpha) + colour]

    def story(self) -> dict:
        """How the guide was shown, for a LoRA's metadata."""
        return {"show": self.show, "opacity": self.opacity, type(self.drawing).__name__: _recipe(self.drawing)}

    def _drawn(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Colour times alpha ``[3, H, W]``, and alpha ``[1, H, W]``."""
        with torch.inference_mode(False):  # kept, and may be used in training later
            colour, alpha = self.drawing.draw(height, width).split([3, 1])
            if self.show == TRANSPARENT:
                colour, alpha = 0.5 * (colour + 1 - alpha), torch.full_like(alpha, 0.5)
            return self.opacity * colour, self.opacity * alpha


@dataclass(frozen=True, eq=False)
class Beside:
    """A second picture, shown before the one that is asked about.

    Args:
        image: ``[3, h, w]`` of any size, 0..1.
    """

    image: Tensor
    pictures: ClassVar[int] = 2

    def shown(self, pictures: Sequence[Tensor], before: Tensor | None = None) -> list[Tensor]:
        """The pictures ``[B, 3, H, W]`` that are shown at once, with the guide before the last of them."""
        *first, picture = pictures
        return [*first, self.image.to(picture).expand(picture.shape[0], -1, -1, -1), picture]

    def story(self) -> dict:
        """How the guide was shown, for a LoRA's metadata."""
        return {"show": BESIDE, **_recipe(self)}


@dataclass(frozen=True)
class BeforeAfter:
    """What the model drew without what it is being taught, shown before what it draws now."""

    pictures: ClassVar[int] = 2

    def shown(self, pictures: Sequence[Tensor], before: Tensor | None = None) -> list[Tensor]:
        """The pair, each ``[B, 3, H, W]``: ``before`` and the last of the pictures, or the pictures if they are two.

        Raises:
            ValueError: there is no picture to compare with.
        """
        pair = list(pictures) if before is None else [before.to(pictures[-1]), pictures[-1]]
        if len(pair) != 2:
            raise ValueError(
                "A before/after question compares two pictures but got 1: connect the picture before as reference."
            )
        return pair

    def story(self) -> dict:
        """How the guide was shown, for a LoRA's metadata."""
        return {"show": BEFORE_AFTER}


Guide = Overlay | Beside | BeforeAfter


@dataclass(frozen=True, eq=False)
class PlacedPicture:
    """A picture of any size as a drawing, fitted to the frame.

    Args:
        image: ``[3, h, w]``, 0..1, colours not multiplied by alpha.
        alpha: ``[h, w]``, 0 clear to 1 covering; None makes white clear.
        x, y: where its centre goes, as shares of the frame's width (from the left) and height (from the top).
        scale: 1 is as large as fits.
        stretch: give up its shape to fill the frame (at scale 1).
    """

    image: Tensor
    alpha: Tensor | None = None
    x: float = 0.5
    y: float = 0.5
    scale: float = 1.0
    stretch: bool = False

    def __post_init__(self) -> None:
        checked_share("x of the guide", self.x)
        checked_share("y of the guide", self.y)

    def draw(self, height: int, width: int) -> Tensor:
        """See ``Drawing``; what reaches beyond the frame is cut off."""
        alpha = white_is_clear(self.image) if self.alpha is None else self.alpha
        whole = torch.cat([self.image * alpha, alpha[None]])
        h, w = self._size(height, width)
        fitted = interpolate(whole[None], (h, w), mode="bilinear", antialias=True)[0]
        left, top = round(self.x * width - w / 2), round(self.y * height - h / 2)
        return pad(fitted, [left, width - left - w, top, height - top - h])

    def _size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.scale * height / self.image.shape[1], self.scale * width / self.image.shape[2]
        if not self.stretch:
            rows = columns = min(rows, columns)
        return max(1, round(rows * self.image.shape[1])), max(1, round(columns * self.image.shape[2]))


def white_is_clear(image: Tensor) -> Tensor:
    """Alpha ``[h, w]`` of a drawing ``[3, h, w]`` on white paper: 0 where it is white, 1 elsewhere."""
    return (image < WHITE).any(dim=0).to(image.dtype)


def on_white(drawing: Tensor) -> Tensor:
    """A drawing ``[4, H, W]`` (see ``Drawing``) on white paper, ``[3, H, W]``."""
    return drawing[:3] + 1 - drawing[3:]


def under(guide: Guide | None, pictures: Sequence[Tensor]) -> list[Tensor]:
    """What is shown at once of pictures, each ``[3, H, W]``, when a question with ``guide`` is asked about the last."""
    if guide is None:
        return list(pictures)
    return [shown[0] for shown in guide.shown([picture[None] for picture in pictures])]


def as_batches(images: Tensor | Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Pictures shown at once as float32 batches ``[B, 3, H, W]`` of one length on ``device``."""
    batches = [images] if isinstance(images, Tensor) else list(images)
    rows = max(map(len, batches))
    return [batch.to(device, torch.float32).expand(rows, -1, -1, -1) for batch in batches]


def shown_with(guide: Guide | None, pictures: Sequence, questions: Sequence) -> list:
    """Of a picture and its reference before it, what a question with ``guide`` is about: where a question compares with
    the picture before, the reference is that, and the others are about the picture alone."""
    compares = any(isinstance(question.guide, BeforeAfter) for question in questions)
    return list(pictures[-1:] if compares and not isinstance(guide, BeforeAfter) else pictures)


def look_by_guide(
    look: Callable[[list[Tensor], list], Tensor], pictures: list[Tensor], questions: Sequence, before: Tensor | None
) -> Tensor:
    """Log-likelihoods ``[B, Q]``, where questions with the same guide share a look.

    Args:
        look: the log-likelihoods ``[B, n]`` of n questions about pictures ``[B, 3, H, W]`` shown at once.
        pictures: what is shown without guides.
        questions: their guides decide what is shown with them.
        before: ``[B, 3, H, W]`` for before/after questions.
    """
    columns: list[Tensor] = [None] * len(questions)
    for guide, members in by_guide(questions).items():
        among = shown_with(guide, pictures, questions)
        shown = among if guide is None else guide.shown(among, before)
        scores = look(shown, [questions[i] for i in members])
        for i, column in zip(members, scores.unbind(dim=1)):
            columns[i] = column
    return torch.stack(columns, dim=1)


def by_guide(questions: Sequence) -> dict[Guide | None, list[int]]:
    """Guide -> indices of the questions that are asked under it, in order."""
    groups: dict[Guide | None, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question.guide, []).append(i)
    return groups


def checked_share(name: str, value: float) -> float:
    """``value``, if it is within 0..1.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"The {name} is {value:g}: give a share from 0 to 1.")
    return value


def _recipe(drawing) -> dict:
    """The fields of a dataclass; pictures and masks as size and fingerprint."""
    return {field.name: _told(getattr(drawing, field.name)) for field in fields(drawing)}


def _told(value):
    if not isinstance(value, Tensor):
        return value
    pixels = (value * 255).round().byte().cpu().contiguous()
    return f"{'x'.join(map(str, value.shape))} sha256 {hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}"
