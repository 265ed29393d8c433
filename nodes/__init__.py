"""What a user drags into a graph."""

from comfy_api.latest import ComfyExtension, io

from .guides import (
    BeforeAfterGuide,
    CompositionGuide,
    DepthGuide,
    GuideFromImage,
    HorizonGuide,
    LineWeightGuide,
    PaletteGuide,
)
from .judge import AskJudge, JudgeScore, SeenByJudge
from .loaders import JudgeLoader, TinyTextEncoder
from .lora import ApplyLoRA, SaveLoRA
from .native import native_nodes
from .question import AskQuestion, MorePrompts
from .report import RunReport
from .strength_sheet import StrengthSheet
from .trainer import Trainer


class DualProcessExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            JudgeLoader,
            AskQuestion,
            MorePrompts,
            Trainer,
            ApplyLoRA,
            SaveLoRA,
            RunReport,
            StrengthSheet,
            AskJudge,
            JudgeScore,
            SeenByJudge,
            HorizonGuide,
            PaletteGuide,
            LineWeightGuide,
            DepthGuide,
            CompositionGuide,
            GuideFromImage,
            BeforeAfterGuide,
            TinyTextEncoder,
            *native_nodes(),
        ]
