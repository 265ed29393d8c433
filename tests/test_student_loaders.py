"""MODELs that are not what Load Diffusion Model makes: they train rightly, or a sentence names the loader to use."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from dual_process.tests.gradients import picture_to_lora_ratio
from dual_process.trainers.self_check import check_gradients

STOCK = "Load Diffusion Model or Load Checkpoint"


@pytest.fixture
def lab(comfy):
    """Builders of tiny models, in the inference mode that ComfyUI runs nodes in."""
    from dual_process.tests import architectures

    with torch.inference_mode():
        yield architectures


def test_compiled_by_the_stock_node(lab):
    """With the backend that runs what torch.compile has traced; the others need a compiler or a GPU."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters

    model = TorchCompileModel.execute(lab.build_model("FLUX schnell"), "eager").result[0]
    student = lab.build_student("FLUX schnell", model)
    counters.clear()
    student.run(lambda: check_gradients(student), beside=[])
    assert counters["frames"]["ok"] > 0


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
    with pytest.raises(ValueError, match=f"no LoRA trains on.*Nunchaku.*{STOCK}"):
        lab.build_student("FLUX schnell", model)


@pytest.fixture
def dynamic(lab):
    """A function that makes a ModelPatcher like one of ComfyUI's dynamic VRAM, which exists on a GPU only."""
    from comfy.model_patcher import ModelPatcher

    if "disable_dynamic" not in inspect.signature(ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI has no dynamic VRAM")

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

    return lambda stock: Dynamic(stock.model, stock.load_device, stock.offload_device)


def test_memory_that_moves_while_the_model_runs(lab, dynamic):
    model = dynamic(lab.build_model("SD3"))
    with pytest.raises(ValueError, match=f"This MODEL.*{STOCK}, or start ComfyUI with --disable-dynamic-vram"):
        lab.build_student("SD3", model)
    model.cached_patcher_init = (lambda name, disable_dynamic: lab.build_model(name), ("SD3",))  # as stock loaders do
    assert not lab.build_student("SD3", model).model.is_dynamic()


def test_memory_that_moves_while_the_vae_runs(lab, dynamic):
    """The VAE's gradient needs its weights in place too; what decodes is what was loaded there."""
    vae, fresh = lab.build_vae("SD3"), lab.build_vae("SD3")
    vae.patcher = dynamic(vae.patcher)
    with pytest.raises(ValueError, match="This VAE.*Load VAE .a file. or Load Checkpoint, or start ComfyUI with"):
        lab.build_student("SD3", vae=vae)
    vae.patcher.cached_patcher_init = (lambda disable_dynamic: fresh.patcher, ())
    student = lab.build_student("SD3", vae=vae)
    vae.first_stage_model.decode = None  # that one's weights move
    assert not student.vae_patcher.is_dynamic()
    assert student.run(lambda: student.draw(1), beside=[]).shape == (1, 3, 64, 64)
