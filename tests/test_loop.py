"""The training loop and its objective on a student and a judge small enough to know the answer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dual_process.trainers.dual_process import EARLY_STEPS, LATE_STEPS, Settings, train, with_noise
from dual_process.trainers.objective import LIKELIHOOD, MARGIN, Objective
from dual_process.vlm.question import Question


class BrightnessJudge:
    """Says Yes with the logit 8 * (mean brightness - 0.5), whatever it is asked."""

    def log_likelihood(self, images, questions):
        logit = 8 * (images.mean(dim=(1, 2, 3)) - 0.5)
        columns = [torch.nn.functional.logsigmoid(logit if q.answer == "Yes" else -logit) for q in questions]
        return torch.stack(columns, dim=1)


class Brightness(nn.Module):
    """A LoRA of one number that is added to every pixel."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.on = True

    def snapshot(self):
        return {name: value.clone() for name, value in self.state_dict().items()}

    @contextmanager
    def disabled(self):
        self.on = False
        yield
        self.on = True


class GreyStudent:
    """Draws grey pictures of brightness 0.3 plus a little noise plus the LoRA's shift, in one step."""

    steps = prompts = 1
    gradient_scale = 4.0

    def __init__(self):
        self.lora = Brightness()
        self.seeds = []

    def use_prompt(self, index):
        assert index == 0

    def noise(self, seed):
        self.seeds.append(seed)
        return 0.01 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))

    def roll(self, noise, k):
        return noise

    def predict(self, x, k):
        return 0.3 + x + (self.lora.shift if self.lora.on else 0.0)

    def decode(self, x0):
        return x0

    def draw(self, seed, prompt=0):
        return self.predict(self.noise(seed), 0).clamp(0, 1)


def teach(answer="Yes", **settings):
    student, pictures = GreyStudent(), []
    defaults = {"steps": 60, "learning_rate": 0.02, "check_every": 5, "judge_noise": 0.05}
    objective = Objective([Question("Is it bright?", answer)])
    on_step = lambda run, images: pictures.append(images)  # noqa: E731
    run = train(student, BrightnessJudge(), objective, Settings(**{**defaults, **settings}), on_step)
    return student, run, pictures


def test_learns_yes_and_stops_when_it_is_held():
    student, run, pictures = teach(held=0.9, anchor=0.0)
    assert run.checks[0].step == 0 and run.checks[0].scores[0] < 0.2
    assert run.checks[-1].scores[0] >= 0.9
    assert run.stopped == f"held at step {len(run.loss)}" and len(run.loss) < 60
    assert len(pictures) == len(run.scores) == len(run.loss)


def test_what_is_held_already_is_not_taught():
    """A LoRA that is continued may hold its goal from the start."""
    student, run, pictures = teach("No", held=0.7, anchor=0.0)
    assert run.checks[0].scores[0] > 0.7 and len(run.checks) == 1
    assert run.loss == pictures == [] and student.lora.shift == 0
    assert run.stopped == "held before the first step: there is nothing to teach"
    _, run, _ = teach("No", held=0.7, anchor=0.0, check_every=0, steps=3)
    assert len(run.loss) == 3 and run.stopped == "all steps done"


def test_learns_no():
    student, run, _ = teach("No", held=0.97, anchor=0.0)
    assert run.checks[-1].scores[0] > 0.95 and student.lora.shift < 0


def test_the_best_check_is_kept():
    """With steps far too long the brightness swings; the LoRA that is handed back is that of the best check."""
    student, run, _ = teach(steps=23, learning_rate=2.0, check_every=1, held=1.1, anchor=0.0)
    best = max(run.checks, key=lambda check: check.scores[0])
    assert run.checks[-1].scores == best.scores
    assert BrightnessJudge().log_likelihood(best.pictures, [Question("?")]).exp().mean().item() == pytest.approx(
        best.scores[0]
    )


def test_the_anchor_holds_back():
    free, _, _ = teach(check_every=0, anchor=0.0)
    held, _, _ = teach(check_every=0, anchor=50.0)
    assert 0 < held.lora.shift < free.lora.shift


def test_training_never_sees_the_held_out_seeds():
    student, run, _ = teach(check_seeds=3)
    checks = {s for s in student.seeds if 2**31 <= s < 2**32}
    assert checks == {2**31, 2**31 + 1, 2**31 + 2}
    assert all(s >= 2**32 for s in student.seeds if s not in checks)


def test_same_seed_same_run():
    assert teach(seed=3)[1].loss == teach(seed=3)[1].loss != teach(seed=4)[1].loss


def test_which_steps_are_learned():
    assert list(Settings().learned_steps(3)) == [0, 1, 2]
    for setting in (EARLY_STEPS, LATE_STEPS):
        assert list(Settings(learn_at=setting).learned_steps(1)) == [0]
    assert list(Settings(learn_at=EARLY_STEPS).learned_steps(4)) == [0]
    assert list(Settings(learn_at=LATE_STEPS).learned_steps(4)) == [3]
    assert list(Settings(learn_at=EARLY_STEPS).learned_steps(20)) == [0, 1, 2, 3, 4]
    assert list(Settings(learn_at=LATE_STEPS).learned_steps(50)) == list(range(37, 50))


def test_accumulated_passes_are_one_larger_batch():
    """Four passes make the step that one pass with the mean of their gradients makes."""
    quiet = {"steps": 1, "judge_noise": 0.0, "anchor": 0.0, "check_every": 0}
    student, run, _ = teach(accumulate=4, **quiet)
    trained = [seed for seed in student.seeds if seed >= 2**32]
    assert len(trained) == 4 and len(run.loss) == 1
    loss_of = Objective([Question("Is it bright?")])
    losses = [loss_of(BrightnessJudge(), GreyStudent().draw(seed))[0].item() for seed in trained]
    assert run.loss[0] == pytest.approx(sum(losses) / 4)


def test_a_dead_gradient_is_an_error():
    student = GreyStudent()
    student.decode = lambda x0: x0.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="norm 0"):
        train(student, BrightnessJudge(), Objective([Question("Is it bright?")]), Settings(steps=3), print)


def test_objectives_by_hand():
    images = torch.full((1, 3, 2, 2), 0.5)
    images[0] += 0.125  # logit 1
    wanted, other = torch.nn.functional.logsigmoid(torch.tensor([1.0, -1.0])).tolist()
    likelihood, p = Objective([Question("?")], LIKELIHOOD)(BrightnessJudge(), images)
    assert likelihood.item() == pytest.approx(-wanted) and p.item() == pytest.approx(torch.tensor(1.0).sigmoid().item())
    margin, _ = Objective([Question("?")], MARGIN, margin=3.0)(BrightnessJudge(), images)
    assert margin.item() == pytest.approx(3 - (wanted - other))
    won, _ = Objective([Question("?")], MARGIN, margin=0.5)(BrightnessJudge(), images)
    assert won.item() == 0
    both, p = Objective([Question("?", "Yes", 3.0), Question("?", "No", 1.0)], LIKELIHOOD)(BrightnessJudge(), images)
    assert both.item() == pytest.approx((3 * -wanted + -other) / 4) and p.shape == (1, 2)
    with pytest.raises(ValueError, match="No question"):
        Objective([])


def test_noise_has_the_strength_it_says():
    rng = torch.Generator().manual_seed(0)
    noise = with_noise(torch.zeros(400, 3, 16, 16), 0.1, rng).std(dim=(1, 2, 3))
    assert noise.max() <= 0.11 and noise.mean().item() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(with_noise(torch.ones(1, 3, 4, 4), 0.0, rng), torch.ones(1, 3, 4, 4))
