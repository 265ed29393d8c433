"""Judge from CLIP: ComfyUI's own Qwen3-VL, tiny and random, against its plain forward and finite differences."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from dual_process.benchmarks.matrix_judges import picture
from dual_process.tests.native_vlm import tiny_qwen3_vl
from dual_process.vlm.question import Question

WARM, LINE = Question("Warm?"), Question("Is the line thick?")


@pytest.fixture(scope="module")
def clip(comfy):
    """A CLIP as ComfyUI's loader makes it."""
    if not importlib.util.find_spec("comfy.text_encoders.qwen3vl"):
        pytest.skip("this ComfyUI has no Qwen3-VL")
    import comfy.sd

    encoder, tokenizer = tiny_qwen3_vl()
    target = SimpleNamespace(params={}, clip=lambda **_: encoder, tokenizer=lambda **_: tokenizer)
    return comfy.sd.CLIP(target)


@pytest.fixture(scope="module")
def managed(clip):
    """The node's output for that CLIP, loaded."""
    from dual_process.nodes.native import JudgeFromClip

    with torch.inference_mode():
        (made,) = JudgeFromClip.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(clip=clip).result
        made.load()
    return made


@pytest.fixture(scope="module")
def judge(managed):
    return managed.judge


def test_there_is_a_node_exactly_where_core_has_the_model(comfy):
    from dual_process.nodes.native import JudgeFromClip, native_nodes

    has = importlib.util.find_spec("comfy.text_encoders.qwen3vl") is not None
    assert native_nodes() == ([JudgeFromClip] if has else [])


def test_the_clips_own_patcher_is_what_comfyui_loads(managed, clip):
    assert managed.patcher is clip.patcher


def test_another_clip_is_one_sentence(judge):
    from dual_process.nodes.native import JudgeFromClip

    with pytest.raises(ValueError, match="This CLIP is not a judge"):
        JudgeFromClip.execute(SimpleNamespace(cond_stage_model=torch.nn.Linear(1, 1)))


def test_gradient_inside_a_node_is_that_of_finite_differences(judge):
    from dual_process.trainers.comfy_memory import gradients

    with torch.inference_mode(), gradients():
        image = picture((64, 96)).requires_grad_()
        (gradient,) = torch.autograd.grad(judge.log_likelihood(image, [WARM]).sum(), image)
    length = gradient.norm().item()
    step = 0.02 * gradient / length
    with torch.no_grad():
        rise = judge.log_likelihood(image + step, [WARM]) - judge.log_likelihood(image - step, [WARM])
    assert rise.item() / 0.04 == pytest.approx(length, rel=0.01)


@torch.no_grad()
def test_score_is_that_of_the_next_token_that_core_would_draw(judge, clip):
    image = picture((64, 96))
    tokens = clip.tokenize("Warm?", image=image.movedim(1, -1))
    encoder = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
    embeds, _, _, info = encoder.process_tokens([[token[0] for token in next(iter(tokens.values()))[0]]], "cpu")
    hidden = encoder.transformer(None, embeds=embeds, embeds_info=info)[0]
    logp = encoder.transformer.logits(hidden)[0, -1].log_softmax(-1)
    yes = judge._answer("Yes")
    assert len(yes) == 1
    assert judge.log_likelihood(image, [WARM]).item() == pytest.approx(logp[yes[0]].item(), abs=1e-4)
    assert clip.decode([logp.argmax().item()]).strip() == judge.ask(image, "Warm?", 1)


def test_an_answer_of_several_tokens_is_averaged(judge):
    image, answer = picture(), judge._answer("maybe definitely")
    assert len(answer) == 2
    logp = judge._answer_logp(image, "Warm?", answer)
    expected = (logp[0, answer[0]] + logp[1, answer[1]]) / 2
    alone = judge.log_likelihood(image, [Question("Warm?", "maybe")])
    both = judge.log_likelihood(image, [Question("Warm?", "maybe definitely"), Question("Warm?", "maybe")])
    assert torch.allclose(both, torch.stack([expected, alone[0, 0]])[None], atol=1e-5)


def test_several_questions_batches_and_two_pictures(judge):
    images, asked = picture(rows=2), [WARM, WARM.opposite(), LINE]
    scores = judge.log_likelihood(images, asked)
    assert scores.shape == (2, 3)
    for i, image in enumerate(images):
        for j, question in enumerate(asked):
            assert judge.log_likelihood(image[None], [question]).item() == pytest.approx(scores[i, j].item(), abs=1e-4)
    two = judge.log_likelihood([images[:1], images[1:]], [WARM])
    assert (two - judge.log_likelihood([images[1:], images[:1]], [WARM])).abs() > 1e-4
    assert (two - scores[:1, :1]).abs() > 1e-4


def test_what_was_seen_is_a_multiple_of_32(judge):
    assert judge.seen([picture((70, 90))[0]]).shape == (3, 64, 96)


def test_its_blocks_are_recomputed_with_the_same_gradient(lab, clip, managed):
    """In bf16 every product keeps a copy of its weight in fp32: core computes what encoders do in that."""
    from dual_process.trainers.checkpointing import JUDGE
    from dual_process.trainers.dual_process import Settings, one_pass
    from dual_process.trainers.objective import Objective

    def gradient(on: bool) -> torch.Tensor:
        student = lab.build_student("SD3", checkpointed=on)
        again = []
        student.recompute.tell = lambda event, call: again.append(call.block)

        def loop():
            noise, rng = student.noise(1), torch.Generator().manual_seed(0)
            settings = Settings(judge_noise=0.0, anchor=0.0)
            one_pass(student, student.in_turn(managed), Objective([WARM]), settings, rng, noise, noise, 0)
            return torch.cat([a.B.grad.flatten() for a in student.lora.adapters if a.B.grad is not None])

        found = student.run(loop, beside=[managed.patcher])
        assert any(block.part == JUDGE for block in again) == on
        return found

    kept, recomputed = gradient(False), gradient(True)
    assert kept.norm() > 0 and (recomputed - kept).norm() < 1e-5 * kept.norm()
