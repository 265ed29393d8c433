"""The look before the leap: does the gradient that training is about to follow describe the model it runs on?

Attention kernels without autograd, patches that cache or detach, quantised layers and blocks that write into their
inputs do not fail. They return a gradient that is silently wrong, and an hour of training on it. So before the first
step the gradient is compared with what the model does when its LoRA is really moved.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..vlm.judge import eased
from ..vlm.memory import out_of_memory
from .checkpointing import GENERATOR, Block
from .lora import repeated_blocks

log = logging.getLogger(__name__)

SEED = 2**33  # beyond the seeds of training and of the held-out pictures
GROUPS = 3  # stretches of layers that are moved one after another, so that none hides behind the others
MOVE = 3e-4  # of a prediction's norm: small against curvature, large against float32 rounding
MOVE_PER_NOISE = 3.0
TOLERANCE = 0.05
TOLERANCE_PER_NOISE = 15.0
MOST_TOLERANCE = 0.3
UPDATE = 0.1  # standard deviation of an update that layers have while gradients are compared, for inputs of 1
REMEMBERED = 1e-2  # relative change of a prediction that is asked for twice; kernels that add up in any order make less
VISIBLE = 1e-3  # relative change of a prediction that cannot be rounding, unless the model's noise is larger

STOCK_LOADERS = "Load the model with Load Diffusion Model or Load Checkpoint"
BACKWARD_FAILS = (
    "Backward through the model fails ({}). A patch or a loader is in the way: take the patches off the model, or: "
    f"{STOCK_LOADERS}."
)
NO_KERNELS = "start ComfyUI with --use-pytorch-cross-attention, and take sage attention patches off the model"


def check_gradients(student) -> None:
    """Compare the student's gradients with finite differences, at its first sampling step.

    Costs three forwards with backward, twelve or thirteen without (more where the first step length does not fit, or
    half precision cannot hold the gradients), one decode with backward, and the draw of one and a half pictures. The
    LoRA is left as it was; the student's ``gradient_scale`` falls to what its gradients need to be finite.

    Args:
        student: a student that is being run (inside its ``run``).
    Raises:
        RuntimeError: gradients do not pass, or are not the model's; the text says what to change.
    """
    scale = student.gradient_scale
    try:
        with _off_the_grid(student.lora):
            _check_first_step(student)
    except RuntimeError as fault:
        if out_of_memory(fault):
            raise
        student.gradient_scale = scale
        try:
            _check_first_step(student)  # some models may not bear the update; what is at fault fails without it too
        except RuntimeError as same:
            raise same if out_of_memory(same) else fault
    for k in sorted({student.steps // 2, student.steps - 1}):
        x = _check_backward_at(student, k)
    _ask_twice(student, x, k)


@contextmanager
def _off_the_grid(lora) -> Iterator[None]:
    """While the context lasts, every layer has a small random update.

    A layer's output lies on the grid of its number format, and a new LoRA adds nothing to it: moves of less than half a
    step of that grid would all be rounded away, in deep models most of them. Between grid points rounding is as often
    up as down.
    """
    generator = torch.Generator().manual_seed(3)
    before = [adapter.B.clone() for adapter in lora.adapters]
    with torch.no_grad():
        for adapter in lora.adapters:
            size = UPDATE / (adapter.scale * math.sqrt(adapter.B.shape[1]))
            adapter.B += (torch.randn(adapter.B.shape, generator=generator) * size).to(adapter.B)
    try:
        yield
    finally:
        with torch.no_grad():
            for adapter, b in zip(lora.adapters, before):
                adapter.B.copy_(b)


def _check_first_step(student) -> None:
    student.use_prompt(0)
    x = student.roll(student.noise(SEED), 0)
    prediction = student.predict(x, 0)
    if not prediction.requires_grad:
        raise RuntimeError(
            "No gradient passes through the model: its loader or a patch computes without autograd (TensorRT "
            f"engines and some quantised loaders do). {STOCK_LOADERS}."
        )
    prediction = prediction.detach()
    if not prediction.isfinite().all():
        raise RuntimeError("The model's own pictures are not finite numbers. Load it in bf16 or fp32.")
    _check_decoder(student, prediction)
    weights = _smooth_weights(prediction)

    def predict() -> Tensor:
        return student.predict(x, 0)

    gradients = _lora_gradients(student, predict, weights)
    with torch.no_grad():
        masked = student.latent_mask is not None and torch.equal(student.predict(-x, 0), prediction)
    if masked:
        raise RuntimeError(
            "At the first sampler step the latent's mask leaves nothing to the model, so nothing can be learned there: "
            "a soft mask with Differential Diffusion does so. Take that node or the mask off for the training."
        )
    with torch.no_grad():
        probe = _Probe(list(student.lora.adapters), gradients, predict, weights)
        probe.look_for_cut_layers(student.lora.paths)
        probe.compare_with_differences()


def _check_backward_at(student, k: int) -> Tensor:
    """Patches that answer one step from another are quiet at the first, and keep what they saw from draw to draw.
    Returns x_σk."""
    try:
        x = student.roll(student.noise(SEED), k)
        _backward_with_some_kept(student, x, k)
        return x
    except (RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        said = _said(error)
        if "inplace operation" in said:
            raise RuntimeError(BACKWARD_FAILS.format(said)) from error
        raise RuntimeError(
            f"The model cannot be learned from at sampler step {k + 1} ({said}), though it can at the first: a patch "
            "reuses one step's result for another. Take EasyCache, TeaCache and the like off the model."
        ) from error


def _backward_with_some_kept(student, x: Tensor, k: int) -> None:
    """Backward, while one block of each kind keeps its activations, if there is memory for it.

    A patch may overwrite what autograd has saved, as NAGuidance does. Torch notices that, but not in blocks that are
    recomputed: gradients are silently wrong there, some by too little for ``compare_with_differences``. A patch of
    chosen blocks only may stay unnoticed.
    """

    def backward() -> None:
        value = student.predict(x, k).square().mean() * student.gradient_scale
        torch.autograd.grad(value, list(student.lora.parameters()), allow_unused=True)

    recompute, before = student.recompute, student.recompute.kept
    blocks = enumerate(repeated_blocks(student.model.model.diffusion_model))
    kinds = {frozenset(map(type, block.modules())): Block(GENERATOR, number) for number, (_, block) in blocks}
    try:
        recompute.kept = frozenset(kinds.values())
        return backward()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    finally:
        recompute.kept = before
    backward()


def _said(error: Exception) -> str:
    """What torch says went wrong, without its hints to programmers."""
    return str(error).splitlines()[0].partition(". Hint:")[0]


@torch.no_grad()
def _ask_twice(student, x: Tensor, k: int) -> None:
    """Anchor and prior compare predictions of the same, which have to differ by the LoRA alone."""
    once, again = student.predict(x, k), student.predict(x, k)
    if (again - once).norm() > REMEMBERED * once.norm():
        raise RuntimeError(
            "Asked twice, the model answers differently: a patch remembers what it was asked before. Take it (APG with "
            "momentum, EasyCache, TeaCache and the like) off the model."
        )


def _check_decoder(student, latent: Tensor) -> None:
    latent.requires_grad_()
    gradient = _gradients(student, lambda: student.decode(latent).square().mean(), [latent])
    if gradient is None or not gradient[0].any():
        raise RuntimeError(
            "No usable gradient passes through the VAE: it decodes in tiles, without autograd, or beyond the range of "
            "its number format. Connect the VAE straight from Load VAE, without tiling patches, and run it in bf16 or "
            "fp32."
        )


def _gradients(student, value: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor] | None:
    """Those of ``value()``, by the largest of the student's scales at which they are finite; None if there are none."""
    while (outcome := value() * student.gradient_scale).requires_grad:
        found = torch.autograd.grad(outcome, inputs, allow_unused=True)
        found = [torch.zeros_like(i) if g is None else g / student.gradient_scale for i, g in zip(inputs, found)]
        if all(g.isfinite().all() for g in found):
            return found
        if student.gradient_scale == 1.0:
            return None
        student.gradient_scale = eased(student.gradient_scale)
    return None


