"""Students and judges to measure a step on: the bundled ones, and random ones of any size."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from dual_process.demo.comfyui import use_comfyui
from dual_process.tests.vlm_families import tensor_backed
from dual_process.tests.vlm_words import CORPUS, SMOL, qwen_words, smol_words
from dual_process.trainers.objective import LIKELIHOOD, Objective
from dual_process.vlm.judge import Judge
from dual_process.vlm.question import Question

QUESTIONS = [
    "Is the overlaid red line aligned with the horizon of the scene?",
    "Do the predominant colors of the image match the color palette at the bottom?",
    "Is Point B much closer to the camera than Point A in this picture?",
    "Are there visible layers or separation between the oil and water?",
    "Does the composition of the image match the overlaid red instructions?",
]
PIXELS_PER_LATENT = 8


@dataclass
class Pair:
    """What a step needs: ``student(checkpointed)`` makes the student, ``judge`` is a ``ManagedJudge``."""

    name: str
    student: callable
    judge: object

    def objective(self, questions: int) -> Objective:
        """Cross-entropy of Yes, as published, for the first ``questions`` questions."""
        return Objective([Question(text) for text in QUESTIONS[:questions]], LIKELIHOOD)


def start_comfyui() -> None:
    """Make ComfyUI importable in this process."""
    use_comfyui(Path(tempfile.mkdtemp(prefix="dual_process_")))


def bundled(batch: int = 16) -> Pair:
    """The models of the pack, with the template's batch of 64 px pictures."""
    from dual_process.benchmarks.bundled import Laboratory

    laboratory = Laboratory()

    def student(checkpointed: bool):
        student = laboratory.student(batch=batch)
        student.recompute.on = checkpointed
        return student

    return Pair("bundled", student, laboratory.judge)


def random_pair(
    name: str,
    architecture,
    judge: Judge,
    side: int,
    batch: int = 1,
    rank: int = 16,
    prompts: int = 1,
    tokens: tuple[int, int] = (77, 48),
    model=None,
    vae=None,
) -> Pair:
    """A random model of an ``Architecture`` drawing pictures of ``side`` px in four steps, and a judge.

    Args:
        tokens: number and width of the tokens of a prompt.
        model, vae: where they are not to be made here.
    """
    import comfy.samplers

    from dual_process.tests import architectures as lab
    from dual_process.trainers.comfy_memory import ManagedJudge
    from dual_process.trainers.comfy_student import ComfyStudent

    model = model or lab.assemble(architecture)
    channels, latent = architecture.latent[1], side // PIXELS_PER_LATENT
    vae = vae or small_vae(channels)

    def student(checkpointed: bool) -> ComfyStudent:
        return ComfyStudent(
            model,
            vae,
            [lab.conditioning(architecture, seed, *tokens) for seed in range(prompts)],
            None,
            {"samples": torch.zeros(batch, channels, latent, latent)},
            comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4),
            comfy.samplers.sampler_object("euler"),
            rank=rank,
            alpha=float(rank),
            checkpointed=checkpointed,
        )

    return Pair(name, student, ManagedJudge(judge))


def small_vae(channels: int, width: int = 16):
    """A random decoder in TAESD's form, ``width`` channels wide (TAESD: 64): a small part of a step, as an
    AutoencoderKL is beside FLUX."""
    from dual_process.tests.architectures import LinearVAE, randomise

    class SmallVAE(LinearVAE):
        def spacial_compression_decode(self):
            return PIXELS_PER_LATENT

    def convolution(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    layers = [convolution(channels, width), nn.ReLU()]
    for _ in range(3):
        layers += [_Residual(*(convolution(width, width) for _ in range(3))) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), convolution(width, width)]
    decoder = nn.Sequential(*layers, _Residual(*(convolution(width, width) for _ in range(3))), convolution(width, 3))
    randomise(decoder, seed=7, gain=0.5)
    vae = SmallVAE(channels)
    vae.first_stage_model.decoder, vae.first_stage_model.decode = decoder, decoder.forward
    return vae


