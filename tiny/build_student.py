"""Train the student: ComfyUI's SD3 MMDiT on a deterministic coupling of noise and scene.

Because the generator of the data is known, noise and picture need not be paired at random. Factor j of a scene is tied
to one direction of the noise, the mean of latent channel j, so that the right x0 is a function of (noise, prompt).
Rectified flow then has straight paths and a plain regression target: clean pictures in one to four steps, as from a
distilled generator. A clause in the prompt moves its factor into one half of its range, still steered by the noise.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import scenes
from .build_vae import decode_sampler, encode_sampler
from .text_encoder import CONTEXT_WIDTH, POOLED_WIDTH, TinyTextEncoder, pad, words_to_tokens
from .training import Average, descend, learning_rate, save

log = logging.getLogger(__name__)

DEPTH, PATCH, LATENT_SIDE = 3, 2, scenes.SIDE // 8
SCENES, STEPS, BATCH, PEAK_RATE = 16384, 8000, 64, 1.5e-3
SHIFT = 3.0  # ComfyUI's sampling setting for SD3


def new_student(device: str) -> nn.Module:
    """ComfyUI's MMDiT as its loader would detect it (width 64 * DEPTH), initialised as a DiT."""
    from comfy.supported_models import SD3

    width, places = 64 * DEPTH, (16 // PATCH) ** 2
    config = SD3({
        "in_channels": 16, "out_channels": 16, "patch_size": PATCH, "depth": DEPTH, "input_size": None,
        "adm_in_channels": POOLED_WIDTH, "num_patches": places, "pos_embed_max_size": 16 // PATCH, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear",
                                    "params": {"in_features": CONTEXT_WIDTH, "out_features": width}},
        "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
    })
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=device).diffusion_model
    _initialise(model)
    return model.to(device).requires_grad_(True).train()


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    from comfy.ldm.modules.diffusionmodules.mmdit import get_2d_sincos_pos_embed_torch

    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if name.endswith(("ln_q.weight", "ln_k.weight")) else 0.0)
        elif "adaLN_modulation" in name or name == "final_layer.linear.weight":
            weight.zero_()
        else:
            weight.normal_(std=1 / math.sqrt(weight[0].numel()))
    side = math.isqrt(model.pos_embed.shape[1])
    model.pos_embed.copy_(get_2d_sincos_pos_embed_torch(model.hidden_size, side, side)[None])


