"""VLM Judge Loader inside a real ComfyUI: what its boxes do, and when it may use the network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from dual_process.benchmarks.matrix_judges import picture
from dual_process.tests import vlm_families
from dual_process.vlm.question import Question


@pytest.fixture
def loaders(comfy, monkeypatch):
    """The module of the loader node, with downloads that only note what they were asked."""
    from dual_process.nodes import loaders

    def download(hub_id, root, report):
        asked.append((hub_id, root))
        report(1, 4)
        shutil.copytree(root / "someone" / "tiny", root.joinpath(*hub_id.split("/")), dirs_exist_ok=True)
        return root.joinpath(*hub_id.split("/"))

    loaders.asked = asked = []
    monkeypatch.setattr(loaders, "download_judge", download)
    return loaders


@pytest.fixture
def models(loaders):
    """ComfyUI's models/VLM with one model in it."""
    import folder_paths

    root = Path(folder_paths.models_dir) / "VLM"
    model, processor = vlm_families.build("Idefics3")
    model.save_pretrained(root / "someone" / "tiny")
    processor.save_pretrained(root / "someone" / "tiny")
    yield root
    shutil.rmtree(root)


def load(loaders, **inputs):
    """Run the node as ComfyUI does; returns the judge."""
    clone = loaders.JudgeLoader.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        return clone.EXECUTE_NORMALIZED(**{"judge": "someone/tiny", "dtype": "auto", **inputs}).result[0].judge


def test_a_workflow_of_before_these_boxes_still_loads(loaders, models):
    info = loaders.JudgeLoader.GET_NODE_INFO_V1()
    assert list(info["input"]["required"]) == ["judge", "dtype"]
    assert set(info["input"]["optional"]) >= {"attention", "lora", "hub_id", "download"}
    judge = load(loaders)
    assert judge.name == "someone/tiny" and judge.model.dtype == torch.float32
    assert loaders.asked == []


def test_prompts_are_asked_as_typed(loaders, models):
    judge = load(loaders, system_prompt=" You are careful. ", question_suffix="Answer with Yes or No.")
    asked = judge.prompts.render("Warm?", 1)
    assert "You are careful." in asked and "Warm? Answer with Yes or No." in asked
    judge = load(loaders, prompt_template="{image} Question: {question} Answer:")
    assert judge.prompts.render("Warm?", 1) == "<image> Question: Warm? Answer:"


def test_what_the_user_chose_is_known_to_whoever_asks(loaders, models):
    clone = loaders.JudgeLoader.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    for words in ({}, {"dtype": "bfloat16", "question_suffix": "Answer with Yes or No."}):
        with torch.inference_mode():
            (managed,) = clone.EXECUTE_NORMALIZED(**{"judge": "someone/tiny", "dtype": "auto", **words}).result
        assert managed.choices == words


@pytest.mark.parametrize("box", ["dtype", "attention", "quantisation"])
def test_what_is_in_no_list_is_refused(loaders, models, box):
    """ComfyUI 0.3.75 lets it through."""
    with pytest.raises(ValueError, match=f"{box} is '16', which is not one of its choices: "):
        load(loaders, **{box: "16"})


def test_a_folder_that_was_written_anew_is_loaded_again(loaders, models):
    written, weights = loaders.JudgeLoader.fingerprint_inputs, models / "someone" / "tiny" / "model.safetensors"
    before = written(judge="someone/tiny", dtype="auto")
    (models / "someone" / "tiny" / "NOTES.md").touch()
    assert before == written(judge="someone/tiny", dtype="auto")
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns - 1))
    assert before != written(judge="someone/tiny", dtype="auto")
    assert written(judge=None) == written(judge="gone") == written(judge="someone/tiny", hub_id="else/tiny") == []


def test_attention_and_dtype_are_as_chosen(loaders, models):
    judge = load(loaders, attention="eager", dtype="bfloat16")
    assert judge.model.config._attn_implementation == "eager" and judge.model.dtype == torch.bfloat16


def test_a_lora_is_merged(loaders, models):
    peft = pytest.importorskip("peft")
    base = load(loaders)
    tuned = peft.get_peft_model(load(loaders).model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(models / "loras" / "mine")
    judge, asked = load(loaders, lora="loras/mine"), [Question("Warm?")]
    gap = judge.log_likelihood(picture(), asked) - base.log_likelihood(picture(), asked)
    assert gap.abs().max() > 1e-3


def test_quantisation_without_its_package_is_one_sentence(loaders, models, monkeypatch):
    import comfy.model_management as mm

    freed = []
    monkeypatch.setattr(mm, "free_memory", lambda size, device: freed.append(size))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="A judge in 4 bits needs the package bitsandbytes"):
        load(loaders, quantisation="4-bit")
    assert freed == [(models / "someone" / "tiny" / "model.safetensors").stat().st_size], "it goes straight to the GPU"


def test_a_judge_in_4_bits_does_not_compute_in_32(monkeypatch):
    """As transformers is told; bitsandbytes itself is not needed."""
    from dual_process.vlm.loading import _quantisation

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", dict)
    assert _quantisation(4, None)["bnb_4bit_compute_dtype"] == torch.bfloat16
    assert _quantisation(4, torch.float16)["bnb_4bit_compute_dtype"] == torch.float16


def test_a_model_that_links_out_of_the_models_folder_is_refused(loaders, models, tmp_path):
    shutil.move(models / "someone" / "tiny", tmp_path / "elsewhere")
    (models / "someone" / "tiny").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to .*elsewhere, outside"):
        load(loaders)


def test_nothing_is_downloaded_without_both_the_id_and_the_tick(loaders, models):
    load(loaders, download=True)
    load(loaders, hub_id="someone/tiny")
    with pytest.raises(ValueError, match="else/tiny is not in .*: tick download"):
        load(loaders, hub_id="else/tiny")
    with pytest.raises(ValueError, match='"../../etc" is not a hub id'):
        load(loaders, hub_id="../../etc")
    assert loaders.asked == []


def test_the_id_and_the_tick_download_into_the_models_folder(loaders, models):
    assert load(loaders, judge=loaders.BUNDLED_JUDGE, hub_id=" else/small ", download=True).name == "else/small"
    assert loaders.asked == [("else/small", models)]


def test_cancel_stops_a_download(loaders, models):
    import comfy.model_management as mm

    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        load(loaders, hub_id="else/tiny", download=True)
    assert not (models / "else").exists()
