"""Models in half precision and fp8: the LoRA stays float32, and its gradient is that of the float32 model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dual_process.tests.gradients import give_lora_a_value, picture_to_lora_ratio
from dual_process.trainers.dual_process import Settings, train
from dual_process.trainers.lora import LoRA
from dual_process.trainers.objective import Objective
from dual_process.vlm.question import Question

# Not FLUX dev: in bf16 it rounds 1000 times the guidance before taking its sine, and so is another model.
NAMES = ["SD1.5", "SD3", "FLUX schnell", "Z-Image"]
FORMATS = {  # weights, computation, least cosine of the gradient; fp8 and bf16 keep 3 and 7 bits of each weight
    "fp16": (torch.float16, None, 0.999),
    "bf16": (torch.bfloat16, None, 0.99),
    "bf16 weights": (torch.bfloat16, torch.float32, 0.999),
    "fp8 in bf16": (torch.float8_e4m3fn, torch.bfloat16, 0.9),
    "fp8 in fp16": (torch.float8_e4m3fn, torch.float16, 0.9),
}


def gradient(lab, name: str, dtype=torch.float32, compute=None, vae_dtype=torch.float32, size=1.0) -> torch.Tensor:
    """The LoRA's gradient of a fixed direction of pictures of some size, all layers in one vector."""
    model, vae = lab.build_model(name, dtype=dtype, compute=compute), lab.linear_vae(name)
    vae.vae_dtype = vae_dtype
    vae.first_stage_model.to(vae_dtype)
    return gradient_of(lab.build_student(name, model, vae=vae), size)


def gradient_of(student, size=1.0) -> torch.Tensor:
    def loop():
        image = student.decode(student.predict(student.roll(student.noise(3), 0), 0))
        direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5)).to(image)
        ((image * direction).mean() * size * student.gradient_scale).backward()
        return torch.cat([p.grad.flatten() for p in student.lora.parameters() if p.grad is not None])

    return student.run(loop, beside=[])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_float32_model(lab, name):
    exact = gradient(lab, name)
    for label, (dtype, compute, least) in FORMATS.items():
        assert cosine_similarity(gradient(lab, name, dtype, compute), exact, dim=0) > least, label


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 model", "bf16 model"])
def test_small_gradients_come_through_a_half_precision_vae(lab, dtype):
    exact = gradient(lab, "SD3", size=1e-5)
    half = gradient(lab, "SD3", dtype, vae_dtype=torch.float16, size=1e-5)
    assert cosine_similarity(half, exact, dim=0) > 0.99


@pytest.mark.parametrize("label", FORMATS)
@pytest.mark.parametrize("name", ["SD1.5", "FLUX dev"])
def test_two_steps(lab, name, label):
    dtype, compute, _ = FORMATS[label]
    model = lab.build_model(name, dtype=dtype, compute=compute)
    weights = {key: value.clone() for key, value in model.model.state_dict().items()}
    student, judge = lab.build_student(name, model), lab.build_judge()
    before = student.lora.snapshot()
    objective = Objective([Question("Is the line thick?")], target=1 - 1e-13)
    settings = Settings(steps=2, check_every=0, check_seeds=1)
    run = student.run(lambda: train(student, judge.judge, objective, settings, lambda *_: None), [judge.patcher])
    assert len(run.loss) == 2 and all(torch.isfinite(torch.tensor(run.loss)))
    after = student.lora.state_dict()
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key].cpu()) for key in before)
    for key, value in model.model.state_dict().items():
        assert value.dtype == weights[key].dtype and torch.equal(value.float(), weights[key].float()), key


