"""The student on ComfyUI's own classes: right gradients, and a user's model that is never changed."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from dual_process.tests.gradients import derivative_ratio, give_lora_a_value, picture_to_lora_ratio
from dual_process.trainers.dual_process import Settings, new_noise, one_pass, shown
from dual_process.trainers.objective import LIKELIHOOD, MARGIN, TARGET, Objective
from dual_process.vlm.question import Question

ALL = [
    "SD1.5", "SDXL", "SD3", "FLUX dev", "FLUX schnell", "Chroma", "FLUX.2", "Lumina 2", "Z-Image", "Qwen-Image",
    "Wan still", "HiDream", "PixArt", "Cosmos Predict2",
]  # fmt: skip
ASKED = ["SD1.5", "SDXL", "SD3", "FLUX dev", "Z-Image"]


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_from_picture_to_lora(lab, name, checkpointed):
    vae = lab.linear_vae(name)  # TAESD's kinks blur differences; it has its own test
    student = lab.build_student(name, vae=vae, checkpointed=checkpointed)
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ALL)
def test_no_target_is_a_layer_that_steers_unless_it_is_named(lab, name):
    from dual_process.trainers.lora import lora_targets

    network = lab.build_model(name).model.diffusion_model
    drawing = set(lora_targets(network))
    assert set(lora_targets(network, "block|stream|lin|qkv|attn|mlp|ff|feed|proj|to_")) <= drawing
    assert drawing <= set(lora_targets(network, ".*"))


@pytest.mark.parametrize(("name", "targets"), [("FLUX dev", "_mod"), ("SD3", "adaLN"), ("SD1.5", "emb_layers")])
def test_gradient_of_layers_that_steer(lab, name, targets):
    vae = lab.linear_vae(name)
    student = lab.build_student(name, vae=vae, targets=targets)
    assert all(targets in path for path in student.lora.paths)
    assert picture_to_lora_ratio(student) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("name", ASKED)
def test_gradient_from_answer_to_lora(lab, name, checkpointed):
    vae = lab.linear_vae(name)
    student, judge = lab.build_student(name, vae=vae, checkpointed=checkpointed), lab.build_judge()
    questions = [Question("Is the line thick?"), Question("Are the colours warm?", "No")]

    def loop():
        give_lora_a_value(student.lora)
        x = student.roll(student.noise(3), 1)

        def loss():
            return -judge.judge.log_likelihood(student.decode(student.predict(x, 1)), questions).double().sum()

        return derivative_ratio(list(student.lora.parameters()), loss)

    assert student.run(loop, beside=[judge.patcher]) == pytest.approx(1, abs=0.01)


def test_gradient_through_the_vae(lab):
    """In float64, where differences are exact enough for ReLU networks."""
    student = lab.build_student("SD3")
    student.vae.first_stage_model.double()
    student.vae.vae_dtype = torch.float64

    def loop():
        torch.manual_seed(0)
        x0 = torch.randn(1, 16, 2, 2, dtype=torch.float64, requires_grad=True)
        latent_to_picture = torch.randn(3 * 16 * 16, dtype=torch.float64)
        loss = lambda: (student.decode(x0).double().flatten() * latent_to_picture).sum()  # noqa: E731
        return derivative_ratio([x0], loss, reach=1e-3)

    assert student.run(loop, beside=[]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("name", "latent", "warned"),
    [
        ("SD1.5", (4, 64, 64), ""),
        ("SD1.5", (4, 24, 40), "Training at 320x192, while most models of this kind are made for about 512x512"),
        ("FLUX dev", (16, 48, 64), "Training at 512x384, while most models of this kind are made for about 1024x1024"),
        ("FLUX dev", (16, 64, 64), ""),
        ("FLUX dev", (16, 96, 128), ""),
        ("SD3", (16, 8, 8), "Training at 64x64"),
    ],
)
def test_a_small_latent_is_warned_of_unless_the_model_is_a_toy(lab, monkeypatch, name, latent, warned):
    from dual_process.trainers import comfy_student

    student = lab.build_student(name, latent={"samples": torch.zeros(1, *latent)})
    assert student.size_warning() == ""
    monkeypatch.setattr(comfy_student, "TOY", 0)
    student = lab.build_student(name, latent={"samples": torch.zeros(1, *latent)})
    said = student.size_warning()
    assert said.startswith(warned) and bool(said) == bool(warned)


@pytest.mark.parametrize("name", ["SD1.5", "SD3"])
def test_noise_laid_over_a_finished_latent(lab, name):
    """SD1.5: x0 + sigma noise (Karras et al., table 1, VE); SD3: (1 - sigma) x0 + sigma noise (rectified flow)."""
    student = lab.build_student(name)

    def loop():
        x0, noise, sigma = student.roll(student.noise(1), student.steps), student.noise(2), student.sigmas[1]
        kept = noise.clone()
        wanted = x0 + sigma * noise if name == "SD1.5" else (1 - sigma) * x0 + sigma * noise
        torch.testing.assert_close(student.noised(x0, noise, 1), wanted)
        assert torch.equal(noise, kept)

    student.run(loop, beside=[])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "sampler",
    "euler dpmpp_2m lms ipndm res_multistep er_sde uni_pc uni_pc_bh2 sa_solver sa_solver_pece".split(),
)
@pytest.mark.parametrize("name", ["SD1.5", "SD3"])
def test_learns_at_a_picture_that_the_sampler_draws(lab, name, sampler, k):
    """Rolled to step k is what the whole walk shows the model at that step's noise."""
    import comfy.samplers

    student, seen = lab.build_student(name, sampler=comfy.samplers.sampler_object(sampler)), []

    def loop():
        noise, plain = student.noise(3), student._denoiser
        rolled = student.roll(noise, k)

        class Recording:
            def __getattr__(self, name):
                return getattr(plain, name)

            def __call__(self, x, sigma, **kwargs):
                seen.append((sigma[0].item(), x.clone()))
                return plain(x, sigma, **kwargs)

        student._denoiser = Recording()
        student.roll(noise, student.steps)
        drawn = next(x for sigma, x in seen if sigma == pytest.approx(student.sigmas[k].item()))
        torch.testing.assert_close(rolled, drawn, rtol=1e-4, atol=1e-4 * drawn.abs().max().item())

    student.run(loop, beside=[])


