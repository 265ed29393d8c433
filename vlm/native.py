"""A vision language model that ComfyUI itself loaded as CLIP (Qwen3-VL, ComfyUI 0.33) as a differentiable judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from .overlay import as_batches, look_by_guide
from .question import Question
from .seen import side_by_side


class AddOutOfPlace(TorchFunctionMode):
    """Inside the block ``torch.add(a, b, out=c)`` returns a new tensor and leaves ``c`` alone.

    Core's transformer block adds its residual with ``out=``, which autograd refuses; nobody reads ``c`` afterwards.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.add:
            kwargs.pop("out", None)
        return function(*args, **kwargs)


class NativeJudge:
    """Does what ``vlm.judge.Judge`` does with core's own tokenizer, vision tower and logits, in fp32 arithmetic.

    Core's key/value cache is written in place and carries no gradient, so every distinct question costs a whole pass,
    and pictures of a batch are looked at one by one.

    Args:
        clip: a ``comfy.sd.CLIP`` holding ComfyUI's Qwen3-VL, loaded on its device when it is asked.
        name: what the judge is called in messages.
    """

    gradient_scale = 1.0  # fp32 arithmetic

    def __init__(self, clip, name: str = "Qwen3-VL (CLIP)"):
        self.clip = clip
        self.name = name

    @property
    def device(self) -> torch.device:
        return self.clip.patcher.load_device

    @property
    def _encoder(self):
        model = self.clip.cond_stage_model
        return getattr(model, model.clip)

    def check(self, questions: Sequence[Question]) -> None:
        """Nothing can fail here: Qwen's vocabulary has a token for every byte."""

    def log_likelihood(
        self, images: Tensor | Sequence[Tensor], questions: Sequence[Question], before: Tensor | None = None
    ) -> Tensor:
        """As ``Judge.log_likelihood``: ``[B, Q]`` float32, differentiable with respect to the pictures."""
        return look_by_guide(self._rows, as_batches(images, self.device), questions, before)

    @torch.no_grad()
    def ask(self, images: Tensor | Sequence[Tensor], text: str, max_new_tokens: int = 64) -> str:
        """As ``Judge.ask``: core's own greedy answer."""
        pictures = [images] if isinstance(images, Tensor) else images
        tokens = self._tokens([picture.reshape(picture.shape[-3:]) for picture in pictures], text)
        return self.clip.decode(self.clip.generate(tokens, do_sample=False, max_length=max_new_tokens)).strip()

    @torch.no_grad()
    def seen(self, pictures: Sequence[Tensor]) -> Tensor:
        """As ``Judge.seen``: the pictures in the size that core hands to the vision tower."""
        vision = self._encoder.transformer
        resized = []
        for picture in pictures:
            given = picture.to(self.device, torch.float32)[None]
            _, extra = vision.preprocess_embed({"type": "image", "data": given.movedim(1, -1)}, self.device)
            size = (extra["grid"][0, 1:] * vision.visual.patch_size).tolist()
            resized.append(interpolate(given, size, mode="bilinear", align_corners=False)[0])
        return side_by_side(resized)

    def _rows(self, shown: list[Tensor], questions: Sequence[Question]) -> Tensor:
        """Mean log-likelihood per answer token ``[B, Q]`` of questions about the same pictures."""
        return torch.stack([self._scores(pictures, questions) for pictures in zip(*shown)])

    def _scores(self, pictures: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        """Mean log-likelihood per answer token ``[Q]`` about one set of pictures, each ``[3, H, W]``."""
        first: dict[str, Tensor] = {}  # what may follow a question, by the question's text
        scores = []
        for question in questions:
            answer = self._answer(question.answer)
            text = question.text.strip()
            if len(answer) > 1 or text not in first:
                logp = self._answer_logp(pictures, text, answer)
                first[text] = logp[:1]
            else:
                logp = first[text]
            scores.append(logp[range(len(answer)), answer].mean())
        return torch.stack(scores)

    def _answer_logp(self, pictures: Sequence[Tensor], text: str, answer: list[int]) -> Tensor:
        """Log-probabilities ``[n, V]`` at the n positions that predict the answer's tokens."""
        encoder, model = self._encoder, self._encoder.transformer
        (prompt,) = self._tokens(pictures, text).values()
        fed = [token[0] for token in prompt[0]] + answer[:-1]
        with AddOutOfPlace():
            embeds, _, _, info = encoder.process_tokens([fed], self.device)
            positions, where, deepstack = model.build_image_inputs(embeds, info)
            hidden = model.model.forward(
                None, embeds=embeds, position_ids=positions, visual_pos_masks=where, deepstack_embeds=deepstack
            )[0]
        ends = range(hidden.shape[1] - len(answer) + 1, hidden.shape[1] + 1)
        return torch.cat([model.logits(hidden[:, :end])[:, -1] for end in ends]).float().log_softmax(-1)

    def _tokens(self, pictures: Sequence[Tensor], text: str) -> dict:
        return self.clip.tokenize(text.strip(), images=[picture.movedim(0, -1)[None] for picture in pictures])

    def _answer(self, answer: str) -> list[int]:
        tokenizer = getattr(self.clip.tokenizer, self.clip.tokenizer.clip).tokenizer
        return tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
