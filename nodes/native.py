"""A judge from a CLIP input, where the running ComfyUI core has a vision-language model of its own."""

import importlib.util

from comfy_api.latest import io

from ..trainers.comfy_memory import ManagedJudge, static_clone
from ..vlm.native import NativeJudge
from .types import CATEGORY, JudgeType


class JudgeFromClip(io.ComfyNode):
    """CLIP -> VLM_JUDGE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessJudgeFromClip",
            display_name="Judge from CLIP",
            category=CATEGORY,
            description="Uses a Qwen3-VL that ComfyUI itself loaded as CLIP as the judge.",
            inputs=[io.Clip.Input("clip", tooltip="From Load CLIP, with a Qwen3-VL 4B or 8B file.")],
            outputs=[JudgeType.Output(display_name="judge", tooltip="Connect to a trainer or to Ask the Judge.")],
        )

    @classmethod
    def execute(cls, clip):
        from comfy.text_encoders.qwen3vl import Qwen3VLTEModel

        if not isinstance(clip.cond_stage_model, Qwen3VLTEModel):
            raise ValueError("This CLIP is not a judge: load a Qwen3-VL file with Load CLIP, or use VLM Judge Loader.")
        if clip.is_dynamic():
            patcher, clip = static_clone(clip.patcher), clip.clone()
            clip.patcher = patcher
            clip.cond_stage_model = clip.patcher.model
        return io.NodeOutput(ManagedJudge(NativeJudge(clip), clip.patcher))


def native_nodes() -> list[type[io.ComfyNode]]:
    """The node, where the core has the model."""
    return [JudgeFromClip] if importlib.util.find_spec("comfy.text_encoders.qwen3vl") else []
