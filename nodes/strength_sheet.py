"""One LoRA at many strengths."""

import math

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from comfy_extras.nodes_custom_sampler import SamplerCustom

import nodes

from ..trainers.comfy_student import check_negative
from ..trainers.noise_levels import noise_levels
from ..trainers.sheet import from_image, grid, to_image
from .lora import NOT_CONNECTED, lora_inputs, lora_patches, unlisted, with_patches, written_at
from .refusal import refusal
from .types import CATEGORY


class StrengthSheet(io.ComfyNode):
    """MODEL + LoRA + what a KSampler needs -> the same seeds at several strengths."""

    @classmethod
    def define_schema(cls):
        lora_name, lora = lora_inputs()
        return io.Schema(
            node_id="DualProcessStrengthSheet",
            display_name="Strength Sheet",
            category=CATEGORY,
            description="Draws the same seed with a LoRA at several strengths, side by side: off, as trained, more, "
            "and the other way.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that was trained, without the LoRA."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input("positive", tooltip="The prompt to draw."),
                io.Latent.Input("latent", tooltip="Picture size; each of its batch is a row of the sheet."),
                lora_name,
                io.String.Input(
                    "strengths",
                    default="-1, -0.5, 0, 0.5, 1, 1.5, 2",
                    tooltip="Numbers with commas between them; each is a column. 0 is the model without the LoRA, 1 "
                    "is what was trained.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The noise, the same for all strengths.",
                ),
                io.Int.Input("sampler_steps", default=4, min=1, max=200, tooltip="As the LoRA was trained."),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="As the LoRA was trained.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="As the LoRA was trained.",
                ),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As the LoRA was trained."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed when cfg is not 1 and by CFG++."),
                lora,
                io.Sigmas.Input("sigmas", optional=True, tooltip="Instead of scheduler and sampler_steps."),
                io.Sampler.Input("sampler", optional=True, tooltip="Instead of sampler_name."),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="One picture: strengths across, the batch downwards."),
                io.Image.Output(display_name="pictures", tooltip="The pictures one by one, row after row."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, latent, lora_name, strengths, seed, sampler_steps, sampler_name, scheduler, cfg,
        negative=None, lora=None, sigmas=None, sampler=None,
    ):  # fmt: skip
        drawn_with = sampler or comfy.samplers.sampler_object(sampler_name)
        check_negative(model, drawn_with, negative, cfg)
        levels = noise_levels(model, sampler_steps, sampler_name, scheduler, sampler, sigmas)
        numbers = numbers_in(strengths)
        patches = lora_patches(model, lora_name, lora, "Strength Sheet")
        columns = []
        for strength in numbers:
            controlled = with_patches(model, patches, strength)
            drawn = SamplerCustom.execute(
                controlled, True, seed, cfg, positive, negative or positive, drawn_with, levels, latent
            ).result[0]
            columns.append(nodes.VAEDecode().decode(vae, drawn)[0].cpu())
        rows = torch.stack(columns, dim=1)  # [row, strength, H, W, 3]
        labelled = grid(
            [[to_image(picture.movedim(-1, 0)) for picture in row] for row in rows], [f"{n:g}" for n in numbers]
        )
        sheet = from_image(labelled)
        return io.NodeOutput(sheet, rows.flatten(0, 1), ui=ui.PreviewImage(sheet, cls=cls))

    @classmethod
    def validate_inputs(cls, strengths, lora_name, lora=NOT_CONNECTED):
        listed = unlisted(lora_name, lora)
        return refusal(numbers_in, strengths) if listed is True else listed

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return written_at(lora_name)


def numbers_in(text: str) -> list[float]:
    """The numbers of a text such as "-1, 0, 1.5".

    Raises:
        ValueError: it has something else in it, or nothing.
    """
    numbers = []
    for word in text.split(","):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"'{word.strip()}' is not a number. Write strengths with commas between them: -1, 0, 0.5, 1"
            )
        numbers.append(number)
    return numbers
