"""Generator and judge on the device one after the other, because they do not fit together."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.dual_process import Settings, one_pass, train
from dual_process.trainers.memory_plan import HEADROOM, NEED_LESS, plan_memory, rehearse
from dual_process.trainers.objective import Objective
from dual_process.vlm.overlay import BeforeAfter
from dual_process.vlm.question import Question

QUESTIONS = [Question("Is the line thick?"), Question("Are the colours warm?", "No")]
GOAL = Objective(QUESTIONS)
QUIET = {"drift_limit": 0.0, "stop_at": 1.1}
AMPLE = 1e12


@pytest.fixture
def device(comfy, monkeypatch):
    """ComfyUI's computing device, imitated; it has ample room until told otherwise."""
    import comfy.model_management as mm

    from dual_process.tests.small_device import SmallDevice

    mm.unload_all_models()
    with monkeypatch.context() as patched:
        yield SmallDevice(patched, AMPLE)
        mm.unload_all_models()


def peaks(student, judge) -> tuple[int, int]:
    """Bytes beyond the weights of a pass that keeps everything, and of one that recomputes every block."""
    rehearsal = rehearse(student, judge, GOAL, Settings())
    return rehearsal.peak(rehearsal.blocks), rehearsal.peak(frozenset())


def weights(*patchers) -> int:
    return sum(patcher.model_size() for patcher in patchers)


def kept(student) -> int:
    """Bytes of AdamW's two moments and the running average, which are there from the first step on."""
    return 3 * 4 * sum(parameter.numel() for parameter in student.lora.parameters())


def build(lab, name="SD3"):
    """Without guidance: where memory is free ComfyUI runs prompt and negative prompt together, which moves bits."""
    import comfy.model_management as mm

    mm.unload_all_models()
    return lab.build_student(name, latent=lab.build_latent(name, batch=2), cfg=1.0), lab.build_judge()


def tensors_of(device, *patchers) -> list[torch.Tensor]:
    """The weights, brought to the device once more and away again."""
    import comfy.model_management as mm

    from dual_process.trainers.comfy_memory import load_whole

    device.size = AMPLE
    load_whole(list(patchers))
    found = [value.clone() for patcher in patchers for value in patcher.model.state_dict().values()]
    mm.unload_all_models()
    return found


def no_room_for_both(student, judge, device, monkeypatch) -> None:
    """Whatever is free: the weights of both are more."""
    device.size = weights(student.model, student.decoder, judge.patcher) - 1
    monkeypatch.setattr("comfy.sampler_helpers.estimate_memory", lambda *_: (0, 0))
    monkeypatch.setattr(student.vae, "memory_used_decode", lambda *_: 0)