@pytest.mark.parametrize("name", ALL)
def test_the_users_model_is_bit_identical_afterwards(lab, name):
    model = lab.build_model(name)
    before = lab.sample(model, name)
    student = lab.build_student(name, model)

    def loop():
        give_lora_a_value(student.lora)
        student.decode(student.predict(student.roll(student.noise(3), 2), 2)).sum().backward()

    student.run(loop, beside=[])
    assert torch.equal(lab.sample(model, name), before)
    assert not any("forward" in vars(module) for module in model.model.modules())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", ["SDXL", "FLUX dev"])
def test_nothing_is_left_behind_by_cancel_or_error(lab, name, where):
    import comfy.model_management as mm

    model = lab.build_model(name)
    before = lab.sample(model, name)
    student = lab.build_student(name, model)

    def loop():
        give_lora_a_value(student.lora)
        image = student.decode(student.predict(student.roll(student.noise(3), 1), 1))
        mm.interrupt_current_processing()
        image.sum().backward() if where == "backward" else student.draw(3)

    with pytest.raises(mm.InterruptProcessingException):
        student.run(loop, beside=[])
    with pytest.raises(ZeroDivisionError):
        lab.build_student(name, model).run(lambda: 1 / 0, beside=[])
    assert torch.equal(lab.sample(model, name), before)
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert not getattr(mm, "in_training", False)


