"""Reading answer log-likelihoods from a model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .prompts import Prompt


def plain_look(model, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> Tensor:
    """Mean log-likelihood per answer token, every distinct prompt passed through the whole model.

    Prompts that differ only in their answer share a pass; an answer of several tokens costs one of its own.

    Args:
        model: image-text-to-text model.
        pixels: the processor's picture tensors for ``rows`` rows.
        prompts: what to score.
        rows: batch size B.

    Returns:
        ``[B, len(prompts)]`` float32.
    """
    columns: list[Tensor] = [None] * len(prompts)
    for members in _by_prompt(prompts):
        first = None
        for i in sorted(members, key=lambda i: -len(prompts[i].answer)):
            answer = prompts[i].answer
            if first is not None and len(answer) == 1:
                columns[i] = first[:, answer[0]]
                continue
            logp = answer_logp(model, pixels, prompts[i], rows)
            first = logp[:, 0]
            columns[i] = mean_token(logp, answer)
    return torch.stack(columns, dim=1)


def answer_logp(model, pixels: dict[str, Tensor], prompt: Prompt, rows: int) -> Tensor:
    """Log-probabilities ``[B, n, V]`` at the n positions that predict the answer's tokens."""
    inputs = repeated(extended(prompt.inputs, prompt.answer[:-1]), rows, model.device)
    n = len(prompt.answer)
    logits = model(**inputs, **pixels, logits_to_keep=n, use_cache=False).logits
    return logits[:, -n:].float().log_softmax(-1)


def repeated(inputs: dict[str, Tensor], rows: int, device: torch.device) -> dict[str, Tensor]:
    """A text side of one row, once per picture."""
    return {key: value.to(device).expand(rows, *value.shape[1:]) for key, value in inputs.items()}


def extended(inputs: dict[str, Tensor], tokens: Sequence[int]) -> dict[str, Tensor]:
    """The text side with ``tokens`` appended; every other tensor repeats its last column, as ``generate`` does."""
    if not tokens:
        return inputs
    longer = {}
    for key, value in inputs.items():
        if key == "input_ids":
            added = torch.tensor([list(tokens)])
        else:
            added = value[:, -1:].repeat_interleave(len(tokens), dim=1)
        longer[key] = torch.cat([value, added], dim=1)
    return longer


def mean_token(logp: Tensor, answer: tuple[int, ...]) -> Tensor:
    wanted = torch.tensor(answer, device=logp.device).view(1, -1, 1).expand(logp.shape[0], -1, 1)
    return logp.gather(-1, wanted)[..., 0].mean(dim=1)


def _by_prompt(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of prompts with the same tokens, together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.ids, []).append(i)
    return list(groups.values())