def scaled_fp8(lab, name: str):
    """A MODEL from a file whose matrices are fp8 with a scale each; newer ComfyUIs hold them as QuantizedTensors."""
    import comfy.sd

    weights = {key: value.clone() for key, value in lab.build_model(name).model.diffusion_model.state_dict().items()}
    for key in [key for key, value in weights.items() if "blocks." in key and value.ndim == 2]:
        scale = weights[key].abs().max() / 448
        weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
        weights[key.replace(".weight", ".scale_weight")] = scale
    weights["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    return comfy.sd.load_diffusion_model_state_dict(weights)


def test_scaled_fp8(lab):
    import comfy.sd

    model, vae = scaled_fp8(lab, "SD3"), lab.LinearVAE(16)
    weight = model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight
    assert getattr(weight, "_qdata", weight).dtype == torch.float8_e4m3fn
    before = lab.sample(model, "SD3")
    student = lab.build_student("SD3", model, vae=vae)
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)

    def draw():
        return student._guider.inner_model.process_latent_out(student.roll(student.noise(5), 4))

    trained = student.run(draw, beside=[])
    assert torch.equal(lab.sample(model, "SD3"), before)
    (applied, _) = comfy.sd.load_lora_for_models(model, None, student.lora.export(), 1.0, 0)
    drawn = lab.sample(applied, "SD3")
    assert cosine_similarity((drawn - before).flatten(), (trained - before).flatten(), dim=0) > 0.9
    assert torch.equal(lab.sample(model, "SD3"), before)


def test_comfyui_moves_a_judge_of_scaled_fp8_after_it_was_loaded(lab):
    from dual_process.trainers.comfy_memory import ManagedJudge

    clip = scaled_fp8(lab, "SD3")
    ManagedJudge(None, clip).load()
    clip.model.to("cpu")


class Quantised(torch.nn.Parameter):
    """As bitsandbytes' weights are: of a class of their own, with scales beside the numbers."""


def test_weights_keep_their_class_and_scales(lab):
    from dual_process.trainers.comfy_memory import make_trainable_through

    layer = torch.nn.Linear(4, 4, bias=False)  # in inference mode, as whatever ComfyUI moves
    layer.weight = torch.Tensor._make_subclass(Quantised, layer.weight.data, False)
    layer.weight.scale = 3.0
    with torch.inference_mode(False):
        make_trainable_through(layer)
        x = torch.ones(1, 4, requires_grad=True)
        layer(x).sum().backward()
    assert type(layer.weight) is Quantised and layer.weight.scale == 3.0 and not layer.weight.requires_grad
    assert torch.equal(x.grad[0], layer.weight.sum(0))


