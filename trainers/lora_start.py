"""Training that goes on from a LoRA file."""

from __future__ import annotations

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from .lora import LoRA
from .lora_fit import fit, is_plain

INSTEAD = "or put the file on the model with a LoRA loader: the trainer then learns a second LoRA on top of it."


@torch.no_grad()
def start_from(lora: LoRA, tensors: dict[str, Tensor], model: BaseModel) -> None:
    """Give ``lora`` the values of a LoRA file: training starts with what the file does at strength 1.

    Every naming is understood that ComfyUI's own loader understands for ``model``. Layers of ``lora`` that the file
    lacks start without an update.

    Args:
        tensors: what the file holds: ``A`` [rank, in], ``B`` [out, rank], and perhaps an alpha, of each layer.
    Raises:
        ValueError: the file is for another model, has layers that ``lora`` has not or not in that size, another rank,
            or is no plain LoRA.
    """
    patches, left_over = fit(tensors, model, "the LoRA to continue")
    adapters = {f"diffusion_model.{path}.weight": adapter for path, adapter in zip(lora.paths, lora.adapters)}
    strange = [key for key, patch in patches.items() if key not in adapters or not is_plain(patch)]
    _refuse_strange(strange or left_over)
    for key, patch in patches.items():
        up, down, alpha, *_ = patch.weights
        adapter, rank = adapters[key], down.shape[0]
        if rank != adapter.A.shape[0]:
            raise ValueError(f"The LoRA to continue has rank {rank} in '{key}': set rank to {rank}, {INSTEAD}")
        scale = 1.0 if alpha is None else alpha / rank
        adapter.A.copy_(down)
        adapter.B.copy_(up.float() * (scale / adapter.scale))


def _refuse_strange(names: list) -> None:
    if names:
        raise ValueError(
            f"The LoRA to continue holds {len(names)} things that this training does not adapt, or not in that "
            f"size, first '{names[0]}'. Widen the targets, {INSTEAD}"
        )
