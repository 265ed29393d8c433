"""What a LoRA file says about itself: to people, to programs that sort LoRAs, and to whoever wants to make it again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from importlib.metadata import version

import comfyui_version
import torch
from comfy.model_base import ModelType

from ..vlm.question import TEACH, Question
from .dual_process import Run, Settings
from .lora_file import VERSION
from .memory_plan import MemoryPlan
from .objective import Objective

COMFYUI = "https://github.com/comfyanonymous/ComfyUI"

# ComfyUI's model class -> ss_base_model_version as kohya's sd-scripts write it, modelspec.architecture by ModelSpec.
BASES = {
    "SD15": ("sd_v1", "stable-diffusion-v1"),
    "SD20": ("sd_v2", "stable-diffusion-v2-512"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SD3": ("sd3", "stable-diffusion-3"),
    "Flux": ("flux1", "flux-1-dev"),
    "FluxSchnell": ("flux1", "flux-1-schnell"),
    "Chroma": ("chroma", "chroma"),
    "Lumina2": ("lumina2", "lumina-2"),
}


def metadata(
    run: Run,
    objective: Objective,
    settings: Settings,
    judges: list[str],
    student,
    prompts: list[str],
    plan: MemoryPlan | None = None,
    choices: dict[str, str] | None = None,
) -> dict[str, str]:
    """The header of a trained LoRA's file: ``modelspec.*``, kohya's ``ss_*``, and the story as ``dual_process``.

    ``save_lora`` adds the file's own name to it.

    Args:
        run: of a student that drew at least one check.
        judges: their names: the one that was trained against, and the second one, if there was one.
        student: the ``ComfyStudent`` that was trained.
        prompts: their texts as far as they are known, see ``prompt_texts.prompt_texts``.
        plan: what decided about recomputation, None where the user did.
        choices: what else the user chose, by name; the story has them as they are.
    """
    adapter = student.lora.adapters[0]
    rank = adapter.A.shape[0]
    model_class = type(student.model.model.model_config).__name__
    base, architecture = BASES.get(model_class, (model_class.lower(), model_class.lower()))
    if model_class == "SD20" and student.model.model.model_type == ModelType.V_PREDICTION:
        base, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    taught = [question for question in objective.questions if question.role == TEACH]
    title = "; ".join(f"{question.text} {question.answer}" for question in taught)
    height, width = run.checks[-1].pictures.shape[-2:]
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": COMFYUI,
        "modelspec.title": title,
        "modelspec.description": f"Learned from a vision language model's answers, without pictures: {title}",
        "modelspec.usage_hint": "No trigger word. Strength 1 is what was trained.",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{width}x{height}",
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),  # the file's update has alpha / rank folded in
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_learning_rate": str(settings.learning_rate),
        "ss_lr_scheduler": "piecewise_constant" if run.rate_falls else "constant",
        "ss_max_grad_norm": str(settings.clip),
        "ss_batch_size_per_device": str(student.latent.shape[0]),
        "ss_gradient_accumulation_steps": str(settings.accumulate),
        "ss_gradient_checkpointing": str(student.recompute.on),
        "ss_max_train_steps": str(settings.steps),
        "ss_steps": str(len(run.loss)),
        "ss_seed": str(settings.seed),
        "ss_resolution": f"({width}, {height})",
        "ss_training_finished_at": str(time.time()),
        "ss_training_comment": title,
        "dual_process": json.dumps(
            _story(run, objective, settings, judges, student, prompts, adapter.scale * rank, plan, choices or {})
        ),
    }


def _story(
    run: Run,
    objective: Objective,
    settings: Settings,
    judges: list[str],
    student,
    prompts: list[str],
    alpha: float,
    plan: MemoryPlan | None,
    choices: dict[str, str],
) -> dict:
    """Everything that is known about how the LoRA came to be. ``prompts`` is their number; ``prompt_texts`` may be
    longer, since some encoders take several texts for one."""
    return {
        "version": VERSION,
        "made_with": {
            "ComfyUI": comfyui_version.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "questions": [_asked(question) for question in objective.questions],
        "objective": objective.kind,
        "target": objective.target,
        "judge": judges[0],
        "second_judge": judges[1] if len(judges) > 1 else None,
        "model": type(student.model.model.model_config).__name__,
        "prompts": student.prompts,
        "prompt_texts": prompts,
        "sampler_steps": student.steps,
        "sigmas": student.sigmas.tolist(),
        "cfg": student.cfg,
        "choices": choices,
        "alpha": alpha,
        "layers": len(student.lora.paths),
        "settings": asdict(settings),
        "recomputed": student.recompute.on,
        "memory_plan": plan and asdict(plan),
        "took_turns": student.takes_turns,
        "steps_done": len(run.loss),
        "kept_step": run.checks[-1].step,
        "steps_skipped": run.skipped,
        "rate_falls": run.rate_falls,
        "stopped": run.stopped,
        "held_out_scores_before": run.checks[0].scores,
        "held_out_scores_after": run.checks[-1].scores,
        "second_judge_scores_before": run.checks[0].second,
        "second_judge_scores_after": run.checks[-1].second,
        "held_out_pictures_changed": run.checks[-1].changes,
        "unseen": [
            {"pictures": len(one.pictures), "scores": one.scores, "second": one.second, "changes": one.changes}
            for one in run.unseen or ()
        ],
    }


def _asked(question: Question) -> dict:
    """A question and how its guide was shown; drawings by their numbers, pictures by their fingerprints."""
    guide = question.guide and question.guide.story()
    return {**asdict(replace(question, guide=None)), "role": question.role, "guide": guide}
