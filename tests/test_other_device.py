"""Training where ComfyUI computes on one device and keeps models on another, as it does with a GPU: no tensor is left
behind, and what comes of it is what comes of it on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

from dual_process.tests.test_student import ALL
from dual_process.tests.vlm_families import FAMILIES, judge
from dual_process.trainers.dual_process import Settings, train
from dual_process.trainers.objective import Objective
from dual_process.trainers.report import page
from dual_process.vlm.guides import Horizon
from dual_process.vlm.judge import beside
from dual_process.vlm.overlay import BeforeAfter, Beside, Overlay
from dual_process.vlm.question import Question

QUESTIONS = [
    Question("Is the horizon on the line?", guide=Overlay(Horizon(0.6))),
    Question("Is it a landscape?", keep=True),
    Question("Is the second picture warmer?", guide=BeforeAfter()),
    Question(
        "Are both pictures alike?", guide=Beside(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)))
    ),
]
RESIZED_BY_LANCZOS = ("Idefics3", "SmolVLM")  # which transformers has on the CPU alone: elsewhere it is bicubic


@pytest.fixture
def there(comfy):
    """Enters the other device; what is called before computes on the CPU."""
    from dual_process.tests.other_device import compute_elsewhere

    with pytest.MonkeyPatch.context() as patches:
        modes = []

        def enter(**how):
            modes.append(compute_elsewhere(patches, **how))
            modes[-1].__enter__()

        yield enter
        for mode in modes:
            mode.__exit__(None, None, None)


def test_it_refuses_what_a_gpu_refuses(comfy, there):
    from dual_process.tests.other_device import THERE

    there()
    ours, theirs = torch.ones(2, 2), torch.nn.Linear(2, 2).to(THERE)
    assert theirs.weight.device == THERE and theirs(ours.to(THERE)).device == THERE
    assert theirs(ours.to(THERE)).cpu().device.type == "cpu"
    assert (ours.to(THERE)[torch.tensor([1])] * torch.tensor(2.0)).tolist() == [[2, 2]]
    number = torch.tensor(1.0)
    for meeting in (
        lambda: theirs(ours),
        lambda: ours + ours.to(THERE),
        lambda: ours[torch.tensor([1], device=THERE)],
        lambda: torch.stack([number, number.to(THERE)]),
        lambda: torch.tensor(1.0).add_(number.to(THERE)),
        lambda: ours.to(THERE).index_put_((torch.tensor([1]),), torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            meeting()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=THERE, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        ours.to(THERE).numpy()


def managed(name):
    """A judge of the family that ComfyUI can load."""
    from dual_process.trainers.comfy_memory import ManagedJudge

    with torch.inference_mode(False):
        return ManagedJudge(judge(name))


def learn(student):
    """Two steps with looks; the run, and where the LoRA and the steps' pictures were."""
    one, places = managed("Qwen2-VL"), set()

    def loop():
        places.update(parameter.device.type for parameter in student.lora.parameters())
        settings = Settings(steps=2, check_every=1, stop_at=2.0, augment=0.5)
        seen = lambda run, pictures: places.add(pictures.device.type)  # noqa: E731
        return train(student, student.in_turn(one), Objective(QUESTIONS), settings, seen)

    return student.run(loop, beside=[one.patcher]), places


@pytest.mark.parametrize("name", ALL)
def test_every_student_learns_there(lab, there, name):
    here, places = learn(lab.build_student(name))
    assert places == {"cpu"}
    there()
    run, places = learn(lab.build_student(name))
    assert places == {"lazy"}
    assert run.loss == pytest.approx(here.loss, rel=1e-3)
    assert torch.allclose(run.checks[0].pictures, here.checks[0].pictures, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_judges_there(comfy, there, name):
    if name == "Mllama" and transformers.__version__.startswith("4."):
        pytest.skip("this transformers cuts its gradient")
    from dual_process.tests.other_device import THERE
    from dual_process.trainers.comfy_memory import gradients, loaded_for_training

    picture = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    asked = [Question("Is it red?"), Question("Is it blue?", "No", guide=Overlay(Horizon(0.6)))]

    def look(one, picture):
        picture = picture.requires_grad_()
        found = one.log_likelihood(picture, asked)
        found.sum().backward()
        return found.detach().cpu(), picture.grad.cpu()

    found, gradient = look(judge(name), picture.clone())
    there()
    with torch.inference_mode():
        one = managed(name)
        with gradients(), loaded_for_training([one.patcher]):
            assert one.judge.device == THERE
            found_there, gradient_there = look(one.judge, picture.to(THERE))
    tolerance = 0.5 if name in RESIZED_BY_LANCZOS else 1e-4
    assert torch.allclose(found_there, found, atol=tolerance)
    assert (gradient_there - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize(("size", "turns"), [(2**36, False), (2**24, True)], ids=["together", "in_turns"])
def test_the_node_trains_there(trained, there, size, turns):
    """With everything that looks at the model or the judge apart from the steps, and every way to show a guide."""
    there(size=size)
    inputs = {"judge": managed("Qwen2-VL"), "second_judge": managed("InternVL"), "questions": QUESTIONS}
    inputs |= {"check_every": 1, "self_check": True, "checkpointing": True, "recompute": "automatic"}
    inputs |= {"sampler_name": "euler_ancestral"}  # which draws noise of its own as it walks
    output, shown = trained(**inputs)
    lora, _, before, after, report = output.result
    assert before.device.type == after.device.type == "cpu" and "unseen pictures" in shown[-1]
    assert all(tensor.device.type == "cpu" for tensor in lora.values())
    assert "data:image" in page(report)
    assert any("Taking turns" in line for line in shown) == turns


def test_nothing_of_a_run_stays_there(trained, there):
    """Beside the weights that ComfyUI keeps loaded, and without waiting for garbage collection."""
    import comfy.model_management as mm

    from dual_process.tests.other_device import Elsewhere

    there()
    inputs = {"judge": managed("Qwen2-VL"), "questions": QUESTIONS, "self_check": True, "checkpointing": True}
    gc.collect()
    gc.disable()
    try:
        output, _ = trained(**inputs, check_every=1, recompute="automatic")
        loaded = [one.model.model for one in mm.current_loaded_models]
        weights = {id(tensor) for model in loaded for tensor in [*model.parameters(), *model.buffers()]}
        left = [one for one in gc.get_objects() if isinstance(one, Elsewhere) and id(one) not in weights]
    finally:
        gc.enable()
    assert loaded and output.result
    assert sum(one.nbytes for one in left) < 1000, [one.shape for one in left]


@pytest.mark.parametrize("elsewhere", ["picture", "reference"])
def test_a_picture_of_another_device_may_stand_beside(comfy, there, elsewhere):
    """Some node packs hand pictures on where they computed them."""
    from dual_process.tests.other_device import THERE

    there()
    picture, reference = torch.rand(2, 3, 8, 8), torch.rand(1, 3, 6, 6)
    if elsewhere == "picture":
        picture = picture.to(THERE)
    else:
        reference = reference.to(THERE)
    assert {shown.device for pair in beside(reference, picture) for shown in pair} == {picture.device}
