"""LoRA Apply: files that fit the model, some that fit a little, and some that do not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.lora_file import save_lora


@pytest.fixture
def loras(comfy):
    """ComfyUI's models/loras."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def learned(lab, name: str) -> dict[str, torch.Tensor]:
    """The file of a LoRA that does something."""
    lora = lab.build_student(name).lora
    give_lora_a_value(lora)
    return lora.export()


def test_draws_what_the_stock_loader_draws(lab, loras):
    import nodes
    from dual_process.nodes.lora import ApplyLoRA

    save_lora(learned(lab, "SD3"), loras / "sd3.safetensors")
    model = lab.build_model("SD3")
    (stock,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "sd3.safetensors", 0.7)
    ours = ApplyLoRA.execute(model, "sd3.safetensors", 0.7).result[0]
    assert torch.equal(lab.sample(ours, "SD3"), lab.sample(stock, "SD3"))
    assert not torch.equal(lab.sample(ours, "SD3"), lab.sample(model, "SD3"))


def test_a_file_of_another_model_is_an_error_that_names_both(lab, loras):
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    foreign = learned(lab, "FLUX dev")
    save_lora(foreign, loras / "flux.safetensors")
    with pytest.raises(ValueError, match=f"None of the {len(foreign)} tensors of flux.safetensors fits SD3"):
        ApplyLoRA.execute(lab.build_model("SD3"), "flux.safetensors", 1.0)
    with pytest.raises(ValueError, match="of the connected LoRA fits SD3"):
        ApplyLoRA.execute(lab.build_model("SD3"), FROM_TRAINER, 1.0, foreign)


def test_what_does_not_fit_of_a_file_is_counted_in_the_log(lab, caplog):
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    file, model = learned(lab, "SD3"), lab.build_model("SD3")
    with caplog.at_level(logging.WARNING):
        ApplyLoRA.execute(model, FROM_TRAINER, 1.0, file)
        assert not caplog.records
        more = {**file, "lora_te1_x.lora_up.weight": torch.ones(2, 2), "lora_te1_x.lora_down.weight": torch.ones(2, 2)}
        controlled = ApplyLoRA.execute(model, FROM_TRAINER, 1.0, more).result[0]
    assert len(controlled.patches) == len(file) // 2
    assert f"2 of the {len(more)} tensors of the connected LoRA fit no layer of SD3, first 'lora_te1" in caplog.text


def test_layers_of_the_same_name_and_another_size_are_left_out(lab, caplog):
    """SD1.5's names are SDXL's; core only logs that it could not add such a LoRA."""
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    file, model = learned(lab, "SD3"), lab.build_model("SD3")
    first = next(key for key in file if key.endswith("lora_A.weight"))
    wider = {key: torch.cat([x, x], dim=1) if key.endswith("lora_A.weight") else x for key, x in file.items()}
    with caplog.at_level(logging.WARNING):
        one = ApplyLoRA.execute(model, FROM_TRAINER, 1.0, {**file, first: wider[first]}).result[0]
    assert len(one.patches) == len(file) // 2 - 1
    assert f"2 of the {len(file)} tensors of the connected LoRA fit no layer of SD3" in caplog.text
    with pytest.raises(ValueError, match="of the connected LoRA fits SD3"):
        ApplyLoRA.execute(model, FROM_TRAINER, 1.0, wider)


def test_a_lora_that_changes_nothing_is_saved_with_a_word(lab, loras):
    from dual_process.nodes.lora import SaveLoRA

    blank = lab.build_student("SD3").lora.export()
    for lora, words in ((blank, "changes nothing"), (learned(lab, "SD3"), "")):
        (said,) = SaveLoRA.execute(lora, "sub/word").ui["text"]
        assert said.startswith("Saved as sub/word_") and (words in said if words else said.endswith(".safetensors"))


def test_without_metadata_as_the_users_start_of_comfyui_says(lab, loras, monkeypatch):
    from comfy.cli_args import args

    from dual_process.nodes.lora import SaveLoRA
    from dual_process.trainers.lora_file import TrainedLoRA

    lora = TrainedLoRA(learned(lab, "SD3"), {"dual_process": "{}"})
    for bare in (False, True):
        monkeypatch.setattr(args, "disable_metadata", bare)
        name = SaveLoRA.execute(lora, "sub/bare").result[0]
        with safe_open(loras / name, "pt") as file:
            assert ("dual_process" in file.metadata()) is not bare and len(file.keys()) == len(lora)


def test_no_file_and_a_name_from_another_node_do_not_make_a_node_run_again(loras):
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    for name in (FROM_TRAINER, "deleted.safetensors", None):
        assert ApplyLoRA.fingerprint_inputs(lora_name=name, model=None, strength=1.0) is None


def test_only_files_that_can_be_read_are_offered(lab, loras):
    from dual_process.nodes.lora import ApplyLoRA
    from dual_process.nodes.trainer import Trainer

    for name in ("pickled.pt", "pickled.ckpt", "fine.safetensors"):
        (loras / name).touch()
    try:
        for node, box in ((ApplyLoRA, "lora_name"), (Trainer, "continue_from")):
            kind, options = node.GET_NODE_INFO_V1()["input"]["required"][box]
            offered = options["options"] if kind == "COMBO" else kind
            assert "fine.safetensors" in offered and not [name for name in offered if name.startswith("pickled")]
    finally:
        for name in ("pickled.pt", "pickled.ckpt", "fine.safetensors"):
            (loras / name).unlink()


def test_a_file_that_is_not_there_is_no_reason_to_refuse_where_a_trainer_is_connected(lab, loras):
    """What is connected is None while ComfyUI validates."""
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA
    from dual_process.nodes.strength_sheet import StrengthSheet

    gone = "gone.safetensors"
    for validate in (ApplyLoRA.validate_inputs, lambda **given: StrengthSheet.validate_inputs(strengths="1", **given)):
        assert (
            validate(lora_name=gone, lora=None) is validate(lora_name=FROM_TRAINER) is validate(lora_name=None) is True
        )
        assert validate(lora_name=gone).startswith("There is no 'gone.safetensors' in models/loras. Press R")


def test_a_damaged_file_is_named(lab, loras):
    from dual_process.nodes.lora import ApplyLoRA

    (loras / "broken.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    try:
        with pytest.raises(ValueError, match=r"broken\.safetensors is damaged .*: download or save it again"):
            ApplyLoRA.execute(lab.build_model("SD3"), "broken.safetensors", 1.0)
    finally:
        (loras / "broken.safetensors").unlink()


def test_a_format_that_is_in_no_list_is_refused_but_the_lora_is_saved(lab, loras):
    from dual_process.nodes.lora import SaveLoRA

    tensors = lab.build_student("SD3").lora.export()
    with pytest.raises(ValueError, match="not one of its choices: ComfyUI, diffusers.* saved .* as sub/other_00001"):
        SaveLoRA.execute(tensors, "sub/other", "Diffusers")
    assert load_file(loras / "sub" / "other_00001.safetensors").keys() == tensors.keys()
    (loras / "sub" / "other_00001.safetensors").unlink()
