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

Which blocks are recomputed is up to ``Recompute``, block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..vlm.native import AddOutOfPlace
from .forward_override import override_forward
from .lora import CONTAINERS, repeated_blocks

GENERATOR, DECODER, JUDGE = "model", "VAE", "judge"
GROUPS = 4  # in which a batch is decoded where not everything is kept


class Block(NamedTuple):
    """What is recomputed or kept as one: a block by its part of a step and its number there, or a whole part."""

    part: str
    number: int | None = None


WHOLE_VAE = Block(DECODER)


@dataclass(eq=False)
class Call:
    """One call of a block.

    Attributes:
        passed_on: bytes of its output that its own backward needs, as a ReLU's does. Where both are kept, they are the
            next block's input too.
    """

    block: Block
    passed_on: int = 0


class Event(Enum):
    """What happens to one call of a recomputed block."""

    DONE = "its forward is done, and only its inputs are kept"
    AGAIN = "its recomputation begins"
    BACK = "all that its backward needs is back"


@dataclass
class Recompute:
    """What all recomputable blocks of a run look at.

    Attributes:
        on: recompute blocks in backward instead of keeping activations; may be changed between two passes.
        kept: those that keep their activations all the same.
        tell: called with an event and the call it happens to.
        foreseen: whether this is the choice of ``memory_plan``, which may have foreseen too little.
    """

    on: bool
    kept: frozenset[Block] = frozenset()
    tell: Callable[[Event, Call], None] = lambda event, call: None
    foreseen: bool = False

    def give_way(self) -> bool:
        """Recompute everything from now on, where what is kept was foreseen; returns whether that changes anything."""
        if not self.foreseen or (self.on and not self.kept):
            return False
        self.on, self.kept = True, frozenset()
        return True

    def __contains__(self, block: Block) -> bool:
        """Whether a block is recomputed."""
        return self.on and block not in self.kept


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
    for number, (_, block) in enumerate(repeated_blocks(diffusion_model)):
        stack.callback(override_forward(block, _recomputable(Block(GENERATOR, number), recompute, _on_clones)))
    return stack


def make_recomputable(model: nn.Module, part: str, recompute: Recompute) -> ExitStack:
    """Make the blocks that a VAE or a judge stacks recomputable; closing the returned stack puts everything back."""
    stack = ExitStack()
    for number, block in enumerate(stacked_blocks(model)):
        stack.callback(override_forward(block, _recomputable(Block(part, number), recompute, lambda forward: forward)))
    return stack


def decoded(decode: Callable[[Tensor], Tensor], rows: Tensor, recompute: Recompute) -> Tensor:
    """``decode`` of a batch whose rows do not know of each other.

    While ``recompute`` is on, it is done in ``GROUPS``. Where the whole VAE is recomputed, nothing is held while the
    judge looks, and later no more than one group; blocks that are recomputed too run twice more then.
    """
    if not recompute.on:
        return decode(rows)
    groups = rows.split(-(-len(rows) // GROUPS))
    if WHOLE_VAE in recompute and torch.is_grad_enabled() and rows.requires_grad:
        return torch.cat([_Again.apply(group, decode, recompute) for group in groups])
    return torch.cat([decode(group) for group in groups])


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, decode, recompute):
        ctx.save_for_backward(rows)
        ctx.decode, ctx.recompute, ctx.call = decode, recompute, Call(WHOLE_VAE)
        made = decode(rows)
        recompute.tell(Event.DONE, ctx.call)
        return made

    @staticmethod
    def backward(ctx, push):
        with torch.enable_grad():
            rows = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.recompute.tell(Event.AGAIN, ctx.call)
            made = ctx.decode(rows)
            ctx.recompute.tell(Event.BACK, ctx.call)
        cut = not made.requires_grad  # a VAE that decodes in tiles; the self-check says so
        return (torch.zeros_like(rows) if cut else torch.autograd.grad(made, rows, push)[0]), None, None


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


def added_out_of_place(model: nn.Module) -> ExitStack:
    """Let the blocks of a judge that is ComfyUI's own add as ``AddOutOfPlace`` says, when they are recomputed too;
    closing the returned stack puts everything back."""
    stack = ExitStack()
    for block in stacked_blocks(model):
        stack.callback(override_forward(block, _added_out_of_place))
    return stack


def _added_out_of_place(forward):
    def block(*args, **kwargs):
        with AddOutOfPlace():
            return forward(*args, **kwargs)

    return block


def _on_a_clone(forward):
    def norm(x: Tensor, *args, **kwargs) -> Tensor:
        return forward(x.clone() if torch.is_grad_enabled() and x.requires_grad else x, *args, **kwargs)

    return norm


def _recomputable(block: Block, recompute: Recompute, kept):
    """``kept`` makes of a block's forward what runs while it is not recomputed."""

    def wrap(forward):
        keeping, recomputing = kept(forward), _checkpointed(forward, block, recompute)

        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return (recomputing if block in recompute else keeping)(*args, **kwargs)

        return run

    return wrap


def _checkpointed(forward, block: Block, recompute: Recompute):
    def run_block(*args, **kwargs):
        call = Call(block)
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
            recompute.tell(Event.AGAIN, call)  # after the copies, which stand for what is kept of the inputs anyway
            try:
                return forward(*args, **kwargs)
            finally:  # checkpoint leaves by an exception as soon as it has what it needs
                recompute.tell(Event.BACK, call)

        done = False
        made = checkpoint(run, *map(kept, args), use_reentrant=False, **{n: kept(a) for n, a in kwargs.items()})
        done = True
        written.clear()
        if isinstance(made, Tensor) and "_saved_result" in dir(made.grad_fn):
            call.passed_on = made.untyped_storage().nbytes()
        recompute.tell(Event.DONE, call)
        return made

    return run_block


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
