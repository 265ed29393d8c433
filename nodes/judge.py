"""The judge without training: ask it, or let it sort pictures."""

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..vlm.judge import beside
from ..vlm.overlay import by_guide, shown_with, under
from ..vlm.ranking import rank, score_table
from ..vlm.seen import side_by_side
from .types import CATEGORY, GuideType, JudgeType, QuestionsType

REFERENCE = (
    "Shown to the judge before each picture, for questions that compare: the reference is the first picture, the "
    "picture itself the second. One for all, or one for each. Beside a question with a Before/After Guide, only that "
    "one sees it. Not every model takes two pictures."
)


class AskJudge(io.ComfyNode):
    """IMAGE + question -> the judge's own words."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessAskJudge",
            display_name="Ask the Judge",
            category=CATEGORY,
            description="Asks a vision-language model about pictures and shows its answer and what it saw. "
            "Try a question here before you train on it.",
            is_output_node=True,
            inputs=[
                JudgeType.Input("judge", tooltip="From VLM Judge Loader."),
                io.Image.Input("image", tooltip="One picture or a batch; each picture is asked about separately."),
                io.String.Input(
                    "question",
                    multiline=True,
                    default="Is the horizon in the upper half of the picture? Answer with Yes or No.",
                    tooltip="Any question about the picture.",
                ),
                io.Int.Input(
                    "max_tokens", default=64, min=1, max=1024, tooltip="The answer is cut after this many tokens."
                ),
                io.Image.Input("reference", optional=True, tooltip=REFERENCE),
                GuideType.Input("guide", optional=True, tooltip="What is drawn over the picture, or shown beside it."),
            ],
            outputs=[
                io.String.Output(display_name="answer", tooltip="The judge's answer; one line per picture of a batch."),
                io.Image.Output(
                    display_name="seen",
                    tooltip="The pictures as the judge saw them: after its own resizing, cut into tiles where it does.",
                ),
            ],
        )

    @classmethod
    def execute(cls, judge, image, question, max_tokens, reference=None, guide=None):
        if not question.strip():
            raise ValueError("The question is empty: type what the judge is to be asked.")
        judge.load()
        shown_at_once = [under(guide, one) for one in beside(_channels_first(reference), _channels_first(image))]
        answers, seen = [], []
        progress = comfy.utils.ProgressBar(len(shown_at_once))
        for pictures in shown_at_once:
            mm.throw_exception_if_processing_interrupted()
            answers.append(judge.judge.ask(pictures, question, max_tokens))
            seen.append(judge.judge.seen(pictures).movedim(0, -1).cpu())
            progress.update(1)
        text, shown = "\n".join(answers), torch.stack(seen)
        return io.NodeOutput(text, shown, ui={**ui.PreviewImage(shown, cls=cls).as_dict(), "text": (text,)})


class JudgeScore(io.ComfyNode):
    """IMAGE batch + questions -> the batch sorted best first, and its scores."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessJudgeScore",
            display_name="Judge Score",
            category=CATEGORY,
            description="Scores a batch of pictures by how likely the judge finds the wanted answers, sorts it best "
            "first and picks the best.",
            is_output_node=True,
            inputs=[
                JudgeType.Input("judge", tooltip="From VLM Judge Loader."),
                io.Image.Input("images", tooltip="The pictures to compare, as one batch."),
                QuestionsType.Input("questions", tooltip="What is asked about every picture, and the wanted answers."),
                io.Int.Input("keep", default=1, min=1, max=4096, tooltip="How many of the best pictures to pick."),
                io.Image.Input("reference", optional=True, tooltip=REFERENCE),
            ],
            outputs=[
                io.Image.Output(display_name="best", tooltip="The best pictures, best first."),
                io.Image.Output(display_name="sorted", tooltip="All pictures, best first."),
                io.Float.Output(
                    display_name="best_score", tooltip="Mean probability of the wanted answers on the best picture."
                ),
                io.String.Output(
                    display_name="scores", tooltip="A table: for every picture the mean and the score per question."
                ),
                io.Int.Output(
                    display_name="index",
                    tooltip="Place of the best picture in the batch, counted from 0, as the table and Latent From "
                    "Batch do.",
                ),
            ],
        )

    @classmethod
    def execute(cls, judge, images, questions, keep, reference=None):
        judge.load()
        progress = comfy.utils.ProgressBar(len(images))

        def after_each() -> None:
            mm.throw_exception_if_processing_interrupted()
            progress.update(1)

        order, scores, means = rank(
            judge.judge, _channels_first(images), questions, after_each, _channels_first(reference)
        )
        table = score_table(order, scores, means, questions)
        ordered = images[order]
        best = ordered[:keep]
        shown = {**ui.PreviewImage(best, cls=cls).as_dict(), "text": (table,)}
        first = order[0].item()
        return io.NodeOutput(best, ordered, means[first].item(), table, first, ui=shown)


class SeenByJudge(io.ComfyNode):
    """IMAGE + questions -> what the judge is shown."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessSeenByJudge",
            display_name="Seen by the Judge",
            category=CATEGORY,
            description="Shows pictures as the judge is shown them, under the guides of the questions, before anything "
            "is trained.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures such as the model draws."),
                QuestionsType.Input("questions", tooltip="The questions, with their guides."),
                JudgeType.Input(
                    "judge", optional=True, tooltip="Shows the judge's own resizing and cutting into tiles too."
                ),
                io.Image.Input("reference", optional=True, tooltip=REFERENCE),
            ],
            outputs=[
                io.Image.Output(
                    display_name="seen",
                    is_output_list=True,
                    tooltip="For every picture, and every guide among the questions, what is shown at once.",
                )
            ],
        )

    @classmethod
    def execute(cls, images, questions, judge=None, reference=None):
        look = side_by_side if judge is None else judge.judge.seen
        seen, lines = [], []
        for n, pictures in enumerate(beside(_channels_first(reference), _channels_first(images)), 1):
            for guide, members in by_guide(questions).items():
                at_once = under(guide, shown_with(guide, pictures, questions))
                seen.append(look(at_once).movedim(0, -1).cpu())
                lines.append(f"picture {n}: " + " | ".join(questions[i].text.strip() for i in members))
        shown = {**ui.PreviewImage(seen, cls=cls).as_dict(), "text": ("\n".join(lines),)}
        return io.NodeOutput([picture[None] for picture in seen], ui=shown)


def _channels_first(images: torch.Tensor | None) -> torch.Tensor | None:
    """ComfyUI's ``[B, H, W, C]`` as ``[B, 3, H, W]``; alpha is dropped."""
    return None if images is None else images[..., :3].movedim(-1, 1)
