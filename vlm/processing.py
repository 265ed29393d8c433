"""The model's own processor, asked for text and pixels separately so that pixels can keep their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]

# Largest difference, in normalised pixel units, between the processor's own 8-bit way and ours on a smooth picture.
# A processor resizes 8-bit pictures in 8 bit: every resize rounds to 1/255, which is 0.02 after the usual division by
# a standard deviation of 0.26, and some families resize twice. Ours resizes the float picture and never rounds.
PIXEL_TOLERANCE = 0.05


class ModelInputs:
    """What the model is fed, made by its own processor.

    Text goes through the whole processor beside a blank picture of the right size, which expands the image tokens.
    Pixels go through the image processor alone, with the very options the processor passes to it, as floats: several
    processors accept nothing but PIL images themselves, and 8-bit pictures carry no gradient.

    Args:
        processor: a transformers processor with an image processor and a tokenizer.
        name: what the judge is called in error messages.
        probe: a rendered prompt with one picture, on which the processor is tried out.

    Raises:
        ValueError: the processor cuts the gradient, or prepares float pictures in another way than PIL pictures.
    """

    def __init__(self, processor, name: str, probe: str):
        self.processor = processor
        self.name = name
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs its nodes in inference mode
            picture = _ramp(64, 96)
            with _recording(processor) as recorder:
                features = self._call(probe, [_pil(picture)])
            if recorder.produced is None:
                raise ValueError(f"{name}: {type(processor).__name__} does not use its image processor on a picture.")
            self._options = {**recorder.options, "do_rescale": False, "return_tensors": "pt"}
            self._pixel_keys = [key for key in recorder.produced if key in features]
            self._check(picture, features)

    def text(self, prompt: str, sizes: Sequence[Size]) -> dict[str, Tensor]:
        """The tensors that belong to a prompt about pictures of the given (height, width), each ``[1, L, ...]``.

        Raises:
            ValueError: the family does not take this many pictures.
        """
        blanks = [Image.new("RGB", (width, height)) for height, width in sizes]
        try:
            with torch.inference_mode(False):  # the tensors are kept, and may be used in training later
                features = self._call(prompt, blanks)
        except (ValueError, IndexError, StopIteration) as error:
            if len(blanks) == 1:
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.name} cannot be shown {len(blanks)} pictures at once: {reason}") from error
        targets = ("labels",)  # PaliGemma's processor adds them
        return {k: v for k, v in features.items() if k not in (*self._pixel_keys, *targets)}

    def pixels(self, rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The tensors that belong to the pictures, still attached to their graph.

        Args:
            rows: for each row of the batch its pictures, ``[3, H, W]`` floats on the 0..1 scale.
        """
        features = self.processor.image_processor([list(row) for row in rows], **self._options)
        return {key: features[key] for key in self._pixel_keys}

    def _call(self, prompt: str, pictures: list[Image.Image]) -> dict[str, Tensor]:
        bos = self.processor.tokenizer.bos_token
        features = self.processor(
            images=[pictures],
            text=[prompt],
            add_special_tokens=not (bos and prompt.startswith(bos)),
            return_tensors="pt",
        )
        return {key: value for key, value in features.items() if isinstance(value, Tensor)}

    def _check(self, picture: Tensor, features: dict[str, Tensor]) -> None:
        kind = type(self.processor.image_processor).__name__
        pixels = self.pixels([[picture.clone().requires_grad_()]])
        if not any(value.requires_grad for value in pixels.values()):
            raise ValueError(
                f"The image processor of {self.name} ({kind}) cuts the gradient: this transformers has no "
                "torchvision-backed one for it, or torchvision is missing; install or update them, or choose "
                "another model."
            )
        for key, value in pixels.items():
            same = value.shape == features[key].shape
            gap = (value.float() - features[key].float()).abs().max().item() if same else float("inf")
            if gap > PIXEL_TOLERANCE:
                raise ValueError(
                    f"The image processor of {self.name} ({kind}) prepares a float picture differently from a PIL one "
                    f"({key} differs by {gap:.3g}): its gradient would be of another picture."
                )


class _Recorder:
    """Stands in for an image processor during one call and notes the options it was called with."""

    def __init__(self, inner):
        self.inner = inner
        self.options: dict = {}
        self.produced: list[str] | None = None

    def __call__(self, images, **options):
        features = self.inner(images, **options)
        self.options = options
        self.produced = list(features)
        return features

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


@contextmanager
def _recording(processor) -> Iterator[_Recorder]:
    own = processor.image_processor
    processor.image_processor = _Recorder(own)
    try:
        yield processor.image_processor
    finally:
        processor.image_processor = own


def _ramp(height: int, width: int) -> Tensor:
    """A smooth colour ramp ``[3, height, width]`` in whole 255ths, without overshoot when resized."""
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    along = torch.linspace(0, 1, width).expand(height, width)
    return (torch.stack([down, along, 1 - down]) * 255).round() / 255


def _pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
