"""The check before the first step: quiet on every sound model, and it names what is planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dual_process.tests.test_student import ALL
from dual_process.trainers.self_check import check_gradients


def check(student) -> None:
    student.run(lambda: check_gradients(student), beside=[])


@pytest.mark.parametrize("name", ALL)
def test_a_sound_model_passes(lab, name):
    check(lab.build_student(name))


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX dev", "Z-Image"])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float8_e4m3fn, torch.bfloat16)],
    ids=["bf16", "fp16", "fp8"],
)
def test_rounding_is_not_taken_for_an_error(lab, name, dtype, compute):
    check(lab.build_student(name, lab.build_model(name, dtype=dtype, compute=compute)))


DEEP = {  # what makes a tiny model as deep as the published one
    "SDXL": {
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "num_head_channels": 32,
    },
    "FLUX schnell": {"depth": 19, "depth_single_blocks": 38},
    "Z-Image": {"n_layers": 30},
    "Qwen-Image": {"num_layers": 60},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", DEEP)
def test_neither_is_that_of_hundreds_of_layers(lab, monkeypatch, name, dtype):
    """A new LoRA's first move is less than half precision can add to one layer's output."""
    kind = lab.ARCHITECTURES[name]
    monkeypatch.setitem(lab.ARCHITECTURES, name, replace(kind, config={**kind.config, **DEEP[name]}))
    check(lab.build_student(name, lab.build_model(name, dtype=dtype)))


@pytest.mark.parametrize("half", ["model", "VAE"])
def test_gradients_beyond_half_precision_are_scaled_by_less(lab, half):
    vae = lab.build_vae("SD3")
    if half == "VAE":
        vae.vae_dtype = torch.float16
        vae.first_stage_model.half()
    model = lab.build_model("SD3", dtype=torch.float16 if half == "model" else torch.float32)
    student = lab.build_student("SD3", model, vae=vae)

    def begin_too_high():
        student.gradient_scale = 2.0**40
        check_gradients(student)

    student.run(begin_too_high, beside=[])
    assert 1 < student.gradient_scale < 2**40


def test_a_scale_that_the_check_itself_was_too_rough_for_is_restored(lab, monkeypatch):
    from dual_process.trainers import self_check

    student, first = lab.build_student("SD3"), self_check._check_first_step

    def rough(student):
        if any(adapter.B.any() for adapter in student.lora.adapters):
            student.gradient_scale = 1.0
            raise RuntimeError("beyond its range")
        first(student)

    def begin():
        student.gradient_scale = 64.0
        check_gradients(student)

    monkeypatch.setattr(self_check, "_check_first_step", rough)
    student.run(begin, beside=[])
    assert student.gradient_scale == 64.0


def test_the_lora_is_left_as_it_was(lab):
    student = lab.build_student("SD3")
    before = student.lora.snapshot()
    check(student)
    assert all(torch.equal(before[name], value) for name, value in student.lora.state_dict().items())
    assert all(parameter.grad is None for parameter in student.lora.parameters())


def test_costs_a_twentieth_of_a_hundred_steps_at_most(lab):
    student = lab.build_student("Qwen-Image")  # has layers without gradient, so all parts of the check run
    predict, calls = student.predict, []
    student.predict = lambda x, k: calls.append(k) or predict(x, k)
    check(student)
    backward = 3  # forwards that a backward with recomputation costs; the check has three of them
    step = 1 + backward + 1  # prediction with backward, prediction without the LoRA; rolling and judge not counted
    assert len(calls) + 3 * backward <= 0.05 * 100 * step


def without_autograd(function):
    """``function`` as a CUDA kernel without a backward would be."""

    def kernel(*args, **kwargs):
        with torch.no_grad():
            return function(*args, **kwargs)

    return kernel


def test_attention_patch_without_autograd(lab):
    model = lab.build_model("SD1.5")
    from comfy.ldm.modules.attention import attention_pytorch

    @without_autograd
    def sage(q, k, v, options):
        return attention_pytorch(q, k, v, options["n_heads"])

    for block, number in (("input", 1), ("middle", 0), ("output", 2)):
        model.set_model_attn1_replace(sage, block, number)
    with pytest.raises(RuntimeError, match="get no gradient.*attn1.*--use-pytorch-cross-attention"):
        check(lab.build_student("SD1.5", model))


@pytest.mark.parametrize(
    ("name", "module", "attention"),
    [("PixArt", "pixart.blocks", "optimized_attention"), ("FLUX dev", "flux.layers", "attention")],
)
def test_attention_replaced_by_a_kernel_without_autograd(lab, name, module, attention, monkeypatch):
    import importlib

    module = importlib.import_module(f"comfy.ldm.{module}")
    monkeypatch.setattr(module, attention, without_autograd(getattr(module, attention)))
    with pytest.raises(RuntimeError, match="get no gradient.*--use-pytorch-cross-attention"):
        check(lab.build_student(name))


def test_the_attention_kernel_that_comfyui_was_started_with_is_not_used(lab, monkeypatch):
    """As with --use-sage-attention: most models ask ComfyUI which kernel to use, and the student answers."""
    from comfy.ldm.modules import attention

    sage = attention.wrap_attn(without_autograd(attention.attention_pytorch))
    monkeypatch.setattr(attention, "optimized_attention", sage)
    check(lab.build_student("SD1.5"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tiled_vae(lab, mode):
    student = lab.build_student("SD3")
    decode = student.vae.first_stage_model.decode

    def tiled(latent):
        with mode():
            return torch.cat([decode(half) for half in latent.chunk(2, dim=-1)], dim=-1)

    student.vae.first_stage_model.decode = tiled
    with pytest.raises(RuntimeError, match="No usable gradient passes through the VAE: it decodes in tiles"):
        check(student)


def as_plain_checkpointing_does(forward):
    """Recomputation from the block's inputs as they are by then, which no error reveals in older versions of torch."""

    def block(*args, **kwargs):
        if any(getattr(value, "requires_grad", False) for value in (*args, *kwargs.values())):
            return checkpoint(lambda: forward(*args, **kwargs), use_reentrant=False)
        return forward(*args, **kwargs)

    return block


