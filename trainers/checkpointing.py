"""Activation checkpointing that is right for ComfyUI's blocks, and for a judge's.

Habits of those blocks and their callers make plain ``torch.utils.checkpoint`` return wrong gradients, mostly without an
error:

* blocks write into their inputs (``img += ...``), so recomputation would start from overwritten tensors;
* callers write into what they gave a block (a UNet adds a ControlNet to its skip connections in place);
* blocks share one ``transformer_options`` dict that changes while they are walked (block index), so recomputation
  would run with the values of the last block;
* blocks write what later calls read into lists (a video VAE's earlier frames) and caches (a judge's keys and values),
  so recomputation would write a second time.

So a block is given clones of the activations and copies of the dicts, again for every run of a checkpointed block, a
recomputed one copies of the lists and caches as they were before, and norm layers, whose input is what gets overwritten
after being saved for backward, run on a clone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .forward_override import override_forward
from .lora import CONTAINERS, repeated_blocks


class Event(Enum):
    """What happens to one call of a recomputed block."""

    DONE = "its forward is done, and only its inputs are kept"
    AGAIN = "its recomputation begins"
    BACK = "all that its backward needs is back"


@dataclass
class Recompute:
    """What all recomputable blocks of a run look at.

    Attributes:
        on: recompute in backward instead of keeping activations; may be changed between two passes.
        tell: called with an event and an object that stands for the block's call.
    """

    on: bool
    tell: Callable[[Event, object], None] = lambda event, call: None


def prepare_for_backward(
    diffusion_model: nn.Module, recompute: Recompute, patches: Iterable[nn.Module] = ()
) -> ExitStack:
    """Make backward through ``diffusion_model`` right, and its repeated blocks recomputable; closing the returned stack
    puts everything back.

    Args:
        patches: networks of model patches, which run between the blocks and write into what these return.
    """
    stack = ExitStack()
    for module in (module for network in (diffusion_model, *patches) for module in network.modules()):
        if "norm" in type(module).__name__.lower() and not any(True for _ in module.children()):
            stack.callback(override_forward(module, _on_a_clone))
    for _, block in repeated_blocks(diffusion_model):
        stack.callback(override_forward(block, _recomputable(recompute, _on_clones)))
    return stack


def make_recomputable(model: nn.Module, recompute: Recompute) -> ExitStack:
    """Make the blocks that a VAE or a judge stacks recomputable; closing the returned stack puts everything back."""
    stack = ExitStack()
    for block in stacked_blocks(model):
        stack.callback(override_forward(block, _recomputable(recompute, lambda forward: forward)))
    return stack


def one_by_one(function: Callable[[Tensor], Tensor], rows: Tensor, recompute: Recompute) -> Tensor:
    """``function`` of a batch whose rows do not know of each other.

    While ``recompute`` is on, nothing of it is kept for backward, which runs it again row by row: a VAE then holds
    nothing while the judge looks, and later one picture at a time.
    """
    if recompute.on and torch.is_grad_enabled() and rows.requires_grad:
        return _OneByOne.apply(rows, function, recompute)
    return function(rows)


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, function, recompute):
        ctx.save_for_backward(rows)
        ctx.function, ctx.recompute, ctx.calls = function, recompute, [object() for _ in rows]
        made = function(rows)
        for call in ctx.calls:
            recompute.tell(Event.DONE, call)
        return made

    @staticmethod
    def backward(ctx, pushes):
        gradients = []
        for row, push, call in zip(ctx.saved_tensors[0].split(1), pushes.split(1), ctx.calls):
            with torch.enable_grad():
                row = row.detach().requires_grad_()
                ctx.recompute.tell(Event.AGAIN, call)
                made = ctx.function(row)
                ctx.recompute.tell(Event.BACK, call)
            cut = not made.requires_grad  # a VAE that decodes in tiles; the self-check says so
            gradients += [torch.zeros_like(row)] if cut else torch.autograd.grad(made, row, push)
        return torch.cat(gradients), None, None


def stacked_blocks(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost modules in lists, anywhere under ``module``, that have children and are called themselves.

    Levels of SD's VAE, for example, only hold blocks: they have no ``forward``.
    """
    for child in module.children():
        called = type(child).forward is not nn.Module.forward and not isinstance(child, CONTAINERS)
        if listed and called:
            if any(True for _ in child.children()):
                yield child
        else:
            yield from stacked_blocks(child, listed or isinstance(child, CONTAINERS))


def _on_a_clone(forward):
    def norm(x: Tensor, *args, **kwargs) -> Tensor:
        return forward(x.clone() if torch.is_grad_enabled() and x.requires_grad else x, *args, **kwargs)

    return norm


def _recomputable(recompute: Recompute, kept):
    """``kept`` makes of a block's forward what runs while nothing is recomputed."""

    def wrap(forward):
        keeping, recomputing = kept(forward), _checkpointed(forward, recompute)

        def block(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return (recomputing if recompute.on else keeping)(*args, **kwargs)

        return block

    return wrap


def _checkpointed(forward, recompute: Recompute):
    def block(*args, **kwargs):
        call = object()
        written = {}  # lists and caches that this call writes to, by the copies that recomputation starts from

        def kept(value):
            before = _state(_kept(value))
            if isinstance(value, list) or _is_cache(value):
                written[id(before)] = value
            return before

        def run(*args, **kwargs):
            if done:
                return again(*args, **kwargs)
            args = [_own(written.get(id(a), a)) for a in args]
            return forward(*args, **{name: _own(written.get(id(a), a)) for name, a in kwargs.items()})

        def again(*args, **kwargs):
            args = [_own(_state(a)) for a in args]
            kwargs = {name: _own(_state(a)) for name, a in kwargs.items()}
            recompute.tell(Event.AGAIN, call)
            try:
                return forward(*args, **kwargs)
            finally:  # checkpoint leaves by an exception as soon as it has what it needs
                recompute.tell(Event.BACK, call)

        done = False
        made = checkpoint(run, *map(kept, args), use_reentrant=False, **{n: kept(a) for n, a in kwargs.items()})
        done = True
        written.clear()
        recompute.tell(Event.DONE, call)
        return made

    return block


def _on_clones(forward):
    def block(*args, **kwargs):
        return forward(*[_kept(a) for a in args], **{name: _kept(a) for name, a in kwargs.items()})

    return block


def _kept(value):
    """What the caller may change later, copied: activations (not masks and the like, which nobody changes), dicts."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.clone()
    return dict(value) if isinstance(value, dict) else value


def _own(value):
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.clone()
    return dict(value) if isinstance(value, dict) else value


def _state(value):
    """A list or cache as it is now; what it holds is replaced by those who write to it, not overwritten."""
    if isinstance(value, list):
        return list(value)
    if _is_cache(value):
        now = copy.copy(value)
        now.layers = [copy.copy(layer) for layer in value.layers]
        return now
    return value


def _is_cache(value) -> bool:
    """Whether it is transformers' cache of keys and values."""
    return isinstance(getattr(value, "layers", None), list)
