"""The bundled student and judge as a laboratory: teach, draw seeds that were not trained on, measure the pixels."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from dual_process.demo.comfyui import PACK, use_comfyui
from dual_process.demo.lessons import TINY, TINY_COLOURS, TINY_PROMPT
from dual_process.demo.measure import share
from dual_process.tiny.oracles import holds, measure
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS
from dual_process.tiny.scenes import SIDE
from dual_process.trainers.dual_process import Run, Settings, train
from dual_process.trainers.guards import changes
from dual_process.trainers.objective import MARGIN, Objective
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question

BATCH, FIRST_SEED = 16, 1_000_000_000
HELD_OUT, FEW = 256, 64  # pictures a row is measured on: of 64, one is 1.6 %
RANK = TINY.training["rank"]
TEMPLATE = Settings(**{name: value for name, value in TINY.training.items() if name != "rank"})
COLOURS = replace(TEMPLATE, **TINY_COLOURS)
TEMPLATES = {"horizon": TEMPLATE, "palette": COLOURS, "line": TEMPLATE, "depth": TEMPLATE}


@dataclass
class Lesson:
    """What came of a training: the run, the LoRA's file tensors, held-out pictures [N, 3, H, W] before and after."""

    run: Run
    lora: dict[str, Tensor]
    before: Tensor
    after: Tensor
    seconds: float


class Laboratory:
    """ComfyUI in this process, with the bundled models or others in their place.

    Args:
        checkpoint: file with model, text encoder and VAE, as Load Checkpoint takes it; the bundled student when None.
        judge: folder of the judge.
    """

    def __init__(self, checkpoint: Path | None = None, judge: Path = PACK / "tiny" / "judge"):
        use_comfyui(Path(tempfile.mkdtemp(prefix="dual_process_")))
        import comfy.sd

        from dual_process.tiny.text_encoder import load_tiny_clip

        file = checkpoint or PACK / "tiny" / "models" / "dual_process_tiny.safetensors"
        with torch.inference_mode():
            self.model, self.clip, self.vae = comfy.sd.load_checkpoint_guess_config(
                str(file), output_clip=checkpoint is not None
            )[:3]
            if checkpoint is None:
                self.clip = load_tiny_clip()
        self.dtype = torch.float32 if checkpoint is None else None
        self.ask(judge)

    def ask(self, folder: Path) -> None:
        """Let the judge in this folder judge from now on."""
        from dual_process.trainers.comfy_memory import ManagedJudge

        self.judge = ManagedJudge(load_judge(folder, dtype=self.dtype))

    def student(
        self,
        prompts=(TINY_PROMPT,),
        loras=(),
        sampler_steps: int = 4,
        batch: int = BATCH,
        seed: int = 0,
        side: int = SIDE,
        strength: float = 1.0,
    ):
        """A `ComfyStudent` that draws as the template does, its model already carrying ``loras`` (file tensors)."""
        import comfy.samplers
        import comfy.sd

        import nodes
        from dual_process.trainers.comfy_student import ComfyStudent

        model = self.model
        for lora in loras:
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", sampler_steps)
        conditionings = [nodes.CLIPTextEncode().encode(self.clip, text)[0] for text in prompts]
        latent = {"samples": torch.zeros(batch, 16, side // 8, side // 8)}
        sampler = comfy.samplers.sampler_object("euler")
        lora = {"rank": RANK, "alpha": float(RANK), "seed": seed}
        return ComfyStudent(model, self.vae, conditionings, None, latent, sigmas, sampler, **lora)

    def draw(self, loras=(), count: int = HELD_OUT, **how) -> Tensor:
        """Held-out pictures [count, 3, H, W] of the model with these LoRAs; ``how`` as in ``student``."""
        with torch.inference_mode():
            student = self.student(loras=loras, **how)
            return student.run(lambda: held_out(student, count), beside=[])

    def teach(
        self,
        goals: dict[str, str],
        settings: Settings = TEMPLATE,
        keep: bool = True,
        kind: str = MARGIN,
        **how,
    ) -> Lesson:
        """Teach properties with the answers wanted to their questions, for example ``{"horizon": "No"}``; ``how`` as in
        ``student``."""
        questions = [Question(QUESTIONS[about][0], answer) for about, answer in goals.items()]
        if keep:
            questions.append(Question(KEEP_QUESTION, keep=True))
        return self.learn(Objective(questions, kind), settings, **how)

    def learn(self, objective: Objective, settings: Settings, count: int = HELD_OUT, **how) -> Lesson:
        """One training run, with ``count`` held-out pictures before and after; ``how`` as in ``student``."""
        with torch.inference_mode():
            student = self.student(seed=settings.seed, **how)

            def loop() -> Lesson:
                before, start = held_out(student, count), time.monotonic()
                run = train(student, self.judge.judge, objective, settings, lambda *_: None)
                seconds = time.monotonic() - start
                return Lesson(run, student.lora.export(), before, held_out(student, count), seconds)

            return student.run(loop, beside=[self.judge.patcher])


def held_out(student, count: int) -> Tensor:
    """Pictures of the first held-out seeds, as PNG files would hold them."""
    batches = -(-count // student.latent.shape[0])
    pictures = torch.cat([student.draw(FIRST_SEED + i) for i in range(batches)])[:count]
    return (pictures * 255).round() / 255


def measured(before: Tensor, after: Tensor, about: str, answer: str) -> dict:
    """Shares in 0..1 of pictures that have the property and that are clean, and ``changes`` against those base pictures
    that had the property anyway."""
    had = holds(before, about, answer)
    return {
        "before": share(had),
        "oracle": share(holds(after, about, answer)),
        "readable": share(measure(after)["readable"]),
        "changes": changes(before[had], after),
    }


def save_sheet(pictures: Tensor, beside: Path, name: str) -> None:
    """Eight pictures a row, as a PNG beside the results in file ``beside``."""
    save_image(pictures, beside.with_name(f"{beside.stem}_{name.replace(' ', '_')}.png"), nrow=8)