def multiply_in_fp8(monkeypatch) -> None:
    """A GPU that does, as far as ComfyUI can tell."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "supports_fp8_compute", lambda device=None: True)


def test_scaled_fp8_where_products_are_in_fp8(lab, monkeypatch):
    """ComfyUI 0.3.75 turns them on for such files, and they stop at backward; newer ones round activations."""

    def found():
        return gradient_of(lab.build_student("SD3", scaled_fp8(lab, "SD3"), vae=lab.LinearVAE(16)))

    exact = found()
    multiply_in_fp8(monkeypatch)
    assert cosine_similarity(found(), exact, dim=0) > 0.99


def test_the_anchor_does_not_pull_towards_the_rounding_of_fast_fp8(lab, monkeypatch):
    import comfy.ops
    import comfy.sd

    multiply_in_fp8(monkeypatch)
    weights = {
        key: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "blocks" in key else value
        for key, value in lab.build_model("SD3").model.diffusion_model.state_dict().items()
    }
    options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    student, fast = lab.build_student("SD3", model, vae=lab.LinearVAE(16)), comfy.ops.fp8_linear

    def drift():
        student.use_prompt(0)
        x = student.roll(student.noise(1), 1)
        taught = student.predict(x, 1)
        with torch.no_grad(), student.lora.disabled():
            return taught - student.predict(x, 1)

    assert not student.run(drift, []).any()
    assert comfy.ops.fp8_linear is fast


def plain_fp8(lab, name: str):
    return lab.build_model(name, dtype=torch.float8_e4m3fn, compute=torch.float32)


def learned(lab, model, name: str) -> tuple[LoRA, torch.Tensor]:
    """A LoRA of small effect, and what it draws as it is trained."""
    student = lab.build_student(name, model, alpha=2.0)

    def loop():
        give_lora_a_value(student.lora)
        return student._guider.inner_model.process_latent_out(student.roll(student.noise(5), 4))

    return student.lora, student.run(loop, beside=[])


@pytest.mark.parametrize("load", [plain_fp8, scaled_fp8])
def test_what_is_applied_to_fp8_is_what_was_trained(lab, load):
    import comfy.sd

    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    model = load(lab, "SD3")
    bare = lab.sample(model, "SD3")
    lora, trained = learned(lab, model, "SD3")
    stock, _ = comfy.sd.load_lora_for_models(model, None, lora.export(), 1.0, 0)
    applied = ApplyLoRA.execute(model, FROM_TRAINER, 1.0, lora.export()).result[0]
    error = (lab.sample(applied, "SD3") - trained).norm()
    assert error < 1e-3 * (bare - trained).norm()
    assert error < 0.1 * (lab.sample(stock, "SD3") - trained).norm(), "which rounds the sum to fp8"
    twice = ApplyLoRA.execute(applied, FROM_TRAINER, -1.0, lora.export()).result[0]
    assert (lab.sample(twice, "SD3") - bare).norm() < 1e-3 * (bare - trained).norm(), "one takes back the other"
    assert torch.equal(lab.sample(model, "SD3"), bare)
    assert not any(module._forward_hooks for module in model.model.modules())


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("load", [plain_fp8, scaled_fp8])
def test_a_second_lora_is_trained_on_top_of_one_beside_fp8(lab, load, checkpointed):
    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    model = load(lab, "SD3")
    lora, trained = learned(lab, model, "SD3")
    applied = ApplyLoRA.execute(model, FROM_TRAINER, 1.0, lora.export()).result[0]
    drawn = lab.sample(applied, "SD3")
    student = lab.build_student("SD3", applied, vae=lab.LinearVAE(16), checkpointed=checkpointed)
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)

    def draw():
        return student._guider.inner_model.process_latent_out(student.roll(student.noise(5), 4))

    with torch.no_grad():
        for adapter in student.lora.adapters:
            adapter.B.zero_()
    assert (student.run(draw, beside=[]) - drawn).norm() < 1e-3 * drawn.norm()
    assert torch.equal(lab.sample(applied, "SD3"), drawn)


def test_a_lora_beside_fp8_acts_on_a_compiled_model_too(lab):
    """Compiled before or after, and drawn without it first."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    from dual_process.nodes.lora import FROM_TRAINER, ApplyLoRA

    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch before 2.6")
    model = plain_fp8(lab, "SD3")
    lora, _ = learned(lab, model, "SD3")

    def applied(to):
        return ApplyLoRA.execute(to, FROM_TRAINER, 1.0, lora.export()).result[0]

    def compiled(one):
        clone = one.clone()
        set_torch_compile_wrapper(clone, backend="eager")
        return clone

    uncompiled = lab.sample(applied(model), "SD3")
    bare = compiled(model)
    assert (lab.sample(bare, "SD3") - uncompiled).norm() > 0.01 * uncompiled.norm()
    for both in (applied(bare), compiled(applied(model))):
        assert (lab.sample(both, "SD3") - uncompiled).norm() < 1e-3 * uncompiled.norm()


def test_products_in_fp16_are_summed_in_fp32_while_training(lab):
    """``--fast`` has them summed in fp16, in which scaled gradients overflow."""
    matmul, student = torch.backends.cuda.matmul, lab.build_student("SD3")
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        assert student.run(lambda: matmul.allow_fp16_accumulation, []) is False
        assert matmul.allow_fp16_accumulation is True
    finally:
        matmul.allow_fp16_accumulation = before
