"""What reached the model's eyes: the picture after resizing and cutting, before normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .processing import ModelInputs

GAP = 4  # pixels of grey between the tiles of a picture that the processor cuts up


@torch.no_grad()
def seen_picture(inputs: ModelInputs, pictures: Sequence[Tensor]) -> Tensor:
    """The resized pictures, or their tiles, side by side, exactly as handed to the processor's normalisation.

    A processor that normalises in a way of its own cannot be watched; then it is the pictures as given.

    Args:
        inputs: of the judge that looks.
        pictures: shown at once, each ``[3, H, W]`` on the 0..1 scale.

    Returns:
        ``[3, h, w]`` on the 0..1 scale.
    """
    processor = inputs.processor.image_processor
    normalise = getattr(processor, "rescale_and_normalize", None)
    if normalise is None:
        return side_by_side(pictures)
    tiles: list[Tensor] = []

    def noted(images: Tensor, *args, **kwargs):
        tiles.extend(images.reshape(-1, *images.shape[-3:]))
        return normalise(images, *args, **kwargs)

    processor.rescale_and_normalize = noted
    try:
        inputs.pixels([pictures])
    finally:
        del processor.rescale_and_normalize
    return side_by_side(tiles or pictures)


def side_by_side(tiles: Sequence[Tensor]) -> Tensor:
    """Pictures ``[3, h, w]`` beside each other, clamped to 0..1, grey between and below them."""
    height = max(tile.shape[-2] for tile in tiles)
    widened = [
        pad(tile.float().clamp(0, 1), [0, GAP * (i < len(tiles) - 1), 0, height - tile.shape[-2]], value=0.5)
        for i, tile in enumerate(tiles)
    ]
    return torch.cat(widened, dim=-1)
