"""What is put to the judge and to the generator: questions and prompts."""

from comfy_api.latest import io

from ..vlm.question import Question
from .types import CATEGORY, GuideType, PromptsType, QuestionsType


class AskQuestion(io.ComfyNode):
    """One question, or one more at the end of a chain."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessQuestion",
            display_name="Question",
            category=CATEGORY,
            description="A question about the picture and the answer you want. Chain several to teach several things.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="Is the horizon in the upper half of the picture? Answer with Yes or No.",
                    tooltip="What the judge is asked about each picture. Closed questions that say "
                    "'Answer with Yes or No.' work best.",
                ),
                io.String.Input(
                    "answer",
                    default="Yes",
                    tooltip="The answer the pictures should earn. 'No' is as good a goal as 'Yes'.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="How much this question counts beside the others in the chain. 0: it is only watched. Its "
                    "answer is shown and reported, but neither taught nor kept.",
                ),
                QuestionsType.Input("questions", optional=True, tooltip="Questions that come before this one."),
                io.Boolean.Input(
                    "keep",
                    default=False,
                    optional=True,
                    tooltip="On: this is not taught but has to stay as true as it was before training, for example "
                    "'Is this still a photo of a man?'.",
                ),
                GuideType.Input(
                    "guide",
                    optional=True,
                    tooltip="What is drawn over the picture, or shown beside it, when this question is asked.",
                ),
            ],
            outputs=[QuestionsType.Output(display_name="questions", tooltip="All questions of the chain.")],
        )

    @classmethod
    def execute(cls, text, answer, weight, keep=False, questions=None, guide=None):
        return io.NodeOutput([*(questions or []), Question(text, answer, weight, keep, guide)])


class MorePrompts(io.ComfyNode):
    """One more prompt to train on, at the end of a chain."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessMorePrompts",
            display_name="More Prompts",
            category=CATEGORY,
            description="Collects prompts for the trainer. A control learned on several prompts holds on more of them.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="One more prompt to train on."),
                PromptsType.Input("prompts", optional=True, tooltip="Prompts that come before this one."),
            ],
            outputs=[PromptsType.Output(display_name="prompts", tooltip="Connect to the trainer's more_prompts.")],
        )

    @classmethod
    def execute(cls, conditioning, prompts=None):
        return io.NodeOutput([*(prompts or []), conditioning])
