"""How the judge is taught guides, and what the bundled one makes of them."""

from pathlib import Path

import pytest
import torch

from dual_process.benchmarks.table import MEASURES
from dual_process.tiny import oracles, scenes
from dual_process.tiny.build_judge import Pictures, Prompts, Texts, answer_ids, main_odds, odds_of_yes
from dual_process.tiny.judge_folder import new_processor
from dual_process.tiny.pairs import COMPARISONS, Pairs
from dual_process.tiny.teach_guides import (
    KINDS,
    NAMES,
    SHOWN,
    Guided,
    learn_to_compare,
    learn_to_look,
    under,
)
from dual_process.tiny.wide_scenes import SPANS, any_measures

TINY = Path(scenes.__file__).parent


def load(name):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(TINY / name, dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def guided():
    """Guides over drawn scenes only: they stand for those out of autoencoder and generator too."""
    g = torch.Generator().manual_seed(4)
    factors = torch.rand(64, len(scenes.FACTORS), generator=g)
    measures = any_measures(64, g)
    pictures = Pictures(8, "cpu", (factors, scenes.render(factors)))
    return Guided(pictures, (measures, scenes.draw(measures)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=NAMES)
def test_the_answer_turns_at_the_kinds_distance_and_slopes_all_the_way(kind):
    steps = torch.linspace(0, kind.far, 50)
    odds = kind.odds(steps)
    assert (odds.diff() < 0).all() and [odds[0].item(), odds[-1].item()] == pytest.approx([5.5, -5.5])
    assert torch.equal(odds > 0, steps < kind.near)


def test_guides_are_drawn_where_the_share_says_and_the_odds_follow(guided):
    ruined = set()
    for _ in range(12):
        images, drawings, kinds, odds, shares = guided.next()
        assert images.shape == (SHOWN, 3, 64, 64) and drawings.shape == (SHOWN, 4, 64, 64)
        for row, name in enumerate(NAMES[kind] for kind in kinds.tolist()):
            own, guide = shares[row, list(SPANS).index(KINDS[name].about)], shares[row, len(SPANS) + NAMES.index(name)]
            if own.isnan():
                assert odds[row] < -5
                ruined.add(name)
            else:
                kind = KINDS[name]
                low, high = SPANS[kind.about]
                wanted = kind.odds((own - guide).abs() * (high - low))
                assert odds[row].item() == pytest.approx(wanted.item(), abs=0.1)
            if name == "horizon":
                line = drawings[row, 3].mean(1).argmax().item() / 64
                assert line == pytest.approx((0.16 + 0.68 * guide).item(), abs=0.02)
    assert ruined == set(NAMES), "No to ruins, whatever is asked"


def test_scenes_have_the_measures_that_are_told(guided):
    images, values = guided._pictures(64)
    found = oracles.measure(images)
    clean = found["readable"]
    assert clean.float().mean() > 0.6
    assert (found["horizon"] - values["horizon"])[clean].abs().max() < 0.03
    assert (found["line"] - values["line"])[clean].abs().max() < 0.6


def test_looking_and_comparing_train_what_they_shall(guided):
    before, model = load("judge"), load("judge").requires_grad_(True)
    learn_to_look(model, before, guided, 2)
    old = dict(before.named_parameters())
    moved = {name.split(".")[1] for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved == {"vision_model", "connector"}
    pairs = Pairs(guided.pictures, guided.wide)
    average = learn_to_compare(model, before, new_processor(), guided, pairs, 4)  # the last one under attack
    moved = {name.split(".")[1] for name, p in average.weights.items() if not torch.equal(p, old[name])}
    assert moved >= {"vision_model", "connector", "text_model"}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_bundled_judge_is_surest_where_the_guide_is_met(guided, name):
    """And the less sure the farther the picture is from the guide, which shows where to go."""
    processor, model, kind = new_processor(), load("judge_of_guides"), KINDS[name]
    texts, ids = Texts(processor, [kind.question], "cpu"), answer_ids(processor)
    values = torch.linspace(*SPANS[kind.about], 15)
    measures = any_measures(len(values), torch.Generator().manual_seed(6))
    measures["horizon_line"] = measures["line"] = torch.full_like(values, 2.0)
    measures["horizon"] = torch.full_like(values, 0.45)
    measures[kind.about] = values
    if name == "line":
        measures["horizon_line"] = values
    pictures = scenes.draw(measures)
    for guide in values[1:-1:2]:
        drawing = guided.drawings[name](guide.item()).draw(64, 64).expand(len(values), -1, -1, -1)
        odds = odds_of_yes(model, texts, ids, under(pictures, drawing), torch.zeros(len(values), 1, dtype=torch.long))
        wanted = kind.odds((values - guide).abs())
        assert abs(values[odds[:, 0].argmax()] - guide) <= 1.6 * kind.near
        assert torch.corrcoef(torch.stack((odds[:, 0], wanted)))[0, 1] >= 0.8


@torch.no_grad()
def test_the_bundled_judge_of_guides_answers_other_questions_as_the_other_one(guided):
    processor = new_processor()
    asked = Prompts(processor, "cpu"), answer_ids(processor)
    images = scenes.render(torch.rand(64, len(scenes.FACTORS), generator=torch.Generator().manual_seed(9)))
    both = [main_odds(load(name), *asked, images) > 0 for name in ("judge", "judge_of_guides")]
    assert (both[0] == both[1]).float().mean(0).min() >= 0.98


def test_pairs_differ_as_is_told_and_the_odds_follow(guided, monkeypatch):
    """Told, and measured in the pixels: disturbed pictures, hence not to the digit."""
    monkeypatch.setattr("dual_process.tiny.pairs.RUINS", {"black": lambda images, _: torch.zeros_like(images)})
    pairs, ruined, drawn = Pairs(guided.pictures, guided.wide), 0, {name: [] for name in COMPARISONS}
    for _ in range(12):
        shown, rows, odds = pairs.next(12)
        assert shown.shape == (12, 2, 3, 64, 64) and rows.sort()[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        black = shown[:, 1].mean((1, 2, 3)) < 0.1
        ruined += int(black.sum())
        assert (odds[black] == -5.5).all() and shown[:, 0].mean((1, 2, 3)).min() > 0.1
        first, second = oracles.measure(shown[:, 0]), oracles.measure(shown[:, 1])
        for row in (first["readable"] & second["readable"]).nonzero().flatten().tolist():
            name = list(COMPARISONS)[rows[row]]
            measure = MEASURES[name]
            seen = COMPARISONS[name].odds(first[measure][row], second[measure][row])
            drawn[name].append((odds[row].item(), seen.item()))
    assert ruined == 12, "an eighth of twelve is one"
    for name, found in drawn.items():
        told, seen = torch.tensor(found).T
        assert len(found) > 15 and torch.corrcoef(torch.stack((told, seen)))[0, 1] > 0.85, name


@torch.no_grad()
@pytest.mark.parametrize("kind", COMPARISONS.values(), ids=list(COMPARISONS))
def test_the_bundled_judge_compares_two_pictures(kind):
    """The same scene with one measure changed."""
    processor, model = new_processor(), load("judge_of_guides")
    texts, ids = Texts(processor, [kind.question], "cpu", pictures=2), answer_ids(processor)
    g = torch.Generator().manual_seed(7)
    first = any_measures(64, g)
    low, high = SPANS[kind.about]
    second = first | {kind.about: low + (high - low) * torch.rand(64, generator=g)}
    if kind.about == "line":
        second["horizon_line"] = second["line"]
    shown = torch.stack((scenes.draw(first), scenes.draw(second)), 1)
    odds = odds_of_yes(model, texts, ids, shown, torch.zeros(64, 1, dtype=torch.long))[:, 0]
    wanted = kind.odds(first[kind.about], second[kind.about])
    sure = wanted.abs() > 2
    assert ((odds > 0) == (wanted > 0))[sure].float().mean() >= 0.95
    assert torch.corrcoef(torch.stack((odds, wanted)))[0, 1] >= 0.9


@torch.no_grad()
def test_comparisons_are_taught_as_the_judge_is_asked():
    """Through the model's own processor and forward, the picture before first."""
    from dual_process.vlm.loading import load_judge
    from dual_process.vlm.overlay import BeforeAfter
    from dual_process.vlm.question import Question

    judge, processor = load_judge(TINY / "judge_of_guides", dtype=torch.float32), new_processor()
    text = COMPARISONS["horizon"].question
    before, after = scenes.render(torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2)).flatten(0, 1)).chunk(
        2
    )
    asked = [Question(text, answer, guide=BeforeAfter()) for answer in ("Yes", "No")]
    yes, no = judge.log_likelihood(after, asked, before).unbind(1)
    texts, ids = Texts(processor, [text], "cpu", pictures=2), answer_ids(processor)
    shown = torch.stack((before, after), 1)
    odds = odds_of_yes(judge.model, texts, ids, shown, torch.zeros(3, 1, dtype=torch.long))[:, 0]
    torch.testing.assert_close(yes - no, odds, atol=1e-3, rtol=1e-3)
    turned = odds_of_yes(judge.model, texts, ids, shown.flip(1), torch.zeros(3, 1, dtype=torch.long))[:, 0]
    assert (odds * turned < 0).all()
