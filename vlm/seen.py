"""What reached the model's eyes: the picture after resizing and cutting, before normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .processing import ModelInputs

GAP = 4  # pixels of grey between the tiles of a picture that the processor cuts up


@torch.no_grad()
def seen_picture(inputs: ModelInputs, picture: Tensor) -> Tensor:
    """The resized picture, or its tiles side by side, exactly as handed to the processor's normalisation.

    A processor that normalises in a way of its own cannot be watched; then it is the picture as given.

    Args:
        inputs: of the judge that looks.
        picture: ``[3, H, W]`` on the 0..1 scale.

    Returns:
        ``[3, h, w]`` on the 0..1 scale.
    """
    processor = inputs.processor.image_processor
    normalise = getattr(processor, "rescale_and_normalize", None)
    if normalise is None:
        return picture.float().clamp(0, 1)
    tiles: list[Tensor] = []

    def noted(images: Tensor, *args, **kwargs):
        tiles.extend(images.reshape(-1, *images.shape[-3:]))
        return normalise(images, *args, **kwargs)

    processor.rescale_and_normalize = noted
    try:
        inputs.pixels([[picture]])
    finally:
        del processor.rescale_and_normalize
    return _side_by_side(tiles or [picture])


def _side_by_side(tiles: list[Tensor]) -> Tensor:
    height = max(tile.shape[-2] for tile in tiles)
    widened = [
        pad(tile.float().clamp(0, 1), [0, GAP * (i < len(tiles) - 1), 0, height - tile.shape[-2]], value=0.5)
        for i, tile in enumerate(tiles)
    ]
    return torch.cat(widened, dim=-1)
