"""Low-rank adapters (Hu et al., arXiv 2106.09685) that run beside the frozen layers of a diffusion model.

An adapted layer computes ``y = W x + (alpha / rank) B A x``. ``A`` and ``B`` are float32 whatever the model's dtype:
in bf16 most entries of ``A`` could not move at the learning rates used here. The products are the model's, as under
autocast. The frozen weight is never touched, so the model is bit-identical once the adapters are ejected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forward_override import override_forward

# Layers that steer the whole network (modulation, embedders, norms) rather than draw: adapting them burns pictures, so
# they are left alone unless the word for it, which is the group, is named.
NOT_ADAPTED = re.compile(
    r"(adaLN(?:_mod(?:ulation)?)?).*|(?:.*_)?(mod(?:ulation|C|X|CX)?)(?:_.*)?|(mapper)(?:_.*)?"
    r"|.*(emb)(?:ed.*)?(?:_.*)?|.*(norm).*",
    re.IGNORECASE,
)
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def repeated_blocks(diffusion_model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks a diffusion model stacks, as (path, module): what checkpointing cuts at and LoRA adapts.

    A block is a module with children found in a list (of lists) that hangs directly under ``diffusion_model``.
    """

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(child, CONTAINERS):
                yield from walk(f"{path}{name}.", child)
            elif path and any(True for _ in child.children()):
                yield f"{path}{name}", child

    yield from walk("", diffusion_model)


def lora_targets(diffusion_model: nn.Module, pattern: str = "") -> dict[str, nn.Module]:
    """Linear layers to adapt, by path.

    Args:
        pattern: a regular expression searched in each path, e.g. ``attn`` for attention only. Empty: every attention
            and MLP layer of the repeated blocks. Their modulation, embedding and norm layers are adapted only where
            the matched text reaches into that name, as that of ``img_mod`` does and that of ``double_blocks`` does not.
    Raises:
        ValueError: nothing matches, the pattern is not a regular expression, or the model has no such layers.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"The LoRA targets '{pattern}' are not a valid regular expression ({error}). Write 'attn', for "
            "example, or leave them empty to adapt attention and MLP layers."
        ) from error
    targets = {}
    for block_path, block in repeated_blocks(diffusion_model):
        for name, layer in block.named_modules():
            path = f"{block_path}.{name}"
            linear = hasattr(layer, "in_features") and hasattr(layer, "weight")  # Nunchaku's has a qweight
            if linear and _chosen(path, wanted):
                targets[path] = layer
    if not targets and not pattern:
        raise ValueError(
            f"{type(diffusion_model).__name__} keeps its layers in a form that no LoRA can be trained on: its "
            "loader is for inference only (Nunchaku, TensorRT). Load the model with Load Diffusion Model or Load "
            "Checkpoint."
        )
    if not targets:
        raise ValueError(
            f"No layer of {type(diffusion_model).__name__} matches the LoRA targets '{pattern}'. "
            "Leave the targets empty to adapt attention and MLP layers."
        )
    return targets


def _chosen(path: str, wanted: re.Pattern) -> bool:
    matches = [match.span() for match in wanted.finditer(path)]
    parts = (NOT_ADAPTED.fullmatch(path, *part.span()) for part in re.finditer(r"[^.]+", path))
    steering = [part.span(part.lastindex) for part in parts if part]
    if not steering:
        return bool(matches)
    return any(max(a, c) < min(b, d) for a, b in matches for c, d in steering)


class Adapter(nn.Module):
    """A low-rank update ``(alpha / rank) B A`` of a linear layer; ``B`` starts at zero, so training starts at base."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features))
        # laid out as A is, each rank's entries side by side: on a CPU the products take up to four times as long else
        self.B = nn.Parameter(torch.zeros(rank, layer.out_features).T)
        self.scale = alpha / rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` [..., out_features] plus the update at ``x`` [..., in_features], computed in the dtype of ``x``."""
        if x.dtype != self.A.dtype and torch.is_grad_enabled():
            x = x.clone()  # LTX-Video's blocks write into what the layer was given, which backward needs here
        down = F.linear(x, self.A.to(x.dtype)) * self.scale
        up = self.B.T.to(x.dtype)
        if y.dtype != down.dtype:
            return y + (down @ up).to(y.dtype)
        rows = y.reshape(-1, y.shape[-1]), down.reshape(-1, down.shape[-1])
        return torch.addmm(*rows, up).view(y.shape)


class LoRA(nn.Module):
    """Adapters for a set of layers.

    Args:
        layers: path within the diffusion model -> linear layer.
        rank: width of the update.
        alpha: the update is scaled by ``alpha / rank``.
        seed: fixes the initial ``A``.
    """

    def __init__(self, layers: dict[str, nn.Module], rank: int, alpha: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.paths = list(layers)
        self.adapters = nn.ModuleList(Adapter(layer, rank, alpha, generator) for layer in layers.values())
        self.enabled = True
        self._undo: list = []

    def inject(self, diffusion_model: nn.Module) -> None:
        """Add every adapter's output to that of the layer at its path."""
        for path, adapter in zip(self.paths, self.adapters):
            self._undo.append(override_forward(diffusion_model.get_submodule(path), self._adapted(adapter)))

    def eject(self) -> None:
        """Give every layer its own ``forward`` back."""
        while self._undo:
            self._undo.pop()()

    def _adapted(self, adapter: Adapter):
        def wrap(forward):
            def adapted(x: Tensor, *args, **kwargs) -> Tensor:
                y = forward(x, *args, **kwargs)
                return adapter(x, y) if self.enabled else y

            return adapted

        return wrap

    @property
    def blank(self) -> bool:
        """Whether it changes nothing, as before its first training."""
        return not any(adapter.B.any() for adapter in self.adapters)

    @contextmanager
    def disabled(self):
        """The model without this LoRA, for as long as the context lasts."""
        was, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all parameters on the CPU, to go back to with ``load_state_dict``."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.state_dict().items()}

    def export(self) -> dict[str, Tensor]:
        """File tensors ``diffusion_model.<path>.lora_A/.lora_B.weight`` (float32, CPU).

        ``alpha / rank`` is folded into ``B``: strength 1.0 in any LoRA loader is the trained behaviour.
        """
        tensors = {}
        for path, adapter in zip(self.paths, self.adapters):
            tensors[f"diffusion_model.{path}.lora_A.weight"] = adapter.A.detach().cpu().clone().contiguous()
            tensors[f"diffusion_model.{path}.lora_B.weight"] = (adapter.B.detach().cpu() * adapter.scale).contiguous()
        return tensors
