"""GGUF files through the loader that people use, city96/ComfyUI-GGUF: its folder in GGUF_PACK, and `gguf` from PyPI."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value, picture_to_lora_ratio
from dual_process.trainers.self_check import check_gradients

gguf = pytest.importorskip("gguf")
if "GGUF_PACK" not in os.environ:
    pytest.skip("GGUF_PACK does not name the folder of ComfyUI-GGUF", allow_module_level=True)


@pytest.fixture
def load(lab, monkeypatch):
    """The pack's Unet Loader on a new file of the tiny SD3, matrices in the format that is asked for."""
    folder = Path(os.environ["GGUF_PACK"])
    monkeypatch.syspath_prepend(folder.parent)
    pack = importlib.import_module(f"{folder.name}.nodes")
    import folder_paths

    def load(quantisation: str):
        models = Path(folder_paths.get_folder_paths("diffusion_models")[0])
        models.mkdir(parents=True, exist_ok=True)
        write(models / f"{quantisation}.gguf", lab.build_model("SD3").model.diffusion_model.state_dict(), quantisation)
        return pack.UnetLoaderGGUF().load_unet(f"{quantisation}.gguf")[0]

    return load


def write(file: Path, weights: dict[str, torch.Tensor], quantisation: str) -> None:
    writer = gguf.GGUFWriter(file, "sd3")
    for key, value in weights.items():
        fits = value.ndim == 2 and value.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType[quantisation if fits else "F32"]
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_a_lora(lab, model):
    import comfy.sd

    other = lab.build_student("SD3", targets="attn").lora
    give_lora_a_value(other)
    return comfy.sd.load_lora_for_models(model, None, other.export(), 0.7, 0)[0]


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0", "BF16", "F16", "F32"])
def test_gradient_and_the_users_model(lab, load, quantisation, patched):
    model = load(quantisation)
    model = with_a_lora(lab, model) if patched else model
    before = lab.sample(model, "SD3")
    student = lab.build_student("SD3", model, vae=lab.LinearVAE(16))
    student.run(lambda: check_gradients(student), beside=[])
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)
    assert torch.equal(lab.sample(model, "SD3"), before)


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
def test_the_saved_lora_does_what_was_trained(lab, load, quantisation):
    import comfy.sd

    model = load(quantisation)
    student = lab.build_student("SD3", model, vae=lab.LinearVAE(16))

    def drawn_while_training():
        give_lora_a_value(student.lora)
        return student.draw(5)

    picture = student.run(drawn_while_training, beside=[])
    patched = comfy.sd.load_lora_for_models(model, None, student.lora.export(), 1, 0)[0]
    assert (lab.sample(patched, "SD3") - lab.sample(model, "SD3")).norm() > 1
    pixels = student.vae.first_stage_model.decode(lab.sample(patched, "SD3"))
    torch.testing.assert_close(student.vae.process_output(pixels), picture)
