"""Loading models through ComfyUI's memory manager in a state that autograd accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn


class TransformersHolder(nn.Module):
    """Around a transformers model, which forbids ModelPatcher to set ``.device`` on it."""

    def __init__(self, vlm: nn.Module):
        super().__init__()
        self.vlm = vlm


class ManagedJudge:
    """A judge whose weights ComfyUI loads, evicts and reloads like those of any model.

    Args:
        judge: a ``vlm.judge.Judge`` with its weights on the CPU, or a ``vlm.native.NativeJudge``.
        patcher: what ComfyUI already manages the judge's weights with; made here when None.
    """

    def __init__(self, judge, patcher: ModelPatcher | None = None):
        self.judge = judge
        self.patcher = patcher or self._new_patcher(judge)

    @staticmethod
    def _new_patcher(judge) -> ModelPatcher:
        return ModelPatcher(TransformersHolder(judge.model), mm.get_torch_device(), mm.text_encoder_offload_device())

    def load(self) -> None:
        """Bring the judge to the compute device."""
        load_whole([self.patcher])


@contextmanager
def gradients():
    """Autograd inside a ComfyUI node, which runs in inference mode.

    ``in_training`` makes newer ComfyUI choose differentiable rotary embeddings and norms; older ones ignore it.
    """
    before = getattr(mm, "in_training", False)
    mm.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        mm.in_training = before


def static_clone(patcher: ModelPatcher) -> ModelPatcher:
    """A clone whose weights stay where they are while it runs, which newer ComfyUIs do not promise of every model.

    Raises:
        ValueError: the model's loader cannot make one.
    """
    if "disable_dynamic" not in inspect.signature(patcher.clone).parameters:
        return patcher.clone()
    if patcher.is_dynamic() and patcher.cached_patcher_init is None:
        raise ValueError(
            f"The loader of {type(patcher.model).__name__} cannot give its weights a fixed place, which training "
            "needs. Load it with Load Diffusion Model or Load Checkpoint, Load CLIP or Load VAE (no TAESD), or start "
            "ComfyUI with --disable-dynamic-vram."
        )
    return patcher.clone(disable_dynamic=True)


def load_whole(patchers: list[ModelPatcher], memory_required: int = 0) -> None:
    """Load all models together, whole, so that none evicts another.

    Args:
        patchers: the models that are needed at the same time.
        memory_required: bytes to keep free for activations.
    Raises:
        RuntimeError: a model does not fit whole on the device.
    """
    with torch.inference_mode():  # moving an inference tensor outside inference mode corrupts it
        mm.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
    for patcher in patchers:
        if getattr(patcher.model, "model_lowvram", False):
            raise RuntimeError(
                f"{type(patcher.model).__name__} ({patcher.model_size() / 1e9:.1f} GB) does not fit on "
                f"{patcher.load_device} beside the other models. Use a smaller or quantised model or judge, "
                "or start ComfyUI without --lowvram / --novram."
            )


@contextmanager
def loaded_for_training(patchers: list[ModelPatcher], memory_required: int = 0):
    """As ``load_whole``, the models frozen and free of inference tensors for as long as the context lasts."""
    load_whole(patchers, memory_required)
    try:
        for patcher in patchers:
            make_trainable_through(patcher.model)
        yield
    finally:
        for patcher in patchers:
            make_movable(patcher.model)


def make_trainable_through(root: nn.Module) -> None:
    """Freeze every parameter and replace inference tensors, which cannot be saved for backward, by normal copies."""
    _replace_parameters(root, _refused_by_autograd, _copy)
    for module in root.modules():
        _copy_tensors(module._buffers)
        _copy_tensors(vars(module))
    if hasattr(root, "latent_format"):
        _copy_tensors(vars(root.latent_format))
    root.requires_grad_(False)


def make_movable(root: nn.Module) -> None:
    """Make quantised weights inference tensors again: torch detaches no normal ones of that class in inference mode,
    which ComfyUI does as it moves them."""
    with torch.inference_mode():
        _replace_parameters(root, lambda p: isinstance(p, QuantizedTensor) and not p.is_inference(), Tensor.clone)


def _replace_parameters(root: nn.Module, wanted: Callable[[Tensor], bool], copy: Callable[[Tensor], Tensor]) -> None:
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and wanted(parameter):
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(copy(parameter), requires_grad=False)
                module._parameters[name] = copies[id(parameter)]


def _copy_tensors(values: dict) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and _refused_by_autograd(value):
            values[name] = _copy(value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(tensor.device, copy=True)  # tensors of GGUF files answer clone() with themselves


def _refused_by_autograd(tensor: Tensor) -> bool:
    if tensor.is_inference():
        return True
    try:
        tensor._version
    except RuntimeError:  # an inference tensor that was moved outside inference mode
        return True
    return False
