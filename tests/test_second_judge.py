"""A second judge: asked at every look, never trained against, and the one that chooses."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests.test_loop import BrightnessJudge, GreyStudent
from dual_process.trainers.dual_process import Settings, train
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question


class ModestJudge(BrightnessJudge):
    """Finds only brightness near 0.45 bright: it likes what the first judge does at first, and not what follows.
    Refuses to be differentiated through."""

    def __init__(self):
        self.asked = 0

    def log_likelihood(self, images, questions, before=None):
        assert not images.requires_grad and not torch.is_grad_enabled()
        self.asked += 1
        return super().log_likelihood(1 - 3 * (images.mean(dim=(1, 2, 3), keepdim=True) - 0.45).abs(), questions)


def teach(second, questions=(Question("Is it bright?"),), **settings):
    student = GreyStudent()
    defaults = {"steps": 40, "learning_rate": 0.01, "check_every": 2, "judge_noise": 0.0, "average": 0.0}
    free = {"anchor": 0.0, "prior": 0.0, "drift_limit": 0.0}
    settings = Settings(**{**defaults, **free, "stop_at": 0.9, **settings})
    run = train(student, BrightnessJudge(), Objective(list(questions)), settings, lambda *_: None, second)
    return student, run


def test_it_chooses_the_lora_that_is_kept():
    """The first judge wants it ever brighter; the second one is content on the way and not at the end."""
    alone, run = teach(None, stop_at=1.1)
    assert run.checks[-1].step == 40 and run.checks[-1].second == []
    student, run = teach(ModestJudge(), stop_at=1.1)
    kept = run.checks[-1]
    assert 0 < kept.step < 40 and kept.second[0] == max(check.second[0] for check in run.checks)
    assert student.lora.shift.item() == pytest.approx(0.15, abs=0.02) and alone.lora.shift > 0.3
    assert torch.equal(student.draw(2**31), kept.pictures[:2])


def test_it_changes_nothing_of_what_is_learned():
    second = ModestJudge()
    with_one, without = teach(second, stop_at=1.1)[1], teach(None, stop_at=1.1)[1]
    assert with_one.loss == without.loss and with_one.scores == without.scores
    assert second.asked == 2 * len({check.step for check in with_one.checks}) == 42  # two held-out seeds


class Shifted(BrightnessJudge):
    """Finds pictures brighter than they are by ``shift``."""

    def __init__(self, shift):
        self.shift = shift

    def log_likelihood(self, images, questions, before=None):
        return super().log_likelihood(images + self.shift, questions)


def test_training_ends_when_both_hold():
    _, alone = teach(None, steps=200)
    _, both = teach(Shifted(-0.1), steps=200)
    assert both.stopped == f"held at step {len(both.loss)}" and len(both.loss) > len(alone.loss)
    assert all(check.second[0] >= 0.9 < check.scores[0] for check in both.checks[-3:])
    assert min(check.second[0] for check in both.checks) < 0.5
    dark = [Question("Is it bright?", "No")]
    assert teach(None, dark, stop_at=0.7)[1].loss == [], "held before the first step"
    assert len(teach(Shifted(0.3), dark, stop_at=0.7)[1].loss) > 0


def test_the_node_loads_it_through_comfyui_says_it_and_writes_it_down(lab, trained):
    import json

    import comfy.model_management as mm

    mm.unload_all_models()
    first, second = lab.build_judge(), lab.build_judge()
    second.judge.name = "another judge"
    output, shown = trained(judge=first, second_judge=second)
    assert {first.patcher, second.patcher} <= {loaded.model for loaded in mm.current_loaded_models}
    story = json.loads(output.result[0].metadata["dual_process"])
    assert (story["judge"], story["second_judge"]) == ("tiny random judge", "another judge")
    assert story["second_judge_scores_before"] == story["held_out_scores_before"], "the two have the same weights"
    assert len(story["second_judge_scores_after"]) == 1
    assert any(", second judge " in text for text in shown) and "Second judge: " in shown[-1]


def test_the_same_judge_twice_is_refused(lab, trained):
    judge = lab.build_judge()
    with pytest.raises(ValueError, match="cannot disagree with itself"):
        trained(judge=judge, second_judge=judge)


def test_questions_are_checked_against_it_before_anything_is_drawn(lab, trained):
    second = lab.build_judge()
    second.judge.check = lambda questions: (_ for _ in ()).throw(ValueError("The second judge takes one picture."))
    with pytest.raises(ValueError, match="second judge takes one"):
        trained(judge=lab.build_judge(), second_judge=second)
