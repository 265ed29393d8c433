"""What a step will hold in memory, foreseen from one pass with recomputation, and what is recomputed for it to fit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.checkpointing import Block, Call, Event, Recompute, make_recomputable
from dual_process.trainers.dual_process import Settings, one_pass
from dual_process.trainers.live_memory import LiveMemory
from dual_process.trainers.memory_plan import (
    HEADROOM,
    NEED_LESS,
    MemoryPlan,
    Rehearsal,
    plan_memory,
    rehearse,
    try_pass,
    try_step,
)
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question

SHARES = (0.3, 0.6)  # of what keeping everything takes more than recomputing everything
GOAL = Objective([Question("Is the line thick?"), Question("Are the colours warm?", "No")])


def a_pass(student, judge) -> tuple[int, list[torch.Tensor]]:
    """Peak bytes and the gradients of a pass as the student is set."""
    student.use_prompt(0)
    noise = student.noise(1)
    with LiveMemory() as memory:
        one_pass(student, judge, GOAL, Settings(), torch.Generator().manual_seed(0), noise, noise, 0)
    gradients = [p.grad for p in student.lora.parameters() if p.grad is not None]
    for parameter in student.lora.parameters():
        parameter.grad = None
    return memory.peak, gradients


@pytest.mark.parametrize("name", ["SD1.5", "SDXL", "SD3", "FLUX dev", "Lumina 2", "Qwen-Image", "Wan still"])
def test_foreseen_is_what_happens(lab, name):
    student, judge = lab.build_student(name, latent=lab.build_latent(name, batch=2)), lab.build_judge()

    def loop():
        give_lora_a_value(student.lora)
        a_pass(student, judge.judge)  # finds out how the judge looks
        before, recompute = student.lora.snapshot(), student.recompute
        rehearsal = rehearse(student, judge.judge, GOAL, Settings())
        assert all(torch.equal(value, before[key]) for key, value in student.lora.state_dict().items())
        assert all(parameter.grad is None for parameter in student.lora.parameters())
        assert recompute.on and not recompute.kept

        recompute.on = False
        most, plain = a_pass(student, judge.judge)
        assert rehearsal.peak(rehearsal.blocks) == pytest.approx(most, rel=0.15)
        recompute.on = True
        least, again = a_pass(student, judge.judge)
        assert rehearsal.peak(frozenset()) == pytest.approx(least, rel=0.15)
        assert least < 0.6 * most
        runs = [again]
        for share in SHARES:
            budget = least + share * (most - least)
            recompute.kept = rehearsal.choose(budget)
            assert 0 < len(recompute.kept) < len(rehearsal.blocks)
            peak, again = a_pass(student, judge.judge)
            assert rehearsal.peak(recompute.kept) == pytest.approx(peak, rel=0.15) and peak < 1.15 * budget
            runs.append(again)
        for again in runs:
            for a, b in zip(plain, again, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item())

    student.run(loop, [judge.patcher])


def test_what_fits_is_taken(lab):
    """Room for everything, for half of it, and for nothing."""
    student, judge = lab.build_student("SD3", latent=lab.build_latent("SD3", batch=8)), lab.build_judge()
    recompute = student.recompute

    def planned(free: float) -> MemoryPlan:
        student.free_memory = lambda wanted=0: free
        return plan_memory(student, student.in_turn(judge), GOAL, Settings())

    def loop():
        roomy, none = planned(10**12), planned(1)
        assert not planned(10**12).blocks and not recompute.on and roomy.chosen == roomy.keeping
        assert none == planned(1) and recompute.on and not recompute.kept and none.whole_vae
        assert none.chosen == none.recomputing and all(some == all for some, all in none.blocks.values())
        half = planned(HEADROOM * (none.recomputing + roomy.keeping) / 2)
        assert recompute.on and recompute.kept
        assert none.recomputing < half.chosen <= (none.recomputing + roomy.keeping) / 2
        assert sum(some for some, _ in half.blocks.values()) < sum(all for _, all in half.blocks.values())

    student.run(loop, [judge.patcher])


def test_most_work_for_least_memory_is_kept():
    """Three blocks hold 4, 4 and 1 MB; the last but one is half of the work. Forward, then backward in reverse."""
    rehearsal, calls = Rehearsal(), [Call(Block("model", number)) for number in range(3)]
    columns = [2**20, 2**20, 2**18]
    with rehearsal.memory:
        x = torch.ones(1, 8)
        for call in calls:
            x = x + 1
            rehearsal.note(Event.DONE, call)
        for call, width in reversed(list(zip(calls, columns))):
            x = x + 1
            rehearsal.note(Event.AGAIN, call)
            held = x.T @ torch.ones(1, width // 8) if call is calls[1] else torch.ones(width)
            rehearsal.note(Event.BACK, call)
            x = x + 1
            del held
    rehearsal.evaluate()
    assert rehearsal.peak(()) == pytest.approx(4 * 2**20, rel=0.2)
    assert rehearsal.peak(rehearsal.blocks) == pytest.approx(9 * 2**20, rel=0.1)
    assert rehearsal.choose(2**30) == rehearsal.blocks
    assert rehearsal.choose(8.6 * 2**20) == {Block("model", 1), Block("model", 2)}
    assert rehearsal.choose(1) == frozenset()


def test_what_two_blocks_hold_together_is_counted_once(comfy):
    """TAESD's blocks end in a ReLU, whose backward needs what it made; that is what the next block is given."""
    from dual_process.tests.architectures import randomise
    from dual_process.tests.test_recomputation import taesd

    vae, _ = taesd()
    randomise(vae, seed=3)
    vae.requires_grad_(False)
    rehearsal, memory = Rehearsal(), LiveMemory()
    recompute = Recompute(True, tell=rehearsal.note)

    def decode() -> None:
        vae.decode(torch.ones(1, 16, 8, 8, requires_grad=True)).sum().backward()

    with make_recomputable(vae, "VAE", recompute):
        with rehearsal.memory:
            decode()
        rehearsal.evaluate()
        recompute.on = False
        with memory:
            decode()
    assert rehearsal.peak(rehearsal.blocks) == pytest.approx(memory.peak, rel=0.1)


