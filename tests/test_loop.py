"""The training loop and its objective on a student and a judge small enough to know the answer."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dual_process.tests import vlm_families
from dual_process.trainers import dual_process
from dual_process.trainers.augment import varied, with_noise
from dual_process.trainers.checkpointing import Recompute
from dual_process.trainers.dual_process import (
    EARLY_STEPS,
    FRESH_NOISE,
    LATE_STEPS,
    Run,
    Settings,
    one_pass,
    starts,
    train,
)
from dual_process.trainers.guards import WORDS, became, warning
from dual_process.trainers.looks import HOLDING, UNSEEN_SEEDS, Looks
from dual_process.trainers.objective import LIKELIHOOD, MARGIN, TARGET, Objective
from dual_process.vlm.judge import Judge
from dual_process.vlm.question import Question


class BrightnessJudge:
    """Says Yes with the logit 8 * (mean brightness - 0.5), whatever it is asked."""

    gradient_scale = 16.0

    def log_likelihood(self, images, questions, before=None):
        logit = 8 * (images.mean(dim=(1, 2, 3)) - 0.5)
        columns = [torch.nn.functional.logsigmoid(logit if q.answer == "Yes" else -logit) for q in questions]
        return torch.stack(columns, dim=1)


class Brightness(nn.Module):
    """A LoRA of one number that is added to every pixel."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.on = True

    @property
    def blank(self):
        return not self.shift.any()

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
    prompt = 0
    gradient_scale = 4.0
    takes_turns = False

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

    def noised(self, x, noise, k):
        assert k == 0
        return x + noise

    def predict(self, x, k):
        return 0.3 + x + (self.lora.shift if self.lora.on else 0.0)

    def redrawn(self, x0, noise):
        """All greys are the model's own."""
        assert not self.lora.on
        return x0 + noise

    def decode(self, x0):
        return x0

    def finished(self, seed, prompt=0):
        return self.predict(self.noise(seed), 0)

    def draw(self, seed, prompt=0):
        return self.finished(seed, prompt).clamp(0, 1)


class BrokenGradient(GreyStudent):
    """Sends back no finite gradient in the passes of some numbers, counted from 1."""

    def __init__(self, broken):
        super().__init__()
        self.broken, self.passes = broken, 0

    def roll(self, noise, k):
        self.passes += 1
        return noise

    def decode(self, x0):
        return x0 * 1.0 if self.passes not in self.broken else _Infinite.apply(x0)


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def teach(answer="Yes", student=None, **settings):
    student, pictures = student or GreyStudent(), []
    defaults = {"steps": 60, "learning_rate": 0.02, "check_every": 5, "judge_noise": 0.05, "drift_limit": 0.0}
    objective = Objective([Question("Is it bright?", answer)])
    on_step = lambda run, images: pictures.append(images)  # noqa: E731
    run = train(student, BrightnessJudge(), objective, Settings(**{**defaults, **settings}), on_step)
    return student, run, pictures


def test_learns_yes_and_stops_when_it_is_held():
    student, run, pictures = teach(steps=100, stop_at=0.9, anchor=0.0)
    assert run.checks[0].step == 0 and run.checks[0].scores[0] < 0.2
    assert run.checks[-1].scores[0] >= 0.9
    assert run.stopped == f"held at step {len(run.loss)}" and len(run.loss) < 100
    assert len(pictures) == len(run.scores) == len(run.loss)


@pytest.mark.parametrize("steps, check_every, looks", [(100, 5, HOLDING), (100, 20, 2), (60, 10, 3), (8, 10, 1)])
def test_as_many_looks_in_a_row_must_hold_or_half_of_them(steps, check_every, looks):
    _, run, _ = teach(steps=steps, check_every=check_every, stop_at=0.3, anchor=0.0, learning_rate=0.1)
    holding = [check.step for check in run.checks[1:] if check.scores[0] >= 0.3]
    assert run.stopped == f"held at step {len(run.loss)}" and holding[looks - 1] == len(run.loss)


def test_drift_at_the_last_look_is_why_it_ended():
    free = {"anchor": 0.0, "prior": 0.0}
    _, run, _ = teach(check_every=1, learning_rate=0.01, average=0.0, drift_limit=0.1, steps=3, **free)
    assert not run.retreats and run.stopped.startswith("at step 3, because pictures got") and run.checks[-1].step == 2


