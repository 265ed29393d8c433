"""Which layers of a model the tensors of a LoRA file are for, in every naming that ComfyUI's own loader understands."""

from __future__ import annotations

import math

import comfy.lora
import comfy.lora_convert
import comfy.utils
from comfy.model_base import BaseModel
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor


def fit(tensors: dict[str, Tensor], model: BaseModel, name: str) -> tuple[dict, list[str]]:
    """ComfyUI's patches (weight's key -> adapter) that ``tensors`` hold for ``model``, and the tensors left over.

    A relative's layers may have the same names and other sizes (SD1.5 and SDXL): those are left over too.

    Args:
        name: what the LoRA is called in messages.
    Raises:
        ValueError: nothing fits.
    """
    tensors = comfy.lora_convert.convert_lora(tensors)
    layers = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(tensors, layers, log_missing=False)
    misfits = {target for target, patch in patches.items() if not _same_size(patch, target, model)}
    unread = {id(tensor) for target in misfits for tensor in patches[target].weights}
    patches = {target: patch for target, patch in patches.items() if target not in misfits}
    if not patches:
        raise ValueError(
            f"None of the {len(tensors)} tensors of {name} fits {type(model).__name__}: it was made for another model "
            "or is not a LoRA. Choose one that was made for this model."
        )
    read = set().union(*(getattr(patch, "loaded_keys", ()) for patch in patches.values()))
    return patches, [key for key, tensor in tensors.items() if key not in read or id(tensor) in unread]


def is_plain(patch) -> bool:
    """Whether it is a LoRA without middle, DoRA or reshaping."""
    return isinstance(patch, LoRAAdapter) and all(part is None for part in patch.weights[3:])


def _same_size(patch, target: str | tuple, model: BaseModel) -> bool:
    """Whether a plain LoRA's update has as many numbers as the weight, or the slice of it, that it is for."""
    if not isinstance(patch, LoRAAdapter):
        return True
    up, down, _alpha, mid, _dora, reshape = patch.weights
    if mid is not None or reshape is not None:
        return True
    key, *part = (target,) if isinstance(target, str) else target
    shape = list(comfy.utils.get_attr(model, key).shape)
    if part:
        dim, _start, length = part[0]
        shape[dim] = length
    return up.shape[0] * down.flatten(1).shape[1] == math.prod(shape)
