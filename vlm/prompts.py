"""From a question to the tokens of its prompt and of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .processing import ModelInputs, Size

_PLACE = "\u00abanswer\u00bb"  # stands where the answer will be while the template is rendered


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it, and the tokens of the answer that is scored.

    Args:
        inputs: the tensors that belong to the text, each ``[1, L, ...]``, ending where the answer begins.
        answer: token ids of the answer alone, without the end of turn that the template puts after it.
    """

    inputs: dict[str, Tensor]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.inputs["input_ids"][0].tolist())


class PromptWriter:
    """Renders questions with the model's own chat template and finds the tokens of their answers.

    Args:
        processor: a transformers processor with an image processor and a tokenizer.
        name: what the judge is called in error messages.
        system: system prompt; empty for none.
        suffix: text added to every question after a space, for example "Answer with Yes or No."
        template: prompt for models without a chat template, with ``{image}`` (or the model's own token for a picture)
            and ``{question}`` in it; used in place of the chat template when given.

    Raises:
        ValueError: there is neither a chat template nor a ``template``, a ``template`` lacks one of its places or comes
            with a ``system`` prompt, or the processor cannot be used.
    """

    def __init__(self, processor, name: str, system: str = "", suffix: str = "", template: str = ""):
        self.processor = processor
        self.name = name
        self.system = system
        self.suffix = suffix
        self.template = template
        if not (template or getattr(processor, "chat_template", None)):
            raise ValueError(
                f"{name} has no chat template: choose an instruction-tuned model, or give a prompt template such as "
                '"{image}Question: {question} Answer:".'
            )
        self._image = getattr(processor, "image_token", "<image>")
        there = template.replace(self._image, "{image}")
        if missing := [place for place in ("{image}", "{question}") if template and place not in there]:
            raise ValueError(
                f"The prompt template of {name} has no {' and no '.join(missing)}. Write, for example, "
                '"{image}Question: {question} Answer:".'
            )
        if template and system:
            raise ValueError(
                f"A prompt template is all that {name} is told: write the system prompt into it, or leave one empty."
            )
        self.inputs = ModelInputs(processor, name, self.render("Is this a picture?", 1))
        # Pictures of one size always expand to the same tokens, so a training loop tokenises each question once.
        self.encode = lru_cache(maxsize=256)(self._encode)

    def render(self, question: str, images: int) -> str:
        """The prompt for ``question`` about ``images`` pictures, ending where the model's answer begins."""
        if self.template:
            with_images = self.template.replace("{image}", self._image * images)
            return with_images.replace("{question}", self._asked(question))
        return self._chat(question, images, None)

    def _encode(self, question: str, answer: str, sizes: tuple[Size, ...]) -> Prompt:
        """Tokenise a question about pictures of the given (height, width) and find its answer's tokens."""
        prompt, spoken = self._split(question, answer, len(sizes))
        inputs = self.inputs.text(prompt, sizes)
        ids = inputs["input_ids"][0].tolist()
        prompt += self._appended(ids, prompt)
        before, after = self._tokens(prompt), self._tokens(prompt + spoken)
        shared = common_length(before, after)
        answer_ids = tuple(after[shared:])
        if not answer_ids or self.processor.tokenizer.unk_token_id in answer_ids:
            raise ValueError(f'{self.name} has no token for the answer "{answer}": choose another word.')
        length = len(ids) - (len(before) - shared)  # a merge at the boundary takes tokens back from the prompt
        with torch.inference_mode(False):
            return Prompt({key: value[:, :length] for key, value in inputs.items()}, answer_ids)

    def _split(self, question: str, answer: str, images: int) -> tuple[str, str]:
        """The prompt up to the answer, and the answer as the template speaks it, leading space included."""
        prompt = self.render(question, images)
        answer = answer.strip()
        if self.template:
            return prompt, answer
        whole = self._chat(question, images, _PLACE)
        start = len(prompt) if whole.startswith(prompt) else common_length(prompt, whole)
        found = whole.find(_PLACE, start)
        if found < 0:
            raise ValueError(f"The chat template of {self.name} drops the assistant's answer: choose another model.")
        lead = whole[start:found]
        if whole.startswith(prompt) and not lead.strip():
            return prompt, lead + answer
        return whole[:found], answer  # the template opens an answered turn with more than it prompts with

    def _chat(self, question: str, images: int, answer: str | None) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": self._asked(question)}]
        messages = [{"role": "user", "content": content}]
        if self.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)

    def _asked(self, question: str) -> str:
        return f"{question.strip()} {self.suffix}".strip()

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _appended(self, ids: list[int], prompt: str) -> str:
        """Text that the processor itself put after the prompt (PaliGemma: a newline)."""
        tail = self._tokens(prompt)[-1]
        extra = ids[len(ids) - ids[::-1].index(tail) :] if tail in ids else []
        return self.processor.tokenizer.decode(extra)


def common_length(a, b) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
