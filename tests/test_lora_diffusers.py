"""The LoRA in diffusers' format: diffusers loads it, and with it computes what ComfyUI computes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.lora_file import TrainedLoRA, save_lora

diffusers = pytest.importorskip("diffusers", reason="needs diffusers and PEFT")
reference = pytest.importorskip("dual_process.tests.reference_algorithm", reason="needs diffusers and PEFT")


@pytest.fixture
def build(lab):
    """Name of an architecture -> its diffusion model, and its LoRA (with a value) as the trainer's node hands it on."""
    from dual_process.trainers.diffusers_lora import diffusers_names

    def build(name: str):
        student = lab.build_student(name)
        give_lora_a_value(student.lora)
        model = student.model.model
        file = TrainedLoRA(student.lora.export(), {"ss_steps": "1"}, diffusers_names(model))
        return model.diffusion_model, model.model_config.unet_config, student.lora, file

    return build


class Flux:
    name, map, part, channels, pooled = "FLUX schnell", "flux_to_diffusers", "transformer", 16, 768

    def model():
        return diffusers.FluxTransformer2DModel(
            in_channels=64, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12), num_layers=2,
            num_single_layers=2, joint_attention_dim=48,
        )  # fmt: skip

    def ours(network, x, time, context, pooled):
        return network(x, time, context, pooled, guidance=None)

    def theirs(model, x, time, context, pooled):
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        places = torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).flatten(0, 1)
        tokens = x.view(2, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 64)
        velocity = model(tokens, context, pooled, time, places, torch.zeros(context.shape[1], 3)).sample
        return velocity.view(2, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class StableDiffusion3:
    name, map, part, channels, pooled = "SD3", "mmdit_to_diffusers", "transformer", 16, 2048

    def model():
        return diffusers.SD3Transformer2DModel(
            sample_size=32, pos_embed_max_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=64,
            joint_attention_dim=48, caption_projection_dim=128, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip

    def ours(network, x, time, context, pooled):
        return network(x, time * 1000, context, pooled)

    def theirs(model, x, time, context, pooled):
        return model(x, context, pooled, time * 1000).sample


class StableDiffusion15:
    name, map, part, channels, pooled = "SD1.5", "unet_to_diffusers", "unet", 4, 0

    def model():
        return diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=48,
            attention_head_dim=8,
        )  # fmt: skip

    def ours(network, x, time, context, pooled):
        return network(x, time * 1000, context)

    def theirs(model, x, time, context, pooled):
        return model(x, time * 1000, context).sample


@pytest.mark.parametrize("case", [Flux, StableDiffusion3, StableDiffusion15], ids=lambda case: case.name)
def test_diffusers_computes_the_same_with_the_file(build, case, tmp_path):
    import comfy.utils

    from dual_process.trainers.diffusers_lora import to_diffusers

    network, config, lora, file = build(case.name)
    save_lora(to_diffusers(file), tmp_path / "lora.safetensors")
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, case.channels, 8, 8), (2, 7, 48), (2, case.pooled))
    with torch.inference_mode(False), torch.no_grad():
        x, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
        inputs = (x, torch.tensor([0.7, 0.3]), context, pooled)
        weights = {key: value.clone() for key, value in network.state_dict().items()}
        theirs = reference.fill(case.model(), weights, getattr(comfy.utils, case.map)(config))
        without = case.theirs(theirs, *inputs)
        assert (without - case.ours(network, *inputs)).abs().max() < 1e-5
        theirs.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix=case.part)
        lora.inject(network)
        ours = case.ours(network, *inputs)
        assert (case.theirs(theirs, *inputs) - ours).abs().max() < 1e-5
        assert (without - ours).abs().max() > 1e-2


OTHERS = {  # architecture -> the same tiny configuration in diffusers
    "SDXL": lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=48,
        attention_head_dim=(1, 2), use_linear_projection=True,
    ),
    "Chroma": lambda: diffusers.ChromaTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12), num_layers=2, num_single_layers=2,
        joint_attention_dim=48, approximator_hidden_dim=64, approximator_layers=2,
    ),
    "PixArt": lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, cross_attention_dim=64, caption_channels=48,
        sample_size=8,
    ),
    "Z-Image": lambda: diffusers.ZImageTransformer2DModel(
        dim=256, n_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=48, axes_dims=[32, 48, 48],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_layer_of_the_file_is_one_of_diffusers(build, name):
    from dual_process.trainers.diffusers_lora import to_diffusers

    *_, lora, ours = build(name)
    file, model = to_diffusers(ours), OTHERS[name]()
    rows = 0
    for key in [key for key in file if key.endswith(".lora_A.weight")]:
        part, layer = key.removesuffix(".lora_A.weight").split(".", 1)
        module, b = model.get_submodule(layer), file[key.replace("lora_A", "lora_B")]
        assert part == ("unet" if name == "SDXL" else "transformer")
        if "feed_forward" not in layer:  # Z-Image's width there is the same in both only at its real size
            assert (module.in_features, module.out_features) == (file[key].shape[1], b.shape[0]), layer
        rows += b.shape[0]
    assert rows == sum(adapter.B.shape[0] for adapter in lora.adapters)


def test_a_model_that_comfyui_has_no_map_for_is_refused(build):
    from dual_process.trainers.diffusers_lora import to_diffusers

    *_, file = build("FLUX.2")
    with pytest.raises(ValueError, match="no diffusers name for 'diffusion_model.double_blocks.0.*in ComfyUI's format"):
        to_diffusers(file)
    with pytest.raises(ValueError, match="no diffusers name for 'diffusion_model.x.lora_A.weight'"):
        to_diffusers({"diffusion_model.x.lora_A.weight": torch.ones(2, 3)})  # of a trainer that is not ours


def test_a_lora_that_the_format_cannot_hold_is_saved_in_comfyuis_and_said(build):
    import folder_paths

    from dual_process.nodes.lora import DIFFUSERS, SaveLoRA

    *_, file = build("FLUX.2")
    with pytest.raises(ValueError, match="no diffusers name .* saved in ComfyUI's format as formats/flux2_00001"):
        SaveLoRA.execute(file, "formats/flux2", DIFFUSERS)
    assert load_file(folder_paths.get_full_path("loras", "formats/flux2_00001.safetensors")).keys() == file.keys()


def test_the_node_writes_the_format_it_is_asked_for(build):
    import folder_paths

    from dual_process.nodes.lora import COMFYUI, DIFFUSERS, SaveLoRA

    *_, file = build("SD3")
    beginnings = {}
    for format in (COMFYUI, DIFFUSERS):
        name = SaveLoRA.execute(file, "formats/sd3", format).result[0]
        beginnings[format] = {key.split(".")[0] for key in load_file(folder_paths.get_full_path("loras", name))}
    assert beginnings == {COMFYUI: {"diffusion_model"}, DIFFUSERS: {"transformer"}}