def test_other_injections_go_on_working(lab):
    """As those of Load LoRA (Bypass), which replace forwards too and put back what they found."""
    from comfy.patcher_extension import PatcherInjection

    class Doubled:
        """A layer's forward, replaced as ComfyUI's BypassForwardHook does it."""

        def __init__(self, layer):
            self.layer, self.forward = layer, None

        def inject(self, _):
            if self.forward is None:
                self.forward, self.layer.forward = self.layer.forward, lambda x: 2 * self.forward(x)

        def eject(self, _):
            if self.forward is not None:
                self.layer.forward, self.forward = self.forward, None

    model = lab.build_model("SD3")
    doubled = Doubled(model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv)
    bypassed = model.clone()
    bypassed.set_injections("bypass", [PatcherInjection(inject=doubled.inject, eject=doubled.eject)])
    pictures = [lab.sample(one, "SD3") for one in (model, bypassed)]
    assert not torch.equal(*pictures)
    for _ in range(2):
        student = lab.build_student("SD3", bypassed)
        drawn = student.run(lambda: (student.use_prompt(0), student.roll(student.noise(5), student.steps))[1], [])
        assert torch.allclose(student.model.model.process_latent_out(drawn), pictures[1], atol=1e-5)
        for one, was in zip((model, bypassed), pictures):
            assert torch.equal(lab.sample(one, "SD3"), was)


def test_what_a_patch_draws_at_random_is_the_same_for_the_same_prediction(lab):
    """As HyperTile's and ToMe's: the anchor compares predictions with and without the LoRA."""
    model = lab.build_model("SD3")
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + torch.randn_like(args["denoised"]))
    student = lab.build_student("SD3", model)

    def predictions():
        student.use_prompt(0)
        x = student.roll(student.noise(5), 0)
        with torch.no_grad():
            return student.predict(x, 0), student.predict(x, 0)

    assert torch.equal(*student.run(predictions, []))


def test_copies_of_the_model_on_further_gpus_take_no_part(lab):
    model = lab.build_model("SD3")
    model.set_additional_models("multigpu", [model.clone()])
    assert lab.build_student("SD3", model).model.get_additional_models_with_key("multigpu") == []
    assert len(model.get_additional_models_with_key("multigpu")) == 1


