"""Which tokens of a templated conversation are the answer."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dual_process.tests import vlm_families
from dual_process.vlm.judge import Judge
from dual_process.vlm.question import Question

SIZE = ((64, 64),)


def judge(name: str = "Idefics3", template: str | None = None, **options) -> Judge:
    model, processor = vlm_families.build(name)
    if template is not None:
        processor.chat_template = template
    return Judge(model, vlm_families.tensor_backed(processor), name, **options)


def words(judge: Judge, question: str, answer: str) -> tuple[str, list[str]]:
    """The prompt's text as fed, and the answer's tokens."""
    prompt = judge.prompts.encode(question, answer, SIZE)
    tokenizer = judge.processor.tokenizer
    return tokenizer.decode(prompt.inputs["input_ids"][0]), tokenizer.convert_ids_to_tokens(list(prompt.answer))


def test_leading_space_is_the_templates_own():
    assert words(judge("Idefics3"), "Warm?", "Yes")[1] == ["ĠYes"]  # "Assistant: Yes"
    assert words(judge("Qwen2-VL"), "Warm?", "Yes")[1] == ["Yes"]  # "assistant\nYes"


def test_spaces_typed_around_the_answer_do_not_count():
    one = judge("Qwen2-VL")
    assert words(one, "Warm?", "  Yes ") == words(one, "Warm?", "Yes")


def test_several_tokens_without_the_end_of_turn():
    prompt, answer = words(judge("Qwen2-VL"), "Warm?", "maybe definitely")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer == ["maybe", "Ġdefinitely"]


def test_several_tokens_are_averaged():
    one = judge("Idefics3")
    image = torch.rand(1, 3, 64, 64)
    whole = one.log_likelihood(image, [Question("Warm?", "maybe definitely")])
    first = one.log_likelihood(image, [Question("Warm?", "maybe")])
    prompt = one.prompts.encode("Warm?", "maybe definitely", SIZE)
    fed = torch.cat([prompt.inputs["input_ids"], torch.tensor([prompt.answer[:1]])], dim=1)
    pixels = one.prompts.inputs.pixels([[image[0]]])
    with torch.no_grad():
        logp = one.model(input_ids=fed, **pixels).logits[0, -1].log_softmax(-1)
    assert whole.item() == pytest.approx((first.item() + logp[prompt.answer[1]].item()) / 2, abs=1e-5)


def test_a_merge_at_the_boundary_belongs_to_the_answer():
    model, processor = vlm_families.build("Idefics3")
    processor.tokenizer.add_tokens(AddedToken("YesNo", normalized=False))
    model.resize_token_embeddings(len(processor.tokenizer))
    one = Judge(model, vlm_families.tensor_backed(processor), "Idefics3", template="<|im_start|>{image}{question} Yes")
    prompt, answer = words(one, "Warm?", "Up")
    assert prompt.endswith("Warm? Yes") and answer == ["U", "p"]
    prompt, answer = words(one, "Warm?", "No")
    assert prompt.endswith("Warm?") and answer == ["Ġ", "YesNo"]


def test_a_template_that_opens_answered_turns_with_more_than_it_prompts_with():
    thinking = vlm_families.chatml("<|vision_start|><|image_pad|><|vision_end|>").replace(
        "<|im_start|>{{ message.role }}\n",
        "<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
    )
    prompt, answer = words(judge("Qwen2-VL", template=thinking), "Warm?", "in")  # as in "think"
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert answer == ["in"]


def test_an_answer_that_repeats_the_question_is_found_behind_it():
    prompt, answer = words(judge("Qwen2-VL"), "Yes or No?", "Yes or No?")
    assert prompt.count("Yes or No?") == 1
    assert "".join(answer).replace("Ġ", " ") == "Yes or No?"


def test_system_prompt_and_suffix_are_asked_too():
    prompt, _ = words(judge("Qwen2-VL", system="You are careful.", suffix="Answer with Yes or No."), "Warm?", "Yes")
    assert "You are careful." in prompt
    assert "Warm? Answer with Yes or No.<|im_end|>" in prompt


def test_no_chat_template_is_one_sentence():
    with pytest.raises(ValueError, match="has no chat template: choose an instruction-tuned model"):
        judge("Qwen2-VL", template="")


@pytest.mark.parametrize("template, missing", [("{image} Answer:", "{question}"), ("{question}", "{image}")])
def test_a_prompt_template_without_one_of_its_places_is_one_sentence(template, missing):
    model, processor = vlm_families.build("Qwen2-VL")
    with pytest.raises(ValueError, match=f"The prompt template of Qwen2-VL has no {missing}. Write, for example"):
        Judge(model, processor, "Qwen2-VL", template=template)


def test_a_prompt_template_may_have_the_models_own_token_for_a_picture():
    model, processor = vlm_families.build("Qwen2-VL")
    own, ours = (
        Judge(model, processor, "Qwen2-VL", template=image + "{question}").prompts.render("Warm?", 1)
        for image in (processor.image_token, "{image}")
    )
    assert own == ours and processor.image_token in own


def test_a_prompt_template_is_all_that_is_told():
    model, processor = vlm_families.build("Qwen2-VL")
    with pytest.raises(ValueError, match="write the system prompt into it"):
        Judge(model, processor, "Qwen2-VL", system="You are careful.", template="{image} {question}")


def test_a_template_that_drops_answers_is_one_sentence():
    silent = vlm_families.chatml("<|image_pad|>").replace(
        "{% for part in", "{% if message.role == 'user' %}{% for part in"
    )
    silent = silent.replace("{% endif %}{% endfor %}<|im_end|>", "{% endif %}{% endfor %}{% endif %}<|im_end|>")
    with pytest.raises(ValueError, match="drops the assistant's answer"):
        words(judge("Qwen2-VL", template=silent), "Warm?", "Yes")


def test_an_answer_outside_the_vocabulary_is_one_sentence():
    model, processor = vlm_families.build("Qwen2-VL")
    small = Tokenizer(
        models.WordLevel({"<unk>": 0, "Warm?": 1, "Yes": 2, "No": 3, "<|image_pad|>": 4}, unk_token="<unk>")
    )
    small.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="<unk>")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    one = Judge(model, vlm_families.tensor_backed(processor), "small", template="{image} {question} ")
    assert words(one, "Warm?", "Yes")[1] == ["Yes"]
    with pytest.raises(ValueError, match='no token for the answer "umbrella"'):
        one.prompts.encode("Warm?", "umbrella", SIZE)
