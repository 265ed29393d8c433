"""Tiny randomly initialised vision language models, one per family, built the way their authors publish them.

Every builder returns ``(model, processor)``. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from dual_process.tests.vlm_words import GEMMA, LLAMA, MISTRAL, SMOL, VICUNA, chatml, qwen_words, smol_words, tokenizer
from dual_process.vlm.judge import Judge

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ROPE = dict(rope_type="default", rope_theta=10000.0)
TEXT = dict(**SIZES, num_key_value_heads=2)
CLIP = dict(model_type="clip_vision_model", **SIZES, image_size=28, patch_size=7, projection_dim=32)
SIGLIP = dict(model_type="siglip_vision_model", **SIZES, image_size=28, patch_size=7, vision_use_head=False)


def build(name: str, seed: int = 0) -> tuple[torch.nn.Module, object]:
    """The family's model with weights large enough that every path carries signal, and its processor."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[name]()
    enliven(model)
    return model, processor


def judge(name: str, seed: int = 0, **options) -> Judge:
    """The family as a judge, with ``options`` for ``Judge``, without going through a folder."""
    model, processor = build(name, seed)
    return Judge(model, tensor_backed(processor), name, **{"template": TEMPLATES.get(name, ""), **options})


def tensor_backed(processor):
    """The processor with the image processor that loading would give it: transformers 4 builds the PIL one."""
    if transformers.__version__.startswith("4."):
        own = processor.image_processor
        processor.image_processor = getattr(transformers, f"{type(own).__name__}Fast")(**own.to_dict())
    return processor


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Unit-gain weights: the 0.02 of a fresh model leaves attention flat, and then no mistake in it would show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            embedding = "embed" in name and parameter.ndim == 2
            parameter.normal_(0.0, 1.0 if embedding else parameter[0].numel() ** -0.5)
        elif parameter.numel() == 1 or "gate" in name:
            parameter.fill_(0.5)


def qwen(name: str, vision: dict, patch: int):
    """Qwen2-VL, 2.5 and 3 differ in their vision tower and in how position ids are spread over the axes."""
    words = qwen_words()
    ids = {
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
    }
    rope = dict(**ROPE, mrope_section=[2, 3, 3])
    text = dict(**TEXT, vocab_size=len(words), rope_parameters=rope, rope_scaling=rope)
    if name == "Qwen3VL":
        text["head_dim"] = 16
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(depth=2, num_heads=2, patch_size=patch, temporal_patch_size=2, **vision),
        text_config=text,
        tie_word_embeddings=False,
        **ids,
    )
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=4 * (2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2
    )
    videos = getattr(transformers, "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor")()
    kind = {"Qwen2_5_VL": "Qwen2_5_VLProcessor"}.get(name, f"{name}Processor")
    processor = getattr(transformers, kind)(images, words, videos, chat_template=words.chat_template)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def qwen2_vl():
    return qwen("Qwen2VL", dict(embed_dim=32, hidden_size=32, mlp_ratio=2, spatial_merge_size=2), 14)


def qwen2_5_vl():
    vision = dict(hidden_size=32, intermediate_size=64, out_hidden_size=32, window_size=56, fullatt_block_indexes=[1])
    return qwen("Qwen2_5_VL", vision, 14)


def qwen3_vl():
    vision = dict(hidden_size=32, intermediate_size=64, out_hidden_size=32, deepstack_visual_indexes=[0])
    return qwen("Qwen3VL", dict(**vision, num_position_embeddings=64), 16)


def idefics3(name: str = "Idefics3", split: bool = False):
    words = smol_words()
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(**SIZES, image_size=64, patch_size=8),
        text_config=dict(model_type="llama", **TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": 128 if split else 64}, max_image_size={"longest_edge": 64}, do_image_splitting=split
    )
    parts = [images, words]
    if name == "SmolVLM":
        parts.append(transformers.SmolVLMVideoProcessor())
    processor = getattr(transformers, f"{name}Processor")(*parts, image_seq_len=16, chat_template=SMOL)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def smolvlm():
    return idefics3("SmolVLM", split=True)


