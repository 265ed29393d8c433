"""A device that is not the CPU, imitated on it: tensors that say they are elsewhere, and refuse to meet those that are
here as a GPU's do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import comfy.model_management as mm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dual_process.trainers import comfy_memory, control_hints

# a kind of device that torch has no kernels for on this machine, whose backward runs in the thread that asks for it
THERE = torch.device("lazy", 0)
MAY_MEET = ("aten::copy_", "aten::to.other")


class Elsewhere(Tensor):
    """A tensor on ``THERE``; its numbers are in ``here``, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, here: Tensor):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "layout": here.layout}
        return Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=THERE, **layout)

    def __init__(self, here: Tensor):
        self.here = here

    def __repr__(self, **_):
        return f"Elsewhere({self.here})"

    def tolist(self):
        return self.here.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a tensor of another device to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Generator(torch._C.Generator):
    """Draws for one device. Torch hands on what it wraps, not this object."""

    there: ClassVar[set[int]] = set()

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        (self.there.add if torch.device(device).type == THERE.type else self.there.discard)(self._cdata)


class _Everywhere(TorchDispatchMode):
    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device=...) asks this mode for the move, too
        return super().__enter__()

    def __exit__(self, *raised):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _strangers(name: str, tensors: list[Tensor], args: tuple) -> list[Tensor]:
    """The tensors of an operator if they may not meet, as CUDA has it: numbers of the CPU may be factors and the like
    (but not be joined or written to), and indices lie where they want if what is indexed is there."""
    if name.startswith(MAY_MEET):
        return []
    if name.startswith("aten::index.") and isinstance(args[0], Elsewhere):
        return []
    if name.startswith(("aten::index_put", "aten::_index_put_impl_")):
        tensors = [args[0], args[2]]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    joined = name.startswith(("aten::cat", "aten::stack"))
    written = name.split(".")[0].endswith("_") and not isinstance(tensors[0], Elsewhere)
    only_numbers = all(tensor.ndim == 0 for tensor in here)
    return tensors if there and here and (joined or written or not only_numbers) else []


def _run(func, args: tuple, kwargs: dict):
    """``func`` on the CPU, its result on the device that it asked for or that its tensors are on."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if not there and not asked:
        return func(*args, **kwargs)
    name = func.name()
    if name == "aten::_has_compatible_shallow_copy_type":  # modules then take the new tensor in place of the old one
        return len(there) == len(tensors)
    if strangers := _strangers(name, tensors, args):
        shapes = [(tensor.device.type, tuple(tensor.shape)) for tensor in strangers]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given {shapes}")
    goes_there = asked[0].type == THERE.type if asked else bool(there)
    if name == "aten::to.other":
        goes_there = isinstance(tensors[1], Elsewhere)
    drawn_there = {leaf._cdata in _Generator.there for leaf in leaves if isinstance(leaf, torch._C.Generator)}
    if drawn_there and drawn_there != {goes_there}:
        raise RuntimeError(f"Expected a generator of the device of what is drawn ({name})")

    def here(leaf):
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.here if isinstance(leaf, Elsewhere) else leaf

    result = func(*tree_map(here, args), **tree_map(here, kwargs))
    same = {id(tensor.here if isinstance(tensor, Elsewhere) else tensor): tensor for tensor in tensors}

    def back(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        before = same.get(id(leaf))
        if before is not None and isinstance(before, Elsewhere) == goes_there:
            return before
        new = leaf if before is None else leaf.clone()
        if not goes_there:
            return new
        view_of_normal = func.is_view and not tensors[0].is_inference()  # is a normal tensor in inference mode, too
        with torch.inference_mode(torch.is_inference_mode_enabled() and not view_of_normal):
            return Elsewhere(new)

    return tree_map(back, result)


def compute_elsewhere(monkeypatch, size: int = 2**36) -> TorchDispatchMode:
    """Let ComfyUI compute on ``THERE``, which has room for ``size`` bytes of weights, and keep models on the CPU, for
    as long as the mode that is returned is entered and ``monkeypatch`` lasts."""

    def free(dev=None, torch_free_too=False):
        left = size - sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models)
        return (left, left) if torch_free_too else left

    def no(*_, **__):
        return False

    patches = {"get_torch_device": lambda: THERE, "get_free_memory": free, "get_total_memory": lambda *_: size}
    patches |= {"cpu_state": mm.CPUState.GPU, "vram_state": mm.VRAMState.NORMAL_VRAM}
    patches |= {"should_use_bf16": no, "should_use_fp16": no}  # which ask CUDA
    patches |= {"minimum_inference_memory": lambda: 0, "extra_reserved_memory": lambda: 0}
    for name, value in patches.items():
        monkeypatch.setattr(mm, name, value)
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **kwargs: tensor(tree_map(_number, data), **kwargs))
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch, THERE.type, object(), raising=False)  # what checkpointing asks for the state of dropout
    for module in (comfy_memory, control_hints):
        monkeypatch.setattr(module, "_disable_current_modes", nullcontext)  # the mode of this device has to last
    mm.unload_all_models()
    return _Everywhere()


def _number(leaf):
    return leaf.item() if isinstance(leaf, Elsewhere) else leaf
