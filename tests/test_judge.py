"""The judge against plain transformers calls, on a tiny random model."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests import vlm_families as families
from dual_process.vlm.judge import Judge
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    torch.manual_seed(0)
    model, processor = families.idefics3()
    folder = tmp_path_factory.mktemp("VLM") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_judge(folder)


def test_scores_are_those_of_a_plain_forward(judge):
    image = torch.rand(1, 3, 48, 64)
    question = Question("Is the line thick?")
    prompt = judge.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
        add_generation_prompt=True,
    )
    inputs = judge.processor(
        images=[[image[0]]], text=[prompt], do_rescale=False, add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        expected = judge.model(**inputs).logits[0, -1].log_softmax(-1)
    token = judge.processor.tokenizer.convert_tokens_to_ids("ĠYes")
    assert judge.log_likelihood(image, [question]).item() == pytest.approx(expected[token].item(), abs=1e-5)


def test_gradient_reaches_the_pixels_and_nothing_else(judge):
    image = torch.rand(2, 3, 48, 64, requires_grad=True)
    judge.log_likelihood(image, [Question("Warm?"), Question("Warm?", "No")]).sum().backward()
    assert image.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in judge.model.parameters())


def test_opposite_keeps_case():
    assert Question("Warm?", "yes").opposite().answer == "no"
    assert Question("Warm?", "No").opposite().answer == "Yes"
    assert Question("Warm?", "blue").opposite() is None
    assert Question("Warm?", " YES. ").opposite().answer == "NO."


def test_answers_that_a_judge_never_gives_are_found():
    from dual_process.vlm.answers import never_answered

    given = {"Warm?": (0.6, 0.2), "Say whether.": (0.04, 0.05)}

    class Chatty:
        def log_likelihood(self, images, questions, before=None):
            shares = [given[q.text][q.answer == "No"] if q.text in given else 1e-9 for q in questions]
            return torch.tensor(shares).log().expand(len(images), -1)

    asked = [Question("Warm?", "No"), Question("Say whether."), Question("Which?", "blue")]
    assert never_answered(Chatty(), torch.zeros(2, 3, 4, 4), asked) == [asked[1]]


@pytest.mark.parametrize("bad", [dict(text=" "), dict(text="Warm?", answer=""), dict(text="Warm?", weight=-0.5)])
def test_bad_questions_are_refused(bad):
    with pytest.raises(ValueError):
        Question(**bad)
