"""The trainer's node: its boxes, and what it makes of them."""

from __future__ import annotations

import pytest


@pytest.fixture
def trainer(comfy):
    """The module of the node."""
    import utils.extra_config  # noqa: F401  ComfyUI's nodes.py puts a folder with another utils.py first

    from dual_process.nodes import trainer

    return trainer


def test_boxes_start_with_the_defaults_of_the_method(trainer):
    from dual_process.trainers.dual_process import Settings
    from dual_process.trainers.objective import Objective
    from dual_process.vlm.question import Question

    asked = trainer.Trainer.GET_NODE_INFO_V1()["input"]
    boxes = asked["required"] | asked["optional"]
    names = {"stop_at": "held"}
    same = "steps learning_rate seed anchor judge_noise check_every stop_at accumulate drift_limit augment".split()
    started = {name: boxes[name][1]["default"] for name in same}
    assert started == {name: getattr(Settings(), names.get(name, name)) for name in same}
    assert boxes["target"][1]["default"] == Objective([Question("?")]).target
    added_later = set(trainer.LEFT_OUT) - set("negative more_prompts sigmas sampler".split())
    assert {name: boxes[name][1]["default"] for name in added_later} == {
        name: trainer.LEFT_OUT[name] for name in added_later
    }
