"""Training with guides: what the judge compares with, and a run on the server that tells how it was asked."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from dual_process.demo.workflow import nodes_of, template, to_api
from dual_process.tests.test_loop import GreyStudent
from dual_process.trainers import dual_process
from dual_process.trainers.dual_process import TRAINING_SEEDS, Settings, train
from dual_process.trainers.looks import CHECK_SEEDS
from dual_process.trainers.objective import Objective
from dual_process.vlm.overlay import BeforeAfter
from dual_process.vlm.question import Question


class ComparingJudge:
    """Says Yes with the logit 8 * (brightness gained - 0.2), and notes what it was shown."""

    gradient_scale = 1.0

    def __init__(self):
        self.shown = []

    def log_likelihood(self, images, questions, before=None):
        if before is None:
            logit = images.mean(dim=(1, 2, 3))
        else:
            self.shown.append((before.clone(), images.detach().clone()))
            logit = 8 * ((images - before).mean(dim=(1, 2, 3)) - 0.2)
        columns = [torch.nn.functional.logsigmoid(logit if q.answer == "Yes" else -logit) for q in questions]
        return torch.stack(columns, dim=1)


def teach(question, **settings):
    student, judge = GreyStudent(), ComparingJudge()
    defaults = {
        "steps": 40,
        "learning_rate": 0.02,
        "check_every": 5,
        "judge_noise": 0.0,
        "anchor": 0.0,
        "prior": 0.0,
        "stop_at": 0.9,
        "drift_limit": 0,
    }
    run = train(student, judge, Objective([question]), Settings(**{**defaults, **settings}), lambda *_: None)
    return student, judge, run


def untaught(seed):
    return GreyStudent().draw(seed)


def test_before_and_after_are_of_the_same_noise_without_and_with_the_lora():
    question = Question("Is the second picture brighter?", guide=BeforeAfter())
    student, judge, run = teach(question, check_seeds=1)
    assert run.checks[-1].scores[0] > 0.9 > 0.2 > run.checks[0].scores[0]
    assert student.lora.shift > 0.4
    noises = [seed for seed in student.seeds if seed >= TRAINING_SEEDS]
    checks = [before for before, _ in judge.shown if torch.allclose(before, untaught(CHECK_SEEDS))]
    passes = [before for before, _ in judge.shown if not torch.allclose(before, untaught(CHECK_SEEDS))]
    assert len(checks) == len([check for check in run.checks if check is not run.checks[-1]]) + 1
    assert [torch.equal(before, untaught(seed)) for before, seed in zip(passes, noises, strict=True)] == [True] * len(
        passes
    )
    gained = [(after - before).mean().item() for before, after in judge.shown]
    assert gained[0] == pytest.approx(0, abs=1e-6) and max(gained) > 0.4


def test_the_picture_before_is_not_drawn_when_nothing_compares():
    student, judge, _ = teach(Question("Is it bright?"), steps=3, check_every=0)
    assert judge.shown == []


def test_both_pictures_get_noise():
    question = Question("Is the second picture brighter?", guide=BeforeAfter())
    _, judge, _ = teach(question, steps=8, check_every=0, judge_noise=0.3)
    spread = [(before.std().item() > 0.03, after.std().item() > 0.03) for before, after in judge.shown[1:-1]]
    assert sum(one for one, _ in spread) > 4 and sum(other for _, other in spread) > 4


def test_both_pictures_are_varied_alike():
    """So that nothing differs between them but what the LoRA makes."""
    pictures = torch.rand(2, 3, 16, 16)
    first, second = dual_process.shown([pictures] * 2, Settings(augment=1.0, judge_noise=0.0), torch.Generator())
    assert torch.equal(first, second) and not torch.equal(first, pictures)


def test_a_run_with_every_kind_of_guide_tells_how_the_judge_was_asked(server, client):
    graph = to_api(template("Teach the horizon"), client.get_json("/object_info"))
    (trainer,) = nodes_of(graph, "DualProcessTrainer")
    graph[trainer]["inputs"] |= {"steps": 2, "check_every": 0, "seed": 71}
    place = {"image": ["picture", 0], "opacity": 1.0, "x": 0.5, "y": 0.5, "scale": 1.0, "fit": "keep its shape"}
    nodes = {
        "picture": ("EmptyImage", {"width": 30, "height": 20, "batch_size": 1, "color": 255}),
        "over": ("DualProcessHorizonGuide", {"height": 0.75, "question": "?", "show": "solid", "opacity": 0.5}),
        "beside": ("DualProcessGuideFromImage", {"show": "beside", **place}),
        "before": ("DualProcessBeforeAfterGuide", {"question": "?"}),
    }
    for guide in ("over", "beside", "before"):
        question = {"text": "Is the horizon high?", "answer": "Yes", "weight": 1.0, "guide": [guide, 0]}
        nodes[f"ask {guide}"] = (
            "DualProcessQuestion",
            {**question, "questions": graph[trainer]["inputs"]["questions"]},
        )
        graph[trainer]["inputs"]["questions"] = [f"ask {guide}", 0]
    graph |= {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    known = set(client.get_json("/models/loras"))
    client.run(graph)
    (new,) = set(client.get_json("/models/loras")) - known
    with safe_open(server.base / "models" / "loras" / new, "pt") as file:
        story = json.loads(file.metadata()["dual_process"])
    plain, *_, over, beside, before = (one["guide"] for one in story["questions"])
    assert over == {"show": "solid", "opacity": 0.5, "Horizon": {"height": 0.75}}
    assert beside["show"] == "beside" and beside["image"].startswith("3x20x30 sha256 ")
    assert before == {"show": "before/after"} and plain is None
    assert story["steps_done"] == 2
