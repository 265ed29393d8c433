"""The trainer."""

import logging
import math
import time
from collections.abc import Callable
from types import SimpleNamespace

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker, is_link
from server import PromptServer
from torch import Tensor

import nodes

from ..trainers.comfy_memory import ManagedJudge
from ..trainers.comfy_student import ComfyStudent
from ..trainers.diffusers_lora import diffusers_names
from ..trainers.dual_process import Run, Settings, train
from ..trainers.guards import became
from ..trainers.looks import CHECK_SEEDS, Looks, percent
from ..trainers.lora_file import TrainedLoRA, new_lora_path
from ..trainers.lora_metadata import metadata
from ..trainers.memory_plan import plan_memory, try_step
from ..trainers.noise_levels import noise_levels
from ..trainers.objective import Objective
from ..trainers.prompt_texts import prompt_texts
from ..trainers.report import Report, smoothed
from ..trainers.self_check import check_gradients
from ..trainers.sheet import contact_sheet
from ..vlm.answers import never_answered
from ..vlm.question import WATCH, Question
from .loaders import BUNDLED_GUIDE_READER, BUNDLED_JUDGE
from .lora import loras_folder, read_lora, write_lora, written_at
from .refusal import check_choices
from .trainer_inputs import AUTOMATIC, NEVER, NEW_LORA, chosen_from_lists, left_out, trainer_inputs
from .types import CATEGORY, LoRAType, LossType, ReportType

log = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5
CURVE_POINTS = 200
CHECKED_PICTURES = 4  # held-out pictures at least
UNFINISHED = "dual_process/unfinished"
UNSAVED = "The LoRA is not saved: connect Save LoRA to keep it."
NOTHING_LEARNED = "no look was better than the first, so the LoRA is what it was before"
NO_ANSWER = (
    "The {} hardly ever answers {} with Yes or No, so its answer says little. Try Ask the Judge, and end the "
    "question with: Answer with Yes or No."
)
SAME_JUDGE = "judge and second_judge are the same model: it cannot disagree with itself. Connect another one, or none."


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
            inputs=trainer_inputs(),
            outputs=[
                LoRAType.Output(display_name="lora", tooltip="Connect to LoRA Apply and Save LoRA."),
                LossType.Output(display_name="history", tooltip="Loss of every step, for Plot Loss Graph."),
                io.Image.Output(display_name="before", tooltip="Pictures of held-out seeds before this training."),
                io.Image.Output(display_name="after", tooltip="The same seeds with it."),
                ReportType.Output(display_name="report", tooltip="What happened, for Run Report."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, judge, questions, objective, self_check, second_judge=None, **inputs):
        values = {"objective": objective, **inputs}
        check_choices(chosen_from_lists(values), values)
        inputs = SimpleNamespace(**{**left_out(), **inputs})
        goal = Objective(questions, objective, inputs.target)
        if second_judge is judge:
            raise ValueError(SAME_JUDGE)
        judges = [judge] if second_judge is None else [judge, second_judge]
        for one in judges:
            one.judge.check(questions)
        student = student_from(inputs)
        settings = settings_from(inputs, student.prompts)
        show = Progress(cls.hidden.unique_id, settings.steps, questions)
        show.warn(student.size_warning())
        for one in judges:
            show.warn(bundled_judge_warning(one.judge.name, student))
        plan = None

        def teach() -> Run:
            nonlocal plan
            if self_check:
                student.turns.taken_if_needed(lambda: check_gradients(student))
            first = student.in_turn(judge)
            second = None if second_judge is None else student.in_turn(second_judge)
            if inputs.checkpointing and inputs.recompute == AUTOMATIC:
                plan = plan_memory(student, first, goal, settings)
            else:
                student.turns.taken_if_needed(lambda: try_step(student, first, goal, settings))
            said = [plan.sentence()] if plan else []
            said += [student.turns.sentence()] if student.takes_turns else []
            show.say(" ".join(said))
            drawn = student.draw(CHECK_SEEDS)
            for which, one in zip(("judge", "second judge"), filter(None, [first, second])):
                if unclear := never_answered(one, drawn, questions):
                    show.warn(NO_ANSWER.format(which, ", ".join(f"'{question.text.strip()}'" for question in unclear)))
            run = train(student, first, goal, settings, show, second)
            show.over = True
            if settings.check_every and run.checks[-1].step:
                show.say("Judging other pictures, by which nothing was chosen ...")
                run.unseen = Looks(student, first, second, goal, settings, run).unseen()
            return run

        def learned(run: Run) -> TrainedLoRA:
            story = metadata(run, goal, settings, [one.judge.name for one in judges], student, prompts, plan, chosen)
            return TrainedLoRA(student.lora.export(), story, diffusers_names(student.model.model))

        asked = cls.hidden.dynprompt.get_node, cls.hidden.unique_id
        prompts, negative = prompt_texts(*asked), prompt_texts(*asked, names=["negative"])
        chosen = choices(inputs, negative, judges)
        try:
            run = student.run(teach, beside=[one.patcher for one in judges])
        except BaseException:  # Cancel is no Exception in newer ComfyUIs
            show.rescue(learned)
            raise
        lora = learned(run)
        saved = is_saved(cls.hidden.dynprompt.get_original_prompt(), cls.hidden.unique_id)
        told = show.end(run, "" if saved or not run.loss else UNSAVED)
        before, after = (c.pictures.movedim(1, -1) for c in (run.checks[0], run.checks[-1]))
        pairs = ui.PreviewImage(torch.cat([before, after], dim=1), cls=cls)
        history = {"loss": run.loss} if run.loss else ExecutionBlocker(None)  # core's plot needs a point
        shown = {**pairs.as_dict(), "text": (told,), "curves": (show.curves(run),) if run.loss else ()}
        return io.NodeOutput(lora, history, before, after, Report(run, lora.metadata), ui=shown)

    @classmethod
    def fingerprint_inputs(cls, continue_from, **_):
        return written_at(continue_from)


def choices(inputs: SimpleNamespace, negative: list[str], judges: list[ManagedJudge]) -> dict[str, str]:
    """What has to be known to do it again and stands nowhere else in the LoRA's header."""
    loaded = {
        f"{which}, {name}": value
        for which, judge in zip(("judge", "second judge"), judges)
        for name, value in judge.choices.items()
    }
    return {
        "sampler": "a connected one" if inputs.sampler else inputs.sampler_name,
        "scheduler": inputs.scheduler if inputs.sigmas is None else "connected sigmas",
        "negative prompt": "; ".join(negative) or "none",
        "targets": inputs.targets or "attention and MLPs",
        "continued from": inputs.continue_from,
        **loaded,
    }


def is_saved(graph: dict[str, dict], trainer: str) -> bool:
    """Whether the LoRA goes into a node that writes it, ours or core's, also through others that hand it on; ``graph``
    is in ComfyUI's API form."""

    def hands_on(number: str, output: int) -> bool:
        """Whether what comes out may still be the LoRA: not once it is on a model."""
        kind = nodes.NODE_CLASS_MAPPINGS.get(graph[number]["class_type"])
        return kind is None or io.Model.io_type not in kind.RETURN_TYPES[output : output + 1]

    fed = {number for number, node in graph.items() if [trainer, 0] in node["inputs"].values()}
    while more := {
        number
        for number, node in graph.items()
        if number not in fed
        and any(is_link(value) and value[0] in fed and hands_on(*value) for value in node["inputs"].values())
    }:
        fed |= more
    return any(graph[number]["class_type"].endswith("SaveLoRA") for number in fed)


def bundled_judge_warning(name: str, student: ComfyStudent) -> str:
    """That a bundled judge is asked about other pictures than those it knows; empty when it is not."""
    if name not in (BUNDLED_JUDGE, BUNDLED_GUIDE_READER) or student.toy:
        return ""
    return f"The {name} knows nothing but the bundled model's landscapes: choose another judge for this model."


def settings_from(inputs: SimpleNamespace, prompts: int) -> Settings:
    """How to train; every prompt is among the held-out pictures, twice at least."""
    batch = inputs.latent["samples"].shape[0]
    return Settings(
        steps=inputs.steps,
        learning_rate=inputs.learning_rate,
        seed=inputs.seed,
        anchor=inputs.anchor,
        judge_noise=inputs.judge_noise,
        check_every=inputs.check_every,
        stop_at=inputs.stop_at,
        check_seeds=max(2 * prompts, math.ceil(CHECKED_PICTURES / batch)),
        learn_at=inputs.learn_at,
        accumulate=inputs.accumulate,
        drift_limit=inputs.drift_limit,
        augment=inputs.augment,
        prior=inputs.prior,
    )


def student_from(inputs: SimpleNamespace) -> ComfyStudent:
    """The connected model with a new LoRA, or the one to continue.

    Raises:
        ValueError: inputs that do not fit together.
    """
    drawn_with = inputs.sampler_name, inputs.scheduler, inputs.sampler, inputs.sigmas
    return ComfyStudent(
        inputs.model,
        inputs.vae,
        [inputs.positive, *(inputs.more_prompts or [])],
        inputs.negative,
        inputs.latent,
        noise_levels(inputs.model, inputs.sampler_steps, *drawn_with),
        inputs.sampler or comfy.samplers.sampler_object(inputs.sampler_name),
        cfg=inputs.cfg,
        rank=inputs.rank,
        alpha=float(inputs.rank),
        seed=inputs.seed,
        targets=inputs.targets,
        checkpointed=inputs.checkpointing and inputs.recompute != NEVER,
        start=None if inputs.continue_from == NEW_LORA else read_lora(inputs.continue_from),
    )


class Progress:
    """Shows a run on the trainer's node: progress bar, live pictures (above the last look's, which are always of the
    same seeds, below what is trained on), one line of text and a ``dual_process.progress`` event ``{node, step, steps,
    loss, scores, curves}`` for the front end.

    All of it is handed to ComfyUI's server, which shrinks and encodes pictures on its own thread.
    """

    def __init__(self, node_id: str, steps: int, questions: list[Question]):
        self.node_id, self.steps, self.questions = node_id, steps, questions
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.shown = 0.0
        self.warned = ""
        self.run: Run | None = None
        self.over = False  # whether all that is left is to look at what came of it

    def __call__(self, run: Run, images: Tensor) -> None:
        self.run, preview, look = run, None, run.checks[-1]
        if time.monotonic() - self.shown > PREVIEW_SECONDS:
            self.shown = time.monotonic()
            preview = ("JPEG", contact_sheet(look.pictures, images), 512)
        step = len(run.loss) + run.skipped
        self.bar.update_absolute(step, self.steps, preview)
        server, scores = PromptServer.instance, run.scores[-1]
        event = {"node": self.node_id, "step": step, "steps": self.steps, "loss": run.loss[-1], "scores": scores}
        server.send_sync("dual_process.progress", {**event, "curves": self.curves(run)}, server.client_id)
        second = f", second judge {percent(look.second)}" if look.second else ""
        held_out = f"held-out seeds after step {look.step}: {percent(look.scores)}{second}"
        server.send_progress_text(
            f"step {step}/{self.steps}: wanted answer {percent(scores)}; {held_out}", self.node_id
        )

    def curves(self, run: Run) -> dict:
        """All that the node's panel draws, so that it may be opened at any time: each question's answers so far."""
        taken = len(run.scores)
        steps = [*range(1, taken, taken // CURVE_POINTS + 1), taken]
        scores = [[answers[n] for answers in run.scores] for n in range(len(self.questions))]
        drawn = [{"text": q.text.strip(), "points": smoothed(s, steps)} for q, s in zip(self.questions, scores)]
        return {"steps": self.steps, "questions": drawn}

    def say(self, text: str) -> None:
        """Show a line on the node until the next one, and log it."""
        if text:
            log.info(text)
            PromptServer.instance.send_progress_text(text, self.node_id)

    def warn(self, text: str) -> None:
        """As ``say``, and once more when the run is over."""
        self.warned = " ".join(filter(None, [self.warned, text]))
        self.say(text)

    def rescue(self, learned: Callable[[Run], TrainedLoRA]) -> None:
        """Save the LoRA of the best look of a run that was cancelled or failed, if an answer had become likelier or the
        run was over."""
        run = self.run
        rose = (now > then for then, now in zip(run.checks[0].scores, run.checks[-1].scores)) if run else ()
        likelier = any(up for question, up in zip(self.questions, rose) if question.role != WATCH)
        if not (likelier or self.over and run and run.checks[-1].step):
            return
        if not self.over:
            run.stopped = f"stopped early, after {len(run.loss)} steps"
        path = new_lora_path(loras_folder(), UNFINISHED)
        try:
            write_lora(learned(run), path)
        except Exception:  # the user has to see why the run ended
            log.exception("The LoRA of the run that stopped early could not be saved")
            return
        name = path.relative_to(loras_folder()).as_posix()
        best = f"LoRA of step {run.checks[-1].step}, the best{'' if self.over else ' so far'}, is saved as {name}"
        changed = became(run.checks[-1].changes, run.checks[0].changes)
        self.say(
            f"{'Stopped after training' if self.over else 'Stopped early'}. The {best}. To go on from it, press R and "
            f"choose it in continue_from. {changed and f'{changed}. '}{self.warned}"
        )

    def end(self, run: Run, reminder: str) -> str:
        """Leave one line on the node, and return it: what it brought on held-out seeds, how many steps it took, why it
        ended, how the pictures changed by it, and what to be reminded of."""
        first, kept = run.checks[0], run.checks[-1]
        brought = f"Held-out seeds: {percent(first.scores)} before, {percent(kept.scores)} after step {kept.step}. "
        if kept is first:
            brought = f"Held-out seeds: {percent(first.scores)}; {NOTHING_LEARNED}. " if run.loss else ""
        second = f". Second judge: {percent(first.second)} before, {percent(kept.second)} after" if kept.second else ""
        ended = f"{run.ended()}{second}"
        sentences = filter(None, [run.proved(), ended, became(kept.changes, first.changes)])
        text = brought + " ".join(filter(None, [*(f"{sentence}." for sentence in sentences), self.warned, reminder]))
        PromptServer.instance.send_progress_text(text, self.node_id)
        return text