@pytest.mark.parametrize("before", [False, True])
def test_comfyui_knows_of_the_training_as_long_as_it_lasts(lab, monkeypatch, before):
    """Newer ComfyUIs choose differentiable rotary embeddings and norms by it."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "in_training", before, raising=False)
    student = lab.build_student("FLUX schnell")
    assert mm.in_training is before
    assert student.run(lambda: mm.in_training, beside=[]) is True
    assert mm.in_training is before
    with pytest.raises(ZeroDivisionError):
        student.run(lambda: 1 / 0, beside=[])
    assert mm.in_training is before


@pytest.mark.parametrize("name", ["SD3", "SDXL"])
def test_a_users_lora_is_respected_and_kept(lab, name):
    import comfy.sd

    model = lab.build_model(name)
    bare = lab.sample(model, name)
    users = lab.build_student(name, model).lora
    give_lora_a_value(users)
    styled, _ = comfy.sd.load_lora_for_models(model, None, users.export(), 1.0, 0)
    before = lab.sample(styled, name)
    assert not torch.equal(before, bare)
    student = lab.build_student(name, styled)
    drawn = student.run(lambda: student._guider.inner_model.process_latent_out(student.roll(student.noise(5), 4)), [])
    assert (drawn - before).abs().max() < 1e-5 * before.abs().max()
    assert torch.equal(lab.sample(styled, name), before)
    assert torch.equal(lab.sample(model, name), bare)


@pytest.mark.parametrize("name", ALL)
def test_the_file_is_what_was_trained(lab, name):
    import comfy.sd
    import folder_paths

    import nodes
    from dual_process.trainers.lora_file import new_lora_path, save_lora

    model = lab.build_model(name)
    student = lab.build_student(name, model, alpha=2.0)

    def loop():
        give_lora_a_value(student.lora)
        return student._guider.inner_model.process_latent_out(student.roll(student.noise(5), 4))

    trained = student.run(loop, beside=[])
    in_memory, _ = comfy.sd.load_lora_for_models(model, None, student.lora.export(), 1.0, 0)
    assert set(in_memory.patches) == {f"diffusion_model.{path}.weight" for path in student.lora.paths}
    path = new_lora_path(Path(folder_paths.get_folder_paths("loras")[0]), "control")
    save_lora(student.lora.export(), path)
    (from_file,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, path.name, 1.0)
    scale = trained.abs().max()
    assert (lab.sample(from_file, name) - trained).abs().max() < 1e-5 * scale
    assert torch.equal(lab.sample(from_file, name), lab.sample(in_memory, name))
    assert (lab.sample(model, name) - trained).abs().max() > 1e-3 * scale


def test_memory_for_decoding_the_whole_batch_is_asked_for(lab, monkeypatch):
    from dual_process.trainers import comfy_memory, comfy_student

    asked, load = [], comfy_memory.loaded_for_training

    def record(patchers, memory):
        asked.append(memory)
        return load(patchers, memory)

    monkeypatch.setattr(comfy_memory, "loaded_for_training", record)
    for decode in (0, 1000):
        student = lab.build_student("SD3", latent=lab.build_latent("SD3", batch=2))
        student.vae.memory_used_decode = lambda shape, dtype, decode=decode: decode
        student.run(lambda: None, beside=[])
    without, with_it = asked
    assert with_it - without == pytest.approx(2 * 1000 * comfy_student.TRAINING_MEMORY, abs=1)


def test_draws_what_ksampler_draws(lab):
    import nodes

    model = lab.build_model("SD3")
    student = lab.build_student("SD3", model)
    (picture,) = nodes.VAEDecode().decode(student.vae, {"samples": lab.sample(model, "SD3", seed=11)})
    assert torch.allclose(student.run(lambda: student.draw(11), beside=[]).movedim(1, -1), picture, atol=1e-4)


def test_draws_the_pictures_of_a_batch_that_the_latent_names(lab):
    import nodes

    model = lab.build_model("SD3")
    latent = lab.build_latent("SD3", batch=2) | {"batch_index": [3, 5]}
    student = lab.build_student("SD3", model, latent=latent)
    positive, negative = lab.build_conditioning("SD3"), lab.build_conditioning("SD3", seed=2)
    (drawn,) = nodes.common_ksampler(model, 11, 4, 1.5, "euler", "simple", positive, negative, latent)
    (pictures,) = nodes.VAEDecode().decode(student.vae, drawn)
    assert torch.allclose(student.run(lambda: student.draw(11), beside=[]).movedim(1, -1), pictures, atol=1e-4)


def test_an_empty_latent_has_the_size_that_ksampler_gives_it(lab):
    """Newer versions tell a model of 16 pixels per latent pixel that Empty Latent Image counts in eights."""
    import nodes

    latent = nodes.EmptyLatentImage().generate(64, 64)[0]
    positive, model = lab.build_conditioning("FLUX.2"), lab.build_model("FLUX.2")
    (drawn,) = nodes.common_ksampler(model, 1, 1, 1.0, "euler", "simple", positive, positive, latent)
    assert lab.build_student("FLUX.2", model, latent=latent).latent.shape == drawn["samples"].shape


@pytest.mark.parametrize("anchor, prior", [(0.3, 10.0), (0.0, 10.0), (0.3, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("kind", [MARGIN, TARGET, LIKELIHOOD])
def test_gradient_handed_over_at_the_picture_is_the_whole_gradient(lab, kind, anchor, prior):
    """The loop's own pass, in two parts, against plain end-to-end autograd."""
    student, judge = lab.build_student("SD3"), lab.build_judge()
    questions = [Question("Is the line thick?"), Question("What is it?", "a line", 2.0)]
    objective = Objective(questions, kind, target=1 - 1e-13)
    settings = Settings(anchor=anchor, prior=prior, judge_noise=0.0)
    rng, again = (torch.Generator().manual_seed(0) for _ in range(2))

    def loop():
        give_lora_a_value(student.lora)
        noise = student.noise(3)
        x = student.roll(noise, 1)
        with torch.no_grad(), student.lora.disabled():
            base = student.predict(x, 1)
        x0 = student.predict(x, 1)
        image = student.decode(x0)
        shown([image], settings, again)  # draws as the pass will
        with student.lora.disabled():
            little = new_noise(student, again)
            removed = (x0 - student.redrawn(x0, little)) - (base - student.redrawn(base, little))
        seen = image + (image.clamp(0, 1) - image).detach()  # a clamp that lets gradients pass
        loss, _ = objective(judge.judge, seen)
        held = anchor * (x0 - base).square().mean() + prior * 2 * (removed.detach() * x0).mean()
        whole = torch.autograd.grad(loss + held, list(student.lora.parameters()))
        one_pass(student, judge.judge, objective, settings, rng, noise, x, 1)
        return whole, [p.grad for p in student.lora.parameters()]

    whole, handed_over = student.run(loop, beside=[judge.patcher])
    for a, b in zip(whole, handed_over):
        assert torch.allclose(a, b, atol=1e-6 * a.abs().max())