def test_a_run_that_is_broken_off_leaves_the_best_lora():
    student, run = GreyStudent(), None

    def cancel_at_sixth_step(so_far, images):
        nonlocal run
        run = so_far
        if len(run.loss) == 6:
            raise KeyboardInterrupt

    settings = Settings(steps=60, learning_rate=0.02, check_every=2, drift_limit=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(student, BrightnessJudge(), Objective([Question("Is it bright?")]), settings, cancel_at_sixth_step)
    assert run.checks[-1].step == 4 and torch.equal(student.draw(2**31), run.checks[-1].pictures[:2])


def brightness(check) -> float:
    """Of the pictures of a look, whose mean before training is 0.3."""
    return 0.3 * (1 + check.changes.get("luminance", 0.0))


def test_looks_before_a_retreat_do_not_count():
    """Enough looks hold; between any two retreats there are fewer."""
    _, run, _ = teach(check_every=1, learning_rate=0.01, average=0.0, anchor=0.0, drift_limit=0.1, stop_at=0.18)
    fine = [check for check in run.checks[1:-1] if not warning(check.changes, 0.1)]
    assert sum(check.scores[0] >= 0.18 for check in fine) >= HOLDING
    assert run.retreats == 3 and "pictures got" in run.stopped


def test_a_retreat_begins_anew_at_a_third_of_the_rate():
    """As if the LoRA had been loaded from its best look: neither Adam's moments nor the running average are left."""
    student, run, _ = teach(check_every=2, learning_rate=0.01, average=0.7, anchor=0.0, drift_limit=0.1)
    step = next(check.step for check in run.checks[1:] if warning(check.changes, 0.1))
    before = {check.step: brightness(check) for check in run.checks}
    best = int(run.rate_falls[0].split()[-1])
    assert before[step + 2] - before[best] == pytest.approx(0.01 / 3 * 1.5, rel=0.05)  # mean of strides of one and two


def test_what_holds_is_taught_on_at_a_third_of_the_rate():
    """After a retreat, at a third of that."""
    free = {"anchor": 0.0, "prior": 0.0}
    _, run, _ = teach(check_every=1, learning_rate=0.01, average=0.0, drift_limit=0.1, stop_at=0.18, **free)
    holds = [check.scores[0] >= 0.18 for check in run.checks[:5]]
    assert holds == [False, False, True, True, True]
    seen = [brightness(check) for check in run.checks]
    strides = [after - before for before, after in zip(seen, seen[1:])]
    assert strides[:4] == [pytest.approx(stride, rel=0.05) for stride in (0.01, 0.01, 0.01 / 3, 0.01 / 3)]
    held, back = run.rate_falls[:2]
    assert held == "first held at step 2, from there on at a third of the rate"
    assert back.startswith("at step 5 ") and back.endswith("step 4")
    assert seen[6] - seen[4] == pytest.approx(0.01 / 9, rel=0.05)


def test_what_is_held_already_is_not_taught():
    """A LoRA that is continued may hold its goal from the start."""
    student, run, pictures = teach("No", stop_at=0.7, anchor=0.0)
    assert run.checks[0].scores[0] > 0.7 and len(run.checks) == 1
    assert run.loss == pictures == [] and student.lora.shift == 0
    assert run.stopped == "held before the first step: there is nothing to teach"
    _, run, _ = teach("No", stop_at=0.7, anchor=0.0, check_every=0, steps=3)
    assert len(run.loss) == 3 and run.stopped == "all steps done"


def test_what_a_continued_lora_has_to_keep_is_that_of_the_model_without_it():
    student, run = GreyStudent(), Run()
    student.lora.shift.data.fill_(0.3)
    asked = [Question("Is it bright?"), Question("Is it dark?", "No", keep=True)]
    looks = Looks(student, BrightnessJudge(), None, Objective(asked), Settings(drift_limit=0.35), run)
    looks.begin()
    assert looks.objective.before == pytest.approx((0.17, 0.83), abs=0.01)
    assert run.checks[0].scores == pytest.approx([0.69, 0.31], abs=0.01) and len(run.checks) == 1
    assert run.checks[0].changes["luminance"] == pytest.approx(1, abs=0.05)
    student.lora.shift.data.fill_(0.302)
    assert looks.take(1) == "", "hardly brighter than it began"
    student.lora.shift.data.fill_(0.5)
    assert "brighter" in looks.take(2)


def test_what_each_prompt_has_to_keep_is_its_own():
    """One prompt draws bright pictures, one dark ones: the dark ones are not to become as bright as the mean."""

    class TwoPrompts(GreyStudent):
        prompts = 2

        def use_prompt(self, index):
            self.prompt = index

        def predict(self, x, k):
            return super().predict(x, k) + (0.3 if self.prompt else -0.1)

        def finished(self, seed, prompt=0):
            self.use_prompt(prompt)
            return super().finished(seed)

    class Noted(Objective):
        def of(self, prompt):
            used[prompt] = super().of(prompt).before[1]
            return super().of(prompt)

    asked, used = [Question("Is it a picture?"), Question("Is it bright?", keep=True)], {}
    train(TwoPrompts(), BrightnessJudge(), Noted(asked), Settings(steps=9, check_seeds=4), lambda *_: None)
    for prompt, brightness in enumerate((0.2, 0.6)):
        assert used[prompt] == pytest.approx(1 / (1 + math.exp(-8 * (brightness - 0.5))), abs=0.01)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
    ids=["allocator", "driver", "cuBLAS"],
)
def test_a_step_that_runs_out_of_memory_begins_again_with_everything_recomputed(error):
    class Crowded(GreyStudent):
        passes = 0

        def __init__(self, foreseen):
            super().__init__()
            self.recompute = Recompute(on=False, foreseen=foreseen)

        def predict(self, x, k):
            if torch.is_grad_enabled():
                self.passes += 1
                if self.passes == 4 and not self.recompute.on:  # the second of step 2
                    raise error
            return super().predict(x, k)

    kept, _, _ = teach(steps=4, accumulate=2)
    crowded, run, _ = teach(student=Crowded(foreseen=True), steps=4, accumulate=2)
    assert crowded.recompute.on and len(run.loss) == 4 and torch.equal(crowded.lora.shift, kept.lora.shift)
    with pytest.raises(RuntimeError, match=str(error)):
        teach(student=Crowded(foreseen=False), steps=4, accumulate=2)