@torch.no_grad()
def encode_scenes(vae: nn.Module, count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Random scenes as (u [count, 8], latents [count, 16, 8, 8] in the sampler's space)."""
    u = torch.rand(count, len(scenes.FACTORS), generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.autocast(device, torch.bfloat16):
        parts = [encode_sampler(vae, scenes.render(part).contiguous(memory_format=torch.channels_last)).float()
                 for part in u.split(64)]
    return u, torch.cat(parts)


def tokens_for(wanted: list[dict[str, bool]]) -> Tensor:
    """Prompts as tokens [B, 16]."""
    return torch.tensor([pad(words_to_tokens(scenes.prompt_for(w)), 0)[0] for w in wanted])


def noise_for(u: Tensor, fixed: Tensor, generator: torch.Generator) -> Tensor:
    """Noise [B, 16, 8, 8] that belongs to scenes u when the prompt fixes the properties marked in fixed [B, 4]."""
    free = u.clone()
    properties = free[:, :len(scenes.PROPERTIES)]
    properties.copy_(torch.where(fixed, (2 * properties) % 1, properties))
    direction = torch.special.ndtri(free.clamp(1e-4, 1 - 1e-4)) / LATENT_SIDE
    noise = torch.randn(len(u), 16, LATENT_SIDE, LATENT_SIDE, generator=generator).to(u.device)
    steered = noise[:, :direction.shape[1]]
    steered += (direction - steered.mean((2, 3)))[:, :, None, None]
    return noise


def _draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """A quarter at pure noise, where everything is decided, the rest uniform in SD3's shifted time."""
    time_left = 0.02 + 0.98 * torch.rand(count, generator=generator)
    time_left[: count // 4] = 1.0
    return SHIFT * time_left / (1 + (SHIFT - 1) * time_left)


class _Batches:
    """Endless training batches from the cached scenes: the same scene comes with new noise and another prompt."""

    def __init__(self, u: Tensor, latents: Tensor, seed: int) -> None:
        self.u, self.latents = u, latents
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(scenes u, x0, noise, sigma [B, 1, 1, 1], tokens)"""
        rows = torch.randint(0, len(self.u), (BATCH,), generator=self.generator).to(self.u.device)
        u, device = self.u[rows], self.u.device
        share = torch.rand(BATCH, 1, generator=self.generator)  # from prompts that say nothing to prompts that say all
        fixed = torch.rand(BATCH, len(scenes.PROPERTIES), generator=self.generator) < (share * 1.6 - 0.4)
        sides = (u[:, :len(scenes.PROPERTIES)] >= 0.5).tolist()
        wanted = [{name: side for name, side, is_fixed in zip(scenes.PROPERTIES, *row, strict=True) if is_fixed}
                  for row in zip(sides, fixed.tolist(), strict=True)]
        noise = noise_for(u, fixed.to(device), self.generator)
        sigma = _draw_sigmas(BATCH, self.generator).to(device)
        return u, self.latents[rows], noise, sigma[:, None, None, None], tokens_for(wanted).to(device)


def train_student(folder: Path, vae: nn.Module, device: str, steps: int = STEPS,
                  count: int = SCENES) -> dict[str, float]:
    """Train the student and its word vectors together; writes ``student.safetensors`` and ``text.safetensors``."""
    torch.manual_seed(3)
    start = time.time()
    batches = _Batches(*encode_scenes(vae, count, 4, device), seed=5)
    encode_seconds = time.time() - start
    model = nn.ModuleDict({"student": new_student(device), "text": TinyTextEncoder(device)})
    parameters = list(model.parameters())
    average = Average(model, 0.9985)
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        _, x0, noise, sigma, tokens = batches.next()
        with torch.autocast(device, torch.bfloat16):
            context, pooled = model["text"](tokens)
            flow = model["student"]((1 - sigma) * x0 + sigma * noise, sigma.flatten() * 1000, y=pooled, context=context)
        error = sigma * (flow.float() - (noise - x0))  # of the predicted x0
        loss = (error.square() / sigma.clamp(min=0.15)).mean()
        descend(loss, parameters, optimiser, learning_rate(step, steps, PEAK_RATE, 300))
        average.update(model)
        if step % 100 == 0:
            first = error[: BATCH // 4].square().mean()
            log.info("student %d/%d loss %.4f at noise %.4f %.0f s",
                     step, steps, loss.item(), first.item(), time.time() - start)
        if step % 500 == 499 or step == steps - 1:
            for part in ("student", "text"):
                weights = {name.removeprefix(f"{part}."): w for name, w in average.weights.items()
                           if name.startswith(f"{part}.")}
                buffers = dict(model[part].named_buffers())
                save(weights | buffers, folder / f"{part}.safetensors")
    return {"seconds": time.time() - start, "encode_seconds": encode_seconds, "loss": loss.item()}


class Student:
    """The trained student for checks and for the judge's training pictures; ComfyUI draws with its own sampler."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model, self.text = new_student(device).eval(), TinyTextEncoder(device).eval()
        for part, name in ((self.model, "student"), (self.text, "text")):
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
            part.requires_grad_(False)

    def predict(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """x0 [B, 16, 8, 8] from noisy latents and their sigma [B, 1, 1, 1]."""
        context, pooled = self.text(tokens)
        return x - sigma * self.model(x, sigma.flatten() * 1000, y=pooled, context=context)

    @torch.no_grad()
    def draw(self, noise: Tensor, wanted: list[dict[str, bool]], steps: int = 4) -> Tensor:
        """Latents as stock euler / simple / cfg 1 draws them."""
        time_left = torch.arange(steps, 0, -1) / steps
        sigmas = [*(SHIFT * time_left / (1 + (SHIFT - 1) * time_left)).tolist(), 0.0]
        x, tokens = noise, tokens_for(wanted).to(noise.device)
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            x0 = self.predict(x, torch.full((len(x), 1, 1, 1), now, device=x.device), tokens)
            x = x0 + (then / now) * (x - x0)
        return x


@torch.no_grad()
def half_denoised(student: Student, vae: nn.Module, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """What a trainer shows a judge: (scenes u, decoded predictions of x0) from every noise level and many prompts."""
    device = next(student.model.parameters()).device
    batches = _Batches(*encode_scenes(vae, count, seed, device.type), seed=seed)
    u, pictures = [], []
    for _ in range(-(-count // BATCH)):
        scene, x0, noise, sigma, tokens = batches.next()
        u.append(scene)
        pictures.append(decode_sampler(vae, student.predict((1 - sigma) * x0 + sigma * noise, sigma, tokens)).float())
    return torch.cat(u), torch.cat(pictures)
