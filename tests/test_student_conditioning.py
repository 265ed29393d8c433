"""The student with everything a user hangs on a MODEL: right gradients with each, and each one respected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dual_process.tests.gradients import give_lora_a_value, picture_to_lora_ratio


def tiny_controlnet(lab, name: str):
    """A ControlNet with random weights from ComfyUI's own classes, for SD1.5, SD3 or FLUX."""
    import comfy.cldm.cldm
    import comfy.cldm.mmdit
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ldm.flux.controlnet
    import comfy.ops

    config = dict(lab.build_model(name).model.model_config.unet_config)
    config |= {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}
    wrap = {}
    if name == "SD3":
        network = comfy.cldm.mmdit.ControlNet(num_blocks=2, **config)
        wrap = {"compression_ratio": 1, "latent_format": comfy.latent_formats.SD3()}
    elif name == "FLUX dev":
        network = comfy.ldm.flux.controlnet.ControlNetFlux(**config)
        wrap = {"extra_conds": ["y", "guidance"]}
    else:
        for unused in ("out_channels", "transformer_depth_output"):
            del config[unused]
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
    lab.randomise(network, seed=11)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), **wrap)


def controlnet(lab, name: str) -> dict:
    import nodes

    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(12))
    prompts = lab.build_conditioning(name), lab.build_conditioning(name, seed=2)
    vae = lab.build_vae(name) if name == "SD3" else None
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *prompts, tiny_controlnet(lab, name), image, 0.8, 0.0, 1.0, vae=vae
    )
    return {"positives": [controlled[0]], "negative": controlled[1]}


def area_and_mask(lab, name: str) -> dict:
    import nodes

    upper, left, everywhere = (lab.build_conditioning(name, seed=seed) for seed in (1, 21, 22))
    (upper,) = nodes.ConditioningSetArea().append(upper, 64, 32, 0, 0, 1.0)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    (left,) = nodes.ConditioningSetMask().append(left, mask, "default", 0.7)
    return {"positives": [upper + left + everywhere]}


def block_patch(lab, name: str) -> dict:
    """A model patch that does something else in every block, by the index ComfyUI tells it."""
    model = lab.build_model(name)
    if name == "SD1.5":

        def scaled(n, options):
            return n * (1 + 0.3 * options["block_index"] + 0.1 * options["block"][1])

        model.set_model_attn1_output_patch(scaled)
        model.set_model_attn2_output_patch(scaled)
        return {"model": model}

    def replaced(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * (1 + 0.3 * args["transformer_options"].get("block_index", 1))}

    for i in range(2):
        model.set_model_patch_replace(replaced, "dit", "double_block", i)
    return {"model": model}


def users_lora(lab, name: str) -> dict:
    import comfy.sd

    model = lab.build_model(name)
    lora = lab.build_student(name, model, seed=31).lora
    give_lora_a_value(lora)
    return {"model": comfy.sd.load_lora_for_models(model, None, lora.export(), 1.0, 0)[0]}


def diffsynth_controlnet(lab, name: str) -> dict:
    """A model patch with weights of its own, which writes into what the blocks return."""
    import comfy.ops
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet, QwenImageDiffsynthControlnet

    network = QwenImageBlockWiseControlNet(2, dim=64, operations=comfy.ops.manual_cast)
    lab.randomise(network, seed=11)
    patch = ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    vae = SimpleNamespace(
        encode=lambda image: torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(13)),
        spacial_compression_encode=lambda: 8,
    )
    image, node = torch.rand(1, 64, 64, 3), QwenImageDiffsynthControlnet()
    return {"model": node.diffsynth_controlnet(lab.build_model(name), patch, vae, image, 1.0)[0]}


def flux_guidance(lab, name: str) -> dict:
    import node_helpers

    return {"positives": [node_helpers.conditioning_set_values(lab.build_conditioning(name), {"guidance": 9.0})]}


def options_hook(lab, name: str) -> dict:
    """A hook that patches the blocks for its own prompt only and leaves weights alone."""
    import comfy.hooks

    patches = {"patches": {"attn1_output_patch": [lambda n, options: 1.5 * n]}}
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook(patches, comfy.hooks.EnumHookScope.HookedOnly))
    return {"positives": [comfy.hooks.set_hooks_for_conditioning(lab.build_conditioning(name), hooks)]}


def shifted_sampling(lab, name: str) -> dict:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3

    model = lab.build_model(name)
    if name == "SD1.5":
        return {"model": ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]}
    if name == "SD3":
        return {"model": ModelSamplingSD3().patch(model, 7.0)[0]}
    return {"model": ModelSamplingFlux().patch(model, 1.5, 0.5, 1024, 1024)[0]}


def inpainting(lab, name: str) -> dict:
    generator = torch.Generator().manual_seed(41)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:] = 1
    samples = torch.randn(lab.ARCHITECTURES[name].latent, generator=generator)
    return {"latent": {"samples": samples, "noise_mask": mask}}


def batch(lab, name: str) -> dict:
    return {"latent": lab.build_latent(name, batch=3)}


