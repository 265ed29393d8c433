"""Model files at their true width, with fewer blocks: detected by the stock loaders, trained, and saved."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dual_process.trainers.dual_process import Settings, train
from dual_process.trainers.lora_file import save_lora
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question

UNET = {
    "image_size": 32, "use_checkpoint": False, "legacy": False, "use_spatial_transformer": True, "in_channels": 4,
    "out_channels": 4, "model_channels": 320, "transformer_depth_middle": 1, "use_temporal_resblock": False,
    "use_temporal_attention": False,
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """A model file: class and config that ComfyUI should come to, context width, pooled width, where it lies."""

    model_class: str
    config: dict
    context: int
    pooled: int
    folder: str = "diffusion_models"
    prefix: str = ""
    renamed: tuple[str, str] = ("", "")


FILES = {
    "FLUX schnell": File(
        "FluxSchnell",
        {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "guidance_embed": False,
         "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True,
         "hidden_size": 3072, "context_in_dim": 4096, "patch_size": 2, "depth": 1, "depth_single_blocks": 1,
         "txt_ids_dims": []},
        4096, 768, renamed=("_norm.weight", "_norm.scale"),
    ),
    "SDXL": File(  # recognised by the depth of its first half; the second can be shallow
        "SDXL",
        UNET | {"num_classes": "sequential", "adm_in_channels": 2816, "context_dim": 2048, "channel_mult": [1, 2, 4],
                "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
                "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "use_linear_in_transformer": True},
        2048, 1280,
    ),
    "SD1.5": File(
        "SD15",
        UNET | {"adm_in_channels": None, "context_dim": 768, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
                "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
                "use_linear_in_transformer": False},
        768, 0, folder="checkpoints", prefix="model.diffusion_model.",
    ),
}  # fmt: skip


@pytest.fixture
def lab(lab):
    yield lab
    gc.collect()  # gigabytes hang in cycles


def write(lab, file: File, path: Path) -> None:
    """Random weights of unit gain in bf16 under the names of published files."""
    import comfy.supported_models

    model_config = getattr(comfy.supported_models, file.model_class)(lab.known_to_this_comfyui(file))
    weights = model_config.get_model({}, "", device="meta").diffusion_model.state_dict()
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {}
    for key, like in weights.items():
        values = noise.repeat(math.ceil(like.numel() / len(noise)))[: like.numel()].view(like.shape)
        if like.ndim > 1:
            values *= 1 / math.sqrt(like[0].numel())
        else:
            values.mul_(0.05).add_(float("norm" in key))
        tensors[file.prefix + key.replace(*file.renamed)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load(file: File, name: str):
    """The MODEL that a stock loader node makes of the file."""
    import nodes

    if file.folder == "checkpoints":
        return nodes.CheckpointLoaderSimple().load_checkpoint(name)[0]
    return nodes.UNETLoader().load_unet(name, "default")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_true_width_is_detected_trained_and_saved(lab, name, caplog):
    import folder_paths

    import nodes

    file = FILES[name]
    path = Path(folder_paths.get_folder_paths(file.folder)[0]) / f"{name}.safetensors"
    write(lab, file, path)
    model = load(file, path.name)
    path.unlink()
    assert type(model.model.model_config).__name__ == file.model_class
    assert "unet missing" not in caplog.text and "unet unexpected" not in caplog.text

    generator = torch.Generator().manual_seed(1)
    pooled = {"pooled_output": torch.randn(1, file.pooled, generator=generator)}
    prompt = [[torch.randn(1, 7, file.context, generator=generator), pooled]]
    first = model.get_model_object("model_sampling").sigma_max
    student = lab.build_student(
        name, model, positives=[prompt], negative=None, cfg=1.0, sigmas=torch.tensor([first, 0.0])
    )
    before, judge = student.lora.snapshot(), lab.build_judge()
    settings = Settings(steps=2, check_every=0, check_seeds=1)
    objective = Objective([Question("Is the line thick?")], target=1 - 1e-13)
    run = student.run(lambda: train(student, judge.judge, objective, settings, lambda *_: None), [judge.patcher])
    assert len(run.loss) == 2 and all(map(math.isfinite, run.loss))
    after = student.lora.snapshot()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert sum(not torch.equal(before[key], after[key]) for key in before) > len(before) * 0.4

    lora = Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"
    save_lora(student.lora.export(), lora)
    (taught,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora.name, 1.0)
    assert set(taught.patches) == {f"diffusion_model.{layer}.weight" for layer in student.lora.paths}
