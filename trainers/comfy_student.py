"""The student: any MODEL, conditioning and VAE that ComfyUI has loaded, as a differentiable maker of pictures.

There is no per-model code: ComfyUI's guider turns any MODEL with any conditioning (prompts, areas, ControlNets, model
patches, the user's own LoRAs) into a denoised x0, with gradients. The training loop runs as the ``Sampler`` of one
``CFGGuider.sample()`` call, which is where ComfyUI has everything loaded and encoded.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.extra_samplers.uni_pc import sample_unipc, sample_unipc_bh2
from comfy.hooks import EnumHookType
from comfy.k_diffusion.sampling import sample_sa_solver, sample_sa_solver_pece
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy.sd import VAE
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ..vlm.judge import FP16_GRADIENT_SCALE
from ..vlm.memory import out_of_memory
from .checkpointing import (
    DECODER,
    JUDGE,
    Recompute,
    added_out_of_place,
    decoded,
    make_recomputable,
    prepare_for_backward,
)
from .comfy_memory import InTurn, ManagedJudge, Result, TransformersHolder, Turns, gradients, is_dynamic, static_clone
from .control_hints import hints_encoded_apart
from .full_precision import multiplied_in_full
from .lora import LoRA, lora_targets
from .lora_beside import held_beside
from .lora_start import start_from
from .memory_plan import NEED_LESS
from .prompts import single_prompts

KEY = "dual_process"
CONDITIONING_SEED = 0  # of conditionings that hold noise, such as unCLIP's; they are made once, for all draws
MADE_FOR = {"SD15": 512, "SD20": 512}  # px a side that a model is made for, by ComfyUI's class; all others: 1024
TOY = 50_000_000  # numbers in the weights of a diffusion model, below which it is a toy, such as the bundled one
# Activations kept for backward, in units of ComfyUI's estimate for inference. What autograd saved in a decode of SD's
# VAE was 2.6 times ComfyUI 0.33's estimate, of Wan's 2.9 times.
TRAINING_MEMORY = 3
KEPT_OF_LORA = 3  # times its size: AdamW's two moments and the running average
JUDGES = ["judge", "second judge"]
# They predict the next picture and correct it once the model has seen it; where a schedule ends, they leave that out.
PREDICTING = [sample_unipc, sample_unipc_bh2, sample_sa_solver, sample_sa_solver_pece]
LITTLE_NOISE = 0.158  # times a picture's own spread: what is laid over it before it is redrawn


class ComfyStudent:
    """What the loop trains: rolls out, predicts x0, decodes, and owns the LoRA.

    Attributes for the loop: ``steps`` of the schedule, ``prompts`` to choose from, ``prompt`` in use, ``lora``, and
    ``gradient_scale``, by which gradients are to be multiplied on their way through VAE and generator.

    Args:
        model: ComfyUI MODEL; it is cloned, and the weights it shares are bit-identical after ``run``.
        vae: ComfyUI VAE that decodes the model's latents.
        positives: CONDITIONINGs with the prompts to train on; each row of a batched one is a prompt.
        negative: CONDITIONING, or None when ``cfg`` is 1 and nothing else uses it, as CFG++ samplers do.
        latent: ComfyUI LATENT; its batch size is the number of pictures per step.
        sigmas: noise levels of the schedule, falling to 0 or near it; shape [steps + 1].
        sampler: ComfyUI SAMPLER that walks them.
        cfg: classifier-free guidance scale.
        rank, alpha, seed, targets: of the LoRA, see ``lora.LoRA`` and ``lora.lora_targets``.
        checkpointed: recompute every block in backward; least memory, about half as much time again. ``recompute`` may
            change it, block by block, while the student runs.
        start: tensors of a LoRA file to go on from, see ``lora_start.start_from``.
    Raises:
        ValueError: inputs that do not fit together, before anything is loaded.
    """

    def __init__(
        self,
        model: ModelPatcher,
        vae: VAE,
        positives: list[list],
        negative: list | None,
        latent: dict,
        sigmas: Tensor,
        sampler: comfy.samplers.KSAMPLER,
        cfg: float = 1.0,
        rank: int = 16,
        alpha: float = 16.0,
        seed: int = 0,
        targets: str = "",
        checkpointed: bool = True,
        start: dict[str, Tensor] | None = None,
    ):
        check_negative(model, sampler, negative, cfg)
        if len(sigmas) < 2:
            raise ValueError("The schedule has no step. Set sampler_steps to 1 or more.")
        if sigmas[-1] > sigmas[0] / 10:
            raise ValueError(
                f"The schedule ends at sigma {sigmas[-1]:.3g}, so the judge would look at pictures that are not drawn "
                "to the end. Connect sigmas that end at or near 0, not the first half of SplitSigmas."
            )
        if not isinstance(sampler, comfy.samplers.KSAMPLER):
            raise ValueError(
                f"A SAMPLER of the kind {type(sampler).__name__} cannot be walked step by step. Connect one from "
                "KSamplerSelect, or use sampler_name."
            )
        said = [values for conditioning in [*positives, negative or []] for _, values in conditioning]
        boxes = [values["gligen"][1] for values in said if "gligen" in values]
        if any(map(is_dynamic, [*model.model_patches_models(), *boxes])):
            raise ValueError(
                "A patch of the model (a ControlNet of Qwen-Image or Z-Image, GLIGEN boxes) has weights that move "
                "while it runs, through which no right gradient passes. Start ComfyUI with --disable-dynamic-vram, or "
                "take it off."
            )
        if any(_swaps_weights(conditioning) for conditioning in [*positives, negative or []]):
            raise ValueError(
                "A conditioning carries a hook that swaps the model's weights (Create Hook LoRA, Create Hook Model as "
                "LoRA) between prompts, so gradients would pass through the wrong ones. Take it off, and load that "
                "LoRA on the model with Load LoRA instead."
            )
        self.model = static_clone(model)
        self.model.remove_additional_models("multigpu")  # copies on further GPUs, which compute without gradients
        self.vae, self.decoder = vae, static_clone(vae.patcher)
        self.decoder.model.to(vae.vae_dtype)  # ComfyUI reads a clone anew in the file's format
        self.latent_mask, self.noise_indices = latent.get("noise_mask"), latent.get("batch_index")
        prompts = [prompt for positive in positives for prompt in single_prompts(positive)]
        self.conds = {f"prompt {i}": prompt for i, prompt in enumerate(prompts)}
        self.prompts = len(prompts)
        if negative is not None:
            self.conds["negative"] = negative
        self.cfg, self.sigmas, self.sampler, self.recompute = cfg, sigmas, sampler, Recompute(checkpointed)
        self.steps = len(sigmas) - 1
        self._check_vae()
        with gradients():
            fix = comfy.sample.fix_empty_latent_channels
            known = {key: value for key, value in latent.items() if key in inspect.signature(fix).parameters}
            self.latent = fix(self.model, latent["samples"].clone(), **known)
            self.lora = LoRA(lora_targets(self.model.model.diffusion_model, targets), rank, alpha, seed)
            if start is not None:
                start_from(self.lora, start, self.model.model)

    def _check_vae(self) -> None:
        made, maker = self.model.get_model_object("latent_format"), type(self.model.model).__name__
        if self.vae.latent_channels != made.latent_channels:
            raise ValueError(
                f"The VAE decodes latents of {self.vae.latent_channels} channels, but "
                f"{maker} makes {made.latent_channels}. Connect the VAE that belongs to the model."
            )
        if self.vae.latent_dim == 3 and made.latent_dimensions == 2:
            raise ValueError(
                f"The VAE decodes video, but {maker} makes pictures. Connect the VAE that belongs to the model."
            )
        if self.vae.latent_dim == 2 and made.latent_dimensions == 3:
            raise ValueError(
                f"The VAE decodes latents without frames, but those of {maker} have them, even for one picture. "
                "Connect the VAE that belongs to the model."
            )
        probe = torch.tensor([0.25, 0.5, 0.75])
        low, middle, high = self.vae.process_output(probe.clone()).tolist()
        if abs(low + high - 2 * middle) > 1e-5:
            raise ValueError(
                "This VAE does more to its output than rescale it, and gradients cannot pass that. Load another one."
            )
        self._gain = (high - low) / 0.5
        self._offset = middle - self._gain * 0.5

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures, px."""
        scale = self.vae.spacial_compression_decode()
        return self.latent.shape[-2] * scale, self.latent.shape[-1] * scale

    @property
    def toy(self) -> bool:
        """Whether the model is much smaller than any that people draw with."""
        return sum(weight.numel() for weight in self.model.model.diffusion_model.parameters()) < TOY

    def size_warning(self) -> str:
        """What training on pictures much smaller than the model is made for does; empty when they are not."""
        height, width = self.size
        made_for = MADE_FOR.get(type(self.model.model.model_config).__name__, 1024)
        if self.toy or height * width >= made_for**2 / 4:
            return ""
        return (
            f"Training at {width}x{height}, while most models of this kind are made for about {made_for}x{made_for}: "
            "lighter and faster, but composition and line weight are learned at this size. Look at pictures in full "
            "size; if the control is weaker there, continue there from the saved LoRA."
        )

    def run(self, loop: Callable[[], Result], beside: list[ModelPatcher]) -> Result:
        """Run ``loop`` with everything loaded; whatever happens in it, the user's model is as it was afterwards.

        Args:
            beside: the judge, or both, to keep on the device together with model and VAE or to take turns with them
                (``in_turn``).
        """
        patched = self.model
        # Compiled code is of the model without LoRA, and of the user's copy of it where ours has weights of its own.
        patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        options = patched.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = lambda f, *args, **kwargs: attention_pytorch(*args, **kwargs)

        def load(executor, model, noise_shape, conds, model_options=None, **kwargs):
            extra, _ = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
            extra += comfy.sampler_helpers.get_additional_models_from_model_options(model_options)
            extra += model.get_nested_additional_models() + model.model_patches_models()
            memory, _ = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
            decode = self.vae.memory_used_decode(noise_shape, self.vae.vae_dtype) * noise_shape[0]  # it is for one
            groups = {"model with VAE": [model, self.decoder, *extra], **{n: [p] for n, p in zip(JUDGES, beside)}}
            self.turns = Turns(groups, int((memory + decode) * TRAINING_MEMORY), int(max(memory, decode)))
            stack.enter_context(self.turns)
            self._all_conds = conds
            return model.model, self._conds_of_a_draw(0), extra

        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, load)
        # ComfyUI injects and ejects in one order. Others replace forwards too, so ours goes in last and out first.
        others = patched.injections
        put_in = PatcherInjection(inject=lambda p: self.lora.inject(p.model.diffusion_model), eject=lambda p: None)
        take_out = PatcherInjection(inject=lambda p: None, eject=lambda p: self.lora.eject())
        patched.injections = {f"{KEY} out": [take_out], **others, KEY: [put_in]}
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_cfg(self.cfg)
        with ExitStack() as stack:
            stack.callback(self._let_go)
            stack.enter_context(gradients())
            stack.enter_context(multiplied_in_full(patched.model))
            stack.enter_context(held_beside(patched))
            stack.callback(setattr, patched, "injections", others)
            stack.callback(patched.eject_model)
            stack.callback(patched.remove_wrappers_with_key, WrappersMP.PREPARE_SAMPLING, KEY)
            self.lora.to(patched.load_device)
            stack.enter_context(hints_encoded_apart(self.conds, lambda: self.turns.bring_back()))
            guider.inner_set_conds(_normal_tensors(self.conds))
            noise = torch.zeros_like(self.latent)
            stack.enter_context(make_recomputable(self.decoder.model, DECODER, self.recompute))
            for patcher in beside:
                if not isinstance(patcher.model, TransformersHolder):
                    stack.enter_context(added_out_of_place(patcher.model))
                stack.enter_context(make_recomputable(patcher.model, JUDGE, self.recompute))
            sampler = _Loop(self, loop)
            guider.sample(noise, self.latent, sampler, self.sigmas.clone(), self.latent_mask, seed=CONDITIONING_SEED)
        return sampler.result

    def _let_go(self) -> None:
        """Drop what a run had from ComfyUI, and what leads back here, so that nothing waits for garbage collection on
        the device."""
        self._guider = self._denoiser = self._extra_args = self._conds = self._all_conds = self._latent = None

    def _conds_of_a_draw(self, prompt: int) -> dict[str, list]:
        """What a KSampler would be given. Prompts are never given together: ComfyUI hands areas, ControlNets and GLIGEN
        boxes on from each cond to the others."""
        return {
            "positive" if name == f"prompt {prompt}" else name: conds
            for name, conds in self._all_conds.items()
            if name in (f"prompt {prompt}", "negative")
        }

    # What the loop may call, only while ``run`` is running it.

    def use_prompt(self, index: int) -> None:
        """Draw with prompt ``index`` (0 <= index < prompts) from now on."""
        self.prompt, self._guider.conds = index, self._conds[index]

    def noise(self, seed: int) -> Tensor:
        """Unit Gaussian noise in the latent's shape, the same that KSampler draws for this seed."""
        self._extra_args["seed"] = seed  # ancestral samplers draw their own noise from it
        return comfy.sample.prepare_noise(self._latent, seed, self.noise_indices).to(self._latent.device)

    def in_turn(self, judge: ManagedJudge) -> InTurn:
        """The judge for the loop, one of those beside: where they take turns, it comes to the device as it is asked."""
        return InTurn(judge, self.turns)

    @property
    def takes_turns(self) -> bool:
        """Whether model and judge are on the device one after the other, so that no graph outlives a look."""
        return self.turns.apart

    def shortage(self) -> str:
        """That memory does not suffice, and what helps, for people."""
        kept = not self.recompute.on or self.recompute.kept
        first = " Have everything recomputed (checkpointing on, 'recompute' on always)." if kept else ""
        return f"{self.turns.shortage()}{first} {NEED_LESS}"

    def free_memory(self, wanted: float = 0) -> int:
        """Bytes that are free for activations on the device that computes, after evicting models that take no part if
        ``wanted`` bytes were not. ``kept_bytes`` are no longer free."""
        self.turns.make_room(wanted + self.kept_bytes)
        return self.turns.free() - self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """What the first step makes and training keeps from then on, beside the LoRA itself."""
        return KEPT_OF_LORA * sum(parameter.nbytes for parameter in self.lora.parameters())

    @torch.no_grad()
    def roll(self, noise: Tensor, k: int) -> Tensor:
        """x_σk: the schedule walked from pure noise to step ``k`` (0 <= k <= steps), LoRA on, without gradients.

        Samplers that are ``PREDICTING`` walk all of it, until they show the model a picture at σk.
        """
        self.turns.need(self.model)
        self._denoiser.noise = noise
        model_sampling = self._guider.inner_model.model_sampling
        x = model_sampling.noise_scaling(self._sigmas[0], noise, self._latent, self._full_denoise)
        if k == 0:
            return x
        own_args = dict(self._extra_args)  # CFG++ samplers leave a function in them that calls for the negative prompt
        walk = {"extra_args": own_args, "callback": None, "disable": True, **self.sampler.extra_options}
        sample = self.sampler.sampler_function
        if k == self.steps or sample not in PREDICTING:
            return sample(self._denoiser, x, self._sigmas[: k + 1], **walk)
        try:
            sample(_Until(self._denoiser, self._sigmas[k]), x, self._sigmas.clone(), **walk)
        except _Shown as shown:
            return shown.x

    @torch.no_grad()
    def noised(self, x: Tensor, noise: Tensor, k: int) -> Tensor:
        """``x``, a latent rolled to the end of the schedule, with the noise of step ``k`` laid over it: x_σk again."""
        model_sampling = self._guider.inner_model.model_sampling
        x0 = model_sampling.inverse_noise_scaling(self._sigmas[-1], x)
        self._denoiser.noise = noise
        return model_sampling.noise_scaling(self._sigmas[k], noise.clone(), x0, False)

    def predict(self, x: Tensor, k: int) -> Tensor:
        """x0 in the model's latent space as predicted from ``x`` at σk (paper: the one-step denoised estimate).

        What patches draw at random (HyperTile, ToMe), they draw again where the same is predicted twice, as for anchor
        and prior.

        Raises:
            RuntimeError: a patch on the MODEL holds tensors that autograd refuses.
        """
        return self._denoised(x, self._sigmas[k])

    @torch.no_grad()
    def redrawn(self, x0: Tensor, noise: Tensor) -> Tensor:
        """``x0`` with a little of ``noise`` laid over it and denoised, as by a sampler of that one step, by the prompts
        of the last step: of what does not look like the model's own pictures (stains, false lines), a part is gone
        then."""
        sigma, options = self._redrawing[0], self._extra_args["model_options"]
        x = self._guider.inner_model.model_sampling.noise_scaling(sigma, noise.clone(), x0, False)
        self._denoiser.noise = noise
        # some patches look up the step in the schedule by its sigma
        one_step = {**options["transformer_options"], "sample_sigmas": self._redrawing}
        conds = self._guider.conds
        self._guider.conds = _active_at(self._sigmas[-2].item(), conds)
        try:
            return self._denoised(x, sigma, model_options={**options, "transformer_options": one_step})
        finally:
            self._guider.conds = conds

    def _denoised(self, x: Tensor, sigma: Tensor, **other_args) -> Tensor:
        self.turns.need(self.model)
        try:
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                return self._denoiser(x, sigma.expand(x.shape[0]), **{**self._extra_args, **other_args})
        except RuntimeError as error:
            if "Inference tensors cannot be saved" not in str(error):
                raise
            raise RuntimeError(
                f"A patch on the MODEL ({_outside_torch(error)}) holds tensors that no gradient passes, for it is made "
                "for drawing only. Take that node off the model for the training."
            ) from error

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of latents, 0..1 by the VAE's own mapping but not clamped, so no gradient dies.

        Frames of a video latent are laid out along the batch.
        """
        self.turns.need(self.decoder)
        latent = self._guider.inner_model.process_latent_out(x0)
        latent = latent.to(self.vae.device, self.vae.vae_dtype)
        if latent.ndim == 4 and latent.device.type == "cpu":
            latent = latent.contiguous(memory_format=torch.channels_last)  # oneDNN convolves a quarter faster this way
        pixels = decoded(self.decoder.model.decode, latent, self.recompute).float()
        if pixels.ndim == 5:
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        return pixels * self._gain + self._offset

    @torch.no_grad()
    def finished(self, seed: int, prompt: int = 0) -> Tensor:
        """x0 of finished pictures, in the model's latent space: what KSampler would draw for this seed."""
        self.use_prompt(prompt)
        x = self.roll(self.noise(seed), self.steps)
        return self._guider.inner_model.model_sampling.inverse_noise_scaling(self._sigmas[-1], x)

    @torch.no_grad()
    def draw(self, seed: int, prompt: int = 0) -> Tensor:
        """Finished pictures [B, 3, H, W], clamped to 0..1: what KSampler and VAE Decode would show for this seed."""
        return self.decode(self.finished(seed, prompt)).clamp(0, 1)


