"""A vision language model as a differentiable judge of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .look import Look
from .overlay import as_batches, look_by_guide
from .prompts import PromptWriter
from .question import Question
from .seen import seen_picture

FP16_GRADIENT_SCALE = 1024.0  # keeps the small gradients of pixels from vanishing in half precision
EASE = 32  # what that scale is divided by where gradients have left half precision's range
SOME_SIDE = 64  # px; the tokens of an answer do not depend on the picture's size


def eased(scale: float) -> float:
    """The gradient scale to go on with where gradients multiplied by ``scale`` were not finite."""
    return max(1.0, scale / EASE)


class Judge:
    """A frozen vision language model that says how likely it finds an answer.

    Args:
        model: a transformers image-text-to-text model; its parameters are frozen here.
        processor: the model's own processor, with an image processor that works on tensors.
        name: what the judge is called in messages.
        system: system prompt; empty for none.
        suffix: text added to every question, for example "Answer with Yes or No."
        template: prompt for models without a chat template, with ``{image}`` and ``{question}`` in it.

    Attributes:
        gradient_scale: what gradients are to be multiplied by on their way through the model, and divided by at the
            picture.

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
        self.look = Look(self.model, name)
        self.gradient_scale = FP16_GRADIENT_SCALE if model.dtype == torch.float16 else 1.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check(self, questions: Sequence[Question]) -> None:
        """Find out before any picture is drawn whether every answer can be scored.

        Raises:
            ValueError: an answer has no token, or the family does not take as many pictures as a guide shows.
        """
        for question in questions:
            self.prompts.encode(question.text, question.answer, ((SOME_SIDE, SOME_SIDE),) * question.pictures)

    def log_likelihood(
        self, images: Tensor | Sequence[Tensor], questions: Sequence[Question], before: Tensor | None = None
    ) -> Tensor:
        """Natural log of P(answer | pictures, question), the mean over the answer's tokens.

        The end of turn after the answer is not scored. Questions with the same guide share a look at the pictures,
        those with the same text and other answers a pass.

        Args:
            images: pictures ``[B, 3, H, W]`` on the 0..1 scale (values outside are allowed and not clamped), or a
                sequence of such batches, shown to the model side by side in that order.
            questions: what is asked about every picture (of a sequence, the last), under the question's guide.
            before: ``[B, 3, H, W]``, the pictures that before/after questions compare with.

        Returns:
            ``[B, Q]`` float32, differentiable with respect to the pictures.

        Raises:
            ValueError: the model cannot read the pictures, an answer has no token, or ``before`` is missing.
        """
        return look_by_guide(self._scores, as_batches(images, self.device), questions, before)

    def _scores(self, shown: list[Tensor], questions: Sequence[Question]) -> Tensor:
        """Mean log-likelihood per answer token ``[B, Q]`` of questions about the same pictures."""
        sizes = tuple(tuple(batch.shape[-2:]) for batch in shown)
        prompts = [self.prompts.encode(question.text, question.answer, sizes) for question in questions]
        return self.look(self._pixels(shown), prompts, shown[0].shape[0])

    @torch.no_grad()
    def ask(self, images: Tensor | Sequence[Tensor], text: str, max_new_tokens: int = 64) -> str:
        """The judge's own words: its greedy answer to ``text``.

        Args:
            images: a picture, ``[3, H, W]`` or ``[1, 3, H, W]`` on the 0..1 scale, or several to show side by side.
            text: what is asked.
            max_new_tokens: the answer is cut after this many tokens.

        Raises:
            ValueError: the family does not take this many pictures.
        """
        pictures = [images] if isinstance(images, Tensor) else images
        shown = as_batches([picture if picture.ndim == 4 else picture[None] for picture in pictures], self.device)
        sizes = [tuple(batch.shape[-2:]) for batch in shown]
        prompt = self.prompts.inputs.text(self.prompts.render(text, len(shown)), sizes)
        features = {**{key: value.to(self.device) for key, value in prompt.items()}, **self._pixels(shown)}
        tokens = self.model.generate(**features, do_sample=False, max_new_tokens=max_new_tokens)
        answer = tokens[0, prompt["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def seen(self, pictures: Sequence[Tensor]) -> Tensor:
        """What the model is shown of pictures ``[3, H, W]`` at once, as one picture; see ``seen_picture``."""
        return seen_picture(self.prompts.inputs, pictures)

    def _pixels(self, shown: list[Tensor]) -> dict[str, Tensor]:
        """The picture side of the model's inputs, in the model's dtype."""
        pixels = self.prompts.inputs.pixels(list(zip(*shown)))
        dtype = self.model.dtype
        return {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in pixels.items()}


def beside(reference: Tensor | None, pictures: Tensor) -> list[list[Tensor]]:
    """What is shown at each picture ``[B, 3, H, W]``: its reference first, where there is one, then itself.

    Args:
        reference: ``[1, 3, h, w]`` for all pictures or ``[B, 3, h, w]``.
        pictures: what is asked about.

    Raises:
        ValueError: there are neither one nor B references.
    """
    if reference is None:
        return [[picture] for picture in pictures]
    if len(reference) not in (1, len(pictures)):
        raise ValueError(f"{len(reference)} references for {len(pictures)} pictures: connect one, or one for each.")
    return [list(pair) for pair in zip(reference.to(pictures).expand(len(pictures), -1, -1, -1), pictures)]
