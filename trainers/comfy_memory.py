"""Loading models through ComfyUI's memory manager in a state that autograd accepts."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..vlm.memory import out_of_memory
from .rope import rope_in_torch

EVERYTHING = 1e30  # bytes
Result = TypeVar("Result")


class DoesNotFit(RuntimeError):
    """A model is too large for the device."""


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
        choices: how the judge was loaded, as far as the user chose it, by name; for whoever wants to do it again.
    """

    def __init__(self, judge, patcher: ModelPatcher | None = None, choices: dict[str, str] | None = None):
        self.judge = judge
        self.choices = choices or {}
        self.patcher = patcher or self._new_patcher(judge)

    @staticmethod
    def _new_patcher(judge) -> ModelPatcher:
        device = offload_device = mm.get_torch_device()
        if not getattr(judge.model, "is_loaded_in_8bit", False):  # whose bytes are kept where no move finds them
            offload_device = mm.text_encoder_offload_device()
        return ModelPatcher(TransformersHolder(judge.model), device, offload_device)

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
        with torch.inference_mode(False), torch.enable_grad(), rope_in_torch():
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
    if is_dynamic(patcher) and patcher.cached_patcher_init is None:
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
        RuntimeError: ComfyUI does not put a model whole on the device.
    """
    with torch.inference_mode():  # moving an inference tensor outside inference mode corrupts it
        mm.load_models_gpu(patchers, memory_required=memory_required, force_full_load=True)
    for patcher in patchers:
        if getattr(patcher.model, "model_lowvram", False):
            raise DoesNotFit(
                f"ComfyUI left weights of {type(patcher.model).__name__} in main memory, as --novram has it. Start "
                "ComfyUI without it."
            )


@contextmanager
def loaded_for_training(patchers: list[ModelPatcher], memory_required: int = 0):
    """As ``load_whole``, the models frozen for as long as the context lasts and, but for dynamic ones, free of
    inference tensors."""
    load_whole(patchers, memory_required)
    fixed = [patcher.model for patcher in patchers if not is_dynamic(patcher)]
    try:
        for model in fixed:
            make_trainable_through(model)
        for patcher in patchers:
            patcher.model.requires_grad_(False)
        yield
    finally:
        for model in fixed:
            make_movable(model)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether its weights have no fixed place, as newer ComfyUIs load models on NVIDIA: they lie in memory that is
    taken away as others need it, so nothing may hold on to them. That is no harm where no gradient passes, as in
    ControlNets."""
    return getattr(patcher, "is_dynamic", bool)()


