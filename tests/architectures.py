"""Tiny ComfyUI MODELs with random weights, one per architecture, built from ComfyUI's own classes.

Import only where ComfyUI is importable (see conftest).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import comfy.model_management as mm
import comfy.samplers
import comfy.sd
import comfy.supported_models as sm
import comfy.taesd.taesd
import torch
from comfy.model_patcher import ModelPatcher

CONTEXT = 48  # width of the text conditioning

UNET = {
    "image_size": 32, "use_checkpoint": False, "legacy": False, "use_spatial_transformer": True, "in_channels": 4,
    "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth_middle": 1,
    "context_dim": CONTEXT, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
FLUX = {
    "axes_dim": [8, 12, 12], "num_heads": 2, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True, "hidden_size": 64,
    "context_in_dim": CONTEXT, "patch_size": 2, "depth": 2, "depth_single_blocks": 2, "txt_ids_dims": [],
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": CONTEXT, "n_layers": 2,
    "qk_norm": True, "n_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model: ComfyUI's model class, its config, latent shape, extra conditioning shapes."""

    model_class: str
    config: dict
    latent: tuple[int, ...] = (1, 16, 8, 8)
    extra: dict[str, tuple[int, ...]] | None = None


ARCHITECTURES = {
    "SD1.5": Architecture(
        "SD15",
        UNET | {"adm_in_channels": None, "model_channels": 32, "transformer_depth": [1, 1],
                "transformer_depth_output": [1, 1, 1, 1], "use_linear_in_transformer": False},
        (1, 4, 8, 8),
    ),
    "SDXL": Architecture(
        "SDXL",
        UNET | {"num_classes": "sequential", "adm_in_channels": 2816, "model_channels": 64, "transformer_depth": [0, 1],
                "transformer_depth_output": [0, 0, 1, 1], "use_linear_in_transformer": True},
        (1, 4, 8, 8),
        {"pooled_output": (1, 1280)},
    ),
    "SD3": Architecture(
        "SD3",
        {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None,
         "adm_in_channels": 2048, "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms",
         "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
         "context_embedder_config": {"target": "torch.nn.Linear",
                                     "params": {"in_features": CONTEXT, "out_features": 128}}},
        extra={"pooled_output": (1, 2048)},
    ),
    "FLUX dev": Architecture(
        "Flux",
        FLUX | {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768,
                "guidance_embed": True},
        extra={"pooled_output": (1, 768)},
    ),
    "FLUX schnell": Architecture(
        "FluxSchnell",
        FLUX | {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768,
                "guidance_embed": False},
        extra={"pooled_output": (1, 768)},
    ),
    "Chroma": Architecture(
        "Chroma",
        FLUX | {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64,
                "hidden_dim": 64, "n_layers": 2, "vec_in_dim": None},
        extra={"pooled_output": (1, 768)},
    ),
    "FLUX.2": Architecture(
        "Flux2",
        FLUX | {"image_model": "flux2", "axes_dim": [8, 8, 8, 8], "in_channels": 128, "out_channels": 128,
                "vec_in_dim": None, "guidance_embed": True, "patch_size": 1, "theta": 2000, "mlp_ratio": 3.0,
                "qkv_bias": False, "ops_bias": False, "global_modulation": True, "mlp_silu_act": True,
                "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3]},
        (1, 128, 4, 4),
        {"pooled_output": (1, 768)},
    ),
    "Lumina 2": Architecture(
        "Lumina2",
        LUMINA | {"dim": 64, "n_kv_heads": 1, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
                  "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    ),
    "Z-Image": Architecture(
        "ZImage",
        LUMINA | {"dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
                  "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0,
                  "pad_tokens_multiple": 32},
    ),
    "Qwen-Image": Architecture(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 32, "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12)},
        (1, 16, 1, 8, 8),
    ),
    "Wan still": Architecture(
        "WAN21_T2V",
        {"image_model": "wan2.1", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "num_layers": 2,
         "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
         "eps": 1e-6, "in_dim": 16, "model_type": "t2v", "text_dim": CONTEXT},
        (1, 16, 1, 8, 8),
    ),
    "HiDream": Architecture(
        "HiDream",
        {"image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [16, 8, 8], "in_channels": 16,
         "caption_channels": [CONTEXT, CONTEXT], "max_resolution": [128, 128], "llama_layers": [0, 1],
         "num_attention_heads": 2, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1,
         "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 2048},
        extra={"pooled_output": (1, 2048), "conditioning_llama3": (1, 2, 7, CONTEXT)},
    ),
    "PixArt": Architecture(
        "PixArtSigma",
        {"image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 64, "in_channels": 4,
         "depth": 2, "model_max_length": 300, "micro_condition": False, "input_size": 8, "pe_interpolation": 1,
         "caption_channels": CONTEXT},
        (1, 4, 34, 34),  # its position embedding divides by zero below 33
    ),
    "Cosmos Predict2": Architecture(  # Anima's blocks, too
        "CosmosT2IPredict2",
        {"image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
         "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2,
         "num_heads": 2, "concat_padding_mask": True, "crossattn_emb_channels": CONTEXT, "pos_emb_cls": "rope3d",
         "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
         "use_adaln_lora": True, "adaln_lora_dim": 16, "rope_h_extrapolation_ratio": 1.0,
         "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 1.0, "extra_per_block_abs_pos_emb": False,
         "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
         "rope_enable_fps_modulation": False},
        (1, 16, 1, 8, 8),
    ),
}  # fmt: skip


def build_model(name: str, seed: int = 0, dtype=torch.float32, compute: torch.dtype | None = None) -> ModelPatcher:
    """The tiny MODEL of an architecture, random weights of ``dtype``, cast to ``compute`` (if given) as it runs."""
    return assemble(ARCHITECTURES[name], seed, dtype, compute)


def assemble(
    architecture: Architecture, seed: int = 0, dtype=torch.float32, compute: torch.dtype | None = None, device="cpu"
) -> ModelPatcher:
    """As ``build_model``, for an architecture of any size, its weights made on ``device``."""
    model_config = getattr(sm, architecture.model_class)(known_to_this_comfyui(architecture))
    model_config.set_inference_dtype(dtype, compute)
    model = model_config.get_model({}, "", device=device)
    randomise(model.diffusion_model, seed)
    model.requires_grad_(False)
    return ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())


def build_conditioning(name: str, seed: int = 1, tokens: int = 7) -> list:
    """Random CONDITIONING that fits ``build_model(name)``."""
    return conditioning(ARCHITECTURES[name], seed, tokens)


def conditioning(architecture: Architecture, seed: int = 1, tokens: int = 7, width: int = CONTEXT) -> list:
    """Random CONDITIONING of ``tokens`` tokens, ``width`` wide, with the extra values that an architecture wants."""
    generator = torch.Generator().manual_seed(seed)
    extra = architecture.extra or {}
    values = {key: torch.randn(shape, generator=generator) for key, shape in extra.items()}
    return [[torch.randn(1, tokens, width, generator=generator), values]]


def build_latent(name: str, batch: int = 1) -> dict:
    """Empty LATENT that fits ``build_model(name)``."""
    return {"samples": torch.zeros(batch, *ARCHITECTURES[name].latent[1:])}


def randomise(module: torch.nn.Module, seed: int, gain: float = 1.0) -> None:
    """Random weights of a size that keeps activations near one; a smaller ``gain`` bends less."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.ndim >= 2:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif name.endswith(("weight", "scale")):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.05 * noise)
        for buffer in module.buffers():  # position embeddings, which loaders would fill
            if buffer.is_floating_point():
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, device=device))


def known_to_this_comfyui(architecture: Architecture) -> dict:
    """The config without keys that only newer versions of ComfyUI know."""
    if "txt_ids_dims" not in architecture.config:
        return dict(architecture.config)
    from comfy.ldm.chroma.model import ChromaParams
    from comfy.ldm.flux.model import FluxParams

    params = ChromaParams if architecture.model_class == "Chroma" else FluxParams
    known = set(inspect.signature(params).parameters) | {"image_model", "guidance_embed"}
    return {key: value for key, value in architecture.config.items() if key in known}


def build_vae(name: str):
    """A VAE for the architecture's latents: ComfyUI's own TAESD with random weights, or a linear one where TAESD would
    not fit (video latents, 128 channels) or take long (large latents)."""
    latent = ARCHITECTURES[name].latent
    channels = latent[1]
    if len(latent) == 5 or channels > 16 or latent[-1] > 8:
        return linear_vae(name)
    weights = comfy.taesd.taesd.TAESD(latent_channels=channels)
    randomise(weights, seed=7, gain=0.5)
    vae = comfy.sd.VAE(sd={**weights.state_dict(), "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)})
    vae.throw_exception_if_invalid()
    return vae


def linear_vae(name: str):
    """A ``LinearVAE`` for the architecture's latents."""
    latent = ARCHITECTURES[name].latent
    return LinearVAE(latent[1], latent_dim=len(latent) - 2)


class LinearVAE:
    """The part of ComfyUI's VAE that the student uses, decoding every latent pixel to one picture pixel."""

    def __init__(self, channels: int, latent_dim: int = 2):
        self.latent_dim = latent_dim
        self.latent_channels, self.vae_dtype, self.device = channels, torch.float32, mm.get_torch_device()
        self.first_stage_model = torch.nn.Module()
        mix = torch.randn(3, channels, generator=torch.Generator().manual_seed(9)) / channels**0.5
        self.first_stage_model.mix = torch.nn.Parameter(mix, requires_grad=False)
        self.first_stage_model.decode = lambda z: torch.einsum("oc,bc...->bo...", self.first_stage_model.mix, z)
        self.patcher = ModelPatcher(self.first_stage_model, self.device, torch.device("cpu"))

    def memory_used_decode(self, shape, dtype):
        return 3 * math.prod(shape[2:]) * dtype.itemsize

    def spacial_compression_decode(self):
        return 1

    def process_output(self, pixels):
        return ((pixels + 1) / 2).clamp(0, 1)


def build_student(name: str, model: ModelPatcher | None = None, **settings):
    """A ``ComfyStudent`` around the tiny MODEL: four steps of euler/simple, cfg 1.5, rank 4."""
    from dual_process.trainers.comfy_student import ComfyStudent

    model = model or build_model(name)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    defaults = {
        "vae": build_vae(name), "positives": [build_conditioning(name)], "negative": build_conditioning(name, seed=2),
        "latent": build_latent(name), "sigmas": sigmas, "sampler": comfy.samplers.sampler_object("euler"),
        "cfg": 1.5, "rank": 4, "alpha": 4.0,
    }  # fmt: skip
    return ComfyStudent(model, **{**defaults, **settings})


def build_judge():
    """A tiny random Idefics3 as a judge that ComfyUI can load."""
    from dual_process.tests import vlm_families
    from dual_process.trainers.comfy_memory import ManagedJudge
    from dual_process.vlm.judge import Judge

    torch.manual_seed(0)
    with torch.inference_mode(False):
        model, processor = vlm_families.idefics3()
        randomise(model, seed=8)
        return ManagedJudge(Judge(model, processor, "tiny random judge"))


def sample(model: ModelPatcher, name: str, seed: int = 5) -> torch.Tensor:
    """The latent that a stock KSampler makes: four steps of euler/simple, cfg 1.5."""
    import nodes

    latent = build_latent(name)
    positive, negative = build_conditioning(name), build_conditioning(name, seed=2)
    return nodes.common_ksampler(model, seed, 4, 1.5, "euler", "simple", positive, negative, latent)[0]["samples"]
