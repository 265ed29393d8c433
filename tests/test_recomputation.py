"""Recomputing blocks of the VAE and the judge: the same gradient, less memory, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests.vlm_families import FAMILIES
from dual_process.tests.vlm_families import judge as family
from dual_process.trainers.checkpointing import (
    WHOLE_VAE,
    Block,
    Recompute,
    decoded,
    make_recomputable,
    stacked_blocks,
)
from dual_process.vlm.question import Question

QUESTIONS = [Question("Is the line thick?"), Question("Are the colours warm?", "No"), Question("What is it?", "a line")]
SD = dict(
    double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1,
    attn_resolutions=[], dropout=0.0,
)  # fmt: skip


def bytes_alive(module, function, given) -> list[int]:
    """After ``function(given)``, without and with recomputation, both of which give the same gradient."""
    from dual_process.trainers.live_memory import LiveMemory

    found, alive = [], []
    for on in (False, True):
        x = given.clone().requires_grad_()
        with make_recomputable(module, "part", Recompute(on)), LiveMemory() as memory:
            y = function(x)
            alive.append(memory.live)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
            found.append(torch.autograd.grad((y * weights).sum(), x)[0])
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * found[0].abs().max().item())
    assert not any("forward" in vars(inside) for inside in module.modules())
    return alive


@pytest.mark.parametrize("name", FAMILIES)
def test_a_judge_gives_the_same_gradient(name):
    """Also where questions share a look, and the layers write into its cache of keys and values."""
    if name == "SmolVLM":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    judge = family(name)
    questions = QUESTIONS[:2] if name == "PaliGemma" else QUESTIONS
    pictures = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    judge.log_likelihood(pictures, questions)  # finds out whether they share
    kept, recomputed = bytes_alive(judge.model, lambda x: judge.log_likelihood(x, questions), pictures)
    assert recomputed < 0.8 * kept


def sd_vae():
    from comfy.ldm.models.autoencoder import AutoencoderKL

    return AutoencoderKL(embed_dim=4, ddconfig=SD), (2, 4, 8, 8)


def taesd():
    from comfy.taesd.taesd import TAESD

    return TAESD(latent_channels=16), (2, 16, 4, 4)


def wan_vae():
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]), (
        1,
        4,
        2,
        8,
        8,
    )


@pytest.mark.parametrize("build", [sd_vae, taesd, wan_vae])
def test_a_vae_gives_the_same_gradient(comfy, build):
    """Wan's writes earlier frames into a list."""
    from dual_process.tests.architectures import randomise

    vae, shape = build()
    randomise(vae, seed=3)
    vae.requires_grad_(False)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    kept, recomputed = bytes_alive(vae, vae.decode, latent)
    assert recomputed < 0.55 * kept


@pytest.mark.parametrize("kept", [frozenset(), {WHOLE_VAE}, {Block("VAE", 0), Block("VAE", 2)}])
def test_a_batch_is_decoded_in_groups(comfy, kept):
    """Of seven pictures: the same pictures and gradient whatever is kept, and nothing held where all is recomputed."""
    from dual_process.tests.architectures import randomise
    from dual_process.trainers.live_memory import LiveMemory

    vae = taesd()[0]
    randomise(vae, seed=3)
    vae.requires_grad_(False)
    latent = torch.randn((7, 16, 4, 4), generator=torch.Generator().manual_seed(2))
    found = []
    for recompute in (Recompute(False), Recompute(True, frozenset(kept))):
        x = latent.clone().requires_grad_()
        with make_recomputable(vae, "VAE", recompute), LiveMemory() as memory:
            pictures = decoded(vae.decode, x, recompute)
            held = memory.live - pictures.untyped_storage().nbytes()
            found.append((pictures.detach(), *torch.autograd.grad(pictures.square().sum(), x), held))
    (plain, gradient, much), (again, same, little) = found
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert little == 0 if WHOLE_VAE not in kept else 0 < little < 0.6 * much


def test_what_is_a_block():
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(1, 1))])

        def forward(self, x):
            return x

    level, model = nn.Module(), nn.Module()
    level.block, level.up = nn.ModuleList([Block()]), Block()
    model.levels, model.tower = nn.ModuleList([level, nn.Linear(1, 1)]), nn.Module()
    model.tower.layers, model.alone = nn.Sequential(Block(), nn.ReLU()), Block()
    assert list(stacked_blocks(model)) == [level.block[0], level.up, model.tower.layers[0]]
