"""One look at the pictures for all questions: the image prefix is computed once and its key/value cache shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from .plain import extended, mean_token, repeated
from .prompts import Prompt, common_length


def shared_look(model, pixels: dict[str, Tensor], prompts: Sequence[Prompt], rows: int) -> Tensor:
    """Mean log-likelihood per answer token of all prompts over one cached prefix.

    The prefix is what all prompts begin with, the pictures included; it passes the model once per picture. One batch
    of ``rows`` x (distinct endings) short sequences continues from it. Only the positions that predict answer tokens
    go through the language-model head.

    Args and returns as ``plain_look``.

    Raises:
        Exception: whatever the family raises when its pictures are not in the prefix or its cache cannot be continued.
    """
    ids = [prompt.ids for prompt in prompts]
    shared = min(common_length(ids[0], other) for other in ids)
    shared = min(shared, *(len(one) - 1 for one in ids))  # the last token of a prompt predicts the answer
    prefix = repeated({key: value[:, :shared] for key, value in prompts[0].inputs.items()}, rows, model.device)
    with _text_positions(model) as seen:
        cache = model(**prefix, **pixels, use_cache=True, logits_to_keep=1).past_key_values

    endings: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        endings.setdefault(prompt.ids[shared:] + prompt.answer[:-1], []).append(i)
    cache.batch_repeat_interleave(len(endings))
    inputs = _stacked([prompts[members[0]] for members in endings.values()], shared, rows)
    if seen:
        inputs["position_ids"] = _continued(seen[0], len(endings), inputs["input_ids"].shape[1])
    places = [range(len(p.ids) - 1 - shared, len(p.ids) - 1 - shared + len(p.answer)) for p in prompts]
    kept = sorted(set().union(*places))
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    keep = torch.tensor(kept, device=model.device)
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    if logits.shape[1] != len(kept):  # Qwen2-VL of transformers 4.57 ignores logits_to_keep
        logits = logits[:, keep]
    logp = logits.float().log_softmax(-1).unflatten(0, (rows, len(endings)))

    columns: list[Tensor] = [None] * len(prompts)
    for row, members in enumerate(endings.values()):
        for i in members:
            columns[i] = mean_token(logp[:, row, [kept.index(place) for place in places[i]]], prompts[i].answer)
    return torch.stack(columns, dim=1)


def _stacked(prompts: Sequence[Prompt], shared: int, rows: int) -> dict[str, Tensor]:
    """The endings right-padded to one length and repeated for every picture; the mask covers the prefix too."""
    longer = [extended(prompt.inputs, prompt.answer[:-1]) for prompt in prompts]
    longest = max(inputs["input_ids"].shape[1] for inputs in longer)
    stacked = {}
    for key in longer[0]:
        start = 0 if key == "attention_mask" else shared
        padded = [
            pad(inputs[key], [0, 0] * (inputs[key].ndim - 2) + [0, longest - inputs[key].shape[1]]) for inputs in longer
        ]
        whole = torch.cat(padded)[:, start:]
        stacked[key] = whole.repeat(rows, *[1] * (whole.ndim - 1))
    return stacked


@contextmanager
def _text_positions(model) -> Iterator[list[Tensor]]:
    """Note the position ids that reach the language model; families with several position axes make their own."""
    seen: list[Tensor] = []

    def note(_, __, kwargs):
        if isinstance(kwargs.get("position_ids"), Tensor):
            seen.append(kwargs["position_ids"])

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _continued(positions: Tensor, endings: int, length: int) -> Tensor:
    """Position ids for ``length`` text tokens after ``positions`` (``[rows, L]`` or ``[axes, rows, L]``)."""
    axes = positions if positions.ndim == 3 else positions[None]
    start = axes.amax(dim=(0, 2)).repeat_interleave(endings) + 1
    following = start[:, None] + torch.arange(length, device=start.device)
    return following if positions.ndim == 2 else following.expand(positions.shape[0], -1, -1)
