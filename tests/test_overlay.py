"""What the judge is shown under each guide, pixel by pixel, and its derivative."""

from __future__ import annotations

import json

import pytest
import torch

from dual_process.benchmarks.matrix_judges import picture
from dual_process.tests import vlm_families
from dual_process.vlm.guides import Horizon, Points
from dual_process.vlm.judge import Judge
from dual_process.vlm.overlay import (
    SOLID,
    TRANSPARENT,
    BeforeAfter,
    Beside,
    Overlay,
    PlacedPicture,
    by_guide,
    look_by_guide,
    on_white,
)
from dual_process.vlm.question import Question

RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
GREY = torch.full((1, 3, 16, 32), 0.4)
BESIDE = Beside(picture((40, 56), seed=5)[0])
GUIDES = {
    "solid": Overlay(Points((0.3, 0.3), (0.7, 0.7))),
    "half opaque": Overlay(PlacedPicture(torch.rand(3, 9, 7), scale=0.5), opacity=0.5),
    "transparent": Overlay(Horizon(0.6), TRANSPARENT),
    "beside": BESIDE,
    "before/after": BeforeAfter(),
}


def over(image, drawing, show=SOLID, opacity=1.0):
    """The one picture that is shown."""
    (seen,) = Overlay(drawing, show, opacity).shown([image])
    return seen


def test_a_placed_picture_covers_exactly_its_pixels():
    seen = over(GREY, PlacedPicture(RED, x=0.25, y=0.5, scale=0.5))
    expected = GREY.clone()
    expected[..., 4:12, 4:12] = RED
    assert torch.equal(seen, expected)


def test_what_reaches_beyond_the_frame_is_cut_off():
    seen = over(GREY, PlacedPicture(RED, x=1.0, y=0.0, scale=1.0))
    expected = GREY.clone()
    expected[..., :8, 24:] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(("stretch", "columns"), [(False, slice(8, 24)), (True, slice(0, 32))])
def test_fitting_keeps_the_shape_or_fills_the_frame(stretch, columns):
    seen = over(GREY, PlacedPicture(RED, stretch=stretch))
    expected = GREY.clone()
    expected[..., columns] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert torch.allclose(seen, expected, atol=1e-6)


def test_white_is_clear_unless_there_is_an_alpha():
    image = RED.clone()
    image[:, :, 4:] = 1.0
    places = {"x": 0.25, "scale": 0.5}
    clear = over(GREY, PlacedPicture(image, **places))
    assert torch.equal(clear[..., 8:12], GREY[..., 8:12]) and (clear[0, 0, 4:12, 4:8] == 1).all()
    alpha = torch.zeros(8, 8)
    alpha[:, 4:] = 0.25
    covered = over(GREY, PlacedPicture(image, alpha, **places))
    assert torch.equal(covered[..., :8], GREY[..., :8])
    assert torch.allclose(covered[..., 4:12, 8:12], torch.tensor(0.75 * 0.4 + 0.25))


def test_opacity_mixes_and_transparent_mixes_the_white_paper_too():
    placed = PlacedPicture(RED, x=0.25, scale=0.5)
    half = over(GREY, placed, opacity=0.5)
    assert torch.allclose(half[0, :, 8, 8], torch.tensor([0.7, 0.2, 0.2]))
    assert torch.equal(half[..., 12:], GREY[..., 12:])
    washed = over(GREY, placed, TRANSPARENT)
    assert torch.allclose(washed[0, :, 8, 8], torch.tensor([0.7, 0.2, 0.2]))
    assert torch.allclose(washed[..., 12:], torch.tensor(0.7))
    assert torch.allclose(over(GREY, placed, TRANSPARENT, 0.5)[..., 12:], torch.tensor(0.55))


def test_values_outside_the_range_are_left_alone_where_the_guide_is_clear():
    image = torch.linspace(-1, 2, 16 * 32).view(1, 1, 16, 32).expand(2, 3, -1, -1)
    seen = over(image, PlacedPicture(RED, scale=0.5))
    assert torch.equal(seen[..., 20:], image[..., 20:])


def test_order_of_what_is_shown():
    first, image = picture((24, 24), 1, rows=2), picture((16, 32), 2, rows=2)
    reference, guide, seen = BESIDE.shown([first, image])
    assert reference is first and seen is image and torch.equal(guide[1], BESIDE.image) and len(guide) == 2
    before, after = BeforeAfter().shown([first, image], before=image + 1)
    assert after is image and torch.equal(before, image + 1)
    assert BeforeAfter().shown([first, image]) == [first, image]
    with pytest.raises(ValueError, match="connect the picture before as reference"):
        BeforeAfter().shown([image])


def test_a_guide_shown_in_inference_mode_still_trains():
    """ComfyUI previews in inference mode what is trained with later."""
    guide = Overlay(Horizon(0.5))
    with torch.inference_mode():
        guide.shown([GREY.clone()])
    image = GREY.clone().requires_grad_()
    guide.shown([image])[0].square().sum().backward()
    assert image.grad.abs().max() > 0


@pytest.fixture(scope="module")
def judge() -> Judge:
    return vlm_families.judge("Qwen2-VL")


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_gradient_through_each_guide_is_that_of_finite_differences(judge, guide):
    """Along the gradient from the judge's answer, for two wide pictures at once."""
    image, before = picture((40, 72), 3, rows=2).requires_grad_(), picture((40, 72), 4, rows=2)
    asked = [Question("Is the line thick?", guide=guide)]
    (gradient,) = torch.autograd.grad(judge.log_likelihood(image, asked, before).sum(), image)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    length = gradient.norm().item()
    step = 0.01 * gradient / length
    with torch.no_grad():
        rise = judge.log_likelihood(image + step, asked, before) - judge.log_likelihood(image - step, asked, before)
    assert rise.sum().item() / 0.02 == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("name", ["solid", "half opaque", "transparent"])
