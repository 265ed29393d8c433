"""The trainer's node: its boxes, and what it makes of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def trainer(comfy):
    """The module of the node."""
    from dual_process.nodes import trainer

    return trainer


def test_boxes_start_with_the_defaults_of_the_method(trainer):
    from dual_process.trainers.dual_process import Settings
    from dual_process.trainers.objective import Objective
    from dual_process.vlm.question import Question

    asked = trainer.Trainer.GET_NODE_INFO_V1()["input"]
    boxes = asked["required"] | asked["optional"]
    same = (
        "steps learning_rate seed anchor judge_noise check_every stop_at accumulate drift_limit augment prior".split()
    )
    started = {name: boxes[name][1]["default"] for name in same}
    assert started == {name: getattr(Settings(), name) for name in same}
    assert boxes["target"][1]["default"] == Objective([Question("?")]).target


def test_the_benchmarks_teach_as_the_templates_do(trainer):
    from dual_process.benchmarks import guided
    from dual_process.benchmarks.bundled import TEMPLATES
    from dual_process.demo.__main__ import TEMPLATES as NAMES
    from dual_process.demo.lessons import WITH_A_GUIDE
    from dual_process.demo.workflow import nodes_of, template, to_api
    from dual_process.trainers.objective import Objective

    taught = [(name, TEMPLATES[about], Objective.target) for about, name in NAMES.items()]
    names = NAMES | {"area": "Teach a composition"}
    taught += [(names[kind] + WITH_A_GUIDE, guided.SETTINGS[kind], guided.TARGET) for kind in guided.GUIDES]
    taught.append(("Compare before and after", guided.COMPARED["horizon"], guided.TARGET))
    info = {node["type"]: {"input": {}} for name, _, _ in taught for node in template(name)["nodes"]}
    info["DualProcessTrainer"] = trainer.Trainer.GET_NODE_INFO_V1()
    for name, settings, target in taught:
        graph = to_api(template(name), info)
        inputs = graph[nodes_of(graph, "DualProcessTrainer")[0]]["inputs"]
        saved = {"target": Objective.target, "augment": 0.0, **inputs, "latent": {"samples": torch.zeros(16, 1)}}
        assert trainer.settings_from(SimpleNamespace(**saved), prompts=1) == settings
        assert saved["target"] == target


def test_what_the_node_warned_of_is_said_again_at_the_end(lab, trained, monkeypatch):
    from dual_process.nodes.trainer import UNSAVED
    from dual_process.trainers.comfy_student import ComfyStudent

    monkeypatch.setattr(ComfyStudent, "size_warning", lambda student: "These pictures are small.")
    _, shown = trained(judge=lab.build_judge())
    assert shown[0] == "These pictures are small." and ". These pictures are small. " in shown[-1]
    assert shown[-1].endswith(UNSAVED)


def test_a_run_that_fails_says_why_also_if_its_lora_cannot_be_saved(trainer, lab, trained, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    def stop_at_third_step(progress, run, images):
        progress.run = run
        if len(run.loss) == 3:
            raise MemoryError("the GPU is full")

    monkeypatch.setattr(trainer, "write_lora", fail)
    monkeypatch.setattr(trainer.Progress, "__call__", stop_at_third_step)
    with pytest.raises(MemoryError, match="the GPU is full"):
        trained(judge=lab.build_judge(), steps=5, learning_rate=1e-2)


@pytest.mark.parametrize("name", ["euler", "dpm_2", "uni_pc"])
def test_the_schedule_is_that_of_ksampler(lab, name, monkeypatch):
    """It leaves a noise level out for some samplers; SamplerCustom does not."""
    import comfy.samplers

    import nodes
    from dual_process.trainers.noise_levels import noise_levels

    model, given = lab.build_model("SD3"), []
    monkeypatch.setattr(comfy.samplers, "sample", lambda *args, **_: given.append(args[7]) or args[1])
    prompt = lab.build_conditioning("SD3")
    nodes.common_ksampler(model, 1, 4, 1.0, name, "simple", prompt, prompt, lab.build_latent("SD3"))
    assert torch.equal(noise_levels(model, 4, name, "simple"), given[0])
    plain = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    connected = comfy.samplers.sampler_object(name)
    assert torch.equal(noise_levels(model, 4, "euler", "simple", connected), plain)
    assert noise_levels(model, 4, "euler", "simple", connected, sigmas=given[0]) is given[0]


NOTHING = "Held-out seeds: 50%; no look was better than the first, so the LoRA is what it was before.", ""
GREYER = "Held-out seeds: 50% before, 75% after step 20.", ". Pictures got 30% greyer"


@pytest.mark.parametrize("changes, said", [({}, NOTHING), ({"saturation": -0.3}, GREYER)])
def test_last_line_on_the_node_also_when_nothing_was_better_than_before(trainer, monkeypatch, changes, said):
    from dual_process.trainers.dual_process import Run
    from dual_process.trainers.guards import WORDS
    from dual_process.trainers.looks import Check

    texts = []
    server = SimpleNamespace(send_progress_text=lambda text, node: texts.append(text))
    monkeypatch.setattr(trainer.PromptServer, "instance", server, raising=False)
    same = {**dict.fromkeys(WORDS, 0.0), **changes} if changes else {}
    before, kept = (Check(n, [0.5 + n / 80], torch.zeros(2, 3, 4, 4), same if n else {}) for n in (0, 20))
    checks = [before, kept] if changes else [before, kept, before]
    run = Run(loss=[1.0] * 20, checks=checks, stopped="all steps done")
    trainer.Progress("7", 20, []).end(run, "")
    assert texts == [f"{said[0]} 20 steps: all steps done{said[1]}."]


@pytest.mark.parametrize("typo", [{"objective": "typo"}, {"learn_at": "typo"}, {"recompute": "typo"}])
def test_what_is_in_no_list_is_refused(lab, trained, typo):
    """ComfyUI 0.3.75 lets it through."""
    ((name, _),) = typo.items()
    with pytest.raises(ValueError, match=f"{name} is 'typo', which is not one of its choices: "):
        trained(judge=lab.build_judge(), **typo)


def test_what_is_known_of_the_graph(trainer, monkeypatch):
    import nodes
    from dual_process.nodes.lora import ApplyLoRA

    graph = {"7": {"class_type": "DualProcessTrainer", "inputs": {}}}
    assert not trainer.is_saved(
        {**graph, "8": {"class_type": "DualProcessApplyLoRA", "inputs": {"lora": ["7", 0]}}}, "7"
    )
    for kind in ("SaveLoRA", "DualProcessSaveLoRA"):
        assert trainer.is_saved({**graph, "8": {"class_type": kind, "inputs": {"lora": ["7", 0]}}}, "7")
    through = {
        "8": {"class_type": "Switch", "inputs": {"a": ["7", 0], "b": []}},
        "9": {"class_type": "SaveLoRA", "inputs": {}},
    }
    assert not trainer.is_saved({**graph, **through}, "7")
    through["9"]["inputs"]["lora"] = ["8", 0]
    assert trainer.is_saved({**graph, **through}, "7")
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "DualProcessApplyLoRA", ApplyLoRA)
    on_a_model = {
        "8": {"class_type": "DualProcessApplyLoRA", "inputs": {"lora": ["7", 0]}},
        "9": {"class_type": "DualProcessTrainer", "inputs": {"model": ["8", 0]}},
        "10": {"class_type": "DualProcessSaveLoRA", "inputs": {"lora": ["9", 0]}},
    }
    assert not trainer.is_saved({**graph, **on_a_model}, "7") and trainer.is_saved({**graph, **on_a_model}, "9")
    real, toy = (SimpleNamespace(toy=toy) for toy in (False, True))
    bundled = trainer.BUNDLED_JUDGE
    assert bundled in trainer.bundled_judge_warning(bundled, real)
    assert trainer.bundled_judge_warning(bundled, toy) == trainer.bundled_judge_warning("Qwen", real) == ""


def test_a_second_judge_is_warned_of_as_the_first_is(trainer, lab, trained, monkeypatch):
    second = lab.build_judge()
    second.judge.name = trainer.BUNDLED_JUDGE
    second.choices["question_suffix"] = "Say Yes or No."
    monkeypatch.setattr(trainer.ComfyStudent, "toy", False)
    monkeypatch.setattr(trainer.ComfyStudent, "size_warning", lambda student: "")
    output, shown = trained(judge=lab.build_judge(), second_judge=second)
    assert f"The {trainer.BUNDLED_JUDGE} knows nothing but" in shown[0]
    assert any(line.startswith("The second judge hardly ever answers") for line in shown)
    story = json.loads(output.result[0].metadata["dual_process"])
    assert story["choices"]["second judge, question_suffix"] == "Say Yes or No."


@pytest.mark.parametrize("weight, saved", [(0.0, 0), (1.0, 1)])
def test_a_run_that_is_cancelled_is_saved_only_for_what_was_taught(trainer, monkeypatch, weight, saved):
    from dual_process.trainers.dual_process import Run
    from dual_process.trainers.looks import Check
    from dual_process.vlm.question import Question

    written = []
    monkeypatch.setattr(trainer, "write_lora", lambda *file: written.append(file))
    server = SimpleNamespace(send_progress_text=lambda text, node: None)
    monkeypatch.setattr(trainer.PromptServer, "instance", server, raising=False)
    progress = trainer.Progress("7", 20, [Question("Warm?", weight=weight), Question("High?")])
    progress.run = Run(loss=[1.0], checks=[Check(0, [0.3, 0.6], None), Check(20, [0.5, 0.6], None)])
    progress.rescue(lambda run: {})
    assert len(written) == saved


def test_what_cannot_be_read_from_the_rest_is_written_down(lab, trained):
    output, _ = trained(judge=lab.build_judge(), targets="attn", scheduler="normal", steps=1)
    story = json.loads(output.result[0].metadata["dual_process"])
    assert story["choices"] == {
        **{"sampler": "euler", "scheduler": "normal", "negative prompt": "none", "targets": "attn"},
        **{"continued from": "(a new LoRA)"},
    }


def test_live_pictures_are_a_row_of_held_out_seeds_above_one_of_the_step():
    from dual_process.trainers.sheet import contact_sheet

    held_out, step = torch.zeros(6, 3, 8, 10), torch.full((1, 3, 8, 10), 0.5)
    sheet = contact_sheet(held_out, step)
    assert sheet.size == (40, 16)
    assert [sheet.getpixel(at)[0] for at in ((39, 7), (9, 8), (10, 8))] == [0, 127, 255]


def test_a_list_that_is_not_read_is_not_checked(lab, trained):
    import comfy.samplers

    sigmas, sampler = torch.tensor([1.0, 0.5, 0.0]), comfy.samplers.sampler_object("euler")
    gone = {"sampler_name": "of a pack that is gone", "scheduler": "likewise"}
    trained(judge=lab.build_judge(), sigmas=sigmas, sampler=sampler, steps=1, check_every=0, **gone)