def test_learns_no():
    student, run, _ = teach("No", stop_at=0.97, anchor=0.0)
    assert run.checks[-1].scores[0] > 0.95 and student.lora.shift < 0


def test_the_best_check_is_kept():
    """With steps far too long the brightness goes past what the judge likes; the LoRA of the best check comes back."""

    class MiddleJudge(BrightnessJudge):
        def log_likelihood(self, images, questions, before=None):
            return super().log_likelihood(0.7 - (images - 0.5).abs(), questions)

    student, goal = GreyStudent(), Objective([Question("Is it neither dark nor bright?")])
    off = {"anchor": 0.0, "average": 0.0, "drift_limit": 0.0}
    settings = Settings(steps=5, learning_rate=0.1, check_every=1, stop_at=1.1, **off)
    run = train(student, MiddleJudge(), goal, settings, lambda *_: None)
    best = max(run.checks[:-1], key=lambda check: check.scores[0])
    assert best.scores[0] > run.checks[-2].scores[0], "the last look is not the best one"
    assert best.step > 0 and run.checks[-1] is best
    assert torch.equal(student.draw(2**31), best.pictures[:2])
    held = {check.step for check in run.checks if check.pictures is not None}
    assert held == {0, best.step, run.checks[-2].step}, "no others' pictures are needed any more"


def test_the_average_is_checked_and_kept_but_not_trained_from():
    def shifts(average, check_every):
        student, seen = GreyStudent(), []
        note = lambda run, images: seen.append(student.lora.shift.item())  # noqa: E731
        often = {"check_every": check_every, "stop_at": 1.1, "drift_limit": 0.0}
        settings = Settings(steps=8, learning_rate=0.02, average=average, **often)
        run = train(student, BrightnessJudge(), Objective([Question("Is it bright?")]), settings, note)
        return seen, student.lora.shift.item(), run

    trained, kept, run = shifts(average=0.7, check_every=1)
    averaged = trained[0]
    for step, shift in enumerate(trained[1:], start=2):
        averaged += max(0.3, 1 / step) * (shift - averaged)
    assert averaged < 0.9 * trained[-1]
    assert kept == pytest.approx(averaged)
    assert (run.checks[-1].pictures[:2] - GreyStudent().draw(2**31)).mean().item() == pytest.approx(averaged, abs=1e-5)
    assert trained == shifts(average=0.7, check_every=0)[0] == shifts(average=0.0, check_every=1)[0]
    assert shifts(average=0.0, check_every=1)[1] == trained[-1]


