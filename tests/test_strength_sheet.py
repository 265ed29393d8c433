"""Strength Sheet: every column is what the model draws with the LoRA at that strength."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.sheet import GAP


@pytest.fixture
def sheet(lab):
    """Runs the node on a tiny SD3; a function of the inputs to change."""
    from dual_process.nodes.lora import FROM_TRAINER
    from dual_process.nodes.strength_sheet import StrengthSheet

    lora = lab.build_student("SD3").lora
    give_lora_a_value(lora)
    inputs = {
        "model": lab.build_model("SD3"), "vae": lab.build_vae("SD3"), "positive": lab.build_conditioning("SD3"),
        "negative": lab.build_conditioning("SD3", seed=2), "latent": lab.build_latent("SD3"), "lora": lora.export(),
        "lora_name": FROM_TRAINER, "strengths": "-1, 0, 1", "seed": 5, "sampler_steps": 4, "sampler_name": "euler",
        "scheduler": "simple", "cfg": 1.5,
    }  # fmt: skip
    clone = StrengthSheet.PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def run(**changed):
        return {**inputs, **changed}, clone.EXECUTE_NORMALIZED(**{**inputs, **changed})

    return run


def test_zero_is_the_model_alone_and_one_is_lora_apply(lab, sheet):
    from dual_process.nodes.lora import ApplyLoRA

    given, output = sheet()
    whole, pictures = output.result

    def drawn(model):
        return given["vae"].decode(lab.sample(model, "SD3"))[0]

    applied = ApplyLoRA.execute(given["model"], given["lora_name"], 1.0, given["lora"]).result[0]
    assert pictures.shape == (3, 64, 64, 3)
    assert torch.equal(pictures[1], drawn(given["model"]))
    assert torch.equal(pictures[2], drawn(applied))
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])
    assert given["model"].patches == {}, "the connected model stays as it was"
    assert whole.shape == (1, 18 + GAP + 64 + GAP, GAP + 3 * (64 + GAP), 3) and len(output.ui.as_dict()["images"]) == 1
    in_sheet = whole[0, 18 + GAP : -GAP, -64 - GAP : -GAP]
    assert (in_sheet - pictures[2].clamp(0, 1)).abs().max() <= 1 / 255
    assert whole[0, : 18 + GAP].min() < 0.5, "the labels"


def test_every_latent_of_the_batch_is_a_row(lab, sheet):
    _, output = sheet(latent=lab.build_latent("SD3", batch=2), strengths="0,2")
    whole, pictures = output.result
    assert pictures.shape[0] == 4 and whole.shape[1:3] == (18 + GAP + 2 * (64 + GAP), GAP + 2 * (64 + GAP))
    second_row = whole[0, 18 + 2 * GAP + 64 :, GAP : GAP + 64][:64]
    assert (second_row - pictures[2].clamp(0, 1)).abs().max() <= 1 / 255
    assert not torch.equal(pictures[0], pictures[2])


def test_connected_sigmas_and_sampler_win(lab, sheet):
    """As a LoRA is drawn that was trained with them: SamplerCustom behind LoRA Apply."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    from dual_process.nodes.lora import ApplyLoRA

    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0])
    connected = {"sigmas": sigmas, "sampler": comfy.samplers.sampler_object("dpmpp_2m")}
    given, output = sheet(**connected)
    applied = ApplyLoRA.execute(given["model"], given["lora_name"], 1.0, given["lora"]).result[0]
    conditionings = given["positive"], given["negative"]
    drawn = SamplerCustom.execute(
        applied, True, given["seed"], given["cfg"], *conditionings, connected["sampler"], sigmas, given["latent"]
    )
    assert torch.equal(output.result[1][2], given["vae"].decode(drawn.result[0]["samples"])[0])
    assert not torch.equal(output.result[1][2], sheet(sampler=connected["sampler"])[1].result[1][2])
    assert not torch.equal(output.result[1][2], sheet(sigmas=sigmas)[1].result[1][2])


def test_without_a_negative_only_cfg_1(sheet):
    with pytest.raises(ValueError, match="no negative conditioning"):
        sheet(negative=None)
    assert sheet(negative=None, cfg=1.0, strengths="1")[1].result[1].shape[0] == 1


@pytest.mark.parametrize("text, word", [("1, much", "much"), ("", ""), ("1,,2", ""), ("1, nan", "nan")])
def test_what_is_no_number_is_named_before_anything_runs(sheet, text, word):
    from dual_process.nodes.lora import FROM_TRAINER
    from dual_process.nodes.strength_sheet import StrengthSheet

    with pytest.raises(ValueError, match=f"'{word}' is not a number"):
        sheet(strengths=text)
    assert f"'{word}' is not a number" in StrengthSheet.validate_inputs(text, FROM_TRAINER)
    assert all(StrengthSheet.validate_inputs(fine, FROM_TRAINER) is True for fine in ("-1, 2.5", None))