def test_the_choice_says_its_numbers():
    blocks = {"model": (3, 10), "VAE": (0, 12), "judge": (7, 7)}
    some = MemoryPlan(int(10e9), int(2e9), int(6e9), int(8e9), blocks, whole_vae=True)
    assert some.sentence() == (
        "Recomputing 3 of 10 blocks of the model, 7 of 7 blocks of the judge, the VAE as a whole: a step takes about "
        "6.00 GB beyond the weights; keeping everything would take 10.00 GB, and 8.00 GB are free."
    )
    everything = MemoryPlan(int(10e9), int(2e9), int(10e9), int(13e9), {}, whole_vae=False)
    assert everything.sentence() == (
        "Keeping everything: a step takes about 10.00 GB beyond the weights, and 13.00 GB are free."
    )
    tight = MemoryPlan(int(10e9), int(2e9), int(2e9), int(2.5e9), blocks, whole_vae=True)
    assert tight.sentence().endswith(f"2.50 GB are free. It may run out of memory. {NEED_LESS}")


def test_a_step_is_tried_beside_what_training_keeps(lab):
    student, judge = lab.build_student("SD3"), lab.build_judge()

    def loop():
        peaks = []
        for work in (try_pass, try_step):
            with LiveMemory() as memory:
                work(student, judge.judge, GOAL, Settings())
            peaks.append(memory.peak)
        return peaks

    alone, beside = student.run(loop, [judge.patcher])
    lora = sum(parameter.nbytes for parameter in student.lora.parameters())
    assert beside - alone == pytest.approx(3 * lora, rel=0.02)


@pytest.mark.parametrize("where", ["plan", "loop"])
def test_nothing_is_left_behind_by_an_error(lab, where):
    student, judge = lab.build_student("SD3"), lab.build_judge()
    broken = SimpleNamespace(gradient_scale=1.0, log_likelihood=lambda *_: 1 / 0)

    def loop():
        plan_memory(student, broken if where == "plan" else judge.judge, GOAL, Settings())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        student.run(loop, [judge.patcher])
    for root in (student.model.model, student.vae.first_stage_model, judge.judge.model):
        assert not any("forward" in vars(module) for module in root.modules())
    assert student.recompute.tell is type(student.recompute).tell, "nobody listens any more"
    assert all(parameter.grad is None for parameter in student.lora.parameters())


@pytest.mark.parametrize(
    "checkpointing, recompute, planned, recomputed",
    [
        (True, None, True, False),
        (True, "automatic", True, False),
        (True, "always", False, True),
        (True, "never", False, False),
        (False, "always", False, False),
    ],
)
def test_on_the_node(lab, trained, checkpointing, recompute, planned, recomputed):
    """None: a workflow saved before the input existed. The machine has far more memory than this takes."""
    chosen = {"recompute": recompute} if recompute else {}
    output, shown = trained(judge=lab.build_judge(), steps=1, check_every=0, checkpointing=checkpointing, **chosen)
    header = output.result[0].metadata
    story = json.loads(header["dual_process"])
    assert any(text.startswith("Keeping everything: a step takes about") for text in shown) == planned
    assert header["ss_gradient_checkpointing"] == str(recomputed) and story["recomputed"] == recomputed
    assert bool(story["memory_plan"]) == planned
    if planned:
        assert 0 < story["memory_plan"]["recomputing"] < story["memory_plan"]["free"]
