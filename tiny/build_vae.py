"""Train the TAESD-16 autoencoder on rendered scenes: random crops first, whole pictures for the rest."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import scenes
from .training import Average, descend, learning_rate, save

log = logging.getLogger(__name__)

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609  # ComfyUI's latent format SD3: sampler latent = (vae latent - shift) * scale
STEPS, CROP_STEPS, PEAK_RATE = 6000, 3600, 1.2e-3


def new_vae(device: str) -> nn.Module:
    """ComfyUI's TAESD with 16 latent channels, He-initialised, residual branches small."""
    from comfy.taesd.taesd import TAESD, Block

    vae = TAESD(latent_channels=16)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, Block):
                module.conv[4].weight.mul_(0.25)
        for last in (vae.taesd_encoder[-1], vae.taesd_decoder[-1]):
            last.weight.mul_(0.3)
        vae.taesd_decoder[-1].bias.fill_(0.5)
    return vae.to(device, memory_format=torch.channels_last)


def load_vae(path: Path, device: str) -> nn.Module:
    """The trained autoencoder, frozen; ``encode_sampler`` and ``decode_sampler`` work in the sampler's space."""
    vae = new_vae(device)
    vae.load_state_dict(load_file(path))
    return vae.eval().requires_grad_(False)


def encode_sampler(vae: nn.Module, images: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in 0..1 to latents [B, 16, S/8, S/8] as a KSampler sees them."""
    return (vae.encode(images * 2 - 1) - SD3_SHIFT) * SD3_SCALE


def decode_sampler(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `encode_sampler`; values may leave 0..1 slightly."""
    return vae.decode(latents / SD3_SCALE + SD3_SHIFT) * 0.5 + 0.5


def _crops(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """One random crop of each picture, at multiples of 4 px so that every phase of the latent grid is seen."""
    corners = torch.randint(0, (images.shape[-1] - size) // 4 + 1, (len(images), 2), generator=generator) * 4
    return torch.stack([image[:, y:y + size, x:x + size]
                        for image, (y, x) in zip(images, corners.tolist(), strict=True)])


def _loss(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    latents = vae.taesd_encoder(images)
    noise = 0.15 * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(latents)
    error = (vae.taesd_decoder(latents + noise).float() - images)
    reconstruction = error.abs().mean() + 4 * error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    spread = (latents.float().square().mean((0, 2, 3)) - 1).clamp(min=0).mean()
    return reconstruction + edges + 0.01 * spread, error.square().mean()


def train_vae(path: Path, device: str, steps: int = STEPS) -> dict[str, float]:
    """Train, normalise the latents to mean 0 and deviation 1 in the sampler's space, write ``path``; see the result
    for time and quality."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    vae = new_vae(device)
    weights = [p for name, p in vae.named_parameters() if not name.startswith("vae_")]
    average = Average(vae, 0.998)
    optimiser = torch.optim.Adam(weights, betas=(0.9, 0.99))
    start = time.time()
    crop_steps = steps * CROP_STEPS // STEPS
    for step in range(steps):
        whole = step >= crop_steps
        images = scenes.render(torch.rand(8 if whole else 16, 8, generator=generator).to(device))
        images = images if whole else _crops(images, 32, generator)
        with torch.autocast(device, torch.bfloat16):
            loss, squared = _loss(vae, images.contiguous(memory_format=torch.channels_last))
        descend(loss, weights, optimiser, learning_rate(step, steps, PEAK_RATE))
        average.update(vae)
        if step % 100 == 0:
            log.info("vae %d/%d loss %.4f psnr %.1f dB %.0f s",
                     step, steps, loss.item(), -10 * squared.log10().item(), time.time() - start)
        if step % 500 == 499:
            save(average.weights, path.with_suffix(".step"))
    average.copy_to(vae)
    return {"seconds": time.time() - start, **_normalise_and_save(vae, path, device)}


@torch.no_grad()
def _normalise_and_save(vae: nn.Module, path: Path, device: str) -> dict[str, float]:
    images = scenes.render(torch.rand(256, 8, generator=torch.Generator().manual_seed(2)).to(device))
    raw = vae.taesd_encoder(images)
    vae.vae_scale.fill_(SD3_SCALE * raw.std())
    vae.vae_shift.fill_(SD3_SHIFT - raw.mean() / vae.vae_scale)
    save(vae.state_dict(), path)
    error = decode_sampler(vae, encode_sampler(vae, images)).clamp(0, 1) - images
    return {"psnr_db": float(-10 * error.square().mean().log10()), "mean_error": float(error.abs().mean())}
