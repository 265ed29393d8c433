"""Which layers of a model the tensors of a LoRA file are for, in every naming that ComfyUI's own loader understands."""

from __future__ import annotations

import comfy.lora
import comfy.lora_convert
from comfy.model_base import BaseModel
from torch import Tensor


def fit(tensors: dict[str, Tensor], model: BaseModel, name: str) -> tuple[dict, list[str]]:
    """ComfyUI's patches (weight's key -> adapter) that ``tensors`` hold for ``model``, and the tensors left over.

    Args:
        name: how the LoRA is called in messages.
    Raises:
        ValueError: nothing fits.
    """
    tensors = comfy.lora_convert.convert_lora(tensors)
    layers = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(tensors, layers, log_missing=False)
    if not patches:
        raise ValueError(
            f"None of the {len(tensors)} tensors of {name} fits {type(model).__name__}: it was made for another model "
            "or is no LoRA. Choose one that was made for this model."
        )
    read = set().union(*(getattr(patch, "loaded_keys", ()) for patch in patches.values()))
    return patches, [key for key in tensors if key not in read]