def test_the_anchor_holds_back():
    free, _, _ = teach(check_every=0, anchor=0.0)
    held, _, _ = teach(check_every=0, anchor=50.0)
    assert 0 < held.lora.shift < free.lora.shift


def test_holding_comes_lazily():
    """In the first of four steps, four times as strongly, with room for four times the gradient."""
    settings = Settings(anchor=0.5, prior=2.0, clip=1.0)
    held, *free, again = (settings.at(step) for step in range(1, 6))
    assert (held.anchor, held.prior, held.clip) == (2.0, 8.0, 4.0) and again == held
    assert free == [replace(settings, anchor=0.0, prior=0.0)] * 3
    assert settings.at(1, 2.1) == settings.at(2, 2.1) == settings and settings.at(2, 1.9) == free[0]
    colours = replace(settings, prior=0.0)
    assert colours.at(2, 9.0) == free[0], "without a prior strangeness tells nothing"
    nothing = Settings(anchor=0.0, prior=0.0)
    assert all(nothing.at(step) == nothing for step in range(1, 6))


def test_after_a_retreat_its_pictures_decide_how_often_steps_hold(monkeypatch):
    """Not those that it went back from."""
    given, at = [], Settings.at
    monkeypatch.setattr(Settings, "at", lambda *args: given.append(args[1:]) or at(*args))
    _, run, _ = teach(
        student=PalingStudent(), check_every=1, learning_rate=0.01, average=0.0, anchor=0.0, drift_limit=0.1
    )
    back = next(check.step for check in run.checks[1:] if warning(check.changes, 0.1))
    best = int(run.rate_falls[0].split()[-1])
    asked = dict(given)
    assert asked[back + 1] == run.checks[best].changes["strangeness"] != run.checks[back].changes["strangeness"]


def test_pictures_are_cleaned_in_every_fourth_step_only():
    student, seen, so_far = GreyStudent(), [], []
    clean = student.redrawn
    student.redrawn = lambda x0, noise: seen.append(1) or clean(x0, noise)
    settings = Settings(steps=6, check_every=0)
    train(student, BrightnessJudge(), Objective([Question("?")]), settings, lambda *_: so_far.append(len(seen)))
    assert [after - before for before, after in zip(so_far, so_far[1:])] == [0, 0, 0, 2, 0]


class DimStudent(GreyStudent):
    """Its untaught model makes nothing brighter than 0.4, and cleans it away."""

    def redrawn(self, x0, noise):
        return x0.clamp(max=0.4)


def test_pictures_are_cleaned_in_every_step_where_they_have_strayed(monkeypatch):
    """A look, which cleans once itself, comes after step 4."""
    monkeypatch.setattr(dual_process, "STRAYED", 0.9)
    student, seen, so_far = PalingStudent(), [], []
    clean = student.redrawn
    student.redrawn = lambda x0, noise: seen.append(1) or clean(x0, noise)
    settings = Settings(steps=8, check_every=4, check_seeds=1, drift_limit=0.0)
    train(student, BrightnessJudge(), Objective([Question("?")]), settings, lambda *_: so_far.append(len(seen)))
    assert [after - before for before, after in zip(so_far, so_far[1:])] == [0, 0, 0, 1 + 2, 2, 2, 2]


def test_the_prior_holds_back_only_what_is_not_the_model_s_own():
    often = {"check_every": 0, "anchor": 1e-6}  # of next to nothing, so that all are clipped alike
    free, _, _ = teach(prior=0.0, **often)
    natural, _, _ = teach(prior=50.0, **often)
    held, _, _ = teach(student=DimStudent(), prior=50.0, **often)
    assert natural.lora.shift.item() == pytest.approx(free.lora.shift.item(), rel=0.1)
    assert 0.05 < held.lora.shift.item() < 0.25 < free.lora.shift.item() / 2


class PalingStudent(GreyStudent):
    """Its untaught model makes pictures a tenth darker, and those of its second prompt a half."""

    prompts = 2

    def use_prompt(self, index):
        self.prompt = index

    def finished(self, seed, prompt=0):
        self.use_prompt(prompt)
        return super().finished(seed)

    def redrawn(self, x0, noise):
        assert not self.lora.on
        return x0 * (0.5 if self.prompt else 0.9)