class Turns:
    """Models that compute on one device: all there at once or, where they do not fit, one group after the other.

    Groups change places whole, moved by ComfyUI's memory manager. No graph may outlive its group's turn: what autograd
    keeps of weights would hold their memory.

    Args:
        groups: by what people call them, the models that are needed at the same time; the first one's device counts.
        memory_required: bytes for activations while all are there, for which ComfyUI evicts further models.
        least: bytes for activations without which nothing can be computed.
    Attributes:
        apart: whether the groups take turns.
        seconds: what bringing each group alone took last; a group that never was is not in it.
    Raises:
        RuntimeError: in any method that brings a group, which does not even fit alone.
    """

    def __init__(self, groups: dict[str, list[ModelPatcher]], memory_required: int, least: int):
        self.groups, self.memory_required, self.least = groups, memory_required, least
        self.first = next(iter(groups.values()))[0]
        self.device = self.first.load_device
        self.apart = False
        self.seconds: dict[str, float] = {}
        self._here: list[ModelPatcher] = []
        self._loaded = ExitStack()

    def __enter__(self) -> Turns:
        self.apart = self.can_part and sum(map(self._size, self.groups.values())) + self.least > self.room()
        self.need(self.first)
        return self

    def __exit__(self, *_) -> None:
        self._loaded.close()

    @property
    def can_part(self) -> bool:
        """Whether there is something left to gain from one group's absence while another computes."""
        return not self.apart and sum(self._size(group) > 0 for group in self.groups.values()) > 1

    def part(self) -> None:
        """From now on every group has the device to itself."""
        self.apart, self._here = True, []

    def taken_if_needed(self, work: Callable[[], Result]) -> Result:
        """What ``work`` makes; where memory runs out with all models there, it is done again in turns."""
        try:
            return work()
        except RuntimeError as error:
            if not (out_of_memory(error) and self.can_part):
                raise
        self.part()
        return work()

    def room(self) -> float:
        """Bytes that the device has for weights and activations when all else is evicted."""
        if self.device == torch.device("cpu"):
            return math.inf  # where weights are whether or not they are in use
        there = [one for one in mm.current_loaded_models if one.device == self.device and one.model is not None]
        leaving = [one for one in there if one.model.offload_device != self.device]  # all, but for --highvram
        return _spare_memory(self.device) + sum(one.model_loaded_memory() for one in leaving)

    def free(self) -> int:
        """Bytes for activations: what is free now or, in turns, in the one that has least."""
        if self.apart:
            return int(self.room() - max(map(self._size, self.groups.values())))
        return int(_spare_memory(self.device))

    def make_room(self, wanted: float) -> None:
        """Have ComfyUI evict models that take no part, until ``wanted`` bytes are free or none is left."""
        self._evict_others(self._here, wanted)

    def need(self, patcher: ModelPatcher) -> None:
        """Have a model on the device, together with its group."""
        if patcher in self._here:
            return
        start = time.perf_counter()
        name, group = next((name, group) for name, group in self.groups.items() if patcher in group)
        if self.apart and self._size(group) > self.room():
            raise DoesNotFit(
                f"The {name} ({self._size(group) / 1e9:.1f} GB) does not fit on {self.device}, which has "
                f"{self.room() / 1e9:.1f} GB, even alone. Use a smaller or quantised one."
            )
        here = group if self.apart else sum(self.groups.values(), [])
        with _disable_current_modes():  # weights are no activations, which LiveMemory counts
            self._here = []
            self._loaded.close()
            if self.apart:
                self._evict_others(group, EVERYTHING)
            self._loaded.enter_context(loaded_for_training(here, 0 if self.apart else self.memory_required))
            self._here = here
        if self.apart:
            self.seconds[name] = time.perf_counter() - start

    def bring_back(self) -> None:
        """Have those on the device that are needed now, after ComfyUI may have moved some of them."""
        here, self._here = self._here, []
        self.need(here[0])

    def sentence(self) -> str:
        """That turns are taken and what it costs, for people."""
        moved = [f"{name} {self.seconds[name]:.1f} s" for name in self.groups if name in self.seconds]
        return (
            f"Taking turns: together they do not fit into {self.room() / 1e9:.2f} GB ({self._sizes()}). Every pass "
            f"moves them in and out, which took {', '.join(moved)} just now, and computes its picture twice."
        )

    def shortage(self) -> str:
        """That memory does not suffice, for people."""
        turns = ", in turns" if self.apart else ""
        return (
            f"{self.device} has {self.room() / 1e9:.2f} GB: too little for a training step beside the weights"
            f"{turns} ({self._sizes()})."
        )

    def _sizes(self) -> str:
        return ", ".join(f"{name} {self._size(group) / 1e9:.2f} GB" for name, group in self.groups.items())

    def _size(self, group: list[ModelPatcher]) -> int:
        """Bytes that a group takes on the device and gives back as it leaves."""
        leaving = [one for one in group if one.load_device == self.device != one.offload_device]
        return sum(patcher.model_size() for patcher in leaving)

    def _evict_others(self, kept: list[ModelPatcher], wanted: float) -> None:
        if self.device != torch.device("cpu"):
            with torch.inference_mode():
                stay = [one for one in mm.current_loaded_models if one.model in kept]
                mm.free_memory(wanted, self.device, keep_loaded=stay)


def _spare_memory(device: torch.device) -> float:
    """Free bytes, without those that ComfyUI leaves to the rest of the machine (``--reserve-vram``)."""
    return mm.get_free_memory(device) - mm.extra_reserved_memory()


class InTurn:
    """A judge that comes to the device before it looks, and otherwise is the judge."""

    def __init__(self, managed: ManagedJudge, turns: Turns):
        self._managed, self._turns = managed, turns
        self.gradient_scale = managed.judge.gradient_scale  # the run's own, which may fall

    def __getattr__(self, name: str):
        return getattr(self._managed.judge, name)

    def log_likelihood(self, *args) -> Tensor:
        self._turns.need(self._managed.patcher)
        return self._managed.judge.log_likelihood(*args)


def make_trainable_through(root: nn.Module) -> None:
    """Replace inference tensors, which cannot be saved for backward, by normal copies."""
    _replace_parameters(root, _refused_by_autograd, _copy)
    for module in root.modules():
        _copy_tensors(module._buffers)
        _copy_tensors(vars(module))
    if hasattr(root, "latent_format"):
        _copy_tensors(vars(root.latent_format))


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
                    copies[id(parameter)] = _frozen(copy(parameter), parameter)
                module._parameters[name] = copies[id(parameter)]


def _frozen(tensor: Tensor, before: nn.Parameter) -> nn.Parameter:
    """A frozen parameter of ``before``'s class with its attributes, where bitsandbytes keeps scales."""
    if nn.Parameter not in type(before).__mro__:  # a tensor of a class of its own, which stays that
        return nn.Parameter(tensor, requires_grad=False)
    frozen = Tensor._make_subclass(type(before), tensor, False)
    vars(frozen).update(vars(before))
    return frozen


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
