"""Activation checkpointing that is right for ComfyUI's blocks.

Three habits of those blocks and their callers make plain ``torch.utils.checkpoint`` return wrong gradients, mostly
without an error:

* blocks write into their inputs (``img += ...``), so recomputation would start from overwritten tensors;
* callers write into what they gave a block (a UNet adds a ControlNet to its skip connections in place);
* blocks share one ``transformer_options`` dict that changes while they are walked (block index), so recomputation
  would run with the values of the last block.

So a block is given clones of the activations and copies of the dicts, again for every run of a checkpointed block, and
norm layers, whose input is what gets overwritten after being saved for backward, run on a clone.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .forward_override import override_forward
from .lora import repeated_blocks


def prepare_for_backward(
    diffusion_model: nn.Module, checkpointed: bool, patches: Iterable[nn.Module] = ()
) -> ExitStack:
    """Make backward through ``diffusion_model`` right; closing the returned stack puts everything back.

    Args:
        checkpointed: recompute each repeated block in backward instead of keeping its activations.
        patches: networks of model patches, which run between the blocks and write into what these return.
    """
    stack = ExitStack()
    for module in (module for network in (diffusion_model, *patches) for module in network.modules()):
        if "norm" in type(module).__name__.lower() and not any(True for _ in module.children()):
            stack.callback(override_forward(module, _on_a_clone))
    for _, block in repeated_blocks(diffusion_model):
        stack.callback(override_forward(block, _checkpointed if checkpointed else _on_clones))
    return stack


def _on_a_clone(forward):
    def norm(x: Tensor, *args, **kwargs) -> Tensor:
        return forward(x.clone() if torch.is_grad_enabled() and x.requires_grad else x, *args, **kwargs)

    return norm


def _checkpointed(forward):
    def block(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = [_kept(a) for a in args]
        kwargs = {name: _kept(a) for name, a in kwargs.items()}

        def run(*args, **kwargs):
            return forward(*[_own(a) for a in args], **{name: _own(a) for name, a in kwargs.items()})

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

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