def test_strangeness_is_how_many_times_as_much_the_untaught_model_takes_out():
    """Of each prompt as that prompt would have it; mean squares of 0.1 and 0.5 of a picture, against those before."""
    _, run, _ = teach(student=PalingStudent(), check_seeds=4, anchor=0.0, prior=0.0, steps=20)
    before, after = run.checks[0], run.checks[-1]
    for check in (before, after):
        first, second = (check.pictures[i::4].square().mean().item() for i in (0, 2))
        assert check.taken_out == pytest.approx((0.01 * first + 0.25 * second) / 2, rel=0.05)
    assert after.changes["strangeness"] == after.taken_out / before.taken_out > 1.5


def test_without_anything_of_its_own_to_take_out_nothing_is_said_of_strangeness():
    _, run, _ = teach(student=DimStudent(), anchor=0.0, prior=0.0)
    assert run.checks[-1].taken_out > 0 and "strangeness" not in run.checks[-1].changes


def test_people_are_told_of_dirty_pictures_whatever_else_changed():
    calm = dict.fromkeys(WORDS, 0.0)
    dirty = "the pictures look 11.2 times as dirty as its own: look for stains and false lines"
    dirty = f"To the model without the LoRA {dirty}"
    assert became({**calm, "strangeness": 4.7}, {}) == became(calm, {}) == ""
    assert became({**calm, "strangeness": 11.2}, {}) == dirty
    assert became({**calm, "strangeness": 11.2, "saturation": -0.3}, {}) == f"Pictures got 30% greyer. {dirty}"


def test_training_never_sees_the_held_out_seeds():
    student, run, _ = teach(check_seeds=3)
    checks = {s for s in student.seeds if 2**31 <= s < 2**32}
    assert checks == {2**31 + i for i in range(6)}, "three to draw, and what is laid over each for strangeness"
    assert all(s >= 2**32 for s in student.seeds if s not in checks)


def test_at_the_end_pictures_are_judged_by_which_nothing_was_chosen():
    student, run, _ = teach(check_seeds=3)
    student.seeds.clear()
    looks = Looks(
        student, BrightnessJudge(), None, Objective([Question("Is it bright?")]), Settings(check_seeds=3), run
    )
    run.unseen = before, after = looks.unseen()
    assert student.seeds == [UNSEEN_SEEDS + i for i in range(6)] * 2
    assert len(before.pictures) == len(after.pictures) == 6 and before.step == 0 and after.step == run.checks[-1].step
    with student.lora.disabled():
        drawn = torch.cat([student.draw(UNSEEN_SEEDS + i) for i in range(3)])
    assert torch.equal(before.pictures, drawn) and not torch.equal(after.pictures, drawn)
    assert before.scores[0] < 0.2 < 0.9 < after.scores[0] and after.changes["luminance"] > 0
    assert run.proved().startswith("6 unseen pictures: ")
    assert Run().proved() == ""


def test_a_look_asks_about_no_more_pictures_at_once_than_a_step():
    asked, judge = [], BrightnessJudge()
    log_likelihood = judge.log_likelihood
    judge.log_likelihood = lambda images, *rest: asked.append(len(images)) or log_likelihood(images, *rest)
    objective, settings = Objective([Question("Is it bright?")]), Settings(steps=1, check_seeds=5)
    run = train(GreyStudent(), judge, objective, settings, lambda *_: None)
    assert set(asked) == {2} and len(run.checks[0].pictures) == 10


def test_same_seed_same_run():
    assert teach(seed=3)[1].loss == teach(seed=3)[1].loss != teach(seed=4)[1].loss


def test_which_steps_are_learned():
    assert list(Settings().learned_steps(3)) == [0, 1, 2]
    for setting in (EARLY_STEPS, LATE_STEPS):
        assert list(Settings(learn_at=setting).learned_steps(1)) == [0]
    assert list(Settings(learn_at=EARLY_STEPS).learned_steps(4)) == [0, 1]
    assert list(Settings(learn_at=LATE_STEPS).learned_steps(4)) == [3]
    assert list(Settings(learn_at=EARLY_STEPS).learned_steps(20)) == list(range(10))
    assert list(Settings(learn_at=LATE_STEPS).learned_steps(50)) == list(range(37, 50))


