"""Taught on eight prompts, asked on eight others: does a control hold where it was not trained?

`python3 dev.py bench prompts --json FILE` teaches the bundled student a high horizon on prompts that say nothing about
the horizon, and lets the oracle measure it on prompts and seeds that training never saw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path

import torch

from dual_process.demo.comfyui import PACK, use_comfyui
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS
from dual_process.tiny.scenes import prompt_for
from dual_process.trainers.dual_process import EARLY_STEPS, Settings, train
from dual_process.trainers.objective import Objective
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question

PROMPTS, SEEDS, FIRST_SEED = 8, 8, 1_000_000_000


def prompts() -> tuple[list[str], list[str]]:
    """Eight prompts to train on and eight others, each fixing up to three properties but never the horizon."""
    sides = (None, False, True)
    wanted = [
        {name: side for name, side in zip(("palette", "line", "depth"), chosen) if side is not None}
        for chosen in itertools.product(sides, repeat=3)
    ]
    texts = [prompt_for(one) for one in wanted]
    random.Random(0).shuffle(texts)
    return texts[:PROMPTS], texts[PROMPTS : 2 * PROMPTS]


def bundled_student(texts: list[str]):
    """The bundled student, drawing as the template does, with these prompts."""
    import comfy.samplers
    import comfy.sd

    import nodes
    from dual_process.tiny.text_encoder import load_tiny_clip
    from dual_process.trainers.comfy_student import ComfyStudent

    models = PACK / "tiny" / "models"
    model, _, vae = comfy.sd.load_checkpoint_guess_config(
        str(models / "dual_process_tiny.safetensors"), output_clip=False
    )[:3]
    clip = load_tiny_clip(models / "dual_process_tiny_text_encoder.safetensors")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    conditionings = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in texts]
    latent = {"samples": torch.zeros(SEEDS, 16, 8, 8)}
    sampler = comfy.samplers.sampler_object("euler")
    return ComfyStudent(model, vae, conditionings, None, latent, sigmas, sampler, rank=8, alpha=8.0)


def share(pictures: torch.Tensor) -> dict[str, float]:
    """How many pictures the oracle finds to have a high horizon, and to be clean, 0..1."""
    pictures = (pictures * 255).round() / 255
    return {
        "oracle": holds(pictures, "horizon", "Yes").float().mean().item(),
        "readable": measure(pictures)["readable"].float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--steps", type=int, default=140)
    arguments = parser.parse_args()
    use_comfyui(Path(tempfile.mkdtemp(prefix="dual_process_")))
    from dual_process.trainers.comfy_memory import ManagedJudge

    trained_on, unseen = prompts()
    judge = ManagedJudge(load_judge(PACK / "tiny" / "judge", dtype=torch.float32))
    objective = Objective([Question(QUESTIONS["horizon"][0]), Question(KEEP_QUESTION)])
    settings = Settings(
        steps=arguments.steps, learning_rate=1e-3, learn_at=EARLY_STEPS, accumulate=2, check_seeds=8, held=0.97
    )
    with torch.inference_mode():
        student = bundled_student(trained_on + unseen)
        student.prompts = PROMPTS  # training draws from the first eight only

        def draw() -> dict[str, dict[str, float]]:
            def of(first: int) -> dict[str, float]:
                return share(torch.cat([student.draw(FIRST_SEED, first + i) for i in range(PROMPTS)]))

            return {"trained prompts": of(0), "unseen prompts": of(PROMPTS)}

        def loop():
            before = draw()
            run = train(student, judge.judge, objective, settings, lambda run, _: print(len(run.loss), run.scores[-1]))
            return before, run, draw()

        before, run, after = student.run(loop, beside=[judge.patcher])
    result = {"trained_on": trained_on, "unseen": unseen, "before": before, "after": after, "steps": len(run.loss)}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
