"""Tokenizers trained on a few sentences, with the special tokens and chat templates of published model families.

The templates are short forms of the published ones: same turn marks, same place for the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Is the horizon in the upper half of the picture? Answer with Yes or No.",
    "Are the colours warm? Is the line thick? Does the picture show a red circle? Yes No maybe definitely",
    "Yes\nNo\nYes\nNo\nmaybe\n",
    "user assistant system User Assistant You are a careful judge of pictures.",
]


def tokenizer(
    special: list[str], template: str = "", kind: str = "", corpus: Sequence[str] = CORPUS, **named
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences, with the family's special tokens.

    ``kind`` names the class that transformers 4 insists on; transformers 5 takes any.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(corpus, trainer)
    of_4 = kind and transformers.__version__.startswith("4.")
    maker = getattr(transformers, f"{kind}TokenizerFast") if of_4 else PreTrainedTokenizerFast
    fast = maker(tokenizer_object=bpe, model_input_names=["input_ids", "attention_mask"], **named)
    fast.chat_template = template or None
    return fast


def chatml(image: str) -> str:
    """The turn marks of Qwen and its relatives."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SMOL = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.role.upper() }}: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}"
    "{% if message.role == 'assistant' %}</s>{% else %} {% endif %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}"
    "[/SYSTEM_PROMPT]{% elif message.role == 'user' %}[INST]{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ message.content[0].text }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
SMOL_TOKENS = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", "<pad>"]


def qwen_words(corpus: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return tokenizer([*special, "<pad>"], chatml(image), "Qwen2", corpus, eos_token="<|im_end|>", pad_token="<pad>")


def smol_words(corpus: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    named = dict(bos_token="<|im_start|>", eos_token=SMOL_TOKENS[1], pad_token="<pad>")
    return tokenizer([*SMOL_TOKENS, "<video>"], SMOL, corpus=corpus, **named)
