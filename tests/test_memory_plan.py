"""What a step will hold in memory, foreseen from one pass with recomputation, and what is made of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.dual_process import Settings, one_pass
from dual_process.trainers.live_memory import LiveMemory
from dual_process.trainers.memory_plan import HEADROOM, MemoryPlan, plan_memory, predicted_peaks
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question

GOAL = Objective([Question("Is the line thick?"), Question("Are the colours warm?", "No")])


@pytest.fixture
def lab(comfy):
    """Builders of tiny models, in the inference mode that ComfyUI runs nodes in."""
    from dual_process.tests import architectures

    with torch.inference_mode():
        yield architectures


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
        before = student.lora.snapshot()
        foreseen = predicted_peaks(student, judge.judge, GOAL, Settings())
        assert all(torch.equal(value, before[key]) for key, value in student.lora.state_dict().items())
        assert all(parameter.grad is None for parameter in student.lora.parameters()) and student.recompute.on
        student.recompute.on = False
        kept, plain = a_pass(student, judge.judge)
        student.recompute.on = True
        recomputed, again = a_pass(student, judge.judge)
        assert recomputed < 0.6 * kept
        assert foreseen == (pytest.approx(kept, rel=0.15), pytest.approx(recomputed, rel=0.15))
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item())

    student.run(loop, [judge.patcher])


@pytest.mark.parametrize("free, recompute", [(10**12, False), (10**5, True)])
def test_what_fits_is_taken(lab, free, recompute):
    student, judge = lab.build_student("SD3"), lab.build_judge()
    student.free_memory = lambda wanted: free

    def loop():
        plan = plan_memory(student, judge.judge, GOAL, Settings())
        assert (plan.recompute, student.recompute.on, plan.free) == (recompute, recompute, free)
        assert 0 < plan.recomputing < plan.keeping

    student.run(loop, [judge.patcher])


def test_the_choice_keeps_headroom_and_says_its_numbers():
    fits, tight = (MemoryPlan(int(10e9), int(2e9), int(free)) for free in (10e9 * HEADROOM, 12.5e9))
    assert not fits.recompute and tight.recompute
    assert tight.sentence() == (
        "Recomputing: a step takes about 2.00 GB beyond the weights; keeping everything would take 10.00 GB, and "
        "12.50 GB are free."
    )
    assert (
        fits.sentence() == "Keeping everything: a step takes about 10.00 GB beyond the weights, and 13.00 GB are free."
    )


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


def train_on_the_node(lab, monkeypatch, **changed) -> tuple[dict, list[str]]:
    """The LoRA's header and what the node showed; the inputs given take the place of those here."""
    from comfy_api.latest import io
    from comfy_execution.graph import DynamicPrompt

    from dual_process.nodes import trainer

    shown = []
    server = SimpleNamespace(
        client_id=None, send_sync=lambda *_: None, send_progress_text=lambda text, node: shown.append(text)
    )
    monkeypatch.setattr(trainer, "PromptServer", SimpleNamespace(instance=server))
    graph = DynamicPrompt({"7": {"class_type": "DualProcessTrainer", "inputs": {}}})
    hidden = {io.Hidden.unique_id: "7", io.Hidden.dynprompt: graph}
    clone = trainer.Trainer.PREPARE_CLASS_CLONE({**hidden, "hidden_inputs": hidden})
    inputs = {"sampler_steps": 2, "sampler_name": "euler", "scheduler": "simple", "cfg": 1.0, "seed": 3}
    inputs |= {"steps": 1, "learning_rate": 1e-4, "rank": 4, "objective": "answer margin", "anchor": 0.1}
    inputs |= {"judge_noise": 0.1, "check_every": 0, "stop_at": 1.0, "learn_at": "any step", "accumulate": 1}
    inputs |= {"targets": "", "self_check": False, "continue_from": trainer.NEW_LORA, "checkpointing": True}
    inputs |= {"model": lab.build_model("SD3"), "vae": lab.build_vae("SD3"), "latent": lab.build_latent("SD3")}
    inputs |= {"positive": lab.build_conditioning("SD3"), "questions": GOAL.questions, "judge": lab.build_judge()}
    output = clone.EXECUTE_NORMALIZED(**{**inputs, **changed})
    return output.result[0].metadata, shown


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
def test_on_the_node(lab, monkeypatch, checkpointing, recompute, planned, recomputed):
    """None: a workflow saved before the input existed. The machine has far more memory than this takes."""
    changed = {"recompute": recompute} if recompute else {}
    header, shown = train_on_the_node(lab, monkeypatch, checkpointing=checkpointing, **changed)
    story = json.loads(header["dual_process"])
    assert shown[0].startswith("Keeping everything: a step takes about") == planned
    assert header["ss_gradient_checkpointing"] == str(recomputed) and story["recomputed"] == recomputed
    assert bool(story["memory_plan_bytes"]) == planned
    if planned:
        assert 0 < story["memory_plan_bytes"]["recomputing"] < story["memory_plan_bytes"]["free"]
