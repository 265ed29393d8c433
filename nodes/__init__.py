"""What a user drags into a graph."""

from comfy_api.latest import ComfyExtension, io

from .judge import AskJudge, JudgeScore
from .loaders import JudgeLoader, TinyTextEncoder
from .lora import ApplyLoRA, SaveLoRA
from .native import native_nodes
from .question import AskQuestion, MorePrompts
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
            AskJudge,
            JudgeScore,
            TinyTextEncoder,
            *native_nodes(),
        ]
