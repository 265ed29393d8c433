"""A training run, told."""

import json
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..trainers.lora_file import file_start
from ..trainers.report import numbers, page, sheet
from ..trainers.sheet import from_image
from .refusal import refusal
from .types import CATEGORY, ReportType


class RunReport(io.ComfyNode):
    """The trainer's report -> an HTML page, a PNG and a JSON file in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessReport",
            display_name="Run Report",
            category=CATEGORY,
            description="Writes what happened in a training run as one HTML page and one PNG: pictures before and "
            "after, curves, what else changed, questions, settings. A JSON file beside them has the numbers.",
            is_output_node=True,
            inputs=[
                ReportType.Input("report", tooltip="From the trainer."),
                io.String.Input(
                    "filename_prefix",
                    default="dual_process/report",
                    tooltip="Folder and beginning of the name inside ComfyUI's output folder; a number is added.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the HTML page lies; open it in a browser.")],
        )

    @classmethod
    def execute(cls, report, filename_prefix):
        output = Path(folder_paths.get_output_directory())
        file_start(output, filename_prefix)
        shown = ui.ImageSaveHelper.get_save_images_ui(from_image(sheet(report)), filename_prefix, cls).as_dict()
        (saved,) = shown["images"]
        path = (output / saved["subfolder"] / saved["filename"]).with_suffix(".html")
        path.write_text(page(report), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(numbers(report), indent=1), encoding="utf-8")
        return io.NodeOutput(str(path), ui={**shown, "text": (f"Saved as {path}",)})

    @classmethod
    def validate_inputs(cls, filename_prefix):
        return refusal(lambda prefix: file_start(Path(folder_paths.get_output_directory()), prefix), filename_prefix)
