"""LoRAs that run beside layers of 8 bits, as they were trained, instead of being added to the weights.

To patch such a weight ComfyUI rounds the sum to 8 bits again, which changes pictures as much as a small LoRA does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .lora_fit import is_plain

KEY = "dual_process_beside"
Patches = dict[str | tuple, object]


def split(patches: Patches, model: BaseModel) -> tuple[Patches, Patches]:
    """Those of ComfyUI's patches that can run beside a layer of 8 bits, and the others."""
    beside = {key: patch for key, patch in patches.items() if _is_coarse(key, model) and is_plain(patch)}
    return beside, {key: patch for key, patch in patches.items() if key not in beside}


def add_beside(patcher: ModelPatcher, patches: Patches, strength: float) -> None:
    """Let them run beside the layers whenever the MODEL does, and none of its clones without them."""
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Beside(patches, strength))


@contextmanager
def held_beside(patcher: ModelPatcher) -> Iterator[None]:
    """For as long as the context lasts, run what was added to a MODEL also outside its calls, in which backward
    recomputes its blocks."""
    added = patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    with ExitStack() as stack:
        for beside in added:
            stack.callback(patcher.add_wrapper_with_key, WrappersMP.APPLY_MODEL, KEY, beside)
            stack.enter_context(beside.on(patcher.model))
        yield


class Beside:
    """A wrapper of ``apply_model``: ``y = W x + strength (alpha / rank) B A x`` in the dtype of ``x``, frozen.

    Copies of A and B in that dtype stay on the device until the wrapper is let go, with the MODEL that has it.
    """

    def __init__(self, patches: Patches, strength: float):
        self.updates = {}
        for key, patch in patches.items():
            up, down, alpha = patch.weights[:3]
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            self.updates[key.removesuffix(".weight")] = Update(down.flatten(1), up.flatten(1) * scale)

    def __call__(self, executor, *args, **kwargs):
        with self.on(executor.class_obj), _uncompiled():
            return executor(*args, **kwargs)

    @contextmanager
    def on(self, model: BaseModel) -> Iterator[None]:
        """Let every layer add its update, for as long as the context lasts."""
        with ExitStack() as stack:
            for path, update in self.updates.items():
                stack.callback(model.get_submodule(path).register_forward_hook(update).remove)
            yield


class Update:
    """A forward hook that adds ``up down x``."""

    def __init__(self, down: Tensor, up: Tensor):
        self.matrices = down, up

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = given[0]
        with torch.inference_mode(False):  # also for passes with gradients
            self.matrices = down, up = [
                matrix.detach().to(x.device, x.dtype, copy=matrix.is_inference()) for matrix in self.matrices
            ]
        return y + F.linear(F.linear(x, down), up).to(y.dtype)


def _uncompiled():
    """torch.compile's code, where there is any, knows of no hooks: it would draw without the LoRA."""
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return stance("force_eager") if stance else nullcontext()


def _is_coarse(key: str | tuple, model: BaseModel) -> bool:
    if not isinstance(key, str):  # a part of a weight
        return False
    weight = comfy.utils.get_attr(model, key)
    return weight.ndim == 2 and (isinstance(weight, QuantizedTensor) or weight.element_size() == 1)