class _Shown(Exception):
    def __init__(self, x: Tensor):
        self.x = x


class _Until:
    """A denoiser that raises ``_Shown`` with x when it is shown a picture at ``sigma``."""

    def __init__(self, denoiser, sigma: Tensor):
        self.denoiser, self.sigma = denoiser, sigma

    def __getattr__(self, name: str):
        return getattr(self.denoiser, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        if sigma.flatten()[0] <= self.sigma * 1.0001:  # which samplers convert there and back
            raise _Shown(x)
        return self.denoiser(x, sigma, **kwargs)


class _Loop(comfy.samplers.Sampler):
    """The ``Sampler`` that, instead of sampling, gives the student its working parts and runs the training loop."""

    def __init__(self, student: ComfyStudent, loop: Callable[[], None]):
        self.student, self.loop = student, loop

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        student = self.student
        student._guider, student._sigmas, student._latent = model_wrap, sigmas, latent_image
        student._extra_args = {**extra_args, "denoise_mask": denoise_mask}
        student._denoiser = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        student._denoiser.latent_image = latent_image
        little = _sigma_of(LITTLE_NOISE, model_wrap.inner_model.model_sampling)
        student._redrawing = sigmas.new_tensor([little, 0.0])  # a schedule of one step
        student._full_denoise = student.sampler.max_denoise(model_wrap, sigmas)  # reads from the device
        student._conds = [
            comfy.samplers.process_conds(
                model_wrap.inner_model, noise, student._conds_of_a_draw(prompt), noise.device, latent_image,
                denoise_mask, extra_args["seed"], latent_shapes=[noise.shape],
            )
            for prompt in range(student.prompts)
        ]  # fmt: skip
        in_fp16 = _computes_in_fp16(model_wrap.inner_model) or student.vae.vae_dtype == torch.float16
        student.gradient_scale = FP16_GRADIENT_SCALE if in_fp16 else 1.0
        patches = [patch.model for patch in student.model.model_patches_models()]
        with prepare_for_backward(model_wrap.inner_model.diffusion_model, student.recompute, patches):
            try:
                self.result = self.loop()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise torch.OutOfMemoryError(f"{student.shortage()} ({error})") from error
        model_wrap.conds = student._all_conds  # of which the ControlNets are put away
        return latent_image


def _sigma_of(noise: float, model_sampling) -> float:
    """The sigma at which noise is so many times as strong as a picture."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):  # sigma * scale * noise + (1 - sigma) * picture
        return noise / (getattr(model_sampling, "noise_scale", 1.0) + noise)
    return noise * model_sampling.sigma_data


def _active_at(sigma: float, conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Those of a draw's conds whose range of steps has ``sigma`` in it, for steps of any sigma."""
    start, end = "timestep_start", "timestep_end"  # ComfyUI's, in sigmas
    return {
        name: [
            {key: value for key, value in cond.items() if key not in (start, end)}
            for cond in several
            if cond.get(end, 0.0) <= sigma <= cond.get(start, math.inf)
        ]
        for name, several in conds.items()
    }


def _swaps_weights(conditioning: list) -> bool:
    return any(values["hooks"].get_type(EnumHookType.Weight) for _, values in conditioning if "hooks" in values)


def check_negative(model: ModelPatcher, sampler, negative: list | None, cfg: float) -> None:
    """Raises ValueError if pictures depend on a negative prompt, at cfg 1 too, and none is connected."""
    if negative is not None:
        return
    if cfg != 1.0:
        raise ValueError(f"cfg is {cfg} but no negative conditioning is connected. Connect one, or set cfg to 1.")
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    if "cfg_pp" in name or "euler_pp" in name or model.model_options.get("disable_cfg1_optimization", False):
        raise ValueError(
            "This sampler, or a patch of the model's guidance, uses the negative prompt at cfg 1 too (as CFG++ does), "
            "but none is connected. Connect one."
        )


def _outside_torch(error: Exception) -> str:
    """The function of ComfyUI or of a node pack in which torch raised ``error``, as 'file.py, function'."""
    called = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in Path(f.filename).parts]
    return f"{Path(called[-1].filename).name}, {called[-1].name}"


def _computes_in_fp16(model) -> bool:
    return (model.manual_cast_dtype or model.get_dtype()) == torch.float16


def _normal_tensors(value):
    """Copies of all tensors in nested lists and dicts: those that come in from other nodes are inference tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_normal_tensors(v) for v in value)
    if isinstance(value, dict):
        return {k: _normal_tensors(v) for k, v in value.items()}
    return value