class _Residual(nn.Sequential):
    def forward(self, x):
        first, *others = self
        y = first(x)
        for layer in others:
            y = layer(y.relu())
        return (x + y).relu()


def sd3(depth: int):
    """Stable Diffusion 3's MMDiT: ``depth`` blocks, 64 times as wide."""
    from dual_process.tests import architectures as lab

    architecture = copy.deepcopy(lab.ARCHITECTURES["SD3"])
    architecture.config.update(depth=depth, pos_embed_max_size=64, num_patches=4096, x_block_self_attn_layers=[])
    architecture.config["context_embedder_config"]["params"]["out_features"] = 64 * depth
    return architecture


def flux(heads: int, double: int, single: int, head: int = 64, context: int | None = None):
    """FLUX schnell with ``double`` and ``single`` blocks of ``heads`` heads."""
    from dual_process.tests import architectures as lab

    architecture = copy.deepcopy(lab.ARCHITECTURES["FLUX schnell"])
    axes = [head // 8, head * 7 // 16, head * 7 // 16]
    architecture.config.update(hidden_size=heads * head, num_heads=heads, axes_dim=axes)
    architecture.config.update(depth=double, depth_single_blocks=single, context_in_dim=context or lab.CONTEXT)
    return architecture


def smol_judge(vision: tuple[int, int], text: tuple[int, int], side: int) -> Judge:
    """SmolVLM's form with SmolVLM-256M's vocabulary and random weights, fp32.

    Args:
        vision, text: (layers, width) of the vision tower and of the language model; heads are 64 wide.
        side: px, the picture's longest edge as the judge sees it; 16 px patches, 16 of them to a token.
    """

    def tower(layers: int, width: int) -> dict:
        return dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64)

    return idefics3(
        dict(**tower(*vision), intermediate_size=4 * vision[1], image_size=side, patch_size=16),
        dict(**tower(*text), intermediate_size=8 * text[1] // 3, num_key_value_heads=text[1] // 64, vocab_size=49280),
        scale_factor=4,
        size=dict(size={"longest_edge": side}, do_image_splitting=False),
    )


def idefics3(
    vision: dict, text: dict, scale_factor: int, size: dict, tie=True, dtype=torch.float32, device="cpu"
) -> Judge:
    """Idefics3, which is also SmolVLM, with random weights made on ``device``.

    Args:
        vision, text: of its configuration.
        scale_factor: its square is the number of patches in a token.
        size: of its image processor, at most how large and whether in tiles.
        tie: whether the words' embeddings are the head too.
    """
    words = smol_words(QUESTIONS + CORPUS)
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=dict(model_type="llama", **text),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=scale_factor,
        tie_word_embeddings=tie,
    )
    images = transformers.Idefics3ImageProcessor(max_image_size={"longest_edge": vision["image_size"]}, **size)
    tokens = (vision["image_size"] // vision["patch_size"] // scale_factor) ** 2
    processor = transformers.Idefics3Processor(images, words, image_seq_len=tokens, chat_template=SMOL)
    return _random_judge(config, processor, "Idefics3, random weights", dtype, device)


def qwen2_5_vl(vision: dict, text: dict, tie: bool, dtype=torch.float32, device="cpu") -> Judge:
    """Qwen2.5-VL with random weights made on ``device``; ``vision`` and ``text`` are of its configuration."""
    words = qwen_words(QUESTIONS + CORPUS)
    mark = words.convert_tokens_to_ids
    section = [16, 24, 24] if text["hidden_size"] // text["num_attention_heads"] == 128 else [8, 12, 12]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=section)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(out_hidden_size=text["hidden_size"], **vision),
        text_config=dict(**text, rope_parameters=rope, rope_scaling=rope),
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
        tie_word_embeddings=tie,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(max_pixels=1280 * 28 * 28),
        words,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=words.chat_template,
    )
    return _random_judge(config, processor, "Qwen2.5-VL, random weights", dtype, device)


def _random_judge(config, processor, name: str, dtype: torch.dtype, device: str) -> Judge:
    with torch.inference_mode(False), torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return Judge(model, tensor_backed(processor), name)


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