def test_a_run_whose_pictures_drift_goes_back_and_on_more_carefully_and_ends_at_the_fourth_time():
    """The goal is brighter pictures; too much brighter is called ruined, and the LoRA of the best check is kept."""
    student, run, _ = teach(check_every=1, learning_rate=0.01, average=0.0, drift_limit=0.1)
    *_, drifted, kept = run.checks
    said = warning(drifted.changes, 0.1)
    assert said and run.stopped.startswith(f"at step {drifted.step}, because pictures got {said} (")
    ruined = [check.step for check in run.checks[1:] if warning(check.changes, 0.1)]
    retreats = ruined[:-1]
    assert ruined[-1] == drifted.step and len(retreats) == 3 and not warning(kept.changes, 0.1)
    assert [text.split(" pictures got ")[0] for text in run.rate_falls] == [f"at step {step}" for step in retreats]
    assert run.rate_falls[0].endswith(f"so it went back to the LoRA of step {retreats[0] - 1}")

    seen = [brightness(check) for check in run.checks]
    strides = [seen[step + 1] - seen[step - 1] for step in retreats[:2]]  # from the kept LoRA on
    first = seen[1] - seen[0]
    assert strides == [pytest.approx(first / 3, rel=0.05), pytest.approx(first / 9, rel=0.05)]
    assert 0.3 + student.lora.shift.item() == pytest.approx(kept.pictures.mean().item(), abs=1e-3)
    assert "pictures got" not in teach(check_every=1, learning_rate=0.01, drift_limit=0.0)[1].stopped


def test_fresh_noise_draws_once_and_starts_every_pass_with_another_noise():
    student, rng = GreyStudent(), torch.Generator().manual_seed(0)
    settings = Settings(learn_at=FRESH_NOISE, accumulate=3)
    passes = list(starts(student, settings, rng))
    assert len(student.seeds) == len(set(student.seeds)) == 4 and min(student.seeds) >= 2**32
    drawn, *noises = (GreyStudent().noise(seed) for seed in student.seeds)
    assert all(torch.equal(x, drawn + noise) and k == 0 for (_, x, k), noise in zip(passes, noises, strict=True))


def test_accumulated_passes_are_one_larger_batch():
    """Four passes make the step that one pass with the mean of their gradients makes."""
    stepped = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: stepped.append(optimizer.param_groups[0]["params"][0].grad.item())
    )
    quiet = {"steps": 1, "judge_noise": 0.0, "anchor": 0.0, "prior": 0.0, "check_every": 0, "clip": 1e9}
    student, run, _ = teach(accumulate=4, **quiet)
    hook.remove()
    trained = [seed for seed in student.seeds if seed >= 2**32]
    assert len(trained) == 4 and len(run.loss) == 1
    alone = GreyStudent()
    losses = [Objective([Question("Is it bright?")])(BrightnessJudge(), alone.draw(seed))[0] for seed in trained]
    mean = sum(losses) / 4
    mean.backward()
    assert run.loss[0] == pytest.approx(mean.item())
    assert stepped == [pytest.approx(alone.lora.shift.grad.item())]


def test_a_dead_gradient_is_an_error():
    student = GreyStudent()
    student.decode = lambda x0: x0.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="norm 0"):
        train(student, BrightnessJudge(), Objective([Question("Is it bright?")]), Settings(steps=3), print)


def test_a_step_without_a_finite_gradient_is_left_out():
    student, run, pictures = teach(student=BrokenGradient({3, 4, 6}), steps=8, check_every=0)
    assert run.skipped == 3 and len(run.loss) == len(run.scores) == len(pictures) == 5
    assert student.lora.shift.isfinite() and student.lora.shift > 0 and len(run.checks) == 2


def test_what_half_precision_cannot_hold_is_scaled_by_less():
    """The picture's gradient is 0.08 times the scale here, and beyond 65504 infinite in half precision."""
    student, judge = GreyStudent(), BrightnessJudge()
    student.decode = lambda x0: x0.half().float()
    student.gradient_scale, judge.gradient_scale = 1e8, 512.0
    settings = Settings(steps=8, learning_rate=0.01, check_every=0, average=0.0)
    run = train(student, judge, Objective([Question("Is it bright?")]), settings, lambda *_: None)
    assert run.skipped == 3 and len(run.loss) == 5
    assert student.gradient_scale == 1e8 / 32**2 and judge.gradient_scale == 1
    assert student.lora.shift.item() == pytest.approx(0.05, rel=0.2)


def test_one_step_without_a_finite_gradient_changes_no_scale():
    student, run, _ = teach(student=BrokenGradient({2, 4}), steps=6, check_every=0)
    assert run.skipped == 2 and student.gradient_scale == GreyStudent.gradient_scale