@pytest.mark.parametrize("anchor, prior, forwards", [(0.1, 10.0, 4), (0.0, 10.0, 4), (0.1, 0.0, 2), (0.0, 0.0, 1)])
def test_a_step_runs_the_model_no_more_than_it_needs(lab, anchor, prior, forwards):
    """Once for x0, once more only where that is compared, and twice more only where it is redrawn."""
    student, judge = lab.build_student("SD3", cfg=1.0), lab.build_judge()
    rng = torch.Generator().manual_seed(0)
    calls = []

    def loop():
        noise = student.noise(3)
        student.model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
        settings = Settings(anchor=anchor, prior=prior)
        one_pass(student, judge.judge, Objective([Question("Is the line thick?")]), settings, rng, noise, noise, 0)

    student.run(loop, beside=[judge.patcher])
    assert len(calls) == forwards


@pytest.mark.parametrize("name", ALL)
def test_redrawn_is_what_a_sampler_of_one_step_makes_of_the_picture(lab, name):
    """With the same little noise, without the LoRA: ComfyUI's own sampling, for models of noise and of flow."""
    import comfy.sample
    import comfy.samplers

    from dual_process.trainers.comfy_student import LITTLE_NOISE

    student = lab.build_student(name, cfg=1.0)
    model, schedules = lab.build_model(name), []
    sampling = model.get_model_object("model_sampling")

    def note_schedule(network, args, kwargs):
        schedules.append(kwargs["transformer_options"]["sample_sigmas"])

    def loop():
        give_lora_a_value(student.lora)
        x0, noise = student.predict(student.noise(3), 0).detach(), student.noise(4)
        hook = student.model.model.diffusion_model.register_forward_pre_hook(note_schedule, with_kwargs=True)
        with student.lora.disabled():
            redrawn = student.redrawn(x0, noise)
        hook.remove()
        assert not redrawn.requires_grad and not torch.equal(redrawn, student.redrawn(x0, noise))
        return *map(student._guider.inner_model.process_latent_out, (x0, redrawn)), noise

    x0, redrawn, noise = student.run(loop, beside=[])
    (sigmas,) = schedules
    none, one = torch.zeros(1), torch.ones(1)
    laid_over = sampling.noise_scaling(sigmas[0], one.clone(), none) / sampling.noise_scaling(
        sigmas[0], none.clone(), one
    )
    assert sigmas[1] == 0 and laid_over.item() == pytest.approx(LITTLE_NOISE * getattr(sampling, "sigma_data", 1))
    positive, sampler = lab.build_conditioning(name), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        sampled = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, positive, positive, x0, disable_pbar=True
        )
    assert not torch.allclose(redrawn, x0, atol=1e-3)
    assert torch.allclose(redrawn, sampled, atol=1e-4 * sampled.abs().max())


def test_redrawn_leaves_what_a_mask_protects(lab):
    """As a draw with that mask does, so that the prior holds the other part of the picture only."""
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    student = lab.build_student("SD3", latent={**lab.build_latent("SD3"), "noise_mask": mask})

    def loop():
        x0 = student.finished(3)
        return (student.redrawn(x0, student.noise(4)) - x0).abs()

    changed = student.run(loop, beside=[])
    left, right = changed[..., :4], changed[..., 4:]
    assert left.max() < 1e-5 and right.mean() > 1e-2


