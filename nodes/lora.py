"""Using and keeping what was learned."""

import logging
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..trainers.diffusers_lora import to_diffusers
from ..trainers.lora_beside import add_beside, split
from ..trainers.lora_file import new_lora_path, save_lora
from ..trainers.lora_fit import fit
from .refusal import check_choices, refusal
from .types import CATEGORY, LoRAType

log = logging.getLogger(__name__)
READABLE = (".safetensors", ".sft")  # ComfyUI lists pickles in models/loras as well
FROM_TRAINER = "(the connected LoRA)"
NOT_CONNECTED = object()
COMFYUI, DIFFUSERS = "ComfyUI", "diffusers"


def loras_folder() -> Path:
    """The folder that new LoRAs are written into."""
    return Path(folder_paths.get_folder_paths("loras")[0]).resolve()


def write_lora(lora: dict[str, Tensor], path: Path) -> None:
    """Save ``lora``, without where it came from if ComfyUI runs with ``--disable-metadata``."""
    save_lora(dict(lora) if args.disable_metadata else lora, path)


def saved_loras() -> list[str]:
    """Names of the files in models/loras that can be read without trusting them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(READABLE)]


def read_lora(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file in models/loras.

    Raises:
        ValueError: it is damaged.
    """
    path = folder_paths.get_full_path_or_raise("loras", name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): download or save it again.") from error


def written_at(name: str | None) -> int | None:
    """When a file in models/loras was written, in ns: for ``fingerprint_inputs``, since ComfyUI's cache knows files by
    their names alone. None if there is no such file, or if another node gives the name, which is then None here."""
    path = None if name is None else folder_paths.get_full_path("loras", name)
    return None if path is None else Path(path).stat().st_mtime_ns


def lora_inputs() -> tuple[io.Input, io.Input]:
    """The two ways to give a node a LoRA: by name, and from a trainer."""
    return (
        io.Combo.Input(
            "lora_name",
            options=[FROM_TRAINER, *saved_loras()],
            tooltip="A saved LoRA, used when no trainer is connected.",
        ),
        LoRAType.Input("lora", optional=True, tooltip="The LoRA of a trainer. It wins over lora_name."),
    )


def unlisted(lora_name: str | None, lora) -> str | bool:
    """What ``validate_inputs`` returns of ``lora_inputs``. ComfyUI itself would refuse a file that is not there even
    where a connected LoRA, which is None here, takes its place."""
    if lora_name in (None, FROM_TRAINER) or lora is None:
        return True
    if not (lora_name.endswith(READABLE) and folder_paths.get_full_path("loras", lora_name)):
        return f"There is no '{lora_name}' in models/loras. Press R if it has just come, or choose another."
    return True


def lora_patches(model, lora_name: str, lora: dict[str, torch.Tensor] | None, node: str) -> dict:
    """ComfyUI's patches that the chosen LoRA holds for ``model``; what fits no layer is counted in the log.

    Args:
        node: what the node is called in messages.
    Raises:
        ValueError: no LoRA is chosen, or nothing of it fits.
    """
    name = "the connected LoRA" if lora is not None else lora_name
    if lora is None:
        if lora_name == FROM_TRAINER:
            raise ValueError(f"{node} has no LoRA: connect a trainer, or choose a file in lora_name.")
        lora = read_lora(lora_name)
    patches, left_over = fit(lora, model.model, name)
    if left_over:
        model_class = type(model.model).__name__
        log.warning(
            "%s: %d of the %d tensors of %s fit no layer of %s, first '%s'; the others are applied.",
            node, len(left_over), len(lora), name, model_class, left_over[0],
        )  # fmt: skip
    return patches


def with_patches(model, patches: dict, strength: float):
    """A clone of MODEL with ``lora_patches`` at a strength (1 is what was trained)."""
    controlled = model.clone()
    beside, inside = split(patches, model.model)
    controlled.add_patches(inside, strength)
    if beside:
        add_beside(controlled, beside, strength)
    return controlled


class ApplyLoRA(io.ComfyNode):
    """MODEL + LoRA -> MODEL."""

    @classmethod
    def define_schema(cls):
        lora_name, lora = lora_inputs()
        return io.Schema(
            node_id="DualProcessApplyLoRA",
            display_name="LoRA Apply",
            category=CATEGORY,
            description="Adds a learned control to a model: the trainer's LoRA, or a saved one.",
            inputs=[
                io.Model.Input("model", tooltip="The model to control; the one that was trained, or a relative."),
                lora_name,
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is what was trained; less is subtler, 0 is off, below 0 is the opposite.",
                ),
                lora,
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the control.")],
        )

    @classmethod
    def execute(cls, model, lora_name, strength, lora=None):
        return io.NodeOutput(with_patches(model, lora_patches(model, lora_name, lora, "LoRA Apply"), strength))

    @classmethod
    def validate_inputs(cls, lora_name, lora=NOT_CONNECTED):
        return unlisted(lora_name, lora)

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return written_at(lora_name)


class SaveLoRA(io.ComfyNode):
    """LoRA -> a new file in models/loras."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessSaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Writes a LoRA with its questions and scores into a new file in models/loras.",
            inputs=[
                LoRAType.Input("lora", tooltip="The LoRA of a trainer."),
                io.String.Input(
                    "filename_prefix",
                    default="dual_process/control",
                    tooltip="Folder and beginning of the name inside models/loras; a number is added.",
                ),
                io.Combo.Input(
                    "format",
                    options=[COMFYUI, DIFFUSERS],
                    default=COMFYUI,
                    optional=True,
                    tooltip="ComfyUI for use in ComfyUI; diffusers for load_lora_weights of a diffusers pipeline.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The name LoRA loaders list it under.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, filename_prefix, format=COMFYUI):
        root = loras_folder()
        path = new_lora_path(root, filename_prefix)
        name = path.relative_to(root).as_posix()
        try:
            check_choices(cls.define_schema().inputs, {"format": format})
            written = to_diffusers(lora) if format == DIFFUSERS else lora
        except ValueError as error:
            write_lora(lora, path)  # hours of training may be in it, and a file in the other format is worth them
            raise ValueError(f"{error} So that nothing is lost, it was saved in ComfyUI's format as {name}.") from error
        write_lora(written, path)
        ups = [tensor for key, tensor in lora.items() if key.endswith(".lora_B.weight")]
        blank = bool(ups) and not any(map(torch.any, ups))
        said = ". It changes nothing: nothing was learned" if blank else ""
        return io.NodeOutput(name, ui={"text": [f"Saved as {name}{said}"]})

    @classmethod
    def validate_inputs(cls, filename_prefix):
        return refusal(lambda prefix: new_lora_path(loras_folder(), prefix), filename_prefix)
