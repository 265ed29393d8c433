"""The bundled judge before training: an Idefics3 model of 1.5 M parameters and a processor whose tokenizer is learned
from the questions themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .questions import KEEP_WORDINGS, SUFFIX, WORDINGS

IMAGE_SIDE, PATCH, SHUFFLE, VOCABULARY = 64, 8, 2, 512
IMAGE_TOKENS = (IMAGE_SIDE // PATCH // SHUFFLE) ** 2
ANSWERS = ("Yes", "No")

_SPECIAL = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% else %}{% if loop.first %} {% endif %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_MORE_WORDS = (
    "Assistant: Yes No User: System: You look at a picture and answer. What do you see? There is sky and ground. "
    "Which ball is nearer? Where is the horizon? What colour is it? It is a picture of the sun, red, blue, "
    "orange, black, dark, bright, clean, broken, empty, noisy, left, right, above, below, near, far."
)


def wordings() -> list[str]:
    """Every wording of every question, without the suffix."""
    pairs = [text for upper, lower in WORDINGS.values() for text in upper + lower]
    return pairs + list(KEEP_WORDINGS)


def new_processor() -> Any:
    """A real Idefics3 processor: 64 px, no splitting, byte-level BPE so that any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=_SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([*(text + SUFFIX for text in wordings())] * 2 + [_MORE_WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<pad>",
        additional_special_tokens=_SPECIAL[3:], model_max_length=1024, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    longest = {"longest_edge": IMAGE_SIDE}
    images = Idefics3ImageProcessor(size=longest, max_image_size=longest, do_image_splitting=False,
                                    image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Idefics3Processor(images, fast, image_seq_len=IMAGE_TOKENS, chat_template=_CHAT_TEMPLATE)


def new_model(processor: Any) -> Any:
    """An `Idefics3ForConditionalGeneration` with random weights that fits the processor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}
    config = Idefics3Config(
        vision_config={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "image_size": IMAGE_SIDE, "patch_size": PATCH},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384,
                     "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
                     "max_position_embeddings": 1024, **ids},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=SHUFFLE, **ids,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.update(**ids, max_new_tokens=8, do_sample=False)
    return model


def chat(text: str, pictures: int = 1) -> list[dict[str, Any]]:
    """One question about one picture, or about several at once, as chat messages."""
    return [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]


def save_judge(model: Any, processor: Any, folder: Path) -> None:
    """Write the folder that `AutoModelForImageTextToText` and `AutoProcessor` of transformers 4.57 and 5 load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # transformers 4 reads preprocessor_config.json
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n")
