"""MODELs that are not what Load Diffusion Model makes: they train rightly, or a sentence names the loader to use."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from dual_process.tests.gradients import picture_to_lora_ratio
from dual_process.trainers.self_check import check_gradients

STOCK = "Load Diffusion Model or Load Checkpoint"


def test_compiled_by_the_stock_node(lab):
    """It is trained as it was before the node, which compiles for minutes; what was compiled stays the user's."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters

    # The backend that runs what torch.compile has traced; the others need a compiler or a GPU.
    model = TorchCompileModel.execute(lab.build_model("SD3"), "eager").result[0]
    counters.clear()
    before = lab.sample(model, "SD3")
    assert counters["frames"]["ok"] > 0
    student = lab.build_student("SD3", model, vae=lab.LinearVAE(16))
    counters.clear()
    student.run(lambda: check_gradients(student), beside=[])
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)
    assert not counters["frames"]
    assert torch.equal(lab.sample(model, "SD3"), before)


class Dequantised(nn.Module):
    """A linear layer in 8 bit that is made float again for every use, as GGUF layers are."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().amax() / 127
        self.register_buffer("weight", (layer.weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("name", ["SD3", "FLUX schnell"])
def test_layers_that_are_dequantised_for_every_use(lab, name):
    model = lab.build_model(name)
    network = model.model.diffusion_model
    for path in [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]:
        network.set_submodule(path, Dequantised(network.get_submodule(path)))
    student = lab.build_student(name, model, vae=lab.LinearVAE(16))
    student.run(lambda: check_gradients(student), beside=[])
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)


def test_a_model_without_layers_to_adapt(lab):
    """Nunchaku's: a wrapper whose blocks lie deeper, of layers of its own."""
    model = lab.build_model("FLUX schnell")
    wrapper = nn.Module()
    wrapper.model = model.model.diffusion_model
    model.model.diffusion_model = wrapper
    with pytest.raises(ValueError, match=f"no LoRA can be trained on.*Nunchaku.*{STOCK}"):
        lab.build_student("FLUX schnell", model)


def test_layers_of_packed_weights(lab):
    """Nunchaku's Qwen-Image: blocks where ComfyUI has them, of layers whose kernels have no backward."""
    model = lab.build_model("Qwen-Image")
    for layer in model.model.diffusion_model.transformer_blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.qweight = layer._parameters.pop("weight")
    with pytest.raises(ValueError, match=f"no LoRA can be trained on.*Nunchaku.*{STOCK}"):
        lab.build_student("Qwen-Image", model)


@pytest.fixture
def Dynamic(comfy):
    """A ModelPatcher whose weights move while the model runs, as ComfyUI's dynamic VRAM makes it on a GPU."""
    from comfy.model_patcher import ModelPatcher

    if "disable_dynamic" not in inspect.signature(ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI has no dynamic VRAM")

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

    return Dynamic


def test_memory_that_moves_while_the_model_runs(lab, Dynamic):
    stock = lab.build_model("SD3")
    model = Dynamic(stock.model, stock.load_device, stock.offload_device)
    with pytest.raises(ValueError, match=f"loader of SD3 .*{STOCK}, .*or start ComfyUI with --disable-dynamic-vram"):
        lab.build_student("SD3", model)
    model.cached_patcher_init = (lambda name, disable_dynamic: lab.build_model(name), ("SD3",))  # as stock loaders do
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    student = lab.build_student("SD3", TorchCompileModel.execute(model, "eager").result[0])
    assert not student.model.is_dynamic()
    student.run(lambda: check_gradients(student), beside=[])


def test_a_vae_whose_memory_moves(lab, Dynamic):
    """As Load VAE makes it on a GPU; it is read anew, in the format of its file."""
    vae, file = lab.LinearVAE(16), lab.LinearVAE(16)
    file.first_stage_model.double()
    vae.patcher = Dynamic(vae.first_stage_model, vae.device, vae.device)
    with pytest.raises(ValueError, match="loader of Module cannot.*Load VAE"):
        lab.build_student("SD3", vae=vae)
    vae.patcher.cached_patcher_init = (lambda disable_dynamic: file.patcher, ())
    student = lab.build_student("SD3", vae=vae)
    assert not student.decoder.is_dynamic()
    student.run(lambda: check_gradients(student), beside=[])


def test_rotary_embeddings_are_as_before_after_training(comfy):
    kitchen = pytest.importorskip("comfy_kitchen", reason="this ComfyUI computes them itself")
    from comfy_kitchen.backends.eager import rope

    from dual_process.trainers.rope import rope_in_torch

    before = dict(vars(kitchen))
    with pytest.raises(KeyboardInterrupt), rope_in_torch():
        for name in ("apply_rope", "apply_rope1", "rms_rope", "rms_rope_split_half"):
            assert getattr(kitchen, name) is getattr(rope, name) is not before[name]
        raise KeyboardInterrupt
    assert vars(kitchen) == before


def test_a_controlnet_whose_memory_moves_is_left_alone(lab, Dynamic):
    """Its layers hold on to the device's memory between uses, where a copy could read what is no longer there."""
    from dual_process.trainers.comfy_memory import gradients, loaded_for_training

    layer = nn.Linear(4, 4)
    layer.weight, layer._v_weight = nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4)
    weight, alias = layer.weight, layer._v_weight
    control = Dynamic(nn.Sequential(layer), torch.device("cpu"), torch.device("cpu"))
    with gradients(), loaded_for_training([control]):
        assert layer.weight is weight and layer._v_weight is alias and not weight.requires_grad


def test_gligen_whose_memory_moves(lab, Dynamic):
    boxes = Dynamic(nn.Linear(4, 4), torch.device("cpu"), torch.device("cpu"))
    [[tensor, values]] = lab.build_conditioning("SD1.5")
    positive = [[tensor, values | {"gligen": ("position", boxes, [])}]]
    with pytest.raises(ValueError, match="GLIGEN boxes.*--disable-dynamic-vram"):
        lab.build_student("SD1.5", positives=[positive])
