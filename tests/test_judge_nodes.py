"""Ask the Judge and Judge Score inside a real ComfyUI, and what stays in memory afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dual_process.benchmarks.matrix_judges import picture
from dual_process.tests import vlm_families
from dual_process.vlm.question import Question


@pytest.fixture
def managed(comfy):
    from dual_process.trainers.comfy_memory import ManagedJudge

    return ManagedJudge(vlm_families.judge("Idefics3"))


@pytest.fixture
def nodes(comfy):
    """Ask the Judge and Judge Score, run as ComfyUI runs nodes: in inference mode, as clones with hidden inputs."""
    from comfy_api.latest import io

    from dual_process.nodes.judge import AskJudge, JudgeScore

    def run(node: type[io.ComfyNode], **inputs):
        clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            return clone.EXECUTE_NORMALIZED(**inputs)

    return lambda **inputs: run(AskJudge, **inputs), lambda **inputs: run(JudgeScore, **inputs)


def comfy_images(rows: int) -> torch.Tensor:
    return picture((64, 64), rows=rows).movedim(1, -1)


def test_ask_answers_every_picture_and_shows_what_was_seen(nodes, managed):
    ask, _ = nodes
    output = ask(judge=managed, image=comfy_images(2), question="What is it?", max_tokens=3)
    text, seen = output.result
    assert text == "\n".join(managed.judge.ask(image, "What is it?", 3) for image in picture((64, 64), rows=2))
    assert seen.shape == (2, 64, 64, 3) and seen.min() >= 0 and seen.max() <= 1
    assert output.ui["text"] == (text,) and len(output.ui["images"]) == 2


def test_ask_refuses_an_empty_question(nodes, managed):
    with pytest.raises(ValueError, match="question is empty"):
        nodes[0](judge=managed, image=comfy_images(1), question=" ", max_tokens=3)


def yes_rather_than_no(judge, images, asked):
    """Of the two answers alone, the probability of Yes."""
    return (judge.log_likelihood(images, asked) - judge.log_likelihood(images, [q.opposite() for q in asked])).sigmoid()


def test_score_sorts_and_picks(nodes, managed):
    asked = [Question("Warm?"), Question("Is the line thick?")]
    images = comfy_images(4)
    best, ordered, score, table, index = nodes[1](judge=managed, images=images, questions=asked, keep=2).result
    means = yes_rather_than_no(managed.judge, images.movedim(-1, 1), asked).mean(dim=1)
    assert torch.equal(ordered, images[means.argsort(descending=True)])
    assert torch.equal(best, ordered[:2])
    assert score == pytest.approx(means.max().item(), abs=1e-5)
    assert "Warm? -> Yes" in table and index == means.argmax()


def test_a_reference_goes_before_every_picture(comfy, nodes):
    from dual_process.trainers.comfy_memory import ManagedJudge

    ask, score = nodes
    managed = ManagedJudge(vlm_families.judge("Qwen2-VL"))
    images, reference = comfy_images(2), comfy_images(3)[2:]
    pictures, before = images.movedim(-1, 1), reference.movedim(-1, 1)
    text, seen = ask(judge=managed, image=images, question="Warmer?", max_tokens=3, reference=reference).result
    assert text == "\n".join(managed.judge.ask([before, picture], "Warmer?", 3) for picture in pictures)
    assert seen.shape[2] > seen.shape[1], "reference and picture are side by side"
    asked = [Question("Is the second picture warmer?")]
    best = score(judge=managed, images=images, questions=asked, keep=1, reference=reference).result[2]
    assert best == pytest.approx(yes_rather_than_no(managed.judge, [before, pictures], asked).max().item(), abs=1e-5)


def test_a_judge_asked_in_a_node_still_trains(nodes, managed):
    nodes[0](judge=managed, image=comfy_images(1), question="Warm?", max_tokens=1)
    nodes[1](judge=managed, images=comfy_images(1), questions=[Question("Warm?")], keep=1)
    image = picture((64, 64)).requires_grad_()
    managed.judge.log_likelihood(image, [Question("Warm?"), Question("Is the line thick?")]).sum().backward()
    assert image.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in managed.judge.model.parameters())


def test_comfyui_loads_evicts_and_reloads_the_judge(comfy, nodes, managed):
    import comfy.model_management as mm

    mm.unload_all_models()
    before = managed.judge.log_likelihood(picture((64, 64)), [Question("Warm?")])
    managed.load()
    assert [loaded.model for loaded in mm.current_loaded_models] == [managed.patcher]
    managed.load()
    assert len(mm.current_loaded_models) == 1
    mm.unload_all_models()
    assert mm.current_loaded_models == []
    managed.load()
    assert len(mm.current_loaded_models) == 1
    assert torch.equal(managed.judge.log_likelihood(picture((64, 64)), [Question("Warm?")]), before)


def test_nothing_of_a_dropped_judge_stays(comfy, nodes):
    import comfy.model_management as mm

    from dual_process.trainers.comfy_memory import ManagedJudge

    mm.unload_all_models()
    managed = ManagedJudge(vlm_families.judge("Idefics3"))
    nodes[1](judge=managed, images=comfy_images(2), questions=[Question("Warm?"), Question("Cold?")], keep=1)
    weights = [weakref.ref(parameter) for parameter in managed.judge.model.parameters()]
    assert all(weight() is not None for weight in weights)
    del managed
    gc.collect()
    mm.cleanup_models()
    gc.collect()
    assert sum(weight() is not None for weight in weights) == 0
    assert mm.current_loaded_models == []
