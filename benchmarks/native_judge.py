"""Could a VLM that ComfyUI itself loads as CLIP be the judge, without transformers' model code?

    COMFYUI_PATH=... python3 dev.py bench native_judge --json native_judge.json

Builds ComfyUI's own Qwen3-VL tiny and random, asks for the log-likelihood of an answer, and compares autograd with
finite differences at the pixels. What was found on ComfyUI 0.33.0: the logits are there and the pictures stay attached
to their graph, but core's transformer block adds its residual with ``out=``, which autograd refuses. With that one
addition made out of place the gradient is right; the node Judge from CLIP does so. ComfyUI 0.3.75 has no Qwen3-VL.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dual_process.demo.comfyui import comfyui_folder, use_comfyui
from dual_process.vlm.native import AddOutOfPlace

QUESTION, ANSWER_TOKEN = "Is the line thick?", 9454  # "Yes" in Qwen's vocabulary


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


def log_likelihood(encoder, tokenizer, image: Tensor) -> Tensor:
    """log P(Yes) of one picture ``[1, H, W, 3]`` through core's own tokenizer, vision tower and logits."""
    clip = getattr(encoder, encoder.clip)
    model = clip.transformer
    (batch,) = tokenizer.tokenize_with_weights(QUESTION, image=image).values()
    embeds, _, _, info = clip.process_tokens([[token[0] for token in row] for row in batch], "cpu")
    positions, where, deepstack = model.build_image_inputs(embeds, info)
    hidden = model.model.forward(
        None, embeds=embeds, position_ids=positions, visual_pos_masks=where, deepstack_embeds=deepstack
    )[0]
    return model.logits(hidden)[0, -1].float().log_softmax(-1)[ANSWER_TOKEN]


def gradient_error(encoder, tokenizer) -> float:
    """Relative error of autograd against central differences along the gradient."""
    image = torch.rand(1, 64, 96, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_likelihood(encoder, tokenizer, image), image)
    length = gradient.norm().item()
    step = 0.02 * gradient / length
    with torch.no_grad():
        rise = log_likelihood(encoder, tokenizer, image + step) - log_likelihood(encoder, tokenizer, image - step)
    return abs(rise.item() / 0.04 / length - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    arguments = parser.parse_args()
    folder = comfyui_folder()
    with tempfile.TemporaryDirectory() as base:
        use_comfyui(Path(base), folder)
        from comfyui_version import __version__

        report: dict[str, object] = {"comfyui": __version__}
        try:
            encoder, tokenizer = tiny_qwen3_vl()
        except ImportError as missing:
            report["qwen3_vl"] = f"absent: {missing}"
        else:
            try:
                report["error_as_it_is"] = gradient_error(encoder, tokenizer)
            except RuntimeError as refusal:
                report["error_as_it_is"] = str(refusal)
            with AddOutOfPlace():
                report["error_with_the_addition_out_of_place"] = gradient_error(encoder, tokenizer)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
