"""Training that goes on from a LoRA file: the same pictures at first, a clear sentence where the file does not fit."""

from __future__ import annotations

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value

NAMES = ["SDXL", "FLUX dev", "Z-Image"]


def learned(lab, name: str) -> dict[str, torch.Tensor]:
    """The file of a LoRA that does something."""
    lora = lab.build_student(name).lora
    give_lora_a_value(lora)
    return lora.export()


def as_kohya(tensors: dict[str, torch.Tensor], alpha: float, rank: int = 4) -> dict[str, torch.Tensor]:
    """The same LoRA with kohya's names, and ``B`` made larger by what its alpha takes off."""
    file = {}
    for key, tensor in tensors.items():
        layer, kind, _ = key.removeprefix("diffusion_model.").rsplit(".", 2)
        name = f"lora_unet_{layer.replace('.', '_')}"
        if kind == "lora_A":
            file |= {f"{name}.lora_down.weight": tensor, f"{name}.alpha": torch.tensor(alpha)}
        else:
            file[f"{name}.lora_up.weight"] = tensor * rank / alpha
    return file


@pytest.mark.parametrize("kohya", [False, True], ids=["ComfyUI's names", "kohya's names"])
@pytest.mark.parametrize("name", NAMES)
def test_first_picture_is_that_of_the_file(lab, name, kohya):
    """Compared with the stock loader's, which merges the same file into the weights."""
    import comfy.sd

    file = learned(lab, name)
    file = as_kohya(file, alpha=2.0) if kohya else file
    going_on = lab.build_student(name, start=file, alpha=8.0)
    merged, _ = comfy.sd.load_lora_for_models(lab.build_model(name), None, file, 1.0, 0)
    plain, stock = lab.build_student(name), lab.build_student(name, merged)
    first, without, wanted = (s.run(lambda s=s: s.draw(3), beside=[]) for s in (going_on, plain, stock))
    assert (first - wanted).abs().max() < 1e-5 < 1e-3 < (without - wanted).abs().max()


@pytest.mark.parametrize("kohya", [False, True], ids=["ComfyUI's names", "kohya's names"])
def test_saved_at_once_it_is_the_same_file(lab, kohya):
    file = learned(lab, "SD3")
    again = lab.build_student("SD3", start=as_kohya(file, 2.0) if kohya else file, alpha=1.0).lora.export()
    assert file.keys() == again.keys()
    assert all(torch.allclose(file[key], again[key], rtol=1e-6, atol=0) for key in file)


def test_layers_that_the_file_lacks_start_without_an_update(lab):
    file = {key: tensor for key, tensor in learned(lab, "SD3").items() if ".0." in key}
    lora = lab.build_student("SD3", start=file).lora
    started = [path for path, adapter in zip(lora.paths, lora.adapters) if adapter.B.any()]
    assert 0 < len(started) < len(lora.paths) and all(f"diffusion_model.{p}.lora_A.weight" in file for p in started)


def test_what_does_not_fit_is_said(lab):
    file = learned(lab, "FLUX dev")
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    with pytest.raises(ValueError, match="has rank 4 in 'diffusion_model.double.*: set rank to 4, or put the file on"):
        lab.build_student("FLUX dev", start=file, rank=8)
    with pytest.raises(ValueError, match="things that this training does not adapt, .* first 'diffusion_model.single"):
        lab.build_student("FLUX dev", start=file, targets="^double")
    with pytest.raises(ValueError, match="None of the .* tensors of the LoRA to continue fits Flux: .* another model"):
        lab.build_student("FLUX dev", start=learned(lab, "SD3"))
    with pytest.raises(ValueError, match="1 things .* first 'lora_te1_text_projection.alpha'"):
        lab.build_student("FLUX dev", start={**file, "lora_te1_text_projection.alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=f"does not adapt, .* first '{layer}"):
        lab.build_student("FLUX dev", start={**file, f"{layer}.dora_scale": torch.ones(64, 1)})
    with pytest.raises(ValueError, match=f"2 things .* not in that size, first '{layer}"):
        narrow = {f"{layer}.lora_B.weight": file[f"{layer}.lora_B.weight"][:32]}
        lab.build_student("FLUX dev", start={**file, **narrow})