def wide(lab, name: str) -> dict:
    return {"latent": {"samples": torch.zeros(1, lab.ARCHITECTURES[name].latent[1], 6, 12)}}


CASES = [
    *((feature, name) for feature in (controlnet, area_and_mask, block_patch, users_lora, inpainting, batch, wide)
      for name in ("SD1.5", "SD3", "FLUX dev")),
    *((shifted_sampling, name) for name in ("SD1.5", "SD3", "FLUX dev")), (flux_guidance, "FLUX dev"),
    (options_hook, "SD1.5"), (diffsynth_controlnet, "Qwen-Image"),
]  # fmt: skip


def student_with(lab, feature, name: str, checkpointed: bool = True):
    settings = {"vae": lab.linear_vae(name), "checkpointed": checkpointed}
    return lab.build_student(name, **{**settings, **feature(lab, name)})


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize(("feature", "name"), CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES])
def test_gradient_with(lab, feature, name, checkpointed):
    assert picture_to_lora_ratio(student_with(lab, feature, name, checkpointed)) == pytest.approx(1, abs=0.01)


def nothing(lab, name: str) -> dict:
    return {}


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX dev"])
@pytest.mark.parametrize("feature", [controlnet, area_and_mask, block_patch, users_lora, inpainting])
def test_changes_the_picture(lab, feature, name):
    """What is connected is not silently dropped on the way into training."""

    def prediction(feature):
        student = student_with(lab, feature, name)
        return student.run(lambda: student.predict(student.roll(student.noise(3), 1), 1).detach(), beside=[])

    with_it, without = prediction(feature), prediction(nothing)
    assert (with_it - without).abs().max() > 1e-3 * without.abs().max()


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        (flux_guidance, "FLUX dev"),
        (options_hook, "SD1.5"),
        *((shifted_sampling, name) for name in ("SD1.5", "SD3", "FLUX dev")),
    ],
)
def test_is_drawn_with_as_ksampler_does(lab, feature, name):
    import nodes

    vae, negative = lab.linear_vae(name), lab.build_conditioning(name, seed=2)

    def by_ksampler(settings: dict) -> torch.Tensor:
        model = settings.get("model") or lab.build_model(name)
        (positive,) = settings.get("positives") or [lab.build_conditioning(name)]
        latent = lab.build_latent(name)
        (drawn,) = nodes.common_ksampler(model, 5, 4, 1.5, "euler", "simple", positive, negative, latent)
        return vae.process_output(vae.first_stage_model.decode(drawn["samples"]))

    student = student_with(lab, feature, name)
    picture = student.run(lambda: student.draw(5), beside=[])
    assert torch.allclose(picture, by_ksampler(feature(lab, name)), atol=1e-4)
    assert (picture - by_ksampler({})).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
def test_a_patch_with_tensors_for_drawing_only_is_named(lab, tmp_path, checkpointed):
    from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch

    path, widths = tmp_path / "style.pt", (32, 64)
    layers = {width: {"0.weight": torch.eye(width), "0.bias": torch.zeros(width)} for width in widths}
    torch.save({width: [layer, layer] for width, layer in layers.items()}, path)
    model = lab.build_model("SD1.5")
    model.set_model_attn1_patch(load_hypernetwork_patch(str(path), 0.5))
    student = lab.build_student("SD1.5", model, checkpointed=checkpointed)
    with pytest.raises(RuntimeError, match=r"^A patch on the MODEL \(nodes_hypernetwork.py, __call__\) holds tensors"):
        student.run(lambda: student.predict(student.roll(student.noise(1), 1), 1), beside=[])


def lora_hook(lab, name: str):
    """What Create Hook LoRA makes of a file."""
    import folder_paths
    from comfy_extras.nodes_hooks import CreateHookLora

    from dual_process.trainers.lora_file import new_lora_path, save_lora

    lora = lab.build_student(name, seed=31).lora
    give_lora_a_value(lora)
    path = new_lora_path(Path(folder_paths.get_folder_paths("loras")[0]), "hook")
    save_lora(lora.export(), path)
    return CreateHookLora().create_hook(path.name, 1.0, 0.0)[0]


@pytest.mark.parametrize("name", ["SD1.5", "FLUX dev"])
def test_a_hook_that_swaps_weights_is_refused(lab, name):
    import comfy.model_management as mm
    from comfy_extras.nodes_hooks import ConditioningSetProperties, SetModelHooksOnCond

    import nodes

    model, hooks = lab.build_model(name), lora_hook(lab, name)
    bare, other = lab.build_conditioning(name), lab.build_conditioning(name, seed=2)
    hooked = [
        SetModelHooksOnCond().attach_hook(bare, hooks)[0],
        ConditioningSetProperties().set_properties(bare, 1.0, "default", hooks=hooks)[0],
    ]

    def draw(positive):
        return nodes.common_ksampler(model, 5, 4, 1.5, "euler", "simple", positive, other, lab.build_latent(name))[0][
            "samples"
        ]

    before, with_hook = draw(bare), draw(hooked[0])
    assert not torch.equal(before, with_hook)
    mm.unload_all_models()
    for settings in [*({"positives": [bare, one]} for one in hooked), {"negative": hooked[0]}]:
        with pytest.raises(ValueError, match="hook that swaps the model's weights .*Load LoRA instead"):
            lab.build_student(name, model, **settings)
    assert mm.current_loaded_models == []
    assert torch.equal(draw(bare), before)
    assert torch.equal(draw(hooked[0]), with_hook)