def _smooth_weights(like: Tensor) -> Tensor:
    """A random direction of pictures, smooth because that is what rounding noise is not."""
    coarse = torch.randn(1, like[0].numel() // like[0, 0].numel(), 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = interpolate(coarse, like.shape[-2:], mode="bilinear", align_corners=True)
    weights = smooth.view(1, -1, *(1,) * (like.ndim - 4), *like.shape[-2:]).expand_as(like).to(like)
    return weights / weights.norm()  # the size of a judge's gradient, which half precision can carry


def _lora_gradients(student, predict: Callable[[], Tensor], weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gradients of ``(predict() * weights).sum()`` for every adapter's A and B."""
    try:
        found = _gradients(student, lambda: (predict() * weights).sum(), list(student.lora.parameters()))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise RuntimeError(BACKWARD_FAILS.format(_said(error))) from error
    if found is None:
        raise RuntimeError("The model's gradients are not finite. Load the model in bf16 or fp32 instead of fp16.")
    return list(zip(found[::2], found[1::2]))


class _Probe:
    """Moves adapters, looks what the prediction does, and puts them back."""

    def __init__(self, adapters: list, gradients: list, predict: Callable[[], Tensor], weights: Tensor):
        self.adapters, self.gradients, self.predict = adapters, gradients, predict
        self.base, self.weights = predict(), weights.cpu().double()
        self.unit = (self.weights.norm() * self.base.cpu().double().norm()).item()
        self.live = [i for i, pair in enumerate(gradients) if any(g.any() for g in pair)]
        if not self.live:
            raise RuntimeError(f"No gradient reaches the LoRA. {STOCK_LOADERS}, and {NO_KERNELS}.")
        # What there and back do not cancel is rounding, which this way needs no knowledge of number formats.
        there_and_back = (self._along(self.live, MOVE) + self._along(self.live, -MOVE)) / 2
        self.noise = self._change(there_and_back)

    def _change(self, prediction: Tensor) -> float:
        """Distance of a prediction from the unmoved one, relative to its norm."""
        return ((prediction - self.base).cpu().double().norm() / self.base.cpu().double().norm()).item()

    def _moved(self, moves: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The prediction with some adapters' A and B moved."""
        before = {i: (self.adapters[i].A.clone(), self.adapters[i].B.clone()) for i in moves}
        try:
            for i, (a, b) in moves.items():
                self.adapters[i].A += a
                self.adapters[i].B += b
            return self.predict()
        finally:
            for i, (a, b) in before.items():
                self.adapters[i].A.copy_(a)
                self.adapters[i].B.copy_(b)

    def _along(self, group: list[int], move: float) -> Tensor:
        """The prediction after a step along the gradient that should change ``(prediction * weights).sum()`` by
        ``move`` of its largest possible value."""
        length = move * self.unit / self._norm(group) ** 2
        return self._moved({i: tuple(g * length for g in self.gradients[i]) for i in group})

    def _norm(self, group: list[int]) -> float:
        return math.sqrt(sum(g.cpu().double().square().sum().item() for i in group for g in self.gradients[i]))

    def look_for_cut_layers(self, paths: list[str]) -> None:
        """Layers without gradient are right only if the prediction does not depend on them."""
        silent = [i for i in range(len(self.adapters)) if i not in self.live]
        if not silent:
            return
        generator = torch.Generator().manual_seed(2)
        moves = {}
        for i in silent:
            a, b = self.adapters[i].A, self.adapters[i].B
            push = torch.randn(b.shape, generator=generator).to(b) * 0.1 / math.sqrt(b.shape[1])
            moves[i] = (torch.zeros_like(a), push)
        if self._change(self._moved(moves)) > max(VISIBLE, 3 * self.noise):
            raise RuntimeError(
                f"{len(silent)} of {len(self.adapters)} LoRA layers change the picture but get no gradient, first "
                f"'{paths[silent[0]]}': attention or another kernel runs without autograd. To train, {NO_KERNELS}; or: "
                f"{STOCK_LOADERS}."
            )

    def compare_with_differences(self) -> None:
        """Autograd's derivative against the finite difference along it, stretch by stretch of the model."""
        tolerance = min(TOLERANCE + TOLERANCE_PER_NOISE * self.noise, MOST_TOLERANCE)
        count = len(self.live)
        for start, end in ((n * count // GROUPS, (n + 1) * count // GROUPS) for n in range(GROUPS)):
            group = self.live[start:end]
            if not group:
                continue
            ratio = self._ratio(group, tolerance)
            log.debug("gradient check: ratio %.3f, noise %.1e, tolerance %.2f", ratio, self.noise, tolerance)
            if abs(ratio - 1) > tolerance:
                raise RuntimeError(
                    f"The gradient is not the model's: moving the LoRA does {ratio:.2f} times what the gradient "
                    f"promises (allowed: 1 ± {tolerance:.2f}). Turn checkpointing off, take patches that cache "
                    f"or replace blocks off the model (TeaCache), or: {STOCK_LOADERS}."
                )

    def _ratio(self, group: list[int], tolerance: float) -> float:
        """Finite difference over derivative; of several step lengths the first that fits, else the first."""
        step = max(MOVE, MOVE_PER_NOISE * self.noise)
        ratios = []
        for length in (step, step / 3, step * 3):
            rise = (self._along(group, length) - self._along(group, -length)).cpu().double()
            ratios.append(((rise * self.weights).sum() / (2 * length * self.unit)).item())
            if abs(ratios[-1] - 1) <= tolerance:
                return ratios[-1]
        return ratios[0]
