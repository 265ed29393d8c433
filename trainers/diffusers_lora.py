"""The same LoRA for diffusers, which has other names for a model's layers, and several layers where ComfyUI has one:
query, key and value mostly."""

from __future__ import annotations

import comfy.utils
from comfy.model_base import BaseModel
from torch import Tensor

from .lora_file import TrainedLoRA

# ComfyUI's model class -> its map from diffusers' names to its own. Only models for which the map names every layer.
MAPS = {
    "Flux": "flux_to_diffusers",
    "FluxSchnell": "flux_to_diffusers",
    "Chroma": "flux_to_diffusers",
    "SD3": "mmdit_to_diffusers",
    "PixArtAlpha": "pixart_to_diffusers",
    "PixArtSigma": "pixart_to_diffusers",
    "ZImage": "z_image_to_diffusers",
}


def diffusers_names(model: BaseModel) -> dict[str, tuple[str, slice]]:
    """Layers by the names that diffusers' pipelines read: our path, and the rows of our layer that are theirs.

    Empty for a model whose names in diffusers ComfyUI does not know.
    """
    config = model.model_config.unet_config
    if "num_res_blocks" in config:
        part, key_map = "unet", comfy.utils.unet_to_diffusers(config)
    elif type(model.model_config).__name__ in MAPS:
        part = "transformer"
        key_map = getattr(comfy.utils, MAPS[type(model.model_config).__name__])(config)
    else:
        return {}
    names = {}
    for theirs, ours in key_map.items():
        if not theirs.endswith(".weight"):
            continue
        key, place = (ours, None) if isinstance(ours, str) else ours[:2]
        rows = slice(None) if place is None else slice(place[1], place[1] + place[2])
        path = key.removesuffix(".weight")
        if not any(path == named and _overlap(rows, taken) for named, taken in names.values()):
            names[f"{part}.{theirs.removesuffix('.weight')}"] = path, rows
    return names


def _overlap(a: slice, b: slice) -> bool:
    """Of two whole layers or parts of the same: newer maps end with second names, of other tools and models."""
    return slice(None) in (a, b) or a.start == b.start


def to_diffusers(lora: dict[str, Tensor]) -> TrainedLoRA:
    """``lora`` as ``load_lora_weights`` of a diffusers pipeline reads it.

    A layer that diffusers has in parts keeps its ``A`` in each of them, and gives each its rows of ``B``.

    Raises:
        ValueError: a layer has no name in diffusers.
    """
    tensors, named = {}, set()
    for theirs, (path, rows) in getattr(lora, "diffusers_names", {}).items():
        a, b = (f"diffusion_model.{path}.lora_{side}.weight" for side in "AB")
        if a in lora:
            tensors[f"{theirs}.lora_A.weight"] = lora[a].clone()
            tensors[f"{theirs}.lora_B.weight"] = lora[b][rows].clone()
            named |= {a, b}
    nameless = [key for key in lora if key not in named]
    if nameless:
        raise ValueError(f"ComfyUI knows no diffusers name for '{nameless[0]}'. Save this LoRA in ComfyUI's format.")
    return TrainedLoRA(tensors, {**lora.metadata, "modelspec.implementation": "diffusers"})
