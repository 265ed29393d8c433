"""The published algorithm, stated again in our own words on a diffusers FLUX: what ours must agree with.

Luo et al., "Dual-Process Image Generation", ICCV 2025, arXiv 2506.01955: a one-step x0 from the generator with its LoRA
on, decoded, shown to the judge, cross-entropy of the wanted answer, backward into the LoRA. Their released code does
four things that we do not; they are options here, so that a test can tell what each of them costs:

* it stretches every picture to its own minimum and maximum before the judge sees it;
* its LoRA is bf16;
* it applies the LoRA at five times its weight in the forward pass and resets that before the backward pass;
* it puts the answer right behind the prompt, without the space that some chat templates put before an answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

WEIGHT = 5.0  # of the adapter in training and use
ALPHA_PER_RANK = 0.5  # PEFT's alpha of 8 at the published rank of 16
TARGETS = (
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2))"
)
SCALING, SHIFT = 0.3611, 0.1159  # of FLUX's latents


def diffusers_flux(weights: dict[str, Tensor], key_map: dict, heads: int, head: int, axes: tuple, **config):
    """A diffusers FLUX with a ComfyUI FLUX's weights.

    Args:
        weights, key_map: see ``fill``.
        heads, head, axes: number of attention heads, their width, and the axes of the rotary embedding.
    """
    transformer = FluxTransformer2DModel(
        in_channels=64, num_attention_heads=heads, attention_head_dim=head, axes_dims_rope=axes, **config
    )
    return fill(transformer, weights, key_map)


def fill(model: Module, weights: dict[str, Tensor], key_map: dict):
    """Give a diffusers model a ComfyUI model's weights, and freeze it.

    Args:
        weights: ComfyUI's state dict of the diffusion model.
        key_map: diffusers key -> ComfyUI key, or (key, (dimension, offset, size)) or (key, _, inverse of a function).
    """
    state = {}
    for key in model.state_dict():
        source = key_map[key]
        if isinstance(source, str):
            state[key] = weights[source]
            continue
        tensor = weights[source[0]]
        if source[1] is not None:
            tensor = tensor.narrow(*source[1])
        state[key] = source[2](tensor) if len(source) > 2 else tensor
    model.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
    return model.requires_grad_(False)


def add_lora(transformer: FluxTransformer2DModel, rank: int) -> None:
    """The published adapter on attention and MLPs of the double blocks, with its weight of five."""
    alpha = ALPHA_PER_RANK * rank
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=TARGETS))
    transformer.set_adapters("default", WEIGHT)


def picture(transformer: FluxTransformer2DModel, decode: Callable, z: Tensor, context: Tensor, pooled: Tensor):
    """The picture [1, 3, H, W] (0..1 where the decoder stays in -1..1) of the one-step x0 from pure noise ``z``."""
    _, channels, height, width = z.shape
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
    tokens = z.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    sigma = 1.0
    velocity = transformer(
        hidden_states=tokens,
        timestep=torch.tensor([sigma]),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        img_ids=places,
        txt_ids=torch.zeros(context.shape[1], 3),
    ).sample
    velocity = velocity.view(1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    x0 = z - sigma * velocity.reshape(z.shape)
    return (decode(x0 / SCALING + SHIFT) + 1) / 2


def stretched(image: Tensor) -> Tensor:
    """The picture with its darkest value at 0 and its brightest at 1."""
    return (image - image.min()) / (image.max() - image.min())


def answer_loss(model, processor, image: Tensor, question: str, answer: str) -> Tensor:
    """Cross-entropy of the tokens that ``answer`` adds to the prompt, for an Idefics3 that takes such pictures."""
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    shown = torch.zeros_like(image[0], dtype=torch.uint8).cpu()  # only its size counts for the prompt
    before, ids = (
        processor(text=[text], images=[[shown]], return_tensors="pt")["input_ids"] for text in (prompt, prompt + answer)
    )
    assert torch.equal(ids[:, : before.shape[1]], before), "the answer merges with the prompt"
    wanted = ids[0, before.shape[1] :]
    pixels = ((image - 0.5) / 0.5)[:, None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    return cross_entropy(logits[0, -len(wanted) - 1 : -1].float(), wanted)
