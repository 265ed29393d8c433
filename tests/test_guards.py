"""Guards: what a collapse looks like in numbers, and what is none."""

from __future__ import annotations

import pytest
import torch

from dual_process.tiny import scenes
from dual_process.trainers.guards import RELATIVE, changes, diversity, largest_fault, look, warning


@pytest.fixture(scope="module")
def pictures():
    return scenes.render(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)))


def test_a_copy_has_not_changed(pictures):
    found = changes(pictures, pictures.clone())
    assert set(found) == {*RELATIVE, "clipped", "distance"}
    assert all(value == pytest.approx(0, abs=1e-6) for value in found.values())
    assert warning(found, 0.01) == ""


@pytest.mark.parametrize(
    ("ruin", "words"),
    [
        (lambda x: x * 0.3, "darker"),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), "greyer"),
        (lambda x: x[:1].expand_as(x), "more alike"),
        (lambda x: torch.nn.functional.avg_pool2d(x, 15, 1, 7), "emptier"),
        (lambda x: (x > 0.5).float().amax(1, keepdim=True).expand_as(x), "burnt to black and white"),
        (lambda x: x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), "busier"),
        (lambda x: torch.zeros_like(x), "100% darker"),
    ],
)
def test_ruins_are_named(pictures, ruin, words):
    assert words in warning(changes(pictures, ruin(pictures)), 0.25)


def test_by_hand():
    checks = torch.zeros(1, 3, 2, 2)
    checks[..., 0, 0] = 1
    found = look(checks)
    assert found["luminance"].item() == pytest.approx(0.25) and found["edge_density"].item() == pytest.approx(0.5)
    assert found["clipped"].item() == 1 and found["saturation"].item() == 0
    assert found["colour_entropy"].item() == pytest.approx(0.8113, abs=1e-4)
    grey, paler = torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.5)
    paler[:, 0] += 0.01
    assert changes(grey, paler)["saturation"] == pytest.approx(0.01 / RELATIVE["saturation"], abs=1e-4)
    assert diversity(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])) == pytest.approx(0.5, abs=1e-5)


def test_more_diversity_and_less_burning_are_no_fault():
    calm = dict.fromkeys((*RELATIVE, "clipped"), 0.0)
    assert warning({**calm, "diversity": 2.0, "clipped": -0.9}, 0.25) == ""
    assert warning({**calm, "diversity": -0.4, "luminance": 0.3}, 0.25) == "30% brighter, 40% more alike"
    assert largest_fault({**calm, "diversity": 2.0, "clipped": -0.9, "luminance": -0.1}) == 0.1
    assert largest_fault({**calm, "diversity": -0.4, "luminance": 0.3}) == 0.4


def test_a_picture_of_which_half_precision_made_nothing_has_drifted():
    grey, lost = torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.5)
    lost[1] = torch.nan
    assert warning(changes(grey, lost), 0.25).startswith("50% darker")