@pytest.mark.parametrize("name", ["SD3", "SD1.5"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_same_run(lab, device, monkeypatch, name, recompute):
    """Losses, pictures and LoRA, bit by bit; never were both there, and no weight has changed."""
    found = []
    for apart in (False, True):
        student, judge = build(lab, name)
        student.recompute.on = recompute
        models = [student.model, student.decoder, judge.patcher]
        before, device.most = tensors_of(device, *models), 0
        if apart:
            no_room_for_both(student, judge, device, monkeypatch)

        def loop():
            assert student.takes_turns == apart
            settings = Settings(steps=3, check_every=2, accumulate=2, **QUIET)
            return train(student, student.in_turn(judge), GOAL, settings, lambda *_: None)

        run = student.run(loop, [judge.patcher])
        assert (device.most == weights(*models)) != apart
        after = tensors_of(device, *models)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert not any(p.isnan().any() for p in before)
        found.append((run, student.lora.state_dict()))
    (together, lora), (apart, same) = found
    assert apart.loss == together.loss and apart.scores == together.scores
    assert all(torch.equal(a.pictures, b.pictures) for a, b in zip(apart.checks, together.checks, strict=True))
    assert all(torch.equal(lora[key], same[key]) for key in lora)


def test_the_same_gradient_where_pictures_are_compared(lab, device, monkeypatch):
    goal = Objective([Question("Is the second picture warmer?", guide=BeforeAfter())])
    found = []
    for apart in (False, True):
        student, judge = build(lab)
        device.size = AMPLE
        if apart:
            no_room_for_both(student, judge, device, monkeypatch)

        def loop():
            give_lora_a_value(student.lora)
            student.use_prompt(0)
            noise, rng = student.noise(1), torch.Generator().manual_seed(0)
            one_pass(student, student.in_turn(judge), goal, Settings(), rng, noise, student.roll(noise, 1), 1)
            return [p.grad for p in student.lora.parameters() if p.grad is not None]

        found.append(student.run(loop, [judge.patcher]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].norm() > 0


def test_three_that_take_turns(lab, device, monkeypatch):
    """The second judge looks at held-out pictures only."""
    (student, judge), second = build(lab), lab.build_judge()
    no_room_for_both(student, judge, device, monkeypatch)

    def loop():
        judges = [student.in_turn(one) for one in (judge, second)]
        return train(student, judges[0], GOAL, Settings(steps=1, **QUIET), lambda *_: None, judges[1])

    run = student.run(loop, [judge.patcher, second.patcher])
    assert run.checks[0].second == run.checks[0].scores and set(student.turns.seconds) == set(student.turns.groups)
    assert device.most < weights(student.model, student.decoder, judge.patcher)


@pytest.mark.parametrize("what", ["activations", "rehearsal"])
def test_turns_where_weights_fit_but_no_step(lab, device, what):
    """Either it is foreseen, or ComfyUI's device runs out of memory in the rehearsal."""
    student, judge = build(lab)
    all_weights = weights(student.model, student.decoder, judge.patcher)

    def loop():
        given = student.in_turn(judge)
        keeping, recomputing = peaks(student, given)
        if what == "activations":
            device.size = all_weights + kept(student) + HEADROOM * recomputing - 1
        else:
            device.size = all_weights + kept(student) + HEADROOM * keeping + 1
            monkeypatched(given)
        assert not student.takes_turns
        plan = plan_memory(student, given, GOAL, Settings())
        assert student.takes_turns
        heaviest = weights(student.model, student.decoder)
        assert plan.free == int(device.size - heaviest) - kept(student)
        assert student.recompute.on == (what == "activations")
        assert plan.recomputing <= recomputing, "the weights that moved are not counted"
        sizes = f"model with VAE {heaviest / 1e9:.2f} GB, judge {weights(judge.patcher) / 1e9:.2f} GB"
        wanted = rf"Taking turns: .* {device.size / 1e9:.2f} GB \({sizes}\)\. .*took model with VAE \d+\.\d s, judge \d"
        assert re.search(wanted, student.turns.sentence())

    def monkeypatched(given):
        look = given.log_likelihood

        def tight(*args):
            if not student.takes_turns:
                raise torch.OutOfMemoryError("activations")
            return look(*args)

        given.log_likelihood = tight

    student.run(loop, [judge.patcher])


def test_a_step_that_fits_keeps_all_together(lab, device):
    student, judge = build(lab)

    def loop():
        given = student.in_turn(judge)
        _, recomputing = peaks(student, given)
        all_weights = weights(student.model, student.decoder, judge.patcher)
        device.size = all_weights + kept(student) + HEADROOM * recomputing + 1
        plan_memory(student, given, GOAL, Settings())
        assert student.recompute.on and not student.takes_turns

    student.run(loop, [judge.patcher])


@pytest.mark.parametrize("share, stays", [(0.5, True), (1.5, False)])
def test_others_are_evicted_as_the_judge_needs(lab, device, share, stays):
    """``share`` of the memory left is what a step, judge included, would take."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher

    student, judge = build(lab)
    with torch.inference_mode(False):
        text_encoder = torch.nn.Linear(1000, 1000)
    other = ModelPatcher(text_encoder, mm.get_torch_device(), torch.device("cpu"))
    everything = weights(student.model, student.decoder, judge.patcher, other) + kept(student)

    def loop():
        mm.load_models_gpu([other])
        given = student.in_turn(judge)
        keeping, _ = peaks(student, given)
        device.size = everything + HEADROOM * keeping / share
        plan = plan_memory(student, given, GOAL, Settings())
        assert (text_encoder in device.here) == stays and not student.takes_turns
        assert plan.free == int(device.size - everything + (0 if stays else weights(other)))
        assert student.recompute.on == (HEADROOM * keeping > plan.free)

    student.run(loop, [judge.patcher])


def test_no_room_is_made_by_what_never_leaves(lab, device):
    """As the model with --highvram."""
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher

    student, judge = build(lab)
    with torch.inference_mode(False):
        staying = ModelPatcher(torch.nn.Linear(1000, 1000), mm.get_torch_device(), mm.get_torch_device())

    def loop():
        mm.load_models_gpu([staying])
        assert student.turns.room() == device.size - weights(staying)

    student.run(loop, [judge.patcher])


@pytest.mark.parametrize("least, apart", [(100, False), (101, True)])
def test_turns_where_nothing_can_be_computed_beside_the_weights(lab, device, monkeypatch, least, apart):
    student, judge = build(lab)
    no_room_for_both(student, judge, device, monkeypatch)
    device.size += 101
    monkeypatch.setattr("comfy.sampler_helpers.estimate_memory", lambda *_: (least, least))
    assert student.run(lambda: student.takes_turns, [judge.patcher]) == apart


def test_one_that_does_not_even_fit_alone(lab, device, monkeypatch):
    student, judge = build(lab)
    no_room_for_both(student, judge, device, monkeypatch)
    device.size = weights(student.model, student.decoder) - 1
    with pytest.raises(RuntimeError, match=r"The model with VAE .* does not fit on cpu:0, .* even alone"):
        student.run(lambda: None, [judge.patcher])


def test_turns_where_not_even_the_check_of_gradients_fits(lab, trained, device, monkeypatch):
    """It is before the rehearsal, and whatever is recomputed."""
    from dual_process.nodes import trainer

    tried = []

    def check(student):
        tried.append(student.takes_turns)
        if not student.takes_turns:
            raise torch.OutOfMemoryError("activations")

    monkeypatch.setattr(trainer, "check_gradients", check)
    _, shown = trained(judge=lab.build_judge(), self_check=True, steps=1, check_every=0)
    assert tried == [False, True] and "Taking turns: " in " ".join(shown)


@pytest.mark.parametrize("recompute", ["always", "never"])
def test_turns_where_nothing_is_planned(lab, trained, device, recompute):
    """Weights fit, and no step beside them: a pass is tried before the first look."""
    judge = lab.build_judge()
    calls, look = [], judge.judge.log_likelihood

    def log_likelihood(*args):
        calls.append(judge.patcher.model in device.here and len(device.here) == 1)
        if not calls[-1]:
            raise torch.OutOfMemoryError("activations")
        return look(*args)

    judge.judge.log_likelihood = log_likelihood
    output, shown = trained(judge=judge, recompute=recompute, checkpointing=True, steps=1, check_every=0)
    assert calls[0] is False and all(calls[1:]) and "Taking turns: " in " ".join(shown)
    assert json.loads(output.result[0].metadata["dual_process"])["took_turns"]


@pytest.mark.parametrize("recompute", [True, False])
def test_too_little_memory_also_in_turns(lab, device, monkeypatch, recompute):
    """ComfyUI shows what there is, what helps, and what torch says."""
    student, judge = build(lab)
    student.recompute.on = recompute
    no_room_for_both(student, judge, device, monkeypatch)

    def loop():
        given = student.in_turn(judge)
        given.log_likelihood = out_of_memory
        plan_memory(student, given, GOAL, Settings())

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    sizes = "model with VAE .* GB, judge .* GB"
    with pytest.raises(torch.OutOfMemoryError) as shown:
        student.run(loop, [judge.patcher])
    text = f"cpu:0 has {device.size / 1e9:.2f} GB: too little for a training step beside the weights, in turns"
    assert re.match(rf"{text} \({sizes}\)\. ", str(shown.value))
    assert str(shown.value).endswith(f" {NEED_LESS} (Tried to allocate 2.00 GiB.)")
    assert ("'recompute' on always" in str(shown.value)) != recompute


def test_an_error_in_the_judges_turn(lab, device, monkeypatch):
    student, judge = build(lab)
    models = [student.model, student.decoder, judge.patcher]
    before = tensors_of(device, *models)
    no_room_for_both(student, judge, device, monkeypatch)

    def loop():
        given = student.in_turn(judge)
        given.log_likelihood(torch.rand(1, 3, 64, 64), QUESTIONS)
        assert device.here == [judge.patcher.model]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        student.run(loop, [judge.patcher])
    assert not any("forward" in vars(module) for one in models for module in one.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(device, *models), before, strict=True))


def test_on_a_cpu_nobody_moves(lab):
    student, judge = build(lab)

    def loop():
        assert not student.takes_turns and not student.turns.can_part

    student.run(loop, [judge.patcher])


def test_on_the_node(lab, trained, device, monkeypatch):
    """It says so before the first step, whether or not memory is planned."""
    student, judge = build(lab)
    no_room_for_both(student, judge, device, monkeypatch)
    monkeypatch.setattr("comfy.sd.VAE.memory_used_decode", lambda *_: 0, raising=False)
    for recompute in ("automatic", "always"):
        output, shown = trained(
            recompute=recompute, judge=judge, second_judge=lab.build_judge(), checkpointing=True, steps=1, check_every=0
        )
        story = json.loads(output.result[0].metadata["dual_process"])
        assert "Taking turns: " in " ".join(shown) and story["took_turns"]


def test_in_the_gpu_benchmark(lab, device, monkeypatch):
    """Moving is told where it happens; one graph through everything needs everything at once."""
    from dual_process.benchmarks.gpu import Gauge, measure
    from dual_process.benchmarks.pairs import random_pair, sd3, smol_judge
    from dual_process.benchmarks.ways import Ours, Published

    pair = random_pair("tiny", sd3(2), smol_judge((1, 64), (1, 64), side=64), side=64)
    ours, published = Ours(pair, 1, checkpointed=True), Published(pair, 1)
    assert "moving_seconds" not in measure(lambda: ours, Gauge("cpu"), repeats=1)
    no_room_for_both(ours.student, pair.judge, device, monkeypatch)
    moving = measure(lambda: ours, Gauge("cpu"), repeats=1)["moving_seconds"]
    assert set(moving) == {"model with VAE", "judge"} and all(seconds > 0 for seconds in moving.values())
    assert measure(lambda: published, Gauge("cpu"), repeats=1) == {"out_of_memory": True}


@pytest.mark.parametrize("room", ["for everything", "with recomputation", "in turns"])
def test_the_gpu_benchmark_takes_the_trainers_choice(lab, device, monkeypatch, room):
    from dual_process.benchmarks.gpu import Gauge, by_default, measure
    from dual_process.benchmarks.pairs import random_pair, sd3, smol_judge

    pair = random_pair("tiny", sd3(2), smol_judge((1, 64), (1, 64), side=64), side=64)
    monkeypatch.setattr("comfy.sampler_helpers.estimate_memory", lambda *_: (0, 0))
    first = by_default(pair)
    plan, student = first.plan, first.student
    step = {
        "for everything": HEADROOM * plan.keeping + 1,
        "with recomputation": HEADROOM * (plan.keeping + plan.recomputing) / 2,
        "in turns": HEADROOM * plan.recomputing - 1,
    }
    device.size = weights(student.model, student.decoder, pair.judge.patcher) + kept(student) + step[room]
    found = measure(lambda: by_default(pair), Gauge("cpu"), repeats=1)
    chosen = {"for everything": "Keeping everything: ", "with recomputation": "Recomputing ", "in turns": ""}
    assert found["chosen"].startswith(chosen[room])
    assert set(found.get("moving_seconds", ())) == ({"model with VAE", "judge"} if room == "in turns" else set())


def test_novram_is_refused_by_its_name(lab, monkeypatch):
    from dual_process.trainers import comfy_memory

    model = lab.build_model("SD3")
    model.model.model_lowvram = True
    monkeypatch.setattr(comfy_memory.mm, "load_models_gpu", lambda *_, **__: None)
    with pytest.raises(comfy_memory.DoesNotFit, match="left weights of SD3 in main memory, as --novram has it"):
        comfy_memory.load_whole([model])
