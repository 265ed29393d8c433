"""Counting the bytes of living tensors, the same on every machine and under every allocator."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
COUNTED = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}  # attention is left out: most of it is fused


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are alive, and the most of them in every phase.

    ``entered`` tells it that another phase begins. ``starts`` are the bytes alive as the first operator of a phase
    begins, when what functions held that have just returned is gone. ``work`` are the floating point operations of all
    matrix products and convolutions so far.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.work = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self._known: dict[int, weakref.ref] = {}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def entered(self, phase: str) -> None:
        self.phase = phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.starts.setdefault(self.phase, self.live)
        for given in tree_leaves((args, kwargs)):
            self._note(given, counts=False)  # what was there before the block; views of it are nothing new
        made = function(*args, **kwargs)
        for result in tree_leaves(made):
            self._note(result, counts=True)
        if (kind := function.overloadpacket) in COUNTED:
            self.work += flop_registry[kind](*args, **kwargs, out_val=made)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        return made

    def _note(self, value, counts: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.live += size

        def freed(_) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