def test_the_overlay_itself_against_finite_differences(name):
    image = torch.rand(1, 3, 6, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: GUIDES[name].shown([x])[0], image)


def test_nothing_passes_where_the_guide_covers():
    image = GREY.clone().requires_grad_()
    over(image, PlacedPicture(RED, x=0.25, scale=0.5)).sum().backward()
    expected = torch.ones_like(GREY)
    expected[..., 4:12, 4:12] = 0
    assert torch.equal(image.grad, expected)


def test_questions_with_several_guides_at_once_are_those_one_by_one(judge):
    images, before = picture((40, 72), 3, rows=2).requires_grad_(), picture((40, 72), 4, rows=2)
    texts = ["Is the line thick?", "Are the colours warm?"]
    asked = [Question(text, guide=guide) for text in texts for guide in (None, *GUIDES.values())]
    asked += [question.opposite() for question in asked]
    at_once = judge.log_likelihood(images, asked, before)
    alone = torch.cat([judge.log_likelihood(images, [question], before) for question in asked], dim=1)
    assert at_once.shape == (2, 24) and torch.allclose(at_once, alone, atol=1e-4)
    weights = torch.randn(at_once.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((scores * weights).sum(), images)[0] for scores in (at_once, alone)]
    assert torch.allclose(*gradients, atol=1e-4 * gradients[0].abs().max().item())


def test_questions_with_one_guide_share_a_look(judge, monkeypatch):
    looks = []
    look = judge.look
    monkeypatch.setattr(judge, "look", lambda *arguments: looks.append(1) or look(*arguments))
    guide = GUIDES["solid"]
    asked = [Question("Warm?", guide=guide), Question("Warm?"), Question("Is the line thick?", "No", guide=guide)]
    judge.log_likelihood(picture(), [*asked, *(question.opposite() for question in asked)])
    assert len(looks) == 2


def test_a_guide_changes_the_answer_and_none_does_not(judge):
    image, question = picture((48, 64)), Question("Is the line thick?")
    guide = GUIDES["solid"]
    (seen,) = guide.shown([image])
    shown = judge.log_likelihood(image, [Question(question.text, guide=guide)])
    assert torch.equal(shown, judge.log_likelihood(seen, [question]))
    assert (shown - judge.log_likelihood(image, [question])).abs() > 1e-3


def test_a_guide_beside_goes_before_the_picture(judge):
    image = picture((48, 64))
    shown = judge.log_likelihood(image, [Question("Is the second one warmer?", guide=BESIDE)])
    expected = judge.log_likelihood([BESIDE.image[None], image], [Question("Is the second one warmer?")])
    assert torch.equal(shown, expected)


def test_the_opposite_and_the_grouping_keep_the_guide():
    one, other = GUIDES["solid"], GUIDES["transparent"]
    asked = [Question("a", guide=one), Question("b"), Question("c", guide=other), Question("d", guide=one)]
    assert asked[0].opposite() == Question("a", "No", guide=one)
    assert by_guide(asked) == {one: [0, 3], None: [1], other: [2]}


def test_a_family_that_takes_one_picture_refuses_two_before_training():
    model, processor = vlm_families.build("Idefics3")
    processor.chat_template = processor.chat_template.replace("{% else %}<image>", "{% elif loop.first %}<image>")
    judge = Judge(model, vlm_families.tensor_backed(processor), "Idefics3")
    judge.check([Question("Warm?", guide=GUIDES["solid"])])
    with pytest.raises(ValueError, match="cannot be shown 2 pictures at once"):
        judge.check([Question("Warmer?", guide=BESIDE)])


def test_the_story_is_enough_to_draw_it_again():
    assert GUIDES["transparent"].story() == {"show": "transparent", "opacity": 1.0, "Horizon": {"height": 0.6}}
    assert BeforeAfter().story() == {"show": "before/after"}
    placed = Overlay(PlacedPicture(RED, x=0.25)).story()["PlacedPicture"]
    assert placed["image"].startswith("3x8x8 sha256 ") and placed["x"] == 0.25 and placed["alpha"] is None
    assert placed["image"] != BESIDE.story()["image"]
    json.dumps([guide.story() for guide in GUIDES.values()])


@pytest.mark.parametrize("bad", [{"x": 1.2}, {"y": -0.1}])
def test_a_place_outside_the_frame_is_one_sentence(bad):
    with pytest.raises(ValueError, match="of the guide is .*: give a share from 0 to 1"):
        PlacedPicture(RED, **bad)


def test_only_what_compares_is_asked_with_the_picture_before():
    """Beside a question that compares, another is about the picture alone, not about the two."""
    pictures = [torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)]
    compares, plain = Question("Is the second warmer?", guide=BeforeAfter()), Question("Is it a beach?")
    asked = []

    def look(shown, questions):
        asked.append(len(shown))
        return torch.zeros(1, len(questions))

    look_by_guide(look, pictures, [compares, plain], None)
    look_by_guide(look, pictures, [plain], None)
    assert asked == [2, 1, 2], "without a question that compares, a reference belongs to all"


def test_on_white():
    drawn = on_white(PlacedPicture(RED, x=0.25, scale=0.5).draw(16, 32))
    assert (drawn[:, :, 12:] == 1).all() and drawn[:, 8, 8].tolist() == [1, 0, 0]
