"""A VLM that ComfyUI itself loads as CLIP, tiny and random."""

from __future__ import annotations

import torch


def tiny_qwen3_vl() -> tuple[torch.nn.Module, object]:
    """ComfyUI's Qwen3-VL text encoder, a few hundred thousand weights large, and its tokenizer."""
    import comfy.text_encoders.qwen3vl as core

    core.QWEN3VL_VISION["qwen3vl_4b"] = dict(
        hidden_size=64, intermediate_size=128, depth=3, deepstack_visual_indexes=[0, 1, 2]
    )
    core.QWEN3VL_VISION_COMMON.update(num_heads=4, num_position_embeddings=64)
    small = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2)
    small.update(num_key_value_heads=2, head_dim=64, rope_dims=[12, 10, 10])
    core.QWEN3VL_CONFIGS["qwen3vl_4b"] = type("Tiny", (core.QWEN3VL_CONFIGS["qwen3vl_4b"],), small)
    core.QWEN3VL_CONFIGS["qwen3vl_4b"].__init__ = lambda self: None  # the class attributes are the configuration
    torch.manual_seed(0)
    encoder = core.te(model_type="qwen3vl_4b")(device="cpu", dtype=torch.float32).requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return encoder, core.tokenizer("qwen3vl_4b")()
