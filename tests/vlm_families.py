"""Tiny randomly initialised vision language models, one per family, saved the way users have them."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SMALL_TEXT = dict(**SMALL, num_key_value_heads=2)

CORPUS = [
    "Is the horizon in the upper half of the picture? Answer with Yes or No.",
    "Are the colours warm? Is the line thick? Does the picture show a red circle? Yes No maybe definitely",
    "user assistant system User Assistant You are a careful judge of pictures.",
]


def tokenizer(special: list[str], chat_template: str | None, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences, with the family's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
    fast.chat_template = chat_template
    return fast


SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor

    special = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", "<pad>"]
    words = tokenizer(special, SMOL_TEMPLATE, bos_token=special[0], eos_token=special[1], pad_token="<pad>")
    config = Idefics3Config(
        vision_config=dict(
            **SMALL, image_size=64, patch_size=8
        ),
        text_config=dict(model_type="llama", **SMALL_TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = fast("Idefics3")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, words, image_seq_len=16, chat_template=SMOL_TEMPLATE)
    return Idefics3ForConditionalGeneration(config), processor


def fast(name: str) -> type:
    """The torchvision-backed image processor class: ``XFast`` on transformers 4, plain ``X`` on 5."""
    suffix = "Fast" if transformers.__version__.startswith("4.") else ""
    return getattr(transformers, f"{name}ImageProcessor{suffix}")