@pytest.mark.parametrize("name", ["FLUX dev", "Chroma", "FLUX.2"])
def test_blocks_that_overwrite_their_inputs(lab, name, monkeypatch):
    from dual_process.trainers import checkpointing

    monkeypatch.setattr(checkpointing, "_checkpointed", lambda forward, *_: as_plain_checkpointing_does(forward))
    with pytest.raises(RuntimeError, match="The gradient is not the model's.*Turn checkpointing off"):
        check(lab.build_student(name))


def test_blocks_that_overwrite_what_autograd_saved(lab, monkeypatch):
    from dual_process.trainers import checkpointing

    monkeypatch.setattr(checkpointing, "_on_a_clone", lambda forward: forward)
    monkeypatch.setattr(checkpointing, "_on_clones", lambda forward: forward)
    with pytest.raises(RuntimeError, match=r"Backward through the model fails \(one of the variables.*inplace"):
        check(lab.build_student("FLUX dev", checkpointed=False))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_patch_that_overwrites_what_autograd_saved(lab, checkpointed):
    """As NAGuidance does with the output of attention; in a recomputed block torch would not notice."""

    def guided(out, _):
        stronger = out * out.norm(dim=-1, keepdim=True)
        out[...] = 0.9 * out + 0.1 * stronger
        return out

    model = lab.build_model("SD1.5")
    model.set_model_attn1_output_patch(guided)
    with pytest.raises(
        RuntimeError, match=r"Backward through the model fails \(one of the variables.*inplace.*patches off"
    ):
        check(lab.build_student("SD1.5", model, checkpointed=checkpointed))


@pytest.mark.parametrize("momentum", [0.0, -0.75])
def test_guidance_that_remembers(lab, momentum):
    from comfy_extras.nodes_apg import APG

    model = APG.execute(lab.build_model("FLUX dev"), 0.5, 5.0, momentum).result[0]
    student = lab.build_student("FLUX dev", model)
    if not momentum:
        check(student)
        return
    with pytest.raises(RuntimeError, match="Asked twice, the model answers differently.*APG with momentum"):
        check(student)


def test_a_mask_that_leaves_nothing_to_the_first_step(lab):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(lab.build_model("SD3"), 1.0).result[0]
    half = torch.full((1, 8, 8), 0.5)
    with pytest.raises(RuntimeError, match="Differential Diffusion does so"):
        check(lab.build_student("SD3", model, latent={**lab.build_latent("SD3"), "noise_mask": half}))
    check(lab.build_student("SD3", latent={**lab.build_latent("SD3"), "noise_mask": half}))


def test_a_model_whose_pictures_are_not_finite(lab):
    model = lab.build_model("SD3")
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] / 0)
    with pytest.raises(RuntimeError, match="The model's own pictures are not finite numbers"):
        check(lab.build_student("SD3", model))


def test_cached_blocks(lab):
    """What TeaCache and its relatives do: the second call is answered from the first."""
    from comfy.patcher_extension import WrappersMP

    model, seen = lab.build_model("FLUX dev"), []

    def cached(executor, *args, **kwargs):
        if not seen:
            seen.append(executor(*args, **kwargs))
        return seen[0]

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cached)
    with pytest.raises(RuntimeError, match="0.00 times what the gradient promises.*TeaCache"):
        check(lab.build_student("FLUX dev", model))


@pytest.mark.parametrize("threshold, start", [(0.2, 0.15), (3.0, 0.0), (3.0, 0.15)])
def test_easycache(lab, threshold, start):
    """It answers later steps from earlier ones; the first step is as it should be."""
    import comfy_extras.nodes_easycache as cache

    model = cache.EasyCacheNode.execute(lab.build_model("FLUX dev"), threshold, start, 0.95, False).result[0]
    with pytest.raises(RuntimeError, match="cannot be learned from at sampler step [34] .*Take EasyCache"):
        check(lab.build_student("FLUX dev", model))


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX dev"])
def test_layers_that_compute_without_autograd(lab, name):
    """What a dequantising matrix product without backward (GGUF, Nunchaku) does to a bypass LoRA."""
    model = lab.build_model(name)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "in_features"):
            module.forward = without_autograd(module.forward)
    with pytest.raises(RuntimeError, match="Load Diffusion Model"):
        check(lab.build_student(name, model))


def test_a_model_without_autograd(lab):
    from comfy.patcher_extension import WrappersMP

    model = lab.build_model("FLUX dev")
    model.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "engine", lambda executor, *args, **kwargs: executor(*args, **kwargs).detach()
    )
    with pytest.raises(RuntimeError, match="No gradient passes through the model.*TensorRT.*Load Diffusion Model"):
        check(lab.build_student("FLUX dev", model))