def test_steps_that_hold_are_scaled_by_less_too():
    """One overflow in four is no chance where it is the step that holds pictures: without it nothing would hold."""
    student, run, _ = teach(student=BrokenGradient({1, 5}), steps=8, check_every=0)
    assert run.skipped == 2 and student.gradient_scale == 1 < GreyStudent.gradient_scale


@pytest.mark.parametrize(
    "broken, step", [({1, 2, 3, 4}, 4), ({2, 4, 5, 6, 7}, 7), ({1, 5, 9, 13}, 13), ({1, 5, 13, 17, 21, 25}, 25)]
)
def test_too_many_of_them_are_an_error(broken, step):
    with pytest.raises(RuntimeError, match=f"Step {step}: .* norm (inf|nan)"):
        teach(student=BrokenGradient(broken), steps=step, check_every=0)


def test_small_gradients_come_through_a_half_precision_judge():
    """A loss so small that its gradient would vanish in fp16; compared with the same judge in fp32."""

    class Picture(GreyStudent):
        def __init__(self):
            super().__init__()
            pixels = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
            self.lora.shift = nn.Parameter(pixels)

        def predict(self, x, k):
            return self.lora.shift * 1.0

    class Small(Objective):
        def __call__(self, judge, images, untaught=None):
            log_p = judge.log_likelihood(images, self.questions)
            return 1e-5 * log_p.mean(), log_p.detach().exp()

    torch.manual_seed(0)
    model, processor = vlm_families.idefics3()
    gradients = []
    for dtype in (torch.float32, torch.float16):
        student, judge = Picture(), Judge(model.to(dtype), processor, "tiny")
        quiet, rng = Settings(judge_noise=0.0, anchor=0.0, prior=0.0), torch.Generator().manual_seed(0)
        noise = student.noise(0)
        one_pass(student, judge, Small([Question("Is the line thick?")]), quiet, rng, noise, noise, 0)
        gradients.append(student.lora.shift.grad.flatten())
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.99
    assert (half.norm() / exact.norm()).item() == pytest.approx(1, abs=0.05)


def test_objectives_by_hand():
    images = torch.full((1, 3, 2, 2), 0.5)
    images[0] += 0.125  # logit 1
    wanted, other = torch.nn.functional.logsigmoid(torch.tensor([1.0, -1.0])).tolist()
    likelihood, p = Objective([Question("?")], LIKELIHOOD)(BrightnessJudge(), images)
    assert likelihood.item() == pytest.approx(-wanted) and p.item() == pytest.approx(torch.tensor(1.0).sigmoid().item())
    margin, _ = Objective([Question("?")], MARGIN, target=0.95)(BrightnessJudge(), images)
    assert margin.item() == pytest.approx(math.log(19) - (wanted - other))
    target, _ = Objective([Question("?")], TARGET, target=0.95)(BrightnessJudge(), images)
    assert target.item() == pytest.approx(math.log(0.95) - wanted)
    for kind in (MARGIN, TARGET):
        assert Objective([Question("?")], kind, target=0.6)(BrightnessJudge(), images)[0].item() == 0
        no_opposite = Objective([Question("?", "Very")], kind, target=0.95)(BrightnessJudge(), images)[0].item()
        assert no_opposite == pytest.approx(math.log(0.95) - other), "pushes no further than the target"
    both, p = Objective([Question("?", "Yes", 3.0), Question("?", "No", 1.0)], LIKELIHOOD)(BrightnessJudge(), images)
    assert both.item() == pytest.approx((3 * -wanted + -other) / 4) and p.shape == (1, 2)
    with pytest.raises(ValueError, match="No question"):
        Objective([])


def test_a_question_to_keep_pushes_only_when_it_got_worse():
    """The judge's log-odds are 8 * (brightness - 0.5); before training the answer to keep had those of 0.25."""
    kept = [Question("Is it bright?"), Question("Is it a picture?", keep=True)]
    before = Objective(kept, target=1 / (1 + math.exp(-5))).start_from([0.5, torch.tensor(-2.0).sigmoid().item()])
    for brightness, keep_loss in ((0.25, 0.0), (0.5, 0.0), (0.125, 1.0)):
        loss, scores = before(BrightnessJudge(), torch.full((1, 3, 2, 2), brightness))
        odds = 8 * (brightness - 0.5)
        assert loss.item() == pytest.approx((5.0 - odds + keep_loss) / 2, abs=1e-6)
        assert scores.tolist()[0] == pytest.approx([1 / (1 + math.exp(-odds))] * 2)
    likelihood = replace(before, kind=LIKELIHOOD)
    assert likelihood(BrightnessJudge(), torch.full((1, 3, 2, 2), 0.25))[0].item() == pytest.approx(
        -torch.nn.functional.logsigmoid(torch.tensor(-2.0)).item() / 2
    )
    with pytest.raises(ValueError, match="one to keep"):
        Objective(kept[1:])


