"""Scenes, their prompts, their oracles: the ground truth of every later measurement."""

import itertools

import pytest
import torch

from dual_process.tiny import oracles, pictures, scenes


def some_scenes(count, seed=0):
    u = torch.rand(count, len(scenes.FACTORS), generator=torch.Generator().manual_seed(seed))
    return u, scenes.render(u)


def test_render_is_a_picture_and_deterministic():
    u, images = some_scenes(8)
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, scenes.render(u))


def test_larger_pictures_show_the_same_scene():
    u, images = some_scenes(8)
    small = torch.nn.functional.interpolate(scenes.render(u, 128), 64, mode="area")
    assert (small - images).abs().mean() < 0.01


def test_gap_is_seldom_inside():
    u = torch.linspace(0, 1, 10001)
    horizon = scenes.with_gap(u, (0.22, 0.46), (0.54, 0.78))
    assert (horizon.diff() >= -1e-6).all()
    assert ((horizon > 0.46001) & (horizon < 0.53999)).float().mean() <= scenes.GAP_SHARE + 1e-3


def test_a_prompt_has_the_clauses_of_what_is_wanted_and_no_other():
    states = (None, False, True)
    for values in itertools.product(states, repeat=4):
        wanted = {n: v for n, v in zip(scenes.PROPERTIES, values, strict=True) if v is not None}
        prompt = scenes.prompt_for(wanted)
        said = {n: value for n, pair in scenes.CLAUSES.items() for value in (False, True) if pair[value] in prompt}
        assert said == wanted
    assert scenes.prompt_for({}) == "a landscape with two balls"


def test_oracles_agree_with_what_was_drawn():
    u, images = some_scenes(256, seed=1)
    measured, truth = oracles.measure(images), scenes.attributes(u)
    assert measured["readable"].float().mean() >= 0.99
    ok = measured["readable"]
    assert (measured["horizon"] - truth["horizon"])[ok].abs().max() < 0.02
    assert (measured["line"] - truth["line"])[ok].abs().max() < 0.4
    clear = (2 * u[:, :4] - 1).abs() > scenes.GAP_SHARE
    for j, name in enumerate(scenes.PROPERTIES):
        kept = ok & clear[:, j]
        right = oracles.holds(images, name, "Yes")[kept] == (u[kept, j] > 0.5)
        assert right.float().mean() >= 0.99, name


def test_the_sun_is_seen():
    measures = scenes.attributes(torch.rand(48, 8, generator=torch.Generator().manual_seed(5)))
    hidden = measures | {"sun_x": torch.full((48,), -3.0)}
    for scene, there in ((measures, True), (hidden, False)):
        found = oracles.measure(scenes.draw(scene))
        assert (found["sun"] == there).all() and found["readable"].all()


def test_holds_is_false_for_both_answers_when_unreadable():
    black = torch.zeros(2, 3, 64, 64)
    for name in scenes.PROPERTIES:
        assert not oracles.holds(black, name, "Yes").any()
        assert not oracles.holds(black, name, "No").any()


@pytest.mark.parametrize("name", pictures.RUINS)
def test_oracles_refuse_ruins(name):
    generator = torch.Generator().manual_seed(2)
    _, images = some_scenes(96, seed=3)
    ruined = torch.cat([pictures.RUINS[name](part, generator) for part in images.split(8)])
    may_hide = ("ghosts", "many_suns", "second_line", "broken_line")  # what falls onto its like ruins nothing
    allowed = 0.2 if name in may_hide else 0.03
    assert oracles.measure(ruined)["readable"].float().mean() <= allowed
