"""The trainer."""

import math
import time

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..trainers.comfy_student import ComfyStudent
from ..trainers.diffusers_lora import diffusers_names
from ..trainers.dual_process import LEARN_AT, Run, Settings, train
from ..trainers.lora_file import TrainedLoRA
from ..trainers.lora_metadata import metadata
from ..trainers.objective import LIKELIHOOD, MARGIN, Objective
from ..trainers.self_check import check_gradients
from .lora import read_lora
from .types import CATEGORY, JudgeType, LoRAType, LossType, PromptsType, QuestionsType

PREVIEW_SECONDS = 0.5
NEW_LORA = "(a new LoRA)"
CHECKED_PICTURES = 4  # held-out pictures at least


class Trainer(io.ComfyNode):
    """MODEL + VAE + prompt + judge + questions -> LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessTrainer",
            display_name="Dual-Process Trainer",
            category=CATEGORY,
            description="Teaches the connected model a new control from a judge's answers about its own pictures. "
            "No dataset; the model itself is left as it was.",
            inputs=[
                io.Model.Input("model", tooltip="The image model to teach, with the LoRAs and patches it carries."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input("positive", tooltip="The prompt to train on."),
                io.Latent.Input("latent", tooltip="Picture size; its batch size is the pictures per step."),
                JudgeType.Input("judge", tooltip="The vision-language model that looks at the pictures."),
                QuestionsType.Input("questions", tooltip="What the judge is asked, and the answers you want."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed only when cfg is not 1."),
                PromptsType.Input("more_prompts", optional=True, tooltip="Each step draws one of these or positive."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Instead of scheduler and sampler_steps."),
                io.Sampler.Input("sampler", optional=True, tooltip="Instead of sampler_name."),
                io.Int.Input("steps", default=100, min=1, max=10000, tooltip="Training steps at most."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="Higher learns faster and ruins pictures sooner.",
                ),
                io.Int.Input("rank", default=16, min=1, max=512, tooltip="Width of the LoRA. 4 to 16 is plenty."),
                io.Int.Input(
                    "sampler_steps",
                    default=4,
                    min=1,
                    max=200,
                    tooltip="Steps of the sampler you will draw with: 1 to 4 for turbo models, 20 to 50 for others.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The sampler you will draw with.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="The noise schedule you will draw with.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale you will draw with."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31,
                    control_after_generate=False,
                    tooltip="Same seed and inputs, same LoRA (on one machine).",
                ),
                io.Combo.Input(
                    "objective",
                    options=[MARGIN, LIKELIHOOD],
                    tooltip="Answer margin (Yes or No): push until the answer is clearly won, then stop pushing. "
                    "Answer likelihood: the paper's cross-entropy, for any answer.",
                ),
                io.Float.Input(
                    "anchor",
                    default=0.1,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly pictures are held to what the model would draw anyway.",
                ),
                io.Float.Input(
                    "judge_noise",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise laid over pictures before the judge sees them; keeps it from being fooled by "
                    "patterns no person would see.",
                ),
                io.Int.Input(
                    "check_every",
                    default=20,
                    min=0,
                    max=1000,
                    tooltip="Steps between looks at pictures of seeds that are not trained on. The best LoRA by these "
                    "is kept. 0: never look, train all steps.",
                ),
                io.Float.Input(
                    "stop_at",
                    default=0.97,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Training ends when the judge gives the wanted answers with this probability on those "
                    "pictures.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    tooltip="Recompute instead of remember: much less memory, about a third more time.",
                ),
                io.Combo.Input(
                    "learn_at",
                    options=list(LEARN_AT),
                    tooltip="The sampler steps that are learned from. Early steps decide what is where (with few "
                    "sampler steps, best for composition), late ones how it is drawn.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Passes of one batch that make one step: larger batches than fit on the GPU.",
                ),
                io.String.Input(
                    "targets",
                    default="",
                    tooltip="Regular expression for the layers to adapt, for example 'attn'. Empty: attention and MLPs "
                    "of all blocks.",
                ),
                io.Boolean.Input(
                    "self_check",
                    default=True,
                    tooltip="Before the first step, compare gradients with what the model really does. Finds attention "
                    "kernels, patches and loaders that would train wrongly without an error.",
                ),
                io.Combo.Input(
                    "continue_from",
                    options=[NEW_LORA, *folder_paths.get_filename_list("loras")],
                    tooltip="A saved LoRA to train further, of the same rank. A LoRA that is on the model already "
                    "stays as it is, and a second one is learned on top.",
                ),
            ],
            outputs=[
                LoRAType.Output(display_name="lora", tooltip="Connect to LoRA Apply and Save LoRA."),
                LossType.Output(display_name="history", tooltip="Loss of every step, for Plot Loss Graph."),
                io.Image.Output(display_name="before", tooltip="Pictures of held-out seeds before this training."),
                io.Image.Output(display_name="after", tooltip="The same seeds with it."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        latent,
        judge,
        questions,
        steps,
        learning_rate,
        rank,
        sampler_steps,
        sampler_name,
        scheduler,
        cfg,
        seed,
        objective,
        anchor,
        judge_noise,
        check_every,
        stop_at,
        checkpointing,
        learn_at,
        accumulate,
        targets,
        self_check,
        continue_from,
        negative=None,
        more_prompts=None,
        sigmas=None,
        sampler=None,
    ):
        goal = Objective(questions, objective)
        judge.judge.check(questions)
        settings = Settings(
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            anchor=anchor,
            judge_noise=judge_noise,
            check_every=check_every,
            held=stop_at,
            check_seeds=max(2, 1 + len(more_prompts or []), math.ceil(CHECKED_PICTURES / latent["samples"].shape[0])),
            learn_at=learn_at,
            accumulate=accumulate,
        )
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, sampler_steps)
        student = ComfyStudent(
            model,
            vae,
            [positive, *(more_prompts or [])],
            negative,
            latent,
            sigmas,
            sampler or comfy.samplers.sampler_object(sampler_name),
            cfg=cfg,
            rank=rank,
            alpha=float(rank),
            seed=seed,
            targets=targets,
            checkpointed=checkpointing,
            start=None if continue_from == NEW_LORA else read_lora(continue_from),
        )
        show = Progress(cls.hidden.unique_id, settings.steps)

        def teach() -> Run:
            if self_check:
                check_gradients(student)
            return train(student, judge.judge, goal, settings, show)

        run = student.run(teach, beside=[judge.patcher])
        story = metadata(run, goal, settings, judge.judge.name, student)
        lora = TrainedLoRA(student.lora.export(), story, diffusers_names(student.model.model))
        before, after = (c.pictures.movedim(1, -1) for c in (run.checks[0], run.checks[-1]))
        pairs = ui.PreviewImage(torch.cat([before, after], dim=1), cls=cls)
        return io.NodeOutput(lora, {"loss": run.loss}, before, after, ui=pairs)


class Progress:
    """Shows a run on the trainer's node: progress bar, live picture, one line of text and a ``dual_process.progress``
    event ``{node, step, steps, loss, scores}`` for the front end."""

    def __init__(self, node_id: str, steps: int):
        self.node_id, self.steps = node_id, steps
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.shown = 0.0

    def __call__(self, run: Run, images: Tensor) -> None:
        preview = None
        if time.monotonic() - self.shown > PREVIEW_SECONDS:
            self.shown = time.monotonic()
            preview = ("JPEG", contact_sheet(images), 512)
        step = len(run.loss)
        self.bar.update_absolute(step, self.steps, preview)
        server, scores = PromptServer.instance, run.scores[-1]
        event = {"node": self.node_id, "step": step, "steps": self.steps, "loss": run.loss[-1], "scores": scores}
        server.send_sync("dual_process.progress", event, server.client_id)
        answers = ", ".join(f"{score:.0%}" for score in scores)
        server.send_progress_text(f"step {step}/{self.steps}: wanted answer {answers}", self.node_id)


def contact_sheet(images: Tensor, most: int = 4) -> Image.Image:
    """The first pictures of a batch [B, 3, H, W] in 0..1, side by side."""
    row = torch.cat(list(images[:most].clamp(0, 1)), dim=-1)
    return Image.fromarray((row * 255).byte().permute(1, 2, 0).cpu().numpy())
