"""The last stage of the judge's training, on the judge that is bundled."""

from pathlib import Path

import pytest
import torch

from dual_process.tiny import oracles, scenes
from dual_process.tiny.build_judge import Pictures, Prompts, answer_ids
from dual_process.tiny.judge_folder import new_processor
from dual_process.tiny.refuse_ruins import Asker, Part, changed, learn, liked, ruined, suspected

JUDGE = Path(scenes.__file__).parent / "judge"


def load():
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(JUDGE, dtype=torch.float32, attn_implementation="eager")
    return model.requires_grad_(False)


@pytest.fixture
def asker():
    processor = new_processor()
    return Asker(Prompts(processor, "cpu"), answer_ids(processor), torch.Generator().manual_seed(3))


def test_what_a_judge_answers_and_teaches_is_compared_with_what_it_was(asker):
    before, model = load(), load()
    embeddings = model.model.vision_model.embeddings.requires_grad_(True)
    good = scenes.render(torch.rand(4, 8, generator=torch.Generator().manual_seed(1)))
    assert [x.item() for x in changed(asker, before, model, good.clone())] == [0, pytest.approx(0, abs=1e-6)]
    with torch.no_grad():
        embeddings.patch_embedding.weight *= 1.2
    kept, bent = changed(asker, before, model, good.clone())
    assert kept > 0.001 and bent > 0.01
    bent.backward()
    assert embeddings.patch_embedding.weight.grad.norm() > 0

    with torch.no_grad():  # twice as sure: the gradient is twice as long, bent is 1
        model.load_state_dict(before.state_dict())
        model.lm_head.weight *= 2
    assert changed(asker, before, model, good.clone())[1].item() == pytest.approx(1, abs=1e-3)


def test_only_what_shall_learn_does(asker):
    before, model = load(), load()
    average = learn(asker, before, model, Pictures(5, "cpu"), Part("embeddings", 2, 1e-3, 1.0))
    old = dict(before.named_parameters())
    moved = {name.split(".")[2] for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved == {"embeddings"} and set(average.weights) == set(old)


def test_ruins_that_the_judge_likes_best_are_learned_from(asker):
    model, blobs = load(), ruined(Pictures(5, "cpu"), ("blobs",), 12)
    with torch.no_grad():
        odds = asker.odds(model, blobs, torch.full((12, 1), asker.clean))[:, 0]
    assert torch.equal(liked(asker, model, blobs, 3), blobs[odds.topk(3).indices])
    assert oracles.measure(blobs)["readable"].float().mean() < 0.5
    assert asker.questions(5).shape == (5, 3) and set(asker.questions(5)[:, 0].tolist()) == {asker.clean}


def test_noisy_pictures_that_the_judge_likes_least_are_forgiven(asker, monkeypatch):
    from dual_process.tiny import refuse_ruins

    before, model, pictures = load(), load(), Pictures(5, "cpu")
    part = Part("", 3, 3e-3, bent=0.0, noisy=30.0)  # at 1 to 3 % of the rate: warm-up takes 100

    def mean_loss(judge) -> float:
        asker.generator.manual_seed(9)
        pictures.generator.manual_seed(9)
        with torch.no_grad():
            return suspected(asker, judge, pictures).item()

    worst = mean_loss(before)
    learn(asker, before, model, pictures, part)
    assert mean_loss(model) < worst
    monkeypatch.setattr(refuse_ruins, "NOISY", (6, 6))
    assert mean_loss(before) < worst, "all noisy pictures, not the least liked"
    blobs = ruined(Pictures(5, "cpu"), ("blobs",), 12)
    most, least = liked(asker, before, blobs, 3), liked(asker, before, blobs, 3, least=True)
    odds = [asker.odds(before, some, asker.is_it_clean(3)).detach().mean() for some in (most, least)]
    assert odds[0] > odds[1]