def test_a_conditioning_that_holds_noise(lab):
    """unCLIP lays noise, drawn from the seed it is given, over the embedding of a picture."""
    import nodes
    from dual_process.trainers.comfy_student import CONDITIONING_SEED

    positive, negative = lab.build_conditioning("SDXL"), lab.build_conditioning("SDXL", seed=2)
    embedded = SimpleNamespace(image_embeds=torch.randn(1, 1, 1280, generator=torch.Generator().manual_seed(14)))
    (seen,) = nodes.unCLIPConditioning().apply_adm(positive, embedded, 1.0, 0.0)
    student = lab.build_student("SDXL", positives=[seen], vae=lab.LinearVAE(4))
    picture = student.run(lambda: student.draw(CONDITIONING_SEED), beside=[])
    model, latent = lab.build_model("SDXL"), lab.build_latent("SDXL")
    (drawn,) = nodes.common_ksampler(model, CONDITIONING_SEED, 4, 1.5, "euler", "simple", seen, negative, latent)
    wanted = student.vae.process_output(student.vae.first_stage_model.decode(drawn["samples"]))
    assert torch.allclose(picture, wanted, atol=1e-4)


def controlnet_for_both(lab, name: str) -> list:
    """Through the older node, whose ControlNet ComfyUI passes on to the negative prompt."""
    import nodes

    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(12))
    (controlled,) = nodes.ControlNetApply().apply_controlnet(
        lab.build_conditioning(name), tiny_controlnet(lab, name), image, 0.8
    )
    return controlled


def area(lab, name: str) -> list:
    (upper,) = area_and_mask(lab, name)["positives"]
    return upper[:1] + upper[2:]


@pytest.mark.parametrize("other", [controlnet_for_both, area])
def test_prompts_do_not_know_of_each_other(lab, other):
    """Each is drawn as a KSampler draws it that has only this prompt."""
    import nodes

    name = "SD1.5"
    model, negative = lab.build_model(name), lab.build_conditioning(name, seed=2)
    prompts = [other(lab, name), lab.build_conditioning(name, seed=21)]
    for positives in (prompts, prompts[::-1]):
        student = lab.build_student(name, model, positives=positives, vae=lab.LinearVAE(4))
        drawn = student.run(lambda student=student: [student.draw(5, i) for i in range(2)], beside=[])
        for positive, picture in zip(positives, drawn):
            (latent,) = nodes.common_ksampler(
                model, 5, 4, 1.5, "euler", "simple", positive, negative, lab.build_latent(name)
            )
            wanted = student.vae.process_output(student.vae.first_stage_model.decode(latent["samples"]))
            assert torch.allclose(picture, wanted, atol=1e-4)


def test_every_row_of_a_batched_conditioning_is_a_prompt(lab):
    model, one, other = lab.build_model("SD3"), lab.build_conditioning("SD3"), lab.build_conditioning("SD3", seed=2)
    (tokens, values), (more_tokens, more_values) = one[0], other[0]
    both = {name: torch.cat([values[name], more_values[name]]) for name in values}
    batched = [[torch.cat([tokens, more_tokens]), both], *lab.build_conditioning("SD3", seed=3)]
    student = lab.build_student("SD3", model, positives=[batched])
    assert student.prompts == 2
    alone = lab.build_student("SD3", model, positives=[[*other, *lab.build_conditioning("SD3", seed=3)]])
    drawn = student.run(lambda: student.draw(5, 1), beside=[])
    assert torch.equal(drawn, alone.run(lambda: alone.draw(5), beside=[]))
    three = [torch.cat([tokens] * 3), {}]
    with pytest.raises(ValueError, match="hold 1, 2, 3 prompts"):
        lab.build_student("SD3", model, positives=[[*batched, three]])


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
def test_a_controlnet_encodes_its_picture_in_a_pass_with_gradients(lab, checkpointed):
    """The VAE's weights are inference tensors, as stock loaders make them."""
    with torch.inference_mode():
        feature = controlnet(lab, "SD3")
    control = feature["positives"][0][0][1]["control"]
    vae = control.vae
    student = lab.build_student("SD3", checkpointed=checkpointed, **feature)

    def gradient():
        student.decode(student.predict(student.noise(3), 0)).sum().backward()
        found = torch.cat([adapter.B.grad.flatten() for adapter in student.lora.adapters if adapter.B.grad is not None])
        hint = control.cond_hint
        return found, hint

    found, hint = student.run(gradient, beside=[])
    assert found.abs().max() > 0 and not hint.is_inference() and not hint.requires_grad
    assert control.vae is vae