def test_a_prediction_costs_the_same_after_a_draw(lab):
    """CFG++ samplers turn off, in the arguments they are given, ComfyUI's skipping of the negative prompt at cfg 1."""
    import comfy.samplers

    sampler = comfy.samplers.sampler_object("euler_cfg_pp")
    student, rows = lab.build_student("SD3", cfg=1.0, sampler=sampler, vae=lab.LinearVAE(16)), []

    def loop():
        student.draw(3)
        student.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        student.predict(student.noise(3), 0)

    student.run(loop, beside=[])
    assert rows == [1]


def test_misfits_are_refused_before_anything_is_loaded(lab):
    import comfy.samplers

    with pytest.raises(ValueError, match="SAMPLER of the kind Sampler cannot be walked"):
        lab.build_student("SD3", sampler=comfy.samplers.Sampler())
    with pytest.raises(ValueError, match="4 channels.*makes 16"):
        sdxl_vae = lab.build_vae("SDXL")
        from dual_process.trainers.comfy_student import ComfyStudent

        ComfyStudent(lab.build_model("SD3"), sdxl_vae, [lab.build_conditioning("SD3")], None, lab.build_latent("SD3"),
                     torch.tensor([1.0, 0.0]), comfy.samplers.sampler_object("euler"))  # fmt: skip
    with pytest.raises(ValueError, match="decodes video, but SD3 makes pictures. Connect the VAE"):
        lab.build_student("SD3", vae=lab.LinearVAE(16, latent_dim=3))
    for name in ("Wan still", "Qwen-Image"):
        with pytest.raises(ValueError, match="without frames.*, even for one picture. Connect the VAE"):
            lab.build_student(name, vae=lab.build_vae("SD3"))
    with pytest.raises(ValueError, match="no negative"):
        lab.build_student("SD3", negative=None)
    with pytest.raises(ValueError, match="no step"):
        lab.build_student("SD3", sigmas=torch.tensor([0.0]))
    with pytest.raises(ValueError, match="ends at sigma 0.75, .*SplitSigmas"):
        lab.build_student("SD3", sigmas=torch.tensor([1.0, 0.75]))
    with pytest.raises(ValueError, match="uses the negative prompt at cfg 1 too"):
        lab.build_student("SD3", negative=None, cfg=1.0, sampler=comfy.samplers.sampler_object("euler_cfg_pp"))
    lab.build_student("SD3", sigmas=torch.tensor([1.0, 0.5, 0.02]))  # LaplaceScheduler's last one is no 0
    with pytest.raises(ValueError, match="matches the LoRA targets 'nonsense'"):
        lab.build_student("SD3", targets="nonsense")
    with pytest.raises(ValueError, match=r"'\(\[' are not a valid regular expression \(unterminated"):
        lab.build_student("SD3", targets="([")


def test_nothing_of_a_run_waits_for_garbage_collection(lab):
    """On a GPU it would take the room of what comes next in the same workflow."""
    student = lab.build_student("SD3")
    student.run(partial(student.draw, 1), beside=[])
    gone = [weakref.ref(one) for one in (student, student.model, student.lora)]
    gc.disable()
    try:
        del student
        assert [one() for one in gone] == [None] * 3
    finally:
        gc.enable()


def test_pictures_are_redrawn_by_the_prompts_of_the_last_step(lab):
    """Also where no prompt is active at the little noise that is laid over them, and no other prompt is asked then."""
    late, early = ([[t, {**v, **when}] for t, v in lab.build_conditioning("SD3", seed=seed)] for seed, when in (
        (1, {"start_percent": 0.5, "end_percent": 0.8}), (2, {"start_percent": 0.0, "end_percent": 0.5})
    ))  # fmt: skip

    def redrawn(positive):
        student = lab.build_student("SD3", positives=[positive], cfg=1.0, negative=None)

        def loop():
            student.use_prompt(0)
            noise = student.noise(3)
            before = student._guider.conds
            cleaned = student.redrawn(noise * 0.5, student.noise(4))
            assert student._guider.conds is before
            return cleaned

        return student.run(loop, beside=[])

    assert torch.equal(redrawn(late + early), redrawn(lab.build_conditioning("SD3", seed=1)))
