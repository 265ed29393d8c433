"""A device with little memory, imitated on the CPU, for what ComfyUI does on a GPU."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn


class SmallDevice:
    """ComfyUI's computing device for as long as ``monkeypatch`` lasts.

    Weights leave it as NaN, also for graphs that hold them, and come back as new tensors, of inference mode as from a
    real move.

    Attributes:
        size: bytes; more weights than that are an OutOfMemoryError.
        here: the models whose weights are there.
        most: bytes of weights that were there at once.
    """

    def __init__(self, monkeypatch, size: float):
        self.size, self.most = size, 0
        self.here: list[nn.Module] = []
        self._away: dict[nn.Module, dict[int, torch.Tensor]] = {}
        load, unpatch = ModelPatcher.load, ModelPatcher.unpatch_model

        def arriving(patcher, *args, **kwargs):
            self._arrive(patcher.model)
            return load(patcher, *args, **kwargs)

        def leaving(patcher, device_to=None, unpatch_weights=True):
            unpatch(patcher, device_to, unpatch_weights)
            if device_to is not None and unpatch_weights and patcher.model in self.here:
                self._leave(patcher.model)

        monkeypatch.setattr(ModelPatcher, "load", arriving)
        monkeypatch.setattr(ModelPatcher, "unpatch_model", leaving)
        monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cpu", 0))  # ComfyUI takes it for no CPU
        monkeypatch.setattr(mm, "get_free_memory", self._free)
        monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(mm, "extra_reserved_memory", lambda: 0)
        mm.unload_all_models()

    def _free(self, device=None, torch_free_too=False):
        free = self.size - sum(map(mm.module_size, self.here))
        return (free, 0) if torch_free_too else free

    def _arrive(self, model: nn.Module) -> None:
        if model in self.here:
            return
        self.here.append(model)
        self.most = max(self.most, sum(map(mm.module_size, self.here)))
        if self._free() < 0:
            raise torch.OutOfMemoryError("weights")
        away, back = self._away.pop(model, {}), {}
        with torch.inference_mode():
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if id(parameter) in away:
                        new = back.setdefault(id(parameter), nn.Parameter(away[id(parameter)], requires_grad=False))
                        module._parameters[name] = new

    def _leave(self, model: nn.Module) -> None:
        self.here.remove(model)
        with torch.inference_mode():
            self._away[model] = {id(p): p.clone() for p in model.parameters()}
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
