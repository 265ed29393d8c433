"""The header of a trained LoRA's file, read back."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open

from dual_process.trainers.lora_file import VERSION, TrainedLoRA, new_lora_path, save_lora

ROOT = Path(__file__).resolve().parents[1]


def read_back(lab, name: str, folder: Path) -> tuple[dict[str, str], object]:
    """Header of a LoRA of two training steps, and the run."""
    from dual_process.trainers.dual_process import Settings, train
    from dual_process.trainers.lora_metadata import metadata
    from dual_process.trainers.objective import Objective
    from dual_process.vlm.question import Question

    prompts = [lab.build_conditioning(name, seed=seed) for seed in (1, 2, 3)]
    student, judge = lab.build_student(name, positives=prompts, alpha=8.0), lab.build_judge()
    taught = [Question("Is the line thick?"), Question("Is it night?", "No", weight=2.0)]
    goal = Objective([*taught, Question("Is it a drawing?", keep=True)])
    settings = Settings(steps=2, check_every=0, check_seeds=1, seed=11, learning_rate=3e-4)
    run = student.run(lambda: train(student, judge.judge, goal, settings, lambda *_: None), [judge.patcher])
    header = metadata(run, goal, settings, [judge.judge.name], student, ["a line", "night"])
    path = new_lora_path(folder, "lines/thick")
    save_lora(TrainedLoRA(student.lora.export(), header), path)
    with safe_open(path, "pt") as file:
        return file.metadata(), run


def test_the_file_says_what_it_is_and_how_it_came_to_be(lab, tmp_path):
    header, run = read_back(lab, "SDXL", tmp_path)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "Is the line thick? Yes; Is it night? No",
        "modelspec.resolution": "64x64",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "thick_00001",
        "ss_learning_rate": "0.0003",
        "ss_lr_scheduler": "constant",
        "ss_steps": "2",
        "ss_seed": "11",
        "ss_resolution": "(64, 64)",
    }
    assert {key: header[key] for key in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", header["modelspec.date"])

    story = json.loads(header["dual_process"])
    assert story["version"] == VERSION
    asked = {"text": "Is it night?", "answer": "No", "weight": 2.0, "keep": False}
    assert story["questions"][1] == {**asked, "role": "teach", "guide": None}
    assert story["prompt_texts"] == ["a line", "night"]
    assert (story["prompts"], story["steps_done"], story["kept_step"], story["alpha"]) == (3, 2, 2, 8.0)
    assert (story["judge"], story["model"]) == ("tiny random judge", "SDXL")
    assert story["second_judge"] is None and story["second_judge_scores_after"] == []
    assert set(story["made_with"]) == {"ComfyUI", "torch", "transformers"}
    assert story["settings"]["learning_rate"] == 3e-4
    assert story["rate_falls"] == []
    assert (story["stopped"], story["steps_skipped"]) == ("all steps done", 0)
    assert story["held_out_scores_before"] == run.checks[0].scores
    assert story["held_out_scores_after"] == run.checks[-1].scores


def test_a_model_without_a_name_of_its_own_goes_by_comfyuis_class(lab, tmp_path):
    header, _ = read_back(lab, "Z-Image", tmp_path)
    assert (header["ss_base_model_version"], header["modelspec.architecture"]) == ("zimage", "zimage/lora")


def test_named_models_are_classes_of_this_comfyui(lab):
    import comfy.supported_models

    from dual_process.trainers.lora_metadata import BASES

    assert [name for name in BASES if not hasattr(comfy.supported_models, name)] == []


def test_the_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert VERSION == declared
