"""Loading judges, and the prompt encoder of the bundled tiny student."""

from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import io

from ..trainers.comfy_memory import ManagedJudge
from ..vlm.loading import discover_judges, load_judge
from .types import CATEGORY, JudgeType

PACK = Path(__file__).parent.parent
BUNDLED_JUDGE = "tiny judge (bundled)"
for kind in ("VLM", "LLM"):
    folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
folder_paths.add_model_folder_path("checkpoints", str(PACK / "tiny" / "models"))


def judges() -> dict[str, Path]:
    """Name -> folder of every judge in models/VLM and models/LLM, and the bundled one."""
    roots = [Path(p) for kind in ("VLM", "LLM") for p in folder_paths.get_folder_paths(kind)]
    return {**discover_judges(roots), BUNDLED_JUDGE: PACK / "tiny" / "judge"}


class JudgeLoader(io.ComfyNode):
    """A folder with a vision-language model -> VLM_JUDGE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessJudgeLoader",
            display_name="VLM Judge Loader",
            category=CATEGORY,
            description="Loads a vision-language model that looks at pictures and answers questions about them.",
            inputs=[
                io.Combo.Input(
                    "judge",
                    options=list(judges()),
                    tooltip="A model folder (config.json, safetensors, tokenizer) inside models/VLM or models/LLM. "
                    "The bundled tiny judge only knows the bundled tiny student's landscapes.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "float32", "bfloat16", "float16"],
                    tooltip="Precision of the judge's weights. auto: as stored; float32 on a CPU.",
                ),
            ],
            outputs=[JudgeType.Output(display_name="judge", tooltip="Connect to a trainer or to Ask the Judge.")],
        )

    @classmethod
    def execute(cls, judge, dtype):
        found = judges()
        if judge not in found:
            raise ValueError(f"There is no judge '{judge}' in models/VLM or models/LLM (any more).")
        on_cpu = mm.is_device_cpu(mm.get_torch_device())
        precision = (torch.float32 if on_cpu else None) if dtype == "auto" else getattr(torch, dtype)
        return io.NodeOutput(ManagedJudge(load_judge(found[judge], dtype=precision)))


class TinyTextEncoder(io.ComfyNode):
    """The prompt encoder of the bundled student."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessTinyTextEncoder",
            display_name="Tiny Prompt Encoder",
            category=CATEGORY,
            description="Prompt encoder of the bundled tiny student (dual_process_tiny.safetensors). "
            "Any other model has its own CLIP.",
            inputs=[],
            outputs=[io.Clip.Output(display_name="clip", tooltip="Connect to CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls):
        from ..tiny.text_encoder import load_tiny_clip

        return io.NodeOutput(load_tiny_clip(PACK / "tiny" / "models" / "dual_process_tiny_text_encoder.safetensors"))