def test_a_question_of_weight_0_is_asked_and_nothing_is_done_about_it():
    watched = [Question("Is it bright?"), Question("Is it a picture?", "No", weight=0.0)]
    images = torch.full((1, 3, 2, 2), 0.625).requires_grad_()
    both, scores = Objective(watched)(BrightnessJudge(), images)
    alone, (score,) = Objective(watched[:1])(BrightnessJudge(), images)
    assert both.item() == alone.item() and scores.tolist() == [[score.item(), pytest.approx(1 - score.item())]]
    gradients = [torch.autograd.grad(loss, images)[0] for loss in (both, alone)]
    assert torch.equal(*gradients)
    assert Objective(watched).start_from([0.5, 0.5]).standing([0.99, 0.01]) == 0.99
    with pytest.raises(ValueError, match="only watched"):
        Objective(watched[1:])


def test_standing_is_the_worst_question():
    objective = Objective([Question("a"), Question("b"), Question("c", keep=True)]).start_from([0.1, 0.2, 0.8])
    assert objective.standing([0.9, 0.7, 0.8]) == 0.7
    assert objective.standing([0.9, 0.9, 0.6]) == pytest.approx(0.75)
    assert objective.standing([0.9, 0.95, 0.9]) == 0.9
    assert objective.start_from([0.5, 0.5, 0.0]).standing([0.9, 0.95, 0.1]) == 0.9, "nothing was there to be kept"


def test_a_score_does_not_ask_for_more_than_the_judge_can_give():
    """Half of its probability goes to other words; of what is left for Yes and No, Yes has most."""

    class Hesitant(BrightnessJudge):
        def log_likelihood(self, images, questions, before=None):
            return super().log_likelihood(images, questions) + math.log(0.5)

    white = torch.ones(1, 3, 2, 2)
    assert Objective([Question("?")], MARGIN)(Hesitant(), white)[1].item() == pytest.approx(1 / (1 + math.exp(-4)))
    raw = Objective([Question("?")], LIKELIHOOD)(Hesitant(), white)[1].item()
    assert raw == pytest.approx(0.5 / (1 + math.exp(-4)))


def test_pictures_are_varied_a_little_and_differentiably():
    rng, pictures = torch.Generator().manual_seed(0), torch.rand(8, 3, 24, 40)
    assert varied(pictures, 0.0, rng) is pictures
    assert torch.equal(rng.get_state(), torch.Generator().manual_seed(0).get_state())
    flat = varied(torch.full((200, 3, 8, 8), 0.5), 1.0, rng)
    shift = flat.mean(dim=(1, 2, 3)) - 0.5
    assert flat.std(dim=(1, 2, 3)).max() < 1e-6 and 0.08 < shift.abs().max() <= 0.1
    ramp = torch.linspace(0, 1, 40).expand(200, 3, 24, 40)
    steps = varied(ramp, 1.0, rng).diff(dim=3)[..., 5:-5].mean(dim=(1, 2, 3)) * 39  # crop and contrast change the slope
    assert 0.7 < steps.min() < 0.85 and 1.1 < steps.max() <= 1.21
    again = (varied(pictures.double(), 0.7, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(*again)
    assert torch.autograd.gradcheck(
        lambda x: varied(x, 0.7, torch.Generator().manual_seed(1)), torch.rand(1, 3, 4, 5).double().requires_grad_()
    )


def test_noise_has_the_strength_it_says():
    rng = torch.Generator().manual_seed(0)
    noise = with_noise(torch.zeros(400, 3, 16, 16), 0.1, rng).std(dim=(1, 2, 3))
    assert noise.max() <= 0.11 and noise.mean().item() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(with_noise(torch.ones(1, 3, 4, 4), 0.0, rng), torch.ones(1, 3, 4, 4))
