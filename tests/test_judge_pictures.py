"""Several pictures in one question, batches, odd sizes, and what the judge saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dual_process.benchmarks.matrix_judges import picture
from dual_process.tests import vlm_families
from dual_process.vlm import shared
from dual_process.vlm.judge import Judge
from dual_process.vlm.question import Question
from dual_process.vlm.ranking import rank, score_table
from dual_process.vlm.seen import seen_picture

CHANGED = Question("Did the second picture get warmer?")
SEVERAL = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Idefics2", "Idefics3", "LLaVA", "LLaVA-NeXT", "LLaVA-OneVision"]
SEVERAL += ["Gemma 3", "Mistral 3", "InternVL"]


def blank() -> Image.Image:
    return Image.new("RGB", (64, 40))


@pytest.fixture(scope="module")
def judges():
    made: dict[str, Judge] = {}

    def get(name: str) -> Judge:
        if name not in made:
            made[name] = vlm_families.judge(name)
        return made[name]

    return get


@pytest.mark.parametrize("name", SEVERAL)
def test_two_pictures_in_order(judges, name):
    judge = judges(name)
    before, after = picture((40, 64), 1).requires_grad_(), picture((40, 64), 2, rows=2).requires_grad_()
    scores = judge.log_likelihood([before, after], [CHANGED, Question("Are they the same?")])
    assert scores.shape == (2, 2)
    scores.sum().backward()
    assert before.grad.abs().max() > 0 and after.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    with torch.no_grad():
        swapped = judge.log_likelihood([after[:1], before], [CHANGED])
        alone = judge.log_likelihood([before, after[1:]], [CHANGED])
    assert (swapped[0, 0] - scores[0, 0]).abs() > 1e-4
    assert alone.item() == pytest.approx(scores[1, 0].item(), abs=1e-4)


def test_two_pictures_of_different_sizes(judges):
    scores = judges("Qwen2.5-VL").log_likelihood([picture((64, 64)), picture((40, 96))], [CHANGED])
    assert scores.isfinite().all()


def test_a_template_for_one_picture_is_one_sentence(judges):
    model, processor = vlm_families.build("Idefics3")
    processor.chat_template = processor.chat_template.replace("{% else %}<image>", "{% elif loop.first %}<image>")
    with pytest.raises(ValueError, match="Idefics3 cannot be shown 2 pictures at once"):
        Judge(model, vlm_families.tensor_backed(processor), "Idefics3").log_likelihood(
            [picture(), picture()], [CHANGED]
        )


def test_values_outside_the_range_keep_their_gradient(judges):
    image = (picture() * 3 - 1).requires_grad_()
    judges("Idefics3").log_likelihood(image, [CHANGED]).sum().backward()
    outside = (image < 0) | (image > 1)
    assert outside.any() and image.grad[outside].abs().max() > 0


def test_half_precision_judges_hand_back_fp32_gradients():
    judge = vlm_families.judge("Qwen2.5-VL")
    image = picture().requires_grad_()
    asked = [Question("Warm?"), Question("Is the line thick?")]
    scores = judge.log_likelihood(image, asked)
    judge.model.bfloat16()
    half = judge.log_likelihood(image, asked)
    half.sum().backward()
    assert half.dtype == image.grad.dtype == torch.float32
    assert (half - scores).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_falls_back_loudly_where_image_tokens_see_the_question(caplog, dtype):
    judge = vlm_families.judge("PaliGemma")
    judge.model.to(dtype)
    judge.log_likelihood(picture(), [Question("Warm?"), Question("Is the line thick?")])
    assert "PaliGemma cannot share one look" in caplog.text
    assert "the beginning of its prompt sees the end" in caplog.text


def test_sharing_falls_back_loudly_where_the_cache_is_continued_wrongly(caplog, monkeypatch):
    right = shared._continued
    monkeypatch.setattr(shared, "_continued", lambda *arguments: right(*arguments) + 1)
    judge = vlm_families.judge("Qwen2-VL")
    asked = [Question("Warm?"), Question("Is the line thick?")]
    scores = judge.log_likelihood(picture(), asked)
    assert "Qwen2-VL cannot share one look" in caplog.text and "log-likelihoods differ by" in caplog.text
    assert torch.equal(scores, torch.cat([judge.log_likelihood(picture(), [one]) for one in asked], dim=1))


def test_answers_of_several_tokens_where_the_prompt_sees_them_are_one_sentence(judges):
    with pytest.raises(ValueError, match="answer of 2 tokens cannot be scored"):
        judges("PaliGemma").log_likelihood(picture(), [Question("Warm?", "maybe definitely")])


def test_a_processor_that_cuts_the_gradient_is_one_sentence():
    model, processor = vlm_families.build("Idefics3")
    own = type(processor.image_processor).__call__
    processor.image_processor.__class__ = type(
        "Detaching", (type(processor.image_processor),), {"__call__": torch.no_grad()(own)}
    )
    with pytest.raises(ValueError, match="Detaching. cuts the gradient"):
        Judge(model, processor, "Idefics3")


def test_a_picture_is_asked_about_with_or_without_a_batch_dimension(judges):
    judge = judges("Qwen2-VL")
    image = picture()[0]
    assert judge.ask(image, "What is it?", 5) == judge.ask(image[None], "What is it?", 5) != ""


@pytest.mark.parametrize(("name", "tiles"), [("Idefics3", 1), ("SmolVLM", 5), ("Qwen2-VL", 1), ("LLaVA", 1)])
def test_what_was_seen_is_what_was_normalised(judges, name, tiles):
    if name == "SmolVLM":
        pytest.importorskip("num2words")
    judge = judges(name)
    image = picture((64, 64))[0]
    seen = seen_picture(judge.prompts.inputs, [image])
    side = seen.shape[1]
    assert seen.shape == (3, side, tiles * side + 4 * (tiles - 1))
    mean = seen[..., :side].mean(dim=(1, 2)) if tiles == 1 else image.mean(dim=(1, 2))
    assert torch.allclose(mean, image.mean(dim=(1, 2)), atol=0.02)


def test_a_reference_is_seen_first_and_beside(judges):
    before, after = picture((64, 64), 1), picture((64, 64), 2)
    seen = seen_picture(judges("Idefics3").prompts.inputs, [before[0], after[0]])
    assert seen.shape == (3, 64, 132)
    assert torch.allclose(seen[..., :64], before[0], atol=0.02) and torch.allclose(seen[..., 68:], after[0], atol=0.02)


def against_the_other(judge, images, asked):
    """Probability of the wanted one of Yes and No, of the two alone."""
    wanted, other = (
        judge.log_likelihood(images, [replace(q, answer=answer) for q in asked]) for answer in ("Yes", "No")
    )
    yes = (wanted - other).sigmoid()
    return torch.where(torch.tensor([q.answer == "No" for q in asked]), 1 - yes, yes)


@pytest.mark.parametrize("rows", [1, 2])
def test_ranking_beside_a_reference(judges, rows):
    judge, asked = judges("Qwen2-VL"), [CHANGED]
    reference, images = picture((40, 64), 3, rows=rows), picture(rows=2)
    _, scores, _ = rank(judge, images, asked, lambda: None, reference)
    assert torch.allclose(scores, against_the_other(judge, [reference, images], asked), atol=1e-5)
    assert not torch.allclose(scores, against_the_other(judge, images, asked), atol=1e-5)
    with pytest.raises(ValueError, match="3 references for 2 pictures"):
        rank(judge, images, asked, lambda: None, picture(rows=3))


def test_ask_about_two_pictures(judges):
    judge = judges("Qwen2-VL")
    before, after = picture(seed=1), picture(seed=2)
    with torch.no_grad():
        inputs = judge.processor(
            text=[judge.prompts.render("What changed?", 2)], images=[[blank(), blank()]], return_tensors="pt"
        )
        inputs |= judge.prompts.inputs.pixels([[before[0], after[0]]])
        said = judge.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    expected = judge.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert judge.ask([before, after], "What changed?", 4) == expected != ""


def test_ranking_puts_the_best_first_and_stops_when_told(judges):
    judge = judges("Idefics3")
    asked = [Question("Warm?"), Question("Which season?", "Spring"), Question("Is the line thick?", "No", weight=3.0)]
    images = picture(rows=3)
    order, scores, means = rank(judge, images, asked, lambda: None)
    expected = against_the_other(judge, images, asked)
    expected[:, 1] = judge.log_likelihood(images, asked[1:2])[:, 0].exp()
    assert torch.allclose(scores, expected, atol=1e-5)
    assert torch.allclose(means, (expected[:, 0] + expected[:, 1] + 3 * expected[:, 2]) / 5, atol=1e-5)
    assert means[order].diff().max() <= 0
    heading, *_, first, second, third = score_table(order, scores, means, asked).splitlines()
    assert heading.startswith("picture  mean   q1") and [line[:3] for line in (first, second, third)] == [
        "q1:",
        "q2:",
        "q3:",
    ]

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        rank(judge, images, asked, stop)
    with pytest.raises(ValueError, match="weight 0"):
        rank(judge, images, [Question("Warm?", weight=0.0)], lambda: None)