def idefics2():
    words = smol_words()
    images = transformers.Idefics2ImageProcessor(
        size={"shortest_edge": 42, "longest_edge": 56}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(images, words, image_seq_len=4, chat_template=SMOL)
    perceiver = dict(resampler_n_latents=4, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=16)
    config = transformers.Idefics2Config(
        vision_config=dict(**SIZES, image_size=56, patch_size=14),
        perceiver_config=dict(hidden_size=32, **perceiver, num_key_value_heads=2),
        text_config=dict(model_type="mistral", **TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return transformers.Idefics2ForConditionalGeneration(config), processor


def llava():
    words = tokenizer(["<s>", "</s>", "<image>", "<pad>"], VICUNA, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config=dict(model_type="llama", **TEXT, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next():
    words = tokenizer(["<s>", "</s>", "<image>", "<pad>"], VICUNA, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    grid = [[28, 56], [56, 28], [56, 56]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = transformers.LlavaNextProcessor(
        images,
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=dict(model_type="llama", **TEXT, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        image_seq_length=16,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    template = chatml("<image>\n")
    words = tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>", "<pad>"], template, eos_token="<|im_end|>")
    words.pad_token = "<pad>"
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = transformers.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = transformers.LlavaOnevisionProcessor(
        images,
        words,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=dict(model_type="qwen2", **TEXT, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def gemma3():
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    image = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(
        [*special, *image.values()],
        GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=image,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(images, words, image_seq_length=4, chat_template=GEMMA)
    config = transformers.Gemma3Config(
        vision_config=dict(**SIZES, image_size=56, patch_size=14, vision_use_head=False),
        text_config=dict(**TEXT, head_dim=16, vocab_size=len(words), query_pre_attn_scalar=16, sliding_window=16),
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def paligemma():
    special = ["<pad>", "<bos>", "<eos>", "<image>"]
    words = tokenizer(special, "", "Gemma", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, words)
    config = transformers.PaliGemmaConfig(
        vision_config=dict(**SIGLIP, projection_dim=32),
        text_config=dict(model_type="gemma", **TEXT, head_dim=16, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(words),
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def mistral3():
    special = ["<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>", "[SYSTEM_PROMPT]"]
    words = tokenizer([*special, "[/SYSTEM_PROMPT]"], MISTRAL, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    images = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
    processor = transformers.PixtralProcessor(images, words, patch_size=7, spatial_merge_size=2, chat_template=MISTRAL)
    config = transformers.Mistral3Config(
        vision_config=dict(model_type="pixtral", **SIZES, image_size=56, patch_size=7, head_dim=16),
        text_config=dict(model_type="mistral", **TEXT, head_dim=16, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def pixtral():
    """Pixtral 12B is published as LLaVA with a Pixtral tower."""
    special = ["<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>", "[SYSTEM_PROMPT]"]
    words = tokenizer([*special, "[/SYSTEM_PROMPT]"], MISTRAL, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    images = transformers.PixtralImageProcessor(size={"longest_edge": 28}, patch_size={"height": 7, "width": 7})
    processor = transformers.PixtralProcessor(images, words, patch_size=7, chat_template=MISTRAL)
    config = transformers.LlavaConfig(
        vision_config=dict(model_type="pixtral", **SIZES, image_size=28, patch_size=7, head_dim=16),
        text_config=dict(model_type="mistral", **TEXT, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def internvl():
    template = chatml("<IMG_CONTEXT>\n")
    image = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(
        ["<|im_start|>", "<|im_end|>", "<pad>", *image.values()],
        template,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=image,
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    videos = transformers.InternVLVideoProcessor()
    processor = transformers.InternVLProcessor(images, words, videos, image_seq_length=4, chat_template=template)
    config = transformers.InternVLConfig(
        vision_config=dict(**SIZES, image_size=[28, 28], patch_size=[7, 7]),
        text_config=dict(model_type="qwen2", **TEXT, vocab_size=len(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def mllama():
    special = [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|finetune_right_pad_id|>",
    ]
    words = tokenizer(
        [*special, "<|python_tag|>", "<|image|>"],
        LLAMA,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[4],
    )
    images = transformers.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = transformers.MllamaProcessor(images, words, chat_template=LLAMA)
    config = transformers.MllamaConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=28,
            patch_size=7,
            max_num_tiles=4,
            vision_output_dim=64,
            intermediate_layers_indices=[1],
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        ),
        text_config=dict(**TEXT, vocab_size=len(words), cross_attention_layers=[1], pad_token_id=4, rope_scaling=ROPE),
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )
    return transformers.MllamaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable] = {
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Idefics2": idefics2,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "Gemma 3": gemma3,
    "PaliGemma": paligemma,
    "Mistral 3": mistral3,
    "Pixtral": pixtral,
    "InternVL": internvl,
    "Mllama": mllama,
}
TEMPLATES = {"PaliGemma": "{image}answer en {question}"}
