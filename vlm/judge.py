"""A vision language model as a differentiable judge of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .look import plain_look
from .prompts import PromptWriter
from .question import Question


class Judge:
    """A frozen vision language model that says how likely it finds an answer.

    Args:
        model: a transformers image-text-to-text model; its parameters are frozen here.
        processor: the model's own processor, with an image processor that works on tensors.
        name: how the judge is called in messages.
        system: system prompt; empty for none.
        suffix: text added to every question, for example "Answer with Yes or No."
        template: prompt for models without a chat template, with ``{image}`` and ``{question}`` in it.

    Raises:
        ValueError: the model cannot be prompted or is an encoder-decoder.
    """

    def __init__(self, model, processor, name: str, system: str = "", suffix: str = "", template: str = ""):
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder: choose a decoder-only model such as Qwen2.5-VL.")
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.name = name
        self.prompts = PromptWriter(processor, name, system, suffix, template)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def log_likelihood(self, images: Tensor | Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        """Natural log of P(answer | pictures, question), the mean over the answer's tokens.

        The end of turn after the answer is not scored. Questions with the same text and other answers share a pass.

        Args:
            images: pictures ``[B, 3, H, W]`` on the 0..1 scale (values outside are allowed and not clamped), or a
                sequence of such batches, shown to the model side by side in that order.
            questions: what is asked about every picture.

        Returns:
            ``[B, Q]`` float32, differentiable with respect to the pictures.

        Raises:
            ValueError: the model cannot read the pictures, or an answer has no token.
        """
        shown = self._shown(images)
        sizes = tuple(tuple(batch.shape[-2:]) for batch in shown)
        prompts = [self.prompts.encode(question.text, question.answer, sizes) for question in questions]
        pixels = self._pixels(shown, self.prompts.render(questions[0].text, len(shown)))
        return plain_look(self.model, pixels, prompts, shown[0].shape[0])

    @torch.no_grad()
    def ask(self, image: Tensor, text: str, max_new_tokens: int = 64) -> str:
        """The judge's own words: its greedy answer to ``text`` about ``image`` (``[3, H, W]`` or ``[1, 3, H, W]``)."""
        shown = self._shown(image if image.ndim == 4 else image[None])
        features = self.prompts.process(_rows(shown), self.prompts.render(text, 1))
        features = {key: self._placed(value) for key, value in features.items()}
        tokens = self.model.generate(**features, do_sample=False, max_new_tokens=max_new_tokens)
        answer = tokens[0, features["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _shown(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The pictures as batches of one length on the judge's device."""
        batches = [images] if isinstance(images, Tensor) else list(images)
        rows = max(batch.shape[0] for batch in batches)
        return [batch.to(self.device, torch.float32).expand(rows, -1, -1, -1) for batch in batches]

    def _pixels(self, shown: list[Tensor], text: str) -> dict[str, Tensor]:
        """The processor's picture tensors, still attached to the pictures' graph."""
        features = self.prompts.process(_rows(shown), text)
        text_side = self.prompts.text_side(features)
        pixels = {key: self._placed(value) for key, value in features.items() if key not in text_side}
        wanted = any(batch.requires_grad for batch in shown)
        if wanted and not any(value.requires_grad for value in pixels.values()):
            kind = type(self.processor.image_processor).__name__
            raise ValueError(
                f"The image processor of {self.name} ({kind}) cuts the gradient: it needs the torchvision-backed "
                "processor (install torchvision, and transformers 4.57 or newer)."
            )
        return pixels

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)


def _rows(shown: list[Tensor]) -> list[list[Tensor]]:
    """For each row of the batch, its pictures."""
    return [list(row) for row in zip(*shown)]
