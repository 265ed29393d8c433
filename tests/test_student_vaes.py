"""The VAEs that people have, through ComfyUI's own detection from tensors of the published names and widths."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests.gradients import derivative_ratio, picture_to_lora_ratio


def autoencoder_kl(channels: int, batch_norm: bool = False) -> torch.nn.Module:
    """ComfyUI recognises only the true width of Stable Diffusion's autoencoder: 84 M parameters."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return AutoencoderKL(ddconfig=shape | {"batch_norm_latent": batch_norm}, embed_dim=channels)


def weights_of(lab, name: str) -> dict[str, torch.Tensor]:
    """Random weights of the VAE that belongs to an architecture, named as in its file."""
    import comfy.ldm.wan.vae

    if name in ("Wan still", "Qwen-Image"):
        network = comfy.ldm.wan.vae.WanVAE(
            dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        )  # fmt: skip
    else:
        network = {
            "SD1.5": lambda: autoencoder_kl(4),
            "FLUX dev": lambda: autoencoder_kl(16),
            "FLUX.2": lambda: autoencoder_kl(32, batch_norm=True),
        }[name]()
    lab.randomise(network, seed=7)
    weights = network.state_dict()
    if name == "FLUX dev":
        return {key: value for key, value in weights.items() if "quant_conv" not in key}
    if name == "FLUX.2":
        weights["bn.running_var"] = weights["bn.running_var"].abs() + 0.5
    return weights


def small_student(lab, name: str, side: int = 4):
    """An architecture with its VAE, and a latent of 4x4: at half of that, group norm has nothing to go by."""
    import comfy.sd

    vae = comfy.sd.VAE(sd=weights_of(lab, name))
    vae.throw_exception_if_invalid()
    latent = {"samples": torch.zeros(*lab.ARCHITECTURES[name].latent[:-2], side, side)}
    return lab.build_student(name, vae=vae, latent=latent)


@pytest.mark.parametrize("name", ["SD1.5", "FLUX dev", "FLUX.2", "Wan still", "Qwen-Image"])
def test_gradient_through_a_published_vae(lab, name):
    """From latent to pixels and from LoRA to pixels; what is decoded is what VAE Decode shows, before and after."""
    import nodes

    student = small_student(lab, name)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(student.latent.shape, generator=generator)

    def loop():
        latent = x0.clone().requires_grad_()
        weights = torch.randn(student.decode(x0.clone()).shape, generator=generator)
        ratio = derivative_ratio([latent], lambda: (student.decode(latent) * weights).double().sum())
        return ratio, student.decode(x0.clone()), student._guider.inner_model.process_latent_out(x0.clone())

    def shown(latent):
        return nodes.VAEDecode().decode(student.vae, {"samples": latent.clone()})[0].movedim(-1, 1)

    ratio, decoded, latent = student.run(loop, beside=[])
    assert ratio == pytest.approx(1, abs=0.01)
    assert decoded.shape[-2:] == (4 * student.vae.spacial_compression_decode(),) * 2
    torch.testing.assert_close(decoded.clamp(0, 1), shown(latent), atol=1e-4, rtol=0)
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(decoded.clamp(0, 1), shown(latent), atol=1e-4, rtol=0)
